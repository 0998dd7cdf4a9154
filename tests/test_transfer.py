"""Who fools whom: in closed form, counted by hand, with every way to craft, and a report that says so."""

from __future__ import annotations

import csv
import html
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import Server, row_by_row
from scipy import stats
from test_report import HOSTILE, Tags, assert_needs_nothing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import saddlepoint as sp
from saddlepoint.cli import main
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.evaluate import transfer as module
from saddlepoint.evaluate.transfer import TransferMatrix, brought_to, transfer_matrix
from saddlepoint.report.transfers import _verdict, transfer_results, write_transfers
from saddlepoint.reproduce import ENTRIES, Context, papernot_blackbox
from saddlepoint.reproduce.papernot_blackbox import SoftNearest

SETTINGS: dict[str, Any] = {"title": "A try", "data_name": "made up", "config": {"eps": 0.1}}


class Side(nn.Module):
    """Class 1 where a weighted sum of the features less 1/2 is positive."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        f = (x - 0.5) @ self.weights
        return torch.stack([-f, f], 1)


def sides(**weights: tuple[float, ...]) -> dict[str, sp.Model]:
    return {name: sp.Model(Side(*w)) for name, w in weights.items()}


MODELS = sides(first=(1.0, 0.0, 0.0), second=(0.0, 1.0, 0.0), both=(1.0, 1.0, 0.0))
X = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0.5).long()  # the first model is always right
EPS = 0.2


@pytest.fixture(scope="module")
def matrix() -> TransferMatrix:
    return transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS))


def test_closed_form(matrix: TransferMatrix) -> None:
    """FGSM moves the features that a linear model looks at by eps, and leaves the others alone."""
    away = X - 0.5
    right = {
        "first": torch.full_like(Y, 1).bool(),
        "second": (away[:, 1] > 0) == (Y == 1),
        "both": (away[:, :2].sum(1) > 0) == (Y == 1),
    }
    back = torch.where(Y == 1, -EPS, EPS)
    for source, moves in (("first", (1, 0)), ("second", (0, 1)), ("both", (1, 1))):
        points = (X[:, :2] + back[:, None] * torch.tensor(moves)).clamp(0, 1) - 0.5
        for target, f in (("first", points[:, 0]), ("second", points[:, 1]), ("both", points.sum(1))):
            counted = right[source] & right[target]
            cell = matrix.cells[source, target]
            assert cell.count == int(counted.sum())
            assert cell.fooled == int((counted & ((f > 0) != (Y == 1))).sum())
            assert cell.rate == matrix.rate(source, target) == pytest.approx(cell.fooled / cell.count)
    assert matrix.rate("first", "second") == 0
    assert 0 < matrix.rate("both", "first") < matrix.rate("both", "both")
    assert matrix.rates.shape == (4, 3)
    assert float(matrix.rates[2, 0]) == matrix.rate("both", "first")


def test_counts_one_by_one() -> None:
    """Every number of a cell against a count over the samples, on networks that err now and then."""
    digits = sp.data.load("digits")
    models = {}
    for seed in (0, 1):
        net = sp.zoo.build("mlp", in_shape=(1, 8, 8), seed=seed)
        sp.train(net, digits.train.take(300), epochs=4, seed=seed)
        models[f"net{seed}"] = sp.Model(net)
    x, y = digits.test.x[:80], digits.test.y[:80]
    found = transfer_matrix(models, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.15), seed=3)
    for source, model in models.items():
        direct = sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.15), seed=3, keep="margin")
        row = found.rows[found.sources.index(source)]
        assert torch.equal(row.points, direct.adversarial)
        for target in models:
            count = fooled = crafted = both = same = 0
            for i in range(len(x)):
                here, there = models[source].predict(x[i : i + 1]), models[target].predict(x[i : i + 1])
                if not (here == there == y[i]):
                    continue
                count += 1
                mine, theirs = (models[name].predict(direct.adversarial[i : i + 1]) for name in (source, target))
                fooled += bool(theirs != y[i])
                crafted += bool(mine != y[i])
                both += bool(mine != y[i] and theirs != y[i])
                same += bool(mine != y[i] and mine == theirs)
            cell = found.cells[source, target]
            assert (cell.count, cell.fooled, cell.crafted, cell.both, cell.same) == (count, fooled, crafted, both, same)
            assert cell.carried == pytest.approx(both / crafted)
            assert cell.matched == pytest.approx(same / both)
            limits = stats.binomtest(fooled, count).proportion_ci(0.95, "exact")
            assert cell.interval == pytest.approx((limits.low, limits.high))
    assert found.rate("net0", "net0") > found.rate("net0", "net1") > found.rate("noise", "net1")


def test_noise_is_random_and_of_the_same_size(matrix: TransferMatrix) -> None:
    (noise,) = matrix.noise
    moved = (noise.points - X).abs()
    inside = (noise.points > 0) & (noise.points < 1)
    torch.testing.assert_close(moved[inside], torch.full_like(moved[inside], EPS))
    assert matrix.cells["noise", "second"].count == int(matrix.right("second").sum())
    assert (matrix.cells["noise", "first"].crafted, matrix.cells["noise", "first"].same) == (0, None)
    again, other = (transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), seed=seed).noise[0].points for seed in (0, 1))
    assert torch.equal(noise.points, again)
    assert not torch.equal(noise.points, other)
    for threat in (sp.L2(0.3), sp.L1(0.3)):
        (row,) = transfer_matrix(MODELS, X, Y, "pgd", threat).noise
        sizes = threat.distance(row.points, X)
        assert bool((sizes <= 0.3).all())
        assert float(sizes.median()) > 0.1
    assert transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), noise=False).noise == ()
    assert transfer_matrix(MODELS, X[:9], Y[:9], "deepfool", sp.Minimize("l2")).noise == ()


def test_other_tasks_have_labels_of_their_own() -> None:
    """A model of the other half of the task is judged by what it should say."""
    models = MODELS | {"not first": sp.Model(Side(-1.0, 0.0, 0.0))}
    found = transfer_matrix(models, X, Y, "fgsm", sp.Linf(EPS), labels={"not first": 1 - Y})
    assert bool(found.right("not first").all())
    cell = found.cells["first", "not first"]
    assert (cell.count, cell.fooled) == (200, found.cells["first", "first"].fooled)
    assert cell.same is None, "classes of different tasks can't be the same"
    assert math.isnan(cell.matched)
    assert found.cells["not first", "first"].fooled == cell.fooled
    with pytest.raises(InputError, match="labels for 'third'"):
        transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), labels={"third": Y})
    with pytest.raises(InputError, match="labels of second"):
        transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), labels={"second": Y + 5})


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_distances(bounds: tuple[float, float] | None, dtype: torch.dtype) -> None:
    x = torch.rand(50, 2, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    points = x + 1e-3 * direction
    points[7] = x[7]
    for length in (0.01, 0.3, 0.9):
        moved = brought_to(length, points, x, bounds)
        sizes = (moved - x).double().flatten(1).norm(dim=1)
        rest = torch.arange(50) != 7
        torch.testing.assert_close(sizes[rest], torch.full_like(sizes[rest], length), rtol=1e-4, atol=0)
        assert bool((sizes <= length).all())
        assert torch.equal(moved[7], x[7])
        free = (moved > 0) & (moved < 1) if bounds else torch.ones_like(moved, dtype=torch.bool)
        ratio = ((moved - x) / (points - x).masked_fill(points == x, 1)).double()
        for row in rest.nonzero()[:, 0].tolist() if dtype is torch.float64 else ():  # such small changes are rounded
            mine = ratio[row][free[row]]
            torch.testing.assert_close(mine, mine.mean().expand_as(mine), rtol=2e-3, atol=0)
    far = brought_to(100.0, points, x, (0.0, 1.0))
    assert bool(((far == 0) | (far == 1))[rest].all()), "as long as the bounds let it be"


def test_equal_distances_compare_directions() -> None:
    """The second model's examples are three times as large as the first one's, and are as large when that is asked for."""
    models = sides(first=(1.0, 0.0, 0.0), tilted=(1.0, 1.0, 1.0))
    smallest = {"threat": sp.Minimize("l2"), "attack": "deepfool"}
    plain = transfer_matrix(models, X, Y, **smallest)
    level = transfer_matrix(models, X, Y, **smallest, equal_distance=0.3)
    for name in models:
        sizes = (level.rows[level.sources.index(name)].points - X).norm(dim=1)[level.right(name)]
        assert float(sizes.max()) <= 0.3
        assert level.length(name) == pytest.approx(0.3, rel=1e-4)
    assert abs(plain.length("first") - plain.length("tilted")) > 0.01
    assert plain.length("first") == pytest.approx(float((plain.rows[0].points - X).norm(dim=1).sort().values[99]))
    assert level.noise[0].how == "a random direction"
    assert level.length("noise") == pytest.approx(0.3, rel=1e-4)
    assert "brought to l2 0.3" in level.setting


def test_models_without_gradients_are_crafted_on_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUERIES", 20)
    scores = sp.Model(MODELS["first"].net, access=sp.Access.SCORES)
    labels = sp.Model(MODELS["first"].net, access=sp.Access.LABELS, num_classes=2)
    x, y = X[:40], Y[:40]

    def crafted(model: sp.Model, **settings: Any) -> TransferMatrix:
        return transfer_matrix({"mine": model, "both": MODELS["both"]}, x, y, "fgsm", sp.Linf(EPS), **settings)

    found = crafted(scores)
    assert found.rows[0].how == "Square"
    assert found.rows[0].result is not None
    assert int(found.rows[0].result.queries.backward.sum()) == 0
    assert found.rate("mine", "mine") > 0.3
    assert "mine: Square" in found.summary()
    with pytest.raises(CapabilityError, match=r"mine grants labels only.*instead=\{'mine'"):
        crafted(labels)
    assert crafted(scores, instead="signnoise").rows[0].how == "SignNoise"
    assert crafted(labels, instead=sp.attacks.SignNoise()).rows[0].how == "SignNoise"
    on_another = crafted(labels, instead={"mine": MODELS["first"]})
    assert on_another.rows[0].how == "FGSM, on another model in its place"
    assert on_another.rate("mine", "mine") == transfer_matrix(MODELS, x, y, "fgsm", sp.Linf(EPS)).rate("first", "first")
    by_name = crafted(labels, instead={"mine": "signnoise", "both": sp.attacks.BIM(steps=2)})
    assert [row.how for row in by_name.crafted] == ["SignNoise", "BIM"]
    given = crafted(labels, instead={"mine": 1 - x})
    assert torch.equal(given.rows[0].points, 1 - x)
    assert given.rate("mine", "mine") == 1
    assert given.rows[0].result is None
    assert given.length("mine") == pytest.approx(float((1 - 2 * x).norm(dim=1).median()))
    with pytest.raises(InputError, match="shape of x"):
        crafted(labels, instead={"mine": x[:3]})
    with pytest.raises(InputError, match="bounds"):
        crafted(labels, instead={"mine": x + 3})
    with pytest.raises(InputError, match="bounds"):
        crafted(labels, instead={"mine": sp.Model(MODELS["first"].net, bounds=None)})


def test_sources_can_be_chosen() -> None:
    found = transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), sources=["both", "both"])
    assert found.sources == ("both", "noise")
    assert found.targets == tuple(MODELS)
    with pytest.raises(UnknownNameError, match="source"):
        transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS), sources=["third"])


def test_targets_must_be_reached() -> None:
    weight = torch.eye(3, dtype=torch.float64)
    net = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(weight)
    models = {"net": sp.Model(net), "shifted": sp.Model(lambda x: net(x.roll(1, 1)).roll(-1, 1))}
    y = X.argmax(1)
    found = transfer_matrix(models, X, y, "pgd", sp.Linf(0.5), goal=sp.Targeted("next"))
    assert found.noise == ()
    for target in models:
        reached = models[target].predict(found.rows[0].points) == (y + 1) % 3
        assert torch.equal(found.rows[0].reached[target], reached)
    assert found.cells["net", "net"].fooled == found.cells["net", "net"].crafted > 0
    same = found.cells["net", "shifted"]
    assert same.same == same.both, "whoever reaches the target says the same"
    for goal in (sp.FalsePositive(), sp.Targeted("all")):
        with pytest.raises(InputError, match="one goal a sample"):
            transfer_matrix(models, X, y, "pgd", sp.Linf(0.5), goal=goal)


def test_what_is_kept_is_the_surest_example() -> None:
    """Not the first success: what a model is only just fooled by fools no other."""
    models = sides(first=(1.0, 0.2, 0.0), second=(1.0, -0.2, 0.0))
    y = models["first"].predict(X)
    surest = transfer_matrix(models, X, y, sp.attacks.BIM(steps=8), sp.Linf(EPS))
    first = transfer_matrix(models, X, y, sp.attacks.BIM(steps=8), sp.Linf(EPS), keep="first")
    assert surest.rate("first", "second") > first.rate("first", "second")


def test_ctrl_c_keeps_finished_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attack, calls = module.run_attack, []

    def stopped(*arguments: Any, **settings: Any) -> sp.AttackResult:
        calls.append(arguments)
        result = attack(*arguments, **settings)
        if len(calls) == 2:
            raise sp.Interrupted(result)
        return result

    monkeypatch.setattr(module, "run_attack", stopped)
    found = transfer_matrix(MODELS, X, Y, "fgsm", sp.Linf(EPS))
    assert found.sources == ("first",)
    assert not found.complete
    page = write_transfers(found, tmp_path, **SETTINGS)
    assert "Not complete" in page.read_text()
    assert "interrupted" in _verdict(found)


def test_bad_arguments() -> None:
    def made(models: Any = MODELS, x: Any = X, threat: Any = None, **settings: Any) -> TransferMatrix:
        return transfer_matrix(models, x, Y, "fgsm", threat or sp.Linf(EPS), **settings)

    for arguments, told in (
        ({"models": {}}, "mapping"),
        ({"models": [MODELS["first"]]}, "mapping"),
        ({"models": {"net": MODELS["first"].net}}, "sp.Model"),
        ({"models": MODELS | {"free": sp.Model(Side(1.0, 0, 0), bounds=None)}}, "bounds differ"),
        ({"x": [X]}, "one tensor"),
        ({"threat": 0.1}, "threat must be"),
        ({"equal_distance": 0.0}, "equal_distance"),
        ({"equal_distance": math.inf}, "equal_distance"),
    ):
        with pytest.raises(InputError, match=told):
            made(**arguments)
    with pytest.raises(CapabilityError, match="ball of stated size"):
        made(threat=sp.Minimize("linf"))


def test_a_pair_that_is_never_right_has_no_rate(tmp_path: Path) -> None:
    models = sides(right=(1.0, 0.0, 0.0), wrong=(-1.0, 0.0, 0.0))
    found = transfer_matrix(models, X, Y, "fgsm", sp.Linf(EPS))
    cell = found.cells["right", "wrong"]
    assert (cell.count, cell.interval) == (0, (0.0, 1.0))
    assert math.isnan(cell.rate)
    assert math.isnan(found.length("wrong"))
    document = json.loads(write_transfers(found, tmp_path, **SETTINGS).with_name("results.json").read_text())
    assert [c["rate"] for c in document["cells"] if c["target"] == "wrong"] == [None] * 3
    assert "no pair" in document["verdict"]


def test_ensembles_fused_in_the_loss() -> None:
    """With loss="logit" the gradient is the mean of the members' own; fused in logits it isn't."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(3)]
    torch.set_rng_state(torch_state)
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (0.5, 0.2, 0.3)
    y = sp.Ensemble([sp.Model(net) for net in nets], "loss", weights).predict(x)
    for goal, sign in ((sp.Untargeted(), 1), (sp.Targeted((y + 1) % 4), -1)):
        classes = y if sign == 1 else (y + 1) % 4
        leaf = x.clone().requires_grad_()
        whole = sum(w * cross_entropy(net(leaf), classes, reduction="sum") for w, net in zip(weights, nets, strict=True))
        (expected,) = torch.autograd.grad(sign * whole, leaf)
        for fuse, equal in (("loss", True), ("logits", False)):
            ensemble = sp.Ensemble([sp.Model(net) for net in nets], fuse, weights)
            moved = sp.attack(
                ensemble, x, y, sp.attacks.FastGradientValue(step_size=1e-3, loss="logit"), sp.Linf(0.5), goal, keep="last"
            )
            moves = moved.adversarial - x
            assert bool((moved.iterations == 1).all())
            assert torch.allclose(moves, 1e-3 * expected, atol=1e-12) == equal
    logits, loss = (sp.Ensemble([sp.Model(net) for net in nets], fuse) for fuse in ("logits", "loss"))
    torch.testing.assert_close(logits.logits(x).log_softmax(1), loss.logits(x).log_softmax(1))
    torch.testing.assert_close(loss.logits(x), sum(net(x).log_softmax(1) for net in nets).detach() / 3)
    with pytest.raises(InputError, match="fuse"):
        sp.Ensemble([sp.Model(nets[0])], "votes")  # type: ignore[arg-type]


