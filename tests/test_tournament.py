"""Defenses side by side: what is counted, how it is ranked, what is kept, and what the report says."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from test_report import HOSTILE, Tags, assert_needs_nothing
from torch import nn

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.evaluate import tournament as module
from saddlepoint.report import figures
from saddlepoint.report.defenses import defense_results, write_defenses

DIGITS = sp.data.load("digits")
TRAIN, TEST, THREAT = DIGITS.train.take(300), DIGITS.test.take(40), sp.Linf(0.1)
SETTINGS = {"title": "Which one", "data_name": "digits", "config": {"eps": 0.1}}
ASKED = ["pgd-training:steps=3", "feature-squeezing", "distillation", "pgd-training:steps=3+median"]


def make(seed: int) -> sp.Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


def run(model=make, asked=ASKED, **settings) -> sp.Tournament:
    given = {"epochs": 4, "learning_rate": 1e-2, "batch_size": 100} | settings
    return sp.defend(model, TRAIN, TEST, THREAT, asked, "quick", **given)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished tournament, its folder, and what it said on the way."""
    folder, said = tmp_path_factory.mktemp("defend"), []
    return run(folder=folder, on_row=said.append), folder, said


@pytest.fixture(scope="module")
def found(kept):
    return kept[0]


def test_rows_are_measured_as_by_hand(found):
    assert [row.name for row in found.rows] == ["undefended", *ASKED]
    for row in found.rows:
        assert row.clean_accuracy == pytest.approx(float((row.model.predict(TEST.x) == TEST.y).double().mean()))
        assert row.robust_accuracy <= min(row.naive_accuracy, row.adaptive_accuracy, row.clean_accuracy)
        assert row.parameters == 64 * 32 + 32 + 32 * 10 + 10
        plain = sp.attack(row.network, TEST.x, TEST.y, sp.attacks.PGD(steps=20), THREAT).robust
        if row.model is row.network:
            assert torch.equal(row.naive, plain)
    squeezed = found.rows[2]
    assert squeezed.network is found.rows[0].network
    assert isinstance(squeezed.model, sp.Defended)
    assert torch.equal(squeezed.naive, squeezed.evaluation.naive)


def test_examples_of_others_are_only_shown(found):
    source = found.rows[0].network
    points = sp.attack(source, TEST.x, TEST.y, sp.attacks.APGD(steps=20), THREAT, keep="margin").adversarial
    for row in found.rows[1:]:
        assert torch.equal(row.transferred["undefended"], row.model.predict(points) == TEST.y)
    assert list(found.rows[0].transferred) == ["independent"]


def test_passes_of_trainings_are_counted(found):
    plain, trained, _, distilled, joined = (row.training for row in found.rows)
    samples = 4 * len(TRAIN)
    assert plain.backward == samples  # one for each sample and epoch
    assert trained.backward == samples * (1 + 3)
    assert distilled.backward == 2 * samples  # teacher and student
    assert distilled.forward - plain.forward >= 2 * samples  # the teacher's labels too
    assert joined == trained


def test_trainings_begin_alike_and_leave_the_model_alone():
    model = make(0)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    one, two = (run(model, ["bit-depth:bits=2"], independent=False, epochs=1) for _ in range(2))
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, before[name])
    assert one.to_dict()["models"][1]["clean_accuracy"] == two.to_dict()["models"][1]["clean_accuracy"]
    assert torch.equal(one.rows[0].network.net[1].weight, two.rows[0].network.net[1].weight)


def test_from_weights_keeps_the_model_as_the_undefended_one():
    model = sp.train(make(3).net, TRAIN, epochs=2, learning_rate=1e-2).model
    found = run(model, ["pgd-training:steps=2"], from_weights=True, independent=False, epochs=1, learning_rate=1e-6)
    bare, trained = found.rows
    assert torch.equal(bare.network.net[1].weight, model.net[1].weight)
    assert bare.training.passes == 0
    torch.testing.assert_close(trained.network.net[1].weight, model.net[1].weight, atol=1e-4, rtol=0)
    assert not torch.equal(trained.network.net[1].weight, model.net[1].weight)


def test_ranking_and_ties(found):
    shares = [row.robust_accuracy for row in found.ranking]
    assert shares == sorted(shares, reverse=True)
    best = found.winner
    for row in found.ranking[1:]:
        gained, lost = int((best.stands & ~row.stands).sum()), int((row.stands & ~best.stands).sum())
        p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert found.p_value(row) == pytest.approx(p_value)
        assert (row in found.tied) == (p_value > 0.05)
    for row in found.front:
        assert not any(
            (o.clean_accuracy, o.robust_accuracy) != (row.clean_accuracy, row.robust_accuracy)
            and o.clean_accuracy >= row.clean_accuracy
            and o.robust_accuracy >= row.robust_accuracy
            for o in found.rows
        )
    assert best in found.front


