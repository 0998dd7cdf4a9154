"""The cascade: its figure, its books, what makes it go on, and that a stopped one ends as if it had not been."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
import torch
from contract_support import Counting
from scipy.stats import binomtest
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.engine import Attack
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.evaluate import cascade
from saddlepoint.evaluate.evaluation import STANDS, WRONG, Evaluation, binomial_limits
from saddlepoint.gates import gate

Samples = tuple[Tensor, Tensor]
COUNT = 120


@pytest.fixture(scope="module")
def many() -> Samples:
    split = sp.data.load("digits").test.take(COUNT)
    y = split.y.clone()
    y[::10] = (y[::10] + 3) % 10
    return split.x, y


@pytest.fixture(scope="module")
def found(mlp: nn.Module, many: Samples) -> Evaluation:
    return sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.05))


def same(first: Evaluation, second: Evaluation) -> None:
    assert [stage.name for stage in first.stages] == [stage.name for stage in second.stages]
    assert torch.equal(first.broken_by, second.broken_by)
    torch.testing.assert_close(first.adversarial, second.adversarial)
    assert torch.equal(first.queries.forward, second.queries.forward)


@pytest.mark.parametrize("threat", [sp.Linf(0.05), sp.L2(0.4), sp.L1(1.5), sp.L0(2)], ids=lambda threat: type(threat).__name__)
def test_what_it_says_is_true(threat: sp.Linf, mlp: nn.Module, many: Samples) -> None:
    x, y = many
    counting = Counting(mlp)
    model = sp.Model(counting)
    evaluation = sp.evaluate(model, x, y, threat)
    clean, after = sp.Model(mlp).predict(x), sp.Model(mlp).predict(evaluation.adversarial)
    broken = evaluation.broken_by >= 0
    assert torch.equal(evaluation.clean_predicted, clean)
    assert torch.equal(evaluation.broken_by == WRONG, clean != y)
    assert bool((after[broken] != y[broken]).all())
    assert bool((threat.distance(evaluation.adversarial, x) <= threat.largest_eps).all())
    assert bool((evaluation.margin[broken] > 0).all())
    assert bool((evaluation.margin[evaluation.stands] < 0.01).all())
    assert 0.02 < evaluation.robust_accuracy < evaluation.clean_accuracy
    queries = evaluation.queries
    spent = 0 if evaluation.diagnosis is None else (evaluation.diagnosis.forward + evaluation.diagnosis.backward) * 100
    rows = int(queries.total.sum() + queries.verify.sum()) + queries.probe
    assert rows <= counting.forward_rows + counting.backward_rows <= rows + spent + 1
    assert evaluation.cumulative[-1][1] == evaluation.robust_accuracy
    shares = [share for _, share in evaluation.cumulative]
    assert shares == sorted(shares, reverse=True)
    assert f"within {threat}" in evaluation.summary()


def test_each_sample_leaves_at_its_first_success(found: Evaluation) -> None:
    for number, stage in enumerate(found.stages):
        gone = (found.broken_by >= 0) & (found.broken_by < number)
        assert stage.heavy or not bool(gone[stage.rows].any())  # a ladder's turns come before and after others'
        assert torch.equal((found.broken_by == number).nonzero()[:, 0], stage.broke.sort().values)


def test_what_one_attack_alone_broke(found: Evaluation) -> None:
    alone = found.alone
    assert list(alone) == [stage.name for stage in found.stages]
    assert not len(alone[found.stages[0].name])  # nobody had tried before
    for number, stage in enumerate(found.stages[1:], 1):
        tried = {row for other in found.stages if other is not stage for row in other.rows.tolist()}
        assert alone[stage.name].tolist() == [
            row for row in (found.broken_by == number).nonzero()[:, 0].tolist() if row in tried
        ]
    assert sum(len(rows) for rows in alone.values()) > 0
    assert [each["alone"] for each in found.to_dict()["stages"]] == [len(rows) for rows in alone.values()]


def test_no_less_than_its_parts(mlp: nn.Module, many: Samples, found: Evaluation) -> None:
    for attack in (sp.attacks.PGD(steps=40), sp.attacks.APGDT(steps=20)):
        other = sp.attack(sp.Model(mlp), *many, attack, sp.Linf(0.05))
        assert found.robust_accuracy <= other.robust_accuracy + 1 / COUNT


def test_ladders_begin_with_the_closest_and_stop(mlp: nn.Module, many: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _cascade(mlp, many, sp.Linf(0.03))
    run.run([cascade.Plan("first", "", sp.attacks.FGSM(loss="margin"))])
    standing = (run.broken_by == STANDS).nonzero()[:, 0]
    order = standing[run.margin[standing].argsort(descending=True, stable=True)]
    run.run([cascade.Plan("nothing", "", sp.attacks.UniformNoise(), 0.1)])
    assert torch.equal(run.stages["nothing"].rows, order[:12].sort().values)  # the first rung broke none
    asked: list[tuple[str, list[int]]] = []
    breaks = {"dear": [2, 2, 0], "cheap": [1, 1, 1, 0], "never": [0]}
    price = {"dear": cascade._PRICE, "cheap": 100, "never": 1}

    def answers(plan: cascade.Plan, threat: sp.Linf, chosen: Tensor) -> tuple[int, int]:
        asked.append((plan.name, chosen.nonzero()[:, 0].tolist()))
        return breaks[plan.name].pop(0), price[plan.name]

    monkeypatch.setattr(run, "_stage", answers)
    run.run([cascade.Plan(name, "", sp.attacks.FGSM(), 0.1) for name in breaks])
    turns = ["dear", "cheap", "never", "cheap", "cheap", "cheap", "dear", "dear"]
    assert [name for name, _ in asked] == turns  # all begin, then the one that broke most for its passes goes on
    for name in breaks:
        rows = [row for each, part in asked if each == name for row in part]
        assert sorted(rows) == sorted(order[: len(rows)].tolist())  # each once, the closest first


def test_a_rung_is_as_large_as_its_successes_pay_for(mlp: nn.Module, many: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _cascade(mlp, many, sp.Linf(0.03))
    run.run([cascade.Plan("first", "", sp.attacks.FGSM(loss="margin"))])
    asked: list[int] = []

    def answers(plan: cascade.Plan, threat: sp.Linf, chosen: Tensor) -> tuple[int, int]:
        asked.append(int(chosen.sum()))
        return 2 - len(asked), 400 * asked[-1]

    monkeypatch.setattr(run, "_stage", answers)
    run.run([cascade.Plan("breaks one, then none", "", sp.attacks.FGSM(), 0.1)])
    assert asked == [12, cascade._PRICE // 400]


def test_seeded_plans_begin_at_the_best_point(mlp: nn.Module, many: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Tensor | None] = {}
    real = cascade.run_attack

    def spy(model: sp.Model, x: Tensor, y: Tensor, attack: Attack, threat: sp.Linf, **options: object) -> sp.AttackResult:
        start = options["start"]
        assert start is None or isinstance(start, Tensor)
        given[type(attack).__name__] = start
        return real(model, x, y, attack, threat, **options)

    run = _cascade(mlp, many, sp.Linf(0.03))
    run.run([cascade.Plan("first", "", sp.attacks.FGSM(loss="margin"))])
    monkeypatch.setattr(cascade, "run_attack", spy)
    run.run([cascade.Plan("fresh", "", sp.attacks.APGD(steps=1))])
    best = run.adversarial[run.broken_by == STANDS].clone()
    run.run([cascade.Plan("seeded", "", sp.attacks.PGD(steps=1), 1.0, seeded=True)])
    assert given["APGD"] is None
    seeds = given["PGD"]
    assert seeds is not None
    assert torch.equal(seeds, best)
    assert all(plan.attack.takes_start for plan in _all_plans() if plan.seeded)
    assert any(plan.seeded for plan in _all_plans())


def test_the_last_few_are_tried_once_more(mlp: nn.Module, many: Samples) -> None:
    """One of 120 withstands by its mask, and nothing else does."""
    mask = torch.ones(many[0].shape, dtype=torch.bool)
    right = int((sp.Model(mlp).predict(many[0]) == many[1]).nonzero()[0])
    mask[right] = False
    evaluation = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.5, mask=mask))
    assert evaluation.stands.nonzero()[:, 0].tolist() == [right]
    names = [stage.name for stage in evaluation.stages]
    for plan in cascade.finishing(sp.Norm.LINF, "standard"):
        assert evaluation.stages[names.index(plan.name)].rows.tolist() == [right]
    less = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.02))
    assert not {"last-restarts", "last-targets"} & {stage.name for stage in less.stages}


def _all_plans() -> list[cascade.Plan]:
    efforts = ("quick", "standard", "thorough")
    found = [plan for norm in sp.Norm for effort in efforts for plan in cascade.plans(norm, effort)]
    return found + [plan for norm in sp.Norm for effort in efforts for plan in cascade.escalation(norm, effort)]


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_gradients_that_are_nan_prove_nothing(effort: cascade.Effort, mlp: nn.Module, many: Samples, tmp_path: Path) -> None:
    def rooted(x: Tensor) -> Tensor:
        return mlp(x) + torch.sqrt((x - x).flatten(1).abs().sum(1, keepdim=True))

    honest = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.1), effort)
    evaluation = sp.evaluate(sp.Model(rooted), *many, sp.Linf(0.1), effort, campaign=tmp_path)
    assert [verdict.robust for verdict in sp.compare_campaigns(tmp_path, tmp_path).a] == evaluation.stands.tolist()
    assert sp.replay(tmp_path, int(evaluation.stands.nonzero()[0])).verdict.robust
    assert evaluation.clean_accuracy == honest.clean_accuracy
    assert honest.robust_accuracy <= evaluation.robust_accuracy < 0.7 * evaluation.clean_accuracy  # scores find much
    attacked = {stage.name: len(stage.rows) for stage in evaluation.stages}
    blind = int(evaluation.right.sum()) - len(evaluation.stages[0].broke)
    assert f"gradients were NaN or infinite for {blind} samples" in evaluation.notes
    assert 0 < attacked["noise-blind"] <= blind
    assert "apgd" not in attacked  # which would learn nothing
    if effort == "standard":
        assert evaluation.diagnosis is not None
        assert "exploding-gradients" in {finding.name for finding in evaluation.diagnosis.suspicious}


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_nan_beyond_the_ball_breaks_nothing(mlp: nn.Module, many: Samples, tmp_path: Path) -> None:
    """The search for the curve goes further than the attacks did."""

    def bounded(x: Tensor) -> Tensor:
        return mlp(2 * (x - 0.2)) + torch.where(x.flatten(1).amax(1, keepdim=True) > 0.78, torch.nan, 0.0)

    x = many[0] / 2 + 0.2  # at most 0.7
    evaluation = sp.evaluate(sp.Model(bounded), x, many[1], sp.Linf(0.02), "quick", curve=True, campaign=tmp_path)
    without = sp.evaluate(sp.Model(bounded), x, many[1], sp.Linf(0.02), "quick")
    searched = sp.Campaign(tmp_path).finished("nearest")
    assert searched is not None
    assert bool((evaluation.stands[searched.index] & searched.having("error")).any())  # else this shows nothing
    assert torch.equal(evaluation.stands, without.stands)
    assert evaluation.clean_accuracy == without.clean_accuracy
    assert [verdict.robust for verdict in sp.compare_campaigns(tmp_path, tmp_path).a] == evaluation.stands.tolist()


def test_sources_are_looked_at_first(mlp: nn.Module, many: Samples) -> None:
    for source, told in (
        (nn.Linear(3, 10), r"sources\[1\] can't lead attacks on this model: .*mat1"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), r"sources\[1\] .*differ in their outputs"),
        (lambda x: mlp(x).detach(), r"sources\[1\] .*no path leads"),
    ):
        with pytest.raises(InputError, match=told):
            sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.1), "quick", sources=[sp.Model(mlp), sp.Model(source)])
    with pytest.raises(InputError, match="list of models"):
        sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.1), sources=sp.Model(mlp))  # type: ignore[call-overload]
    with pytest.raises(CapabilityError, match=r"sources\[0\]"):
        sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.1), sources=[sp.Model(mlp, access=sp.Access.SCORES)])


def test_sources_lead_attacks_on_a_model_of_scores(mlp: nn.Module, many: Samples) -> None:
    silent = sp.Model(mlp, access=sp.Access.SCORES)
    evaluation = sp.evaluate(silent, *many, sp.Linf(0.1), "quick", sources=[sp.Model(mlp)])
    assert evaluation.stages[0].name == "transfer-1"
    assert len(evaluation.stages[0].broke)


def test_masked_gradients_bring_more_attacks_and_a_diagnosis(
    mlp: nn.Module, many: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hot(nn.Module):
        """Saturates, so that cross-entropy and all but the last bits of the logits are flat."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x * 8).detach().round() / 8 + (x - x.detach()) * 0)

    evaluation = sp.evaluate(sp.Model(Hot()), *many, sp.Linf(0.1), campaign=tmp_path / "kept")
    assert evaluation.diagnosis is not None
    with monkeypatch.context() as patch:  # a finished campaign asks the model nothing
        patch.setattr(cascade, "run_attack", None)
        patch.setattr(cascade, "diagnose", None)
        again = sp.evaluate(sp.Model(Hot()), *many, sp.Linf(0.1), campaign=str(tmp_path / "kept"))
    assert again.diagnosis == evaluation.diagnosis
    assert torch.equal(again.broken_by, evaluation.broken_by)
    assert evaluation.diagnosis.masked
    quick = sp.evaluate(sp.Model(Hot()), *many, sp.Linf(0.1), "quick")
    assert [stage.name for stage in quick.stages][-1] == "square"
    told = gate(quick, 0.01)
    assert "vanished" in told.message
    assert {"apgd", "restarts", "square-long"} & {stage.name for stage in evaluation.stages}
    assert any("vanished" in note for note in evaluation.notes)