# in words and pictures


def test_summary_and_json(matrix: TransferMatrix) -> None:
    lines = matrix.summary().splitlines()
    assert lines[1] == "(FGSM, linf eps 0.2)"
    assert lines[3].split() == ["first", *(f"{100 * matrix.rate('first', t):.1f}%" for t in MODELS)]
    assert "noise: SignNoise within the same ball" in lines[-1]
    document = json.loads(json.dumps(matrix.to_dict()))
    assert [(c["source"], c["target"]) for c in document["cells"]] == [(s, t) for s in matrix.sources for t in MODELS]
    cell = matrix.cells["both", "first"]
    (found,) = (c for c in document["cells"] if (c["source"], c["target"]) == ("both", "first"))
    assert (found["rate"], found["low"], found["high"]) == (cell.rate, *cell.interval)
    assert [m["clean_accuracy"] for m in document["models"]] == [
        pytest.approx(float(matrix.right(name).double().mean())) for name in MODELS
    ]
    assert document["sources"][0]["median_linf"] == pytest.approx(EPS)
    assert "3 targets" in repr(matrix)


def test_report_says_what_was_measured(matrix: TransferMatrix, tmp_path: Path) -> None:
    page = write_transfers(matrix, tmp_path, **SETTINGS, class_names=["low", "high"], command="saddlepoint transfer")
    tags = Tags(page.read_text())
    assert_needs_nothing(tags)
    text = " ".join(tags.text.split())
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["verdict"] == _verdict(matrix)
    across = [matrix.rate(s, t) for s in MODELS for t in MODELS if s != t]
    assert f"On average, {100 * sum(across) / 6:.1f}% of the examples" in text
    for cell in matrix.cells.values():
        assert f"{cell.fooled} of {cell.count}" in text
        assert f"{100 * cell.rate:.0f}%" in page.read_text()
    assert "saddlepoint transfer" in text
    rows = list(csv.DictReader((tmp_path / "transfers.csv").read_text().splitlines()))
    assert [(r["source"], r["target"], int(r["fooled"])) for r in rows] == [
        (c.source, c.target, c.fooled) for c in matrix.cells.values()
    ]
    assert (tmp_path / "figures" / "transfers.png").read_bytes().startswith(b"\x89PNG")
    saved = sorted(path.name for path in (tmp_path / "adversarial").iterdir())
    assert saved == ["both", "first", "second"]
    assert torch.equal(sp.AttackResult.load(tmp_path / "adversarial" / "first").adversarial, matrix.rows[0].points)
    assert page.stat().st_size < 2_000_000