def test_transferred_examples_that_break_more_are_doubts(found):
    row = found.rows[1]
    none = torch.zeros(len(TEST), dtype=torch.bool)
    misled = replace(row, transferred={"undefended": none})
    assert misled.robust_accuracy == 0
    assert f"break {int(row.evaluation.stands.sum())} samples" in misled.notes[0]
    told = replace(found, rows=(found.rows[0], misled))
    assert "Doubt the figures of `pgd-training:steps=3`" in told.verdict


def test_the_same_call_reads_what_is_kept(kept, monkeypatch):
    found, folder, said = kept
    assert [len(one.rows) for one in said] == [1, 2, 3, 4, 5]
    assert [one.complete for one in said] == [False] * 4 + [True]
    monkeypatch.setattr(defenses.loop.Loop, "_batch", None)  # nothing is trained again
    again = run(folder=folder)
    for old, new in zip(found.rows, again.rows, strict=True):
        assert old.training == new.training
        assert torch.equal(old.stands, new.stands)
    monkeypatch.undo()
    with pytest.raises(sp.DataError, match="another run"):
        run(folder=folder, epochs=3)


def test_interruption_keeps_what_is_finished(tmp_path, monkeypatch):
    straight = run(asked=["distillation", "pgd-training:steps=3"])
    real, calls = module.evaluate, []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", stops)
    cut = run(asked=["distillation", "pgd-training:steps=3"], folder=tmp_path)
    assert not cut.complete
    assert [row.name for row in cut.rows] == ["undefended", "distillation"]
    assert "not finished" in cut.verdict
    assert "interrupted" in cut.summary()
    whole = run(asked=["distillation", "pgd-training:steps=3"], folder=tmp_path)
    assert whole.complete
    for one, other in zip(straight.rows, whole.rows, strict=True):
        assert torch.equal(one.stands, other.stands)
        assert one.training.backward == other.training.backward


def test_a_training_that_was_cut_off_counts_on(tmp_path, monkeypatch):
    real = defenses.loop.Loop._epoch

    def stops(loop, *args):
        if loop.at.epoch == 2:
            raise KeyboardInterrupt
        return real(loop, *args)

    monkeypatch.setattr(defenses.loop.Loop, "_epoch", stops)
    assert run(asked=[], folder=tmp_path, independent=False).rows == ()
    monkeypatch.setattr(defenses.loop.Loop, "_epoch", real)
    (row,) = run(asked=[], folder=tmp_path, independent=False).rows
    assert row.training.backward == 4 * len(TRAIN)


def test_checkpoints_of_other_beginnings_are_not_taken(tmp_path):
    asked = {"asked": ["pgd-training:steps=1"], "independent": False, "epochs": 1}
    run(make(0), folder=tmp_path, **asked)
    with pytest.raises(sp.InputError, match="weights or layers differ"):
        run(make(0), folder=tmp_path, from_weights=True, **asked)
    shutil.rmtree(tmp_path / "evaluations")
    kept, alone = (run(make(0), folder=folder, from_weights=True, **asked).rows[1].network.net for folder in (tmp_path, None))
    assert torch.equal(kept[1].weight, alone[1].weight)


def test_what_does_not_fit_is_said_and_the_others_go_on(monkeypatch):
    real = defenses.Defense.train

    def diverges(self, *args, **kwargs):
        if self.network == "mixup":
            raise sp.ModelError("the training loss is nan")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(defenses.Defense, "train", diverges)
    found = run(asked=["mixup", "median"], independent=False, epochs=1)
    assert [row.name for row in found.rows] == ["undefended", "median"]
    assert found.failed == (("mixup", "the training loss is nan"),)
    assert "mixup could not be made: the training loss is nan" in found.summary()


@pytest.mark.parametrize(
    "text", ["static-augmentation:attack=fgm", "hat", "ensemble", "smoothing:sigma=0.1,votes=5", "free:repeats=2"]
)
def test_defenses_that_need_more_than_an_objective(text):
    found = run(asked=[text], independent=False, learning_rate=3e-2)
    assert [row.name for row in found.rows] == ["undefended", text]
    assert found.rows[1].clean_accuracy > 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pgd-trainin", "pgd-training"),
        ("jepg", "jpeg"),
        ("trades:bet=1", "bet"),
        ("jpeg:bits=1", "bits"),
        ("trades:5", "KEY=VALUE|key=VALUE|trades:5=VALUE"),
        ("trades+mart", "joins trades and mart"),
        ("trades:beta=-1", "beta"),
        ("distillation:temperature=0", "temperature"),
        ("random-resize:smallest=9", "smallest"),
    ],
)
def test_bad_defenses_are_refused_before_any_training(text, says, monkeypatch):
    monkeypatch.setattr(defenses.Defense, "train", None)
    with pytest.raises(sp.InputError, match=says):
        run(asked=["median", text])


