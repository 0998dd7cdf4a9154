"""The frame for re-running papers' figures, and its entries in quick versions; the full ones are marked slow."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import saddlepoint as sp
from saddlepoint import reproduce
from saddlepoint.cli.reproduce import cells, remarks
from saddlepoint.cli.reproduce import reproduce as command
from saddlepoint.defenses.objectives import Batch
from saddlepoint.reproduce import ENTRIES, Context, Entry, Figure, Recipe, frame
from saddlepoint.reproduce.evaluation import CURES, masked
from saddlepoint.reproduce.frame import Static
from saddlepoint.reproduce.goodfellow import worst_case_loss
from saddlepoint.reproduce.masking import undefended_network
from saddlepoint.reproduce.measures import right
from saddlepoint.reproduce.szegedy import WeightDecay, sigmoid_network
from saddlepoint.reproduce.training import SINGLE_STEP, first_less_second, simple_network, slopes

DIGITS = sp.data.load("digits")
NUMBERS = [*range(1, 19), *range(20, 30), *range(31, 39), 52]
TRAINED = [f"R{number}" for number in NUMBERS]
EXPERIMENTS = ["D26", "F5", "G3", "G4", "H4", "H13"]
FIRST = [*TRAINED, "R53", *EXPERIMENTS]


@pytest.fixture(scope="module")
def quick() -> Context:
    """Entries share networks, so tests share the context."""
    return Context(data=DIGITS, quick=True)


@pytest.fixture
def no_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SADDLEPOINT_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def as_mnist(train: int = 64, test: int = 32) -> sp.data.Dataset:
    """A few digits under MNIST's name, for what depends on the name."""
    return sp.data.Dataset("mnist", DIGITS.train.take(train), DIGITS.test.take(test), DIGITS.class_names, "test")


def fixed(id: str, *figures: Figure) -> Entry:
    return Entry(id, "a title", "a paper", "a setting", lambda context: list(figures))