def test_each_sample_has_its_own_size_and_mask(mlp: nn.Module, many: Samples) -> None:
    x, y = many
    eps = torch.where(torch.arange(COUNT) < COUNT // 2, 0.0, 0.1)
    mask = torch.ones(x.shape, dtype=torch.bool)
    mask[-20:] = False
    threat = sp.Linf(eps, mask=mask)
    evaluation = sp.evaluate(sp.Model(mlp), x, y, threat)
    moved = (evaluation.adversarial - x).abs().flatten(1).amax(1)
    assert bool((moved <= eps + 1e-6).all())
    assert not bool(moved[-20:].any())
    middle = slice(COUNT // 2, COUNT - 20)
    alone = sp.evaluate(sp.Model(mlp), x[middle], y[middle], sp.Linf(0.1))
    assert int(evaluation.broken[middle].sum()) >= int(alone.broken.sum()) - 1
    assert not bool(evaluation.broken[: COUNT // 2].any() | evaluation.broken[-20:].any())
    assert evaluation.group(torch.arange(50, 70)).threat.eps == tuple(eps[50:70].tolist())
    with pytest.raises(InputError, match="its own"):
        evaluation.curve()


def test_thorough_attacks_all_that_stand(mlp: nn.Module, many: Samples) -> None:
    x, y = many[0][:30], many[1][:30]
    evaluation = sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.02), "thorough")
    assert bool(evaluation.stands.any())
    for number, stage in enumerate(evaluation.stages):
        if number:
            gone = (evaluation.broken_by >= 0) & (evaluation.broken_by < number) | (evaluation.broken_by == WRONG)
            assert len(stage.rows) == 30 - int(gone.sum())


def test_the_curve_answers_for_every_size(mlp: nn.Module, many: Samples) -> None:
    model = sp.Model(mlp)
    evaluation = sp.evaluate(model, *many, sp.Linf(0.05), curve=True)
    assert torch.equal(evaluation.stands, evaluation.distance > 0.05)
    for eps in (0.02, 0.08):
        itself = sp.evaluate(model, *many, sp.Linf(eps))
        ((_, share),) = evaluation.curve([eps])
        assert itself.robust_accuracy - 0.01 <= share <= itself.robust_accuracy + 0.03
    assert [size for size, _ in evaluation.curve()][-1] == pytest.approx(0.1)
    assert evaluation.stages[-1].name == "nearest"
    assert len(evaluation.stages[-1].rows) == int(evaluation.right.sum())
    assert bool((sp.Linf(0.05).distance(evaluation.adversarial, many[0]) <= 0.05).all())
    fallen = evaluation.broken.nonzero()[:, 0]
    for row in fallen.tolist():  # what is shown of a sample is what broke it, not what the search for the curve found later
        stage = evaluation.stages[int(evaluation.broken_by[row])]
        point = stage.result.select((stage.rows == row).nonzero()[:, 0])
        assert torch.equal(evaluation.adversarial[row], point.adversarial[0])
        assert float(evaluation.margin[row]) == pytest.approx(float(point.margin[0]))


def test_random_models_are_averaged_over(mlp: nn.Module, many: Samples) -> None:
    x, y = many[0][:20], many[1][:20]
    counting = Counting(mlp)

    class Noisy(nn.Module):
        """Gaussian noise on the input."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = counting

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 0.1 * torch.randn_like(x))

    model = sp.Model(Noisy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.SaddlepointWarning)
        evaluation = sp.evaluate(model, x, y, sp.Linf(0.1), "quick")
    assert "expectation" in [stage.name for stage in evaluation.stages]
    assert any("draws=10" in note for note in evaluation.notes)
    assert (model.queries.forward, model.queries.backward) == (counting.forward_rows, counting.backward_rows)


def test_what_has_no_gradients_is_searched_and_diagnosed(mlp: nn.Module, cnn: nn.Module, many: Samples) -> None:
    x, y = many[0][:40], many[1][:40]

    class Detached(nn.Module):
        """No path to the input."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.detach())

    alone = sp.evaluate(sp.Model(Detached()), x, y, sp.Linf(0.1))
    assert alone.diagnosis is not None
    assert alone.diagnosis.masked
    assert [stage.name for stage in alone.stages] == ["noise", "square"]
    assert "no path leads" in alone.summary()
    helped = sp.evaluate(sp.Model(Detached()), x, y, sp.Linf(0.1), "quick", sources=[sp.Model(mlp)])
    honest = sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.1), "quick")
    assert helped.stages[0].name == "transfer-1"
    assert helped.robust_accuracy <= honest.robust_accuracy + 0.05
    other = sp.evaluate(sp.Model(Detached()), x, y, sp.Linf(0.1), "quick", sources=[sp.Model(cnn)])
    assert len(other.stages[0].broke)
    assert bool((sp.Model(mlp).predict(other.adversarial[other.broken]) != y[other.broken]).all())