def test_the_heat_map_is_darker_where_more_are_fooled(matrix: TransferMatrix) -> None:
    from saddlepoint.report import figures

    (axes,) = figures.transfers(matrix).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{100 * rate:.0f}%" for rate in matrix.rates.flatten().tolist()]
    cells = [patch for patch in axes.patches if patch.get_fill()]
    order = sorted(range(12), key=lambda i: cells[i].get_alpha())
    rates = matrix.rates.flatten()[order]
    assert torch.equal(rates, rates.sort().values)
    frames = [patch for patch in axes.patches if not patch.get_fill()]
    assert [round(frame.get_x()) for frame in frames] == [0, 1, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*MODELS, "noise"]


def test_schema_is_documented(matrix: TransferMatrix) -> None:
    document = transfer_results(matrix, **SETTINGS)
    assert transfer_results.__doc__ is not None
    for key in document:
        assert key in transfer_results.__doc__, key
    for part in ("models", "sources", "cells"):
        for key in document[part][0]:
            assert key in transfer_results.__doc__, key


def test_hostile_names(matrix: TransferMatrix, tmp_path: Path) -> None:
    names = dict(zip(MODELS, (HOSTILE, "<b>two</b>", "../../x"), strict=True))
    models = {names[name]: model for name, model in MODELS.items()}
    found = transfer_matrix(models, X[:20], Y[:20], "fgsm", sp.Linf(EPS))
    write_transfers(
        found,
        tmp_path / "out",
        title=HOSTILE,
        data_name=HOSTILE,
        config={HOSTILE: HOSTILE},
        command=HOSTILE,
        class_names=[HOSTILE],
    )
    raw = (tmp_path / "out" / "report.html").read_text()
    tags = Tags(raw)
    assert_needs_nothing(tags)
    assert not any(tag == "b" for tag, _ in tags.tags)
    assert html.escape("<script src=http://evil/x.js>", quote=False) in raw
    assert [path for path in tmp_path.rglob("*") if (tmp_path / "out") not in (path, *path.parents)] == []
    assert len(list((tmp_path / "out/adversarial").iterdir())) == 3