def only_entries(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(frame, "ENTRIES", {entry.id: entry for entry in entries})


def call(*arguments: str) -> tuple[int, str]:
    """Exit status and standard output of the command."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize(
    ("ours", "must", "inside", "verdict"),
    [
        (0.5, (0.5, 0.7), True, "inside"),
        (0.7, (0.5, 0.7), True, "inside"),
        (0.49, (0.5, 0.7), False, "OUTSIDE"),
        (0.71, (0.5, 0.7), False, "OUTSIDE"),
        (math.nan, (0.0, 1.0), False, "OUTSIDE"),
        (0.5, None, None, "not judged"),
    ],
)
def test_a_range_holds_its_ends_and_never_nan(ours, must, inside, verdict):
    figure = Figure("f", ours, must)
    assert (figure.inside, figure.verdict) == (inside, verdict)


def test_an_outcome_passes_unless_a_judged_figure_is_outside(quick):
    good, bad, unjudged = Figure("g", 1.0, (0.0, 1.0)), Figure("b", 2.0, (0.0, 1.0)), Figure("u", 9.0)
    assert fixed("X1", good, unjudged)(quick).passed
    assert not fixed("X1", good, bad)(quick).passed


def test_the_papers_ranges_and_goals_hold_for_full_runs_on_mnist_alone():
    entry = Entry("X1", "t", "r", "s", lambda c: [Figure("f", 0.5, c.accept((0.9, 1.0), loose=(0.1, 1.0)), goal=0.95)])
    for data, is_quick, must, goal in [
        (as_mnist(), False, (0.9, 1.0), 0.95),
        (as_mnist(), True, (0.1, 1.0), None),
        (DIGITS, False, (0.1, 1.0), None),
        (DIGITS, True, (0.1, 1.0), None),
    ]:
        outcome = entry(Context(data=data, quick=is_quick))
        assert outcome.figures[0].must == must
        assert outcome.figures[0].goal == goal
        assert ("on digits, epochs times" in outcome.setting) == (data is DIGITS)
        assert ("at most 6000 training" in outcome.setting) == is_quick
        assert (outcome.data, outcome.stand_in, outcome.quick) == (data.name, data is DIGITS, is_quick)


def test_a_figure_without_a_loose_range_is_not_judged_on_a_stand_in():
    assert Context(data=DIGITS).accept((0.9, 1.0)) is None


def test_equal_recipes_share_a_network_and_the_seed_decides_it():
    recipe = Recipe("softmax", epochs=1)
    context = Context(data=as_mnist())
    model = context.model(recipe)
    assert context.model(Recipe("softmax", epochs=1)) is model
    assert context.model(Recipe("softmax", epochs=2)) is not model
    weights = [Context(data=as_mnist(), seed=seed).model(recipe).net[1].weight for seed in (0, 0, 1)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[2])


def test_global_random_state_and_threads_are_left_alone(quick):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    ENTRIES["R2"](quick)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_an_unfinished_training_is_no_network(monkeypatch):
    monkeypatch.setattr(sp.Model, "forward", _interrupt)
    context = Context(data=as_mnist())
    with pytest.raises(KeyboardInterrupt):
        context.model(Recipe("softmax", epochs=1))
    assert not context.trained


def _interrupt(*_):
    raise KeyboardInterrupt


def test_data_without_a_training_part_is_refused():
    with pytest.raises(sp.DataError, match="no training part"):
        Context(data=sp.data.Dataset("mnist", None, DIGITS.test, DIGITS.class_names, "test"))


def test_only_keeps_and_renumbers_classes():
    kept = frame.only(DIGITS.test, (3, 7))
    assert len(kept) == 100
    torch.testing.assert_close(kept.x[kept.y == 1], DIGITS.test.x[DIGITS.test.y == 7])


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_worst_case_loss_beats_every_corner_of_the_ball(sign):
    """In 6 dimensions, all 64 corners can be tried: the largest logistic loss is at one of them."""
    w, b, x = torch.linspace(-1, 2, 6).double(), torch.tensor(0.3).double(), torch.linspace(0, 1, 6).double()[None]
    corners = torch.cartesian_prod(*[torch.tensor([-0.25, 0.25]).double()] * 6)
    losses = torch.nn.functional.softplus(-sign * ((x + corners) @ w + b))
    torch.testing.assert_close(worst_case_loss(w, b, x, torch.tensor([sign]), 0.25), losses.max()[None])


def test_ids_are_unique_and_the_first_entries_are_there():
    assert sorted(ENTRIES) == sorted(FIRST)
    with pytest.raises(sp.InputError, match="R1 already"):
        frame.entry("R1", "t", "r", "s")(lambda context: [])


def test_find_takes_any_case_once_and_suggests():
    assert [e.id for e in reproduce.find(["r5", "R5", "R1"])] == ["R5", "R1"]
    assert [e.id for e in reproduce.find()] == FIRST
    with pytest.raises(sp.UnknownNameError, match=r"did you mean .*'R1'"):
        reproduce.find(["R1x"])


@pytest.mark.parametrize("name", [*TRAINED, *EXPERIMENTS])
def test_entries_quickly_on_the_stand_in(name, quick):
    outcome = ENTRIES[name](quick)
    assert outcome.stand_in
    assert outcome.passed, [(f.name, f.ours, f.must) for f in outcome.figures if f.inside is False]
    assert any(figure.inside for figure in outcome.figures), "something must be judged"
    assert all(math.isfinite(figure.ours) for figure in outcome.figures)


def test_entries_notice_an_attack_that_does_nothing(monkeypatch, quick):
    monkeypatch.setattr("saddlepoint.reproduce.goodfellow.fgsm", lambda model, x, y, eps, bounds=None: x)
    fresh = Context(data=DIGITS, quick=True, trained=copy.copy(quick.trained))
    assert not any(ENTRIES[name](fresh).passed for name in ("R1", "R2", "R3"))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("R7", "szegedy"), ("R8", "least"), ("R9", "least"), ("R10", "least"), ("R13", "evaluation"), ("R35", "evaluation"),
        ("R20", "training"), ("R52", "training"),
    ],
)  # fmt: skip
def test_entries_notice_a_search_that_has_no_time(name, module, monkeypatch, quick):
    def hurried(*arguments, **settings):
        return sp.attack(*arguments, **settings, budget=sp.Budget(passes=1))

    monkeypatch.setattr(f"saddlepoint.reproduce.{module}.attack", hurried)
    fresh = Context(data=DIGITS, quick=True, trained=copy.copy(quick.trained))
    assert not ENTRIES[name](fresh).passed


def test_r34_notices_an_autoattack_that_is_weaker_than_its_parts(monkeypatch, quick):
    def hurried(model, x, y, method, threat, **settings):
        budget = sp.Budget(passes=1) if isinstance(method, sp.attacks.AutoAttack) else None
        return sp.attack(model, x, y, method, threat, **settings, budget=budget)

    monkeypatch.setattr("saddlepoint.reproduce.evaluation.attack", hurried)
    outcome = ENTRIES["R34"](Context(data=DIGITS, quick=True, trained=copy.copy(quick.trained)))
    assert [f.name for f in outcome.figures if f.inside is False] == ["AutoAttack's less the smallest of its parts', 50 images"]


def beside(folder: Path, net: torch.nn.Module | None = None) -> Context:
    """A grey image of class 0 under MNIST's name, from `folder`/mnist, with this network's weights beside that."""
    split = sp.data.Split(torch.full((1, 1, 28, 28), 0.5), torch.zeros(1, dtype=torch.int64))
    if net is not None:
        (folder / "models").mkdir(parents=True)
        torch.save(net.state_dict(), folder / "models" / "mnist_smallcnn_trades_eps0.3.pt")
    return Context(data=sp.data.Dataset("mnist", split, split, DIGITS.class_names, str(folder / "mnist")), quick=True)


def small_cnn(step: float) -> torch.nn.Module:
    """Class 0 up to a grey of 0.5 + step in the upper left corner, class 1 above that."""
    net = sp.zoo.build("smallcnn", in_shape=(1, 28, 28))
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
        for layer in net.modules():  # each passes its first channel or feature on
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight[0, 0, 1, 1] = 1.0
            elif isinstance(layer, torch.nn.Linear):
                last = layer
                layer.weight[0, 0] = 1.0
        last.weight[0, 0], last.weight[1, 0], last.bias[0] = 0.0, 10.0, 10 * (0.5 + step)
    return net


def quickly(model: sp.Model, *data: torch.Tensor, **settings: int) -> sp.Evaluation:
    """`sp.evaluate`, where something stands, takes minutes."""
    return sp.evaluate(model, *data, effort="quick", **settings)


@pytest.mark.parametrize("parent", ["", "mnist"])
def test_r53_judges_the_weights_beside_or_in_the_folder_of_the_data(parent, monkeypatch, tmp_path):
    monkeypatch.setattr("saddlepoint.reproduce.evaluation.evaluate", quickly)
    data = replace(beside(tmp_path / parent, small_cnn(0.4)).data, source=str(tmp_path / "mnist"))
    outcome = ENTRIES["R53"](Context(data=data, quick=True))
    found = {figure.name: figure.ours for figure in outcome.figures}
    assert outcome.passed, outcome
    assert found.pop("sp.evaluate's passes an image") > 1
    assert found == {
        "clean accuracy": 1.0, "sp.evaluate's accuracy": 1.0, "AutoAttack's accuracy, 50 images": 1.0,
        "sp.evaluate's less AutoAttack's, 50 images": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "eps", "outside"),
    [
        (0.1, 0.3, ["sp.evaluate's accuracy"]),
        (-0.1, 0.3, ["clean accuracy", "sp.evaluate's accuracy"]),
        (0.1, 0.01, ["sp.evaluate's less AutoAttack's, 50 images"]),
    ],
)
def test_r53_notices_another_network_and_an_evaluation_weaker_than_autoattack(step, eps, outside, monkeypatch, tmp_path):
    def within(model, x, y, threat, **settings):
        return quickly(model, x, y, sp.Linf(eps), **settings)

    monkeypatch.setattr("saddlepoint.reproduce.evaluation.evaluate", within)
    outcome = ENTRIES["R53"](beside(tmp_path, small_cnn(step)))
    assert [figure.name for figure in outcome.figures if figure.inside is False] == outside


def test_an_unfinished_evaluation_is_no_figure(monkeypatch, tmp_path):
    def stopped(*arguments, **settings):
        return replace(quickly(*arguments, **settings), complete=False)

    monkeypatch.setattr("saddlepoint.reproduce.evaluation.evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ENTRIES["R53"](beside(tmp_path, small_cnn(0.1)))


def test_r53_says_what_is_missing_and_where_it_is_published(tmp_path, quick):
    for outcome, expected in [
        (ENTRIES["R53"](beside(tmp_path)), (str(tmp_path / "models" / "mnist_smallcnn_trades_eps0.3.pt"), "github.com/")),
        (ENTRIES["R53"](quick), ("a network for mnist", "digits")),
    ]:
        assert all(part in outcome.missing for part in expected)
        assert (outcome.figures, outcome.passed) == ((), False)


def test_r53_refuses_weights_of_another_network(tmp_path):
    with pytest.raises(sp.DataError, match="is it another architecture's"):
        ENTRIES["R53"](beside(tmp_path, torch.nn.Linear(2, 2)))


def test_r13_aims_away_from_the_predicted_class_and_fits_the_true_one_beside_clean_images(quick):
    model = undefended_network(quick)
    x, y = DIGITS.test.x[:8], (model.predict(DIGITS.test.x[:8]) + 1) % 10  # no label is the predicted one
    threat = sp.Linf(0.3)
    points = sp.perturb(model, x, model.predict(x), sp.attacks.FGSM(), threat)
    expected = torch.nn.functional.cross_entropy(model.forward(torch.cat([x, points])), torch.cat([y, y]))
    torch.testing.assert_close(CURES["predicted labels"].loss(Batch(model, x, y, torch.arange(8), 0, 0.0)), expected)


def test_r16_notices_an_ensemble_that_is_the_network_alone(monkeypatch, quick):
    monkeypatch.setattr("saddlepoint.reproduce.training.EnsembleAdversarial", lambda **settings: SINGLE_STEP)
    outcome = ENTRIES["R16"](Context(data=DIGITS, quick=True, trained=copy.copy(quick.trained)))
    assert [figure.name for figure in outcome.figures if figure.inside is False] == ["the latter over the former"]


def test_static_examples_are_made_once_on_the_source_and_added(monkeypatch):
    given = []

    def recorded(model, part, **settings):
        given.append(part)
        return sp.train(model, part, **settings)

    monkeypatch.setattr("saddlepoint.reproduce.frame.train", recorded)
    context = Context(data=as_mnist())
    source = Recipe("softmax", 1, bounds=(0.0, 1.0))
    context.model(replace(source, epochs=2, static=Static(source, sp.attacks.FGSM(), sp.Linf(0.2))))
    first, both = given
    assert torch.equal(both.x[:64], first.x)
    assert torch.equal(both.y, first.y.repeat(2))
    crafted = sp.attack(context.model(source), first.x, first.y, sp.attacks.FGSM(), sp.Linf(0.2)).adversarial
    assert not torch.equal(crafted, first.x)
    torch.testing.assert_close(both.x[64:], crafted)


def test_steepness_is_the_norm_of_the_gradient_of_the_two_largest_logits_difference():
    linear = torch.nn.Linear(4, 3)
    model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), linear), bounds=None)
    x = torch.arange(24.0).reshape(6, 1, 2, 2).sin()
    first, second = model.logits(x).topk(2).indices.unbind(1)
    expected = (linear.weight[first] - linear.weight[second]).norm(dim=1).detach()
    torch.testing.assert_close(slopes(model, x, first_less_second, first), expected)


@pytest.mark.parametrize("scale", [1, 4])
def test_the_series_of_capacities_is_the_papers(scale):
    net = simple_network((1, 28, 28), 10, scale)
    sizes = [layer.weight.shape[0] for layer in net if hasattr(layer, "weight")]
    assert sizes == [2 * scale, 4 * scale, 64 * scale, 10]
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_r35_hides_the_gradient_alone(quick):
    """The rounded network changes where a level changes, and its gradient is zero; scaling changes no prediction."""
    plain, x, y = undefended_network(quick), DIGITS.test.x[:50], DIGITS.test.y[:50]
    rounded, scaled = masked(plain).values()
    point = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(rounded.forward(point), y).backward()
    assert not point.grad.any()
    assert torch.equal(rounded.predict(x), plain.predict(torch.round(x * 7) / 7))
    assert torch.equal(scaled.predict(x), plain.predict(x))
    torch.testing.assert_close(scaled.logits(x), 1000 * plain.logits(x))


def test_weight_decay_is_lambda_times_the_sum_of_squares_over_the_units_of_each_layer(quick):
    net = sigmoid_network((1, 8, 8), 10)
    batch = Batch(sp.Model(net), DIGITS.test.x[:5], DIGITS.test.y[:5], torch.arange(5), 0, 0.0)
    fit, decayed = (WeightDecay(strengths).loss(batch) for strengths in ((0.0, 0.0, 0.0), (0.5, 3.0, 7.0)))
    first, second, third = (layer.weight.square().sum() for layer in net if isinstance(layer, torch.nn.Linear))
    torch.testing.assert_close(fit, torch.nn.functional.cross_entropy(net(batch.x), batch.y))
    torch.testing.assert_close(decayed - fit, 0.5 * first / 100 + 3 * second / 100 + 7 * third / 10)
    with pytest.raises(ValueError, match="zip"):
        WeightDecay((1.0,)).loss(batch)


def test_deepfool_steps_are_those_of_the_papers_loop(quick):
    """The entry's mean number of steps, against a loop for one image after another."""
    model = undefended_network(quick)
    x, y = right(model, quick.few(quick.test, 200))
    assert bool((model.predict(x) == y).all())
    steps = [figure.ours for figure in ENTRIES["R9"](quick).figures if figure.name == "LeNet-like: steps"]
    expected = torch.tensor([steps_to_the_boundary(model.net, point[None]) for point in x]).double().mean()
    assert steps == pytest.approx([float(expected)])


def steps_to_the_boundary(net: torch.nn.Module, x: torch.Tensor) -> int:
    start, total, count = net(x).argmax(), torch.zeros_like(x), 0
    while net(x + 1.02 * total).argmax() == start:
        point = (x + 1.02 * total).requires_grad_()
        ways = []
        for k in set(range(10)) - {int(start)}:
            gap = (net(point)[0, start] - net(point)[0, k]).abs()
            (w,) = torch.autograd.grad(gap, point)
            ways.append((float(gap.detach() / w.norm()), -w * gap.detach() / w.norm() ** 2))
        total, count = total + min(ways, key=lambda way: way[0])[1], count + 1
    return count


@pytest.mark.usefixtures("no_mnist")
def test_without_mnist_digits_stand_in_and_say_so(monkeypatch, tmp_path):
    only_entries(monkeypatch, fixed("X1", Figure("f", 0.5, (0.0, 1.0), paper=0.6, paper_note="of another network")))
    status, text = call("X1")
    assert status == 0
    assert "STAND-IN: these figures were measured on digits" in text
    assert "Why: dataset 'mnist': not found" in text
    assert "the paper's figure is of another network" in text
    with pytest.raises(sp.DataError, match="mnist"):  # who names a root wants MNIST from there
        call("X1", "--root", str(tmp_path))


@pytest.mark.usefixtures("no_mnist")
def test_a_figure_outside_gives_status_1(monkeypatch):
    good, bad = fixed("X1", Figure("f", 0.5, (0.0, 1.0))), fixed("X2", Figure("wrong one", 1.5, (0.0, 1.0)))
    only_entries(monkeypatch, good, bad)
    assert call("X1")[0] == 0
    status, text = call()
    assert status == 1
    assert "OUTSIDE" in text
    assert "1 of 2 judged figures are inside" in text
    assert "outside: X2 wrong one" in text


@pytest.mark.usefixtures("no_mnist")
def test_what_is_not_at_hand_is_skipped_among_all_and_fails_by_name(monkeypatch):
    def unavailable(context):
        raise frame.UnavailableError("no file w.pt")

    only_entries(monkeypatch, fixed("X1", Figure("f", 0.5, (0.0, 1.0))), Entry("X2", "t", "r", "s", unavailable))
    for names, status in [((), 0), (("X1",), 0), (("X2",), 1), (("X1", "X2"), 1)]:
        found, text = call(*names)
        assert found == status, names
        assert ("X2 was not run: no file w.pt." in text) == (names != ("X1",))
        found, text = call("--json", *names)
        assert (found, json.loads(text)["passed"]) == (status, status == 0), names
        missing = [outcome["missing"] for outcome in json.loads(text)["outcomes"] if outcome["id"] == "X2"]
        assert missing == ([] if names == ("X1",) else ["no file w.pt"])


@pytest.mark.usefixtures("no_mnist")
def test_json(monkeypatch):
    figures = Figure("f", 0.5, (0.25, 1.0), 0.6, "a note", 0.7), Figure("no errors", math.nan, unit="")
    only_entries(monkeypatch, fixed("X1", *figures))
    status, text = call("--json", "--quick", "--seed", "3")
    found = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert status == 0
    assert {k: found[k] for k in ("schema", "passed", "complete", "stand_in", "quick", "seed", "threads")} == {
        "schema": 1, "passed": True, "complete": True, "stand_in": True, "quick": True, "seed": 3, "threads": 1,
    }  # fmt: skip
    assert found["data"] == {"name": "digits", "source": "scikit-learn", "fingerprint": DIGITS.fingerprint()}
    assert set(found["versions"]) == {"torch", "python"}
    (outcome,) = found["outcomes"]
    assert set(outcome) == {
        "id", "title", "reference", "setting", "data", "stand_in", "quick", "seed", "figures", "seconds", "missing", "passed",
    }  # fmt: skip
    assert outcome["figures"] == [
        {
            "name": "f", "ours": 0.5, "must": [0.25, 1.0], "paper": 0.6, "paper_note": "a note", "goal": None, "unit": "share",
            "inside": True, "verdict": "inside",
        },
        {
            "name": "no errors", "ours": None, "must": None, "paper": None, "paper_note": "", "goal": None, "unit": "",
            "inside": None, "verdict": "not judged",
        },
    ]  # fmt: skip


@pytest.mark.usefixtures("no_mnist")
def test_ctrl_c_keeps_what_is_finished(monkeypatch):
    only_entries(monkeypatch, fixed("X1", Figure("f", 0.5)), Entry("X2", "t", "r", "s", _interrupt))
    status, text = call("--json")
    found = json.loads(text)
    assert status == 130
    assert [outcome["id"] for outcome in found["outcomes"]] == ["X1"]
    assert (found["complete"], found["passed"]) == (False, False)


@pytest.mark.usefixtures("no_mnist")
def test_list_runs_nothing(monkeypatch):
    only_entries(monkeypatch, Entry("X1", "a title", "a paper", "a setting", _interrupt))
    status, text = call("--list")
    assert status == 0
    assert all(part in text for part in ("X1", "a title", "a paper", "a setting"))
    (row,) = json.loads(call("--list", "--json")[1])["entries"]
    assert row == {"id": "X1", "title": "a title", "reference": "a paper", "setting": "a setting"}


@pytest.mark.usefixtures("no_mnist")
def test_an_unknown_entry_is_refused_before_anything_runs():
    with pytest.raises(sp.UnknownNameError, match="did you mean"):
        call("R1", "R12x")


def test_text_of_figures_and_remarks(quick):
    assert cells(Figure("f", 0.9995, (0.995, 1.0), 0.999, "a note", 1.0)) == (
        "99.95%",
        "99.90%*",
        "99.50% to 100.00%",
        "100.00%",
    )
    assert cells(Figure("f", 1.2e-7, (0.0, 1e-6), unit="")) == ("1.2e-07", "", "0 to 1e-06", "")
    assert remarks([], Context(data=as_mnist())) == ["0 of 0 judged figures are inside their ranges."]
    assert any("QUICK" in line for line in remarks([], quick))


@pytest.fixture(scope="module")
def mnist() -> Context:
    try:
        return Context(data=sp.data.load("mnist"))
    except sp.DataError as error:
        pytest.skip(f"needs MNIST: {error}")


# what docs/reproductions.md says isn't reached
_MISSED = {
    "R34": pytest.mark.xfail(reason="APGD-T alone breaks one sample more than AutoAttack"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(id, marks=_MISSED.get(id, ())) for id in FIRST])
def test_entries_on_mnist(name, mnist):
    outcome = ENTRIES[name](mnist)
    if outcome.missing:
        pytest.skip(f"needs published weights: {outcome.missing}")
    assert not outcome.stand_in
    assert outcome.passed, [(f.name, f.ours, f.must) for f in outcome.figures if f.inside is False]