@pytest.mark.parametrize("threat", [sp.L2(1.0), sp.L1(5.0), sp.L0(8)], ids=lambda threat: type(threat).__name__)
def test_without_gradients_in_other_norms(threat: sp.Linf, mlp: nn.Module, many: Samples) -> None:
    evaluation = sp.evaluate(sp.Model(mlp, access=sp.Access.SCORES), *many, threat, "quick")
    assert bool(evaluation.broken.any())
    assert int(evaluation.queries.backward.sum()) == 0


def test_a_model_without_gradients(mlp: nn.Module, many: Samples) -> None:
    evaluation = sp.evaluate(sp.Model(mlp, access=sp.Access.SCORES), *many, sp.Linf(0.1), "quick")
    assert int(evaluation.queries.backward.sum()) == 0
    assert evaluation.robust_accuracy < evaluation.clean_accuracy


@pytest.mark.parametrize("threat", [sp.Linf(0.1), sp.L2(1.0), sp.L1(5.0), sp.L0(8)], ids=lambda threat: type(threat).__name__)
def test_a_model_of_labels(threat: sp.Linf, mlp: nn.Module, many: Samples, tmp_path: Path) -> None:
    oracle = sp.Model(mlp, access=sp.Access.LABELS)
    evaluation = sp.evaluate(oracle, *many, threat, "quick", campaign=tmp_path / "kept")
    assert int(evaluation.queries.backward.sum()) == 0
    assert bool(evaluation.broken.any())
    broken = evaluation.adversarial[evaluation.broken]
    assert bool((oracle.predict(broken) != many[1][evaluation.broken]).all())
    names = [stage.name for stage in evaluation.stages]
    assert names == (["noise", "labels"] if threat.norm in (sp.Norm.LINF, sp.Norm.L2) else ["noise"])
    again = sp.evaluate(oracle, *many, threat, "quick", campaign=tmp_path / "kept")
    assert again.robust_accuracy == evaluation.robust_accuracy