def test_bad_input():
    with pytest.raises(sp.InputError, match="ball of stated size"):
        sp.defend(make, TRAIN, TEST, sp.Minimize("linf"))
    with pytest.raises(sp.InputError, match="defend trains a network"):
        sp.defend(lambda seed: make(seed).net, TRAIN, TEST, THREAT)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(64, 10))

        def forward(self, x):
            return x.flatten(1) @ self.w

    with pytest.raises(sp.InputError, match="--from-weights"):
        sp.defend(sp.Model(Own()), TRAIN, TEST, THREAT)


def test_defense_by_name():
    one = defenses.defense("trades:beta=1,warmup=2.5 + jpeg:quality=50+median")
    assert one.training == ("trades", {"beta": 1, "warmup": 2.5})
    assert one.before == (("jpeg", {"quality": 50}), ("median", {}))
    assert defenses.defense("weight-penalty:strength=1e+3").training == ("weight-penalty", {"strength": 1000.0})
    assert defenses.defense("gaussian-noise:sigma=8/255").before[0][1] == {"sigma": 8 / 255}
    for name in defenses.DEFENSES:
        assert defenses.defense(name).name == name
    model = one.protect(make(0), (1, 8, 8))
    assert [t.name for t in model.transforms] == ["JPEG(quality=50)", "Median(size=2)"]
    squeezing = defenses.defense("feature-squeezing:bits=1,size=3").protect(make(0), (1, 8, 8))
    assert [t.name for t in squeezing.transforms] == ["BitDepth(bits=1)", "Median(size=3)"]


# the report


def test_report(found, tmp_path):
    report = write_defenses(
        found, tmp_path, architecture="sp.zoo.build('digits-cnn')", again="saddlepoint evaluate", **SETTINGS
    )
    page = report.read_text()
    tags = Tags(page)
    assert_needs_nothing(tags)
    for name in ("undefended", *ASKED):
        assert name in page
    assert "<svg" in page
    assert "&lt;svg" not in page
    rows = list(csv.DictReader((tmp_path / "defenses.csv").read_text().splitlines()))
    assert [row["defense"] for row in rows] == [row.name for row in found.ranking]
    assert float(rows[0]["robust"]) == found.winner.robust_accuracy
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["winner"] == found.winner.name
    net = sp.zoo.load_weights(make(9).net, tmp_path / "winner.safetensors")
    assert torch.equal(net[1].weight, found.winner.network.net[1].weight)


def test_the_lines_that_load_the_winner_run(found, tmp_path, monkeypatch, capsys):
    write_defenses(replace(found, rows=(found.rows[4],)), tmp_path, architecture="make(0).net", **SETTINGS)
    from saddlepoint.report.defenses import loading

    code = loading(replace(found, rows=(found.rows[4],)), "make(0).net")
    monkeypatch.chdir(tmp_path)
    names = {"make": make, "x": TEST.x[:5], "y": TEST.y[:5]}
    exec(code, names)  # what the report tells people to run
    assert torch.equal(names["model"].predict(TEST.x), found.rows[4].model.predict(TEST.x))
    assert "Evaluation of 5 samples" in capsys.readouterr().out


def test_schema_is_documented(found):
    document = defense_results(found, **SETTINGS)
    assert defense_results.__doc__ is not None
    for key in document:
        assert key in defense_results.__doc__, key
    for key in document["models"][0]:
        assert key in defense_results.__doc__, key
    json.dumps(document, allow_nan=False)


def test_figure(found):
    left, right = figures.defenses(found).axes
    numbers = [[text.get_text() for text in axes.texts] for axes in (left, right)]
    assert numbers == [["1", "2", "3", "4", "5"]] * 2
    assert [text.xy for text in left.texts] == [(row.clean_accuracy, row.robust_accuracy) for row in found.ranking]
    least = min(row.training.passes for row in found.rows)
    assert [text.xy[0] for text in right.texts] == [row.training.passes / least for row in found.ranking]


def test_hostile_names(found, tmp_path):
    rows = tuple(replace(row, name=f"{HOSTILE}{number}") for number, row in enumerate(found.rows))
    failed = replace(found, rows=rows, failed=((HOSTILE, HOSTILE),), complete=False)
    settings = dict.fromkeys(("title", "data_name", "command", "architecture", "again"), HOSTILE)
    report = write_defenses(failed, tmp_path, config={HOSTILE: HOSTILE}, class_names=[HOSTILE], **settings)
    assert_needs_nothing(Tags(report.read_text()))


def test_a_tournament_without_rows_is_no_report(found, tmp_path):
    with pytest.raises(sp.InputError, match="no defenses"):
        write_defenses(replace(found, rows=()), tmp_path, **SETTINGS)