def test_other_tasks_and_lengths_are_told(tmp_path: Path) -> None:
    models = MODELS | {"not first": sp.Model(Side(-1.0, 0.0, 0.0))}
    found = transfer_matrix(models, X, Y, "fgsm", sp.Linf(EPS), labels={"not first": 1 - Y}, equal_distance=0.25)
    text = " ".join(Tags(write_transfers(found, tmp_path, **SETTINGS).read_text()).text.split())
    assert "not first told other classes apart, and was judged by these" in text
    assert "until it was 0.25 long in l2" in text


def test_nothing_to_report(matrix: TransferMatrix, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no examples"):
        write_transfers(replace(matrix, rows=()), tmp_path, **SETTINGS)


# the commands

NETS = """
import torch, saddlepoint as sp
digits = sp.data.load("digits")
def trained(seed, width):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    sp.train(net, digits.train.take(300), epochs=3, seed=seed)
    return net
one, two = (trained(seed, 24) for seed in (0, 1))
scores = sp.Model(one, access=sp.Access.SCORES)
labels = sp.Model(one, access=sp.Access.LABELS)
raw = trained(2, 16)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_transfer_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "transfer",
        "--models",
        "nets.py:one, nets.py:two",
        "--models",
        "nets.py:scores",
        "--samples",
        "30",
        "--eps",
        "0.15",
    ]
    status, out, err = call(capsys, *asked, "--instead", "square:steps=10", "--json", "m.json", "--out", "out")
    assert status == 0, err
    assert "crafted on" in out
    document = json.loads((here / "m.json").read_text())
    assert [model["name"] for model in document["models"]] == ["one", "two", "scores"]
    assert [source["how"] for source in document["sources"]] == ["PGD", "PGD", "Square", "SignNoise within the same ball"]
    assert (here / "out" / "report.html").exists()
    status, out, err = call(capsys, "transfer", "--config", "out/config.toml", "--out", "again")
    assert status == 0, err
    same = [json.loads((here / name / "results.json").read_text())["cells"] for name in ("out", "again")]
    assert same[0] == same[1]
    for wrong, told in (
        (["--eps", "0.1,0.2"], "one eps"),
        (["--attack", "nosuch"], "nosuch"),
        (["--equal-distance", "-1"], "equal_distance"),
        (["--models", "nets.py:labels"], "instead="),
    ):
        status, _, err = call(capsys, *asked, *wrong)
        assert status == 2
        assert told in err


def test_substitute_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "substitute",
        "--model",
        "nets.py:labels",
        "--network",
        "nets.py:raw",
        "--seeds",
        "20",
        "--epochs",
        "2",
        "--samples",
        "40",
    ]
    status, out, err = call(capsys, *asked, "--queries", "70", "--out", "out", "--json", "m.json")
    assert status == 0, err
    assert "round 2: 70 queries" in out
    document = json.loads((here / "out" / "substitute.json").read_text())
    assert (document["queries"], document["config"]["seeds"]) == (70, 20)
    found = json.loads((here / "m.json").read_text())
    assert [(c["source"], c["target"]) for c in found["cells"]] == [
        (s, t) for s in ("substitute", "noise") for t in ("substitute", "labels")
    ]
    assert found["samples"] == 40
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    weights = sp.zoo.load_weights(net, here / "out" / "weights.safetensors")
    assert weights[1].weight.shape == (16, 64)
    for wrong, told in (
        (["--seeds", "500"], "leaves nothing to attack"),
        (["--network", "nets.py:scores"], "nn.Module to train"),
        (["--queries", "10"], "pay for the labels"),
    ):
        status, _, err = call(capsys, *asked, *wrong)
        assert status == 2
        assert told in err


def endpoint() -> Server:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Server(lambda rows: {"predictions": row_by_row(net)(rows).argmax(1).tolist()})


def test_a_target_behind_a_url(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["transfer", "--models", "nets.py:one,nets.py:two", "--samples", "20", "--json", "m.json"]
    with endpoint() as server:
        status, out, err = call(capsys, *asked, "--url", server.url, "--gives", "labels", "--out", "out")
        assert status == 0, err
        assert f"{server.computed:,} rows answered" in out
        assert server.computed <= 21 + 20 * 3  # the samples, and the examples of two models and of noise
    document = json.loads((here / "m.json").read_text())
    assert [model["name"] for model in document["models"]] == ["one", "two", "127.0.0.1"]
    assert {cell["source"] for cell in document["cells"]} == {"one", "two", "noise"}
    assert "127.0.0.1" in {cell["target"] for cell in document["cells"]}
    status, _, err = call(capsys, *asked, "--gives", "labels")
    assert status == 2
    assert "--gives is for models behind --url" in err


def test_a_substitute_of_what_is_behind_a_url(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["substitute", "--network", "nets.py:raw", "--seeds", "20", "--epochs", "2", "--samples", "30", "--queries", "70"]
    with endpoint() as server:
        status, out, err = call(capsys, *asked, "--url", server.url, "--gives", "labels", "--out", "out", "--json", "m.json")
        assert status == 0, err
        assert "70 queries" in out
        assert f"{server.computed:,} rows answered" in out
    found = json.loads((here / "m.json").read_text())
    assert ("substitute", "127.0.0.1") in {(cell["source"], cell["target"]) for cell in found["cells"]}
    for more in ([], ["--model", "nets.py:labels", "--url", "http://127.0.0.1:1"]):
        status, _, err = call(capsys, *asked, *more)
        assert status == 2
        assert "either --model or --url" in err


# what the reproductions are made of


def test_smooth_neighbours_are_the_nearest_ones() -> None:
    points = torch.rand(30, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(30) % 3
    net, x = SoftNearest(points, labels), torch.rand(7, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    squares = (x[:, None] - points).flatten(2).square().sum(2)
    expected = torch.stack([torch.exp(-squares[:, labels == c]).sum(1).log() for c in range(3)], 1)
    torch.testing.assert_close(net(x), expected)
    nearest = SoftNearest(30 * points, labels)(30 * x).argmax(1)  # far apart, the nearest one decides
    assert torch.equal(nearest, labels[squares.argmin(1)])


def test_r17_notices_examples_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(papernot_blackbox, "fgsm", lambda model, x, y, eps, bounds: x)
    outcome = ENTRIES["R17"](Context(data=sp.data.load("digits"), quick=True))
    outside = {figure.name for figure in outcome.figures if figure.inside is False}
    assert outside == {"oracle's error on the substitute's examples", "less that after the first training"}