def test_figures(found: Evaluation) -> None:
    count, standing = len(found), int(found.stands.sum())
    assert found.interval.certified == 0
    assert found.interval.low == 0
    assert found.interval.attacked == found.robust_accuracy == pytest.approx(standing / count)
    limits = binomtest(standing, count).proportion_ci(0.95)
    assert binomial_limits(standing, count) == pytest.approx((limits.low, limits.high))
    assert binomial_limits(0, 10)[0] == 0
    assert binomial_limits(10, 10)[1] == 1
    classes = found.per_class()
    assert sum(number for number, _, _ in classes.values()) == count
    assert sum(number * robust for number, _, robust in classes.values()) == pytest.approx(standing)
    curve = found.curve()
    assert curve[0] == (0.0, found.clean_accuracy)
    assert curve[-1] == (pytest.approx(0.05), found.robust_accuracy)
    assert [share for _, share in curve] == sorted((share for _, share in curve), reverse=True)
    with pytest.raises(InputError, match="or evaluate with curve=True"):
        found.curve([0.1])
    closest = found.closest(5)
    assert bool(found.stands[closest].all())
    assert float(found.margin[closest].min()) >= float(found.margin[found.stands].sort(descending=True).values[4])
    with pytest.raises(InputError, match="at least 0"):
        found.closest(-1)
    group = found.group(found.y < 5)
    assert len(group) == int((found.y < 5).sum())
    assert torch.equal(group.stands, found.stands[found.y < 5])
    assert int(group.queries.total.sum()) == int(found.queries.total[found.y < 5].sum())
    for wrong in (torch.tensor([0, 0]), torch.tensor([True]), torch.tensor([len(found)]), torch.tensor([0.5])):
        with pytest.raises(InputError, match="rows must"):
            found.group(wrong)
    assert found.to_dict()["robust_accuracy"] == found.robust_accuracy


def test_worst_case_over_threats(mlp: nn.Module, many: Samples) -> None:
    threats = [sp.Linf(0.03), sp.L2(0.3)]
    both = sp.evaluate(sp.Model(mlp), *many, threats, "quick")
    each = [sp.evaluate(sp.Model(mlp), *many, threat, "quick").stands for threat in threats]
    assert torch.equal(both.stands, each[0] & each[1])
    assert both.robust_accuracy == pytest.approx(float((each[0] & each[1]).double().mean()))
    assert "Worst case" in both.summary()
    assert both.interval.attacked == both.to_dict()["robust_accuracy"]
    assert sum(number * share for number, _, share in both.per_class().values()) == pytest.approx(int(both.stands.sum()))
    assert bool(both.stands[both.closest(5)].all())
    assert both.group(many[1] < 5).robust_accuracy == pytest.approx(float(both.stands[many[1] < 5].double().mean()))


def test_the_batch_changes_nothing(mlp: nn.Module, many: Samples, found: Evaluation) -> None:
    other = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.05), batch_size=7)
    assert torch.equal(found.broken_by, other.broken_by)


def test_a_campaign_goes_on_where_it_was_stopped(mlp: nn.Module, many: Samples, found: Evaluation, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    x, y = many
    monkeypatch.setattr(cascade, "PART", 30)
    whole = sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.05), campaign=sp.Campaign(tmp_path / "whole"))
    assert torch.equal(whole.broken_by, found.broken_by)

    class StoppedError(Exception):
        pass

    real, calls = cascade.run_attack, []

    def breaks(*args: object, **settings: object) -> sp.AttackResult:
        calls.append(1)
        if len(calls) == 7:
            raise StoppedError
        return real(*args, **settings)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(cascade, "run_attack", breaks)
    campaign = sp.Campaign(tmp_path / "cut")
    with pytest.raises(StoppedError):
        sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.05), campaign=campaign)
    again = sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.05), campaign=sp.Campaign(tmp_path / "cut"))
    same(whole, again)
    parts = sum(-(-len(stage.rows) // 30) for stage in whole.stages)
    assert len(calls) <= parts + 4  # rungs end parts early
    table = sp.Campaign(tmp_path / "cut").table()
    assert table.num_rows == sum(len(stage.rows) for stage in whole.stages)
    with pytest.raises(InputError, match="eps"):
        sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.06), campaign=sp.Campaign(tmp_path / "cut"))


def test_ctrl_c_keeps_what_is_finished(mlp: nn.Module, many: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cascade.run_attack, []

    def stops(*args: object, **settings: object) -> sp.AttackResult:
        calls.append(1)
        result = real(*args, **settings)  # type: ignore[arg-type]  # passed on as they came
        if len(calls) == 2:
            raise sp.Interrupted(result.select(torch.arange(10)))
        return result

    monkeypatch.setattr(cascade, "run_attack", stops)
    evaluation = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.05))
    assert not evaluation.complete
    assert "interrupted" in evaluation.summary()
    assert len(evaluation.stages[1].rows) == 10
    assert evaluation.to_dict()["complete"] is False


def test_ctrl_c_between_attacks_keeps_what_is_finished(mlp: nn.Module, many: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(run: cascade._Cascade) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade._Cascade, "signs", stops)
    evaluation = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.05))
    assert not evaluation.complete
    assert evaluation.robust_accuracy < evaluation.clean_accuracy


def test_a_campaign_notices_other_code_around_the_same_weights(mlp: nn.Module, many: Samples, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        """Another forward under the same names."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * factor

    factor = 1.0
    x, y = many[0][:20], many[1][:20]
    sp.evaluate(sp.Model(Scaled()), x, y, sp.Linf(0.05), "quick", campaign=tmp_path)
    sp.evaluate(sp.Model(Scaled()), x, y, sp.Linf(0.05), "quick", campaign=tmp_path)
    factor = 2.0
    with pytest.raises(InputError, match="other outputs"):
        sp.evaluate(sp.Model(Scaled()), x, y, sp.Linf(0.05), "quick", campaign=tmp_path)


def test_a_ball_of_no_size_says_nothing_about_gradients(mlp: nn.Module, many: Samples) -> None:
    evaluation = sp.evaluate(sp.Model(mlp), *many, sp.Linf(0.0))
    assert evaluation.robust_accuracy == evaluation.clean_accuracy
    assert not evaluation.notes


def test_what_gives_nan_is_not_robust(mlp: nn.Module, many: Samples) -> None:
    class Broken(nn.Module):
        """NaN for bright inputs."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.flatten(1).sum(1, keepdim=True) > 20, torch.nan, mlp(x))

    bright = many[0].flatten(1).sum(1) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.SaddlepointWarning)  # the probe says so too
        evaluation = sp.evaluate(sp.Model(Broken()), *many, sp.Linf(0.0), "quick")
    assert bool(bright.any())
    assert torch.equal(evaluation.stands, (sp.Model(mlp).predict(many[0]) == many[1]) & ~bright)
    assert any("NaN" in note for note in evaluation.notes)
    clean = sum(number * share for number, share, _ in evaluation.per_class().values())
    assert clean / COUNT == pytest.approx(evaluation.clean_accuracy)


def test_bad_questions(mlp: nn.Module, many: Samples) -> None:
    model = sp.Model(mlp)
    with pytest.raises(UnknownNameError, match="standard"):
        sp.evaluate(model, *many, sp.Linf(0.1), "standart")  # type: ignore[call-overload]  # the mistake in question
    with pytest.raises(InputError, match=r"sp\.distance"):
        sp.evaluate(model, *many, sp.Minimize("l2"))
    with pytest.raises(InputError, match="shape"):
        sp.evaluate(model, many[0], many[1][:3], sp.Linf(0.1))
    for threat in ("linf", 0.1, ["linf"]):
        with pytest.raises(InputError, match="threat must be"):
            sp.evaluate(model, *many, threat)  # type: ignore[call-overload]  # the mistake in question
    with pytest.raises(InputError, match=r"sp\.Model"):
        sp.evaluate(mlp, *many, sp.Linf(0.1))  # type: ignore[call-overload]  # the mistake in question
    with pytest.raises(InputError, match="at least one threat"):
        sp.evaluate(model, *many, [])
    empty = sp.evaluate(model, many[0][:0], many[1][:0], sp.Linf(0.1))
    assert len(empty) == 0


def _cascade(net: nn.Module, samples: Samples, threat: sp.Linf) -> cascade._Cascade:
    return cascade._Cascade(sp.Model(net), *samples, threat, 0, None, False, None)


def test_groups_by_given_metadata(found: Evaluation) -> None:
    by_class = found.groups(found.y)
    assert list(by_class) == sorted(set(found.y.tolist()))
    shares = {label: (len(group), group.clean_accuracy, group.robust_accuracy) for label, group in by_class.items()}
    assert shares == found.per_class()
    names = ["west" if label < 5 else "east" for label in found.y.tolist()]
    east, west = found.groups(names).values()
    assert list(found.groups(names)) == ["east", "west"]
    assert torch.equal(west.stands, found.stands[found.y < 5])
    assert torch.equal(east.x, found.x[found.y >= 5])
    assert west.interval == found.group(found.y < 5).interval
    mixed = [names[row] if row % 2 else None for row in range(COUNT)]
    assert list(found.groups(mixed)) == list(dict.fromkeys(mixed))


def test_groups_of_the_worst_case(mlp: nn.Module, many: Samples) -> None:
    both = sp.evaluate(sp.Model(mlp), *many, [sp.Linf(0.03), sp.L2(0.3)], "quick")
    for even, group in both.groups(many[1] % 2 == 0).items():
        assert torch.equal(group.stands, both.stands[(many[1] % 2 == 0) == even])
    with pytest.raises(InputError, match=f"{COUNT} samples; got 2"):
        both.groups(["a", "b"])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["a"], f"{COUNT} samples; got 1"),
        (torch.zeros(COUNT + 1), f"{COUNT} samples; got {COUNT + 1}"),
        (torch.tensor(3), f"{COUNT} samples; got 1"),
        (torch.zeros(COUNT, 2), "tell groups apart"),
        ([torch.tensor(1)] * COUNT, "tell groups apart"),
        ([0.0, float("nan")] * (COUNT // 2), "got nan for sample 1"),
        ([["a"]] * COUNT, "tell groups apart"),
        ([("a", [])] * COUNT, "tell groups apart"),
    ],
)
def test_values_that_make_no_groups(values: Sequence[Hashable] | Tensor, told: str, found: Evaluation) -> None:
    with pytest.raises(InputError, match=told):
        found.groups(values)
