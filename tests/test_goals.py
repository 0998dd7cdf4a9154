"""Goals and losses, against plain loops over samples and formulas written out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional

from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.goals import LOSSES, UNRESOLVED, Aim, FalsePositive, Goal, Targeted, Untargeted, loss_named
from saddlepoint.rng import Keys


def keys(count: int) -> Keys:
    return Keys.of(0, torch.arange(count))


def bind(goal: Goal, labels: Tensor, classes: int, logits: Tensor | None = None) -> Aim:
    targets = goal.targets(labels, classes, keys(len(labels)))
    if logits is not None:
        targets = goal.resolve(targets, logits, labels)
    return goal.aim(labels, targets, classes)


def random_logits(count: int, classes: int, seed: int = 0) -> Tensor:
    return 3 * keys(count).absorb(seed).normal((classes,), torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 0, 2])


class TestMargins:
    @given(st.integers(2, 7), st.integers(0, 50))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_untargeted(self, classes: int, seed: int) -> None:
        logits = random_logits(6, classes, seed)
        labels = LABELS % classes
        for top_k in range(1, classes):
            found = bind(Untargeted(top_k=top_k), labels, classes).margin(logits)
            for i, y in enumerate(labels.tolist()):
                others = sorted((logits[i, c].item() for c in range(classes) if c != y), reverse=True)
                assert found[i].item() == others[top_k - 1] - logits[i, y].item()
                in_top_k = y in logits[i].argsort(descending=True)[:top_k].tolist()
                assert (found[i] > 0) == (not in_top_k)

    def test_groups(self) -> None:
        logits = random_logits(6, 6)
        groups = ({0, 1}, {2, 3})
        found = bind(Untargeted(groups=groups), LABELS, 6).margin(logits)  # type: ignore[arg-type]
        for i, y in enumerate(LABELS.tolist()):
            mine = next((g for g in groups if y in g), {y})
            inside = max(logits[i, c].item() for c in mine)
            outside = max(logits[i, c].item() for c in range(6) if c not in mine)
            assert found[i].item() == outside - inside

    def test_overlapping_groups_count_together(self) -> None:
        aim = bind(Untargeted(groups=(frozenset({0, 1}), frozenset({1, 2}))), torch.tensor([0, 1, 2, 3]), 5)
        assert aim.unwanted.long().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]

    @given(st.integers(2, 7), st.integers(0, 50))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_targeted(self, classes: int, seed: int) -> None:
        logits = random_logits(6, classes, seed)
        target = classes - 1
        for top_k in range(1, classes):
            found = bind(Targeted(target, top_k=top_k), LABELS % classes, classes).margin(logits)
            for i in range(6):
                others = sorted((logits[i, c].item() for c in range(classes) if c != target), reverse=True)
                assert found[i].item() == logits[i, target].item() - others[top_k - 1]
                assert (found[i] > 0) == (target in logits[i].argsort(descending=True)[:top_k].tolist())

    def test_a_set_of_targets(self) -> None:
        logits = random_logits(6, 5)
        found = bind(Targeted([1, 4]), LABELS, 5).margin(logits)
        for i in range(6):
            assert found[i].item() == max(logits[i, [1, 4]]).item() - max(logits[i, [0, 2, 3]]).item()

    @pytest.mark.parametrize("probability", [0.3, 0.5, 0.99])
    def test_false_positive(self, probability: float) -> None:
        logits = random_logits(200, 4)
        labels = torch.zeros(200, dtype=torch.int64)
        p = logits.softmax(1)
        given = bind(FalsePositive(target=2, probability=probability), labels, 4)
        assert torch.equal(given.margin(logits) > 0, p[:, 2] > probability)
        expected = (p[:, 2] / (1 - p[:, 2])).log() - math.log(probability / (1 - probability))
        torch.testing.assert_close(given.margin(logits), expected)
        free = bind(FalsePositive(probability=probability), labels, 4, logits)
        assert torch.equal(free.margin(logits) > 0, p.amax(1) > probability)
        assert torch.equal(free.wanted.long().argmax(1), logits.argmax(1))

    def test_false_positive_is_exact_where_probabilities_round_to_one(self) -> None:
        logits = torch.tensor([[80.0, 0.0, 0.0]])
        margin = bind(FalsePositive(target=0, probability=0.5), torch.tensor([0]), 3).margin(logits)
        assert math.isclose(float(margin), 80 - math.log(2), rel_tol=1e-6)

    def test_masking_invents_no_logit(self) -> None:
        """All logits far below zero: a factor of 0 in place of -inf would win every maximum."""
        logits = random_logits(6, 4) - 500
        for goal, y in ((Untargeted(), LABELS), (Targeted(3), LABELS % 3), (Untargeted(top_k=2), LABELS)):
            shifted = bind(goal, y, 4).margin(logits)
            torch.testing.assert_close(shifted, bind(goal, y, 4).margin(logits + 500))
        assert (bind(Untargeted(), logits.argmax(1), 4).margin(logits) < 0).all()

    def test_ties_are_no_margin(self) -> None:
        assert bind(Untargeted(), torch.tensor([1]), 3).margin(torch.ones(1, 3)).item() == 0

    def test_empty_batch(self) -> None:
        empty = torch.empty(0, dtype=torch.int64)
        for goal in (Untargeted(), Untargeted(top_k=2, groups=(frozenset({0, 1}),)), Targeted({1, 2}), FalsePositive()):
            assert bind(goal, empty, 5, torch.empty(0, 5)).margin(torch.empty(0, 5)).shape == (0,)


class TestTargets:
    def test_random_is_uniform_and_never_the_label(self) -> None:
        for classes in (2, 3, 10):
            labels = torch.arange(30_000) % classes
            targets = Targeted("random").targets(labels, classes, keys(30_000))
            assert not (targets == labels).any()
            assert targets.dtype == torch.int64
            assert int(targets.min()) == 0
            assert int(targets.max()) == classes - 1
            steps = (targets - labels) % classes
            if classes > 2:
                counts = torch.bincount(steps, minlength=classes)[1:]
                assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_random_depends_on_the_keys_only(self) -> None:
        labels = torch.arange(8) % 4
        whole = Targeted("random").targets(labels, 10, keys(8))
        assert torch.equal(whole[3:5], Targeted("random").targets(labels[3:5], 10, Keys.of(0, torch.tensor([3, 4]))))

    def test_next_wraps(self) -> None:
        assert Targeted("next").targets(torch.tensor([0, 1, 2]), 3, keys(3)).tolist() == [1, 2, 0]

    def test_least_likely_excludes_the_label(self) -> None:
        goal = Targeted("least_likely")
        logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [-5.0, -6.0, -7.0]])
        labels = torch.tensor([0, 2, 2])
        waiting = goal.targets(labels, 3, keys(3))
        assert waiting.tolist() == [UNRESOLVED] * 3
        assert goal.resolve(waiting, logits, labels).tolist() == [1, 0, 1]
        assert goal.resolve(torch.tensor([2, UNRESOLVED, 0]), logits, labels).tolist() == [2, 0, 0]

    def test_given(self) -> None:
        assert Targeted(2).targets(torch.tensor([0, 1]), 3, keys(2)).tolist() == [2, 2]
        assert Targeted(np.int64(2)) == Targeted(2)  # type: ignore[arg-type]
        assert Targeted({1, 2}).targets(torch.tensor([0, 1]), 3, keys(2)).tolist() == [UNRESOLVED] * 2
        assert Untargeted().targets(torch.tensor([0, 1]), 3, keys(2)).tolist() == [UNRESOLVED] * 2


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "confidence below 0": (lambda: Untargeted(confidence=-1), "confidence"),
    "confidence nan": (lambda: Untargeted(confidence=math.nan), "confidence"),
    "top_k 0": (lambda: Untargeted(top_k=0), "top_k"),
    "top_k a fraction": (lambda: Untargeted(top_k=1.5), "top_k"),  # type: ignore[arg-type]
    "top_k too many": (lambda: bind(Untargeted(top_k=3), torch.tensor([0]), 3), "at least 3 classes"),
    "top_k too many, targeted": (lambda: bind(Targeted(1, top_k=3), torch.tensor([0]), 3), "at least 3 classes"),
    "top_k beyond the group": (
        lambda: bind(Untargeted(top_k=2, groups=(frozenset({0, 1}),)), torch.tensor([0]), 3),
        "there are 1",
    ),
    "groups of everything": (lambda: bind(Untargeted(groups=(frozenset({0, 1, 2}),)), torch.tensor([0]), 3), "there are 0"),
    "unknown group member": (lambda: bind(Untargeted(groups=(frozenset({0, 7}),)), torch.tensor([0]), 3), "class 7"),
    "negative group member": (lambda: bind(Untargeted(groups=(frozenset({-1}),)), torch.tensor([0]), 3), "class -1"),
    "all classes as targets": (lambda: bind(Targeted({0, 1, 2}), torch.tensor([0]), 3), "there are 0"),
    "unknown target in a set": (lambda: bind(Targeted({0, 3}), torch.tensor([0]), 3), "class 3"),
    "no targets": (lambda: Targeted([]), "targets must be"),
    "a fraction as target": (lambda: Targeted(1.5), "targets must be"),  # type: ignore[arg-type]
    "numpy targets, which are per sample": (lambda: Targeted(np.array([1, 2])), "a tensor with one per sample"),  # type: ignore[arg-type]
    "floating targets": (lambda: Targeted(torch.tensor([1.0])), "integers"),
    "two-dimensional targets": (lambda: Targeted(torch.zeros(2, 2, dtype=torch.int64)), r"\(N,\)"),
    "unknown chooser": (lambda: Targeted("least-likely"), "least_likely"),  # type: ignore[arg-type]
    "probability 1": (lambda: FalsePositive(probability=1.0), "probability"),
    "false positive top_k": (lambda: FalsePositive(top_k=2), "top_k"),
    "false positive of no class": (lambda: bind(FalsePositive(target=3), torch.tensor([0]), 3), "class 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_goals(case: str) -> None:
    make, text = BAD[case]
    with pytest.raises(InputError, match=text):
        make()


def test_unknown_loss_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'cross_entropy'"):
        loss_named("crossentropy")
    with pytest.raises(UnknownNameError, match="'dlr'"):
        loss_named("DRL")
    assert loss_named("dlr") is LOSSES["dlr"]
    assert loss_named(LOSSES["margin"]) is LOSSES["margin"]


GOALS = (
    Untargeted(),
    Untargeted(confidence=2.0),
    Untargeted(groups=(frozenset({0, 1}), frozenset({4}))),
    Untargeted(top_k=2),
    Targeted(1),
    Targeted({3, 1}),
    Targeted("next"),
    Targeted(torch.tensor([1, 2])),
    FalsePositive(),
    FalsePositive(target=2, probability=0.7),
)


def test_goals_compare_hash_and_serialise() -> None:
    for a, b in itertools.combinations(GOALS, 2):
        assert a != b
    for goal in GOALS:
        assert json.loads(json.dumps(goal.settings())) == json.loads(json.dumps(goal.settings()))
        assert hash(goal) == hash(goal)
    assert len(set(GOALS)) == len(GOALS)
    assert Targeted([1, 3]) == Targeted({3, 1})
    assert hash(Targeted([1, 3])) == hash(Targeted({3, 1}))
    assert Targeted(torch.tensor([1, 2])) == Targeted(torch.tensor([1, 2]))
    assert Untargeted(groups=[{1, 0}]) == Untargeted(groups=(frozenset({0, 1}),))  # type: ignore[arg-type]
    assert eval(repr(Targeted({3, 1}))) == Targeted({3, 1})
    assert eval(repr(Untargeted(top_k=2))) == Untargeted(top_k=2)


def loss_cases(classes: int, count: int = 6) -> list[tuple[Goal, Aim]]:
    labels = LABELS[:count] % classes
    goals: list[Goal] = [Untargeted(), Targeted("next"), FalsePositive(target=1, probability=0.6)]
    if classes > 3:
        goals += [Untargeted(groups=(frozenset({0, 1}),)), Targeted({0, 3}), Untargeted(top_k=2), Targeted("next", top_k=2)]
    return [(goal, bind(goal, labels, classes)) for goal in goals]


class TestLosses:
    def test_cross_entropy(self) -> None:
        logits = random_logits(6, 4)
        loss = LOSSES["cross_entropy"]
        untargeted = loss(logits, bind(Untargeted(), LABELS, 4))
        torch.testing.assert_close(untargeted, functional.cross_entropy(logits, LABELS, reduction="none"))
        targets = (LABELS + 1) % 4
        targeted = loss(logits, bind(Targeted("next"), LABELS, 4))
        torch.testing.assert_close(targeted, -functional.cross_entropy(logits, targets, reduction="none"))
        p = logits.softmax(1)
        torch.testing.assert_close(loss(logits, bind(Targeted({0, 3}), LABELS, 4)), (p[:, 0] + p[:, 3]).log())
        grouped = loss(logits, bind(Untargeted(groups=(frozenset({0, 1}),)), torch.zeros_like(LABELS), 4))
        torch.testing.assert_close(grouped, -(p[:, 0] + p[:, 1]).log())

    def test_cross_entropy_gradient_is_torchs(self) -> None:
        logits = (random_logits(6, 4) * 20).float().requires_grad_()
        (ours,) = torch.autograd.grad(LOSSES["cross_entropy"](logits, bind(Untargeted(), LABELS, 4)).sum(), logits)
        (theirs,) = torch.autograd.grad(functional.cross_entropy(logits, LABELS, reduction="sum"), logits)
        torch.testing.assert_close(ours, theirs)

    def test_probability_margin(self) -> None:
        logits = random_logits(6, 4)
        p = logits.softmax(1)
        found = LOSSES["probability_margin"](logits, bind(Untargeted(), LABELS, 4))
        for i, y in enumerate(LABELS.tolist()):
            assert math.isclose(found[i], max(p[i, c].item() for c in range(4) if c != y) - p[i, y].item(), abs_tol=1e-12)

    @pytest.mark.parametrize("classes", [3, 4, 7])
    def test_dlr(self, classes: int) -> None:
        """Croce & Hein (2020), eq. 6: -(z_y - max_(i != y) z_i) / (z_pi1 - z_pi3)."""
        logits, labels = random_logits(6, classes), LABELS % classes
        found = LOSSES["dlr"](logits, bind(Untargeted(), labels, classes))
        for i, y in enumerate(labels.tolist()):
            z = logits[i].tolist()
            ranked = sorted(z, reverse=True)
            other = max(v for c, v in enumerate(z) if c != y)
            assert math.isclose(found[i].item(), -(z[y] - other) / (ranked[0] - ranked[2]), rel_tol=1e-12)

    @pytest.mark.parametrize("classes", [3, 4, 7])
    def test_targeted_dlr(self, classes: int) -> None:
        """Eq. 7: -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2), where the label is the strongest rival of the target."""
        logits, labels = random_logits(6, classes), LABELS % classes
        logits = logits.scatter(1, labels[:, None], logits.amax(1, keepdim=True) + 0.5)
        found = LOSSES["dlr"](logits, bind(Targeted("next"), labels, classes))
        for i, y in enumerate(labels.tolist()):
            z = logits[i].tolist()
            ranked, t = sorted(z, reverse=True), (y + 1) % classes
            low = (ranked[2] + ranked[3]) / 2 if classes > 3 else ranked[2]
            assert math.isclose(found[i].item(), -(z[y] - z[t]) / (ranked[0] - low), rel_tol=1e-12)

    def test_dlr_of_two_classes_is_the_margin(self) -> None:
        logits = random_logits(6, 2)
        for goal in (Untargeted(), Targeted("next")):
            aim = bind(goal, LABELS % 2, 2)
            assert torch.equal(LOSSES["dlr"](logits, aim), aim.margin(logits))

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_gradients_by_differences(self, name: str, classes: int) -> None:
        logits = random_logits(6, classes).requires_grad_()
        for goal, aim in loss_cases(classes):
            assert torch.autograd.gradcheck(lambda z, aim=aim: LOSSES[name](z, aim), (logits,), eps=1e-6), goal

    @pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"logit"}))
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_shift_changes_nothing(self, name: str, classes: int) -> None:
        logits = random_logits(6, classes)
        for _, aim in loss_cases(classes):
            for shift in (-300.0, 300.0):
                torch.testing.assert_close(LOSSES[name](logits + shift, aim), LOSSES[name](logits, aim))

    def test_dlr_is_blind_to_scale(self) -> None:
        logits = random_logits(6, 5)
        for goal in (Untargeted(), Targeted("next")):
            aim = bind(goal, LABELS, 5)
            for scale in (1e-3, 1e3):
                torch.testing.assert_close(LOSSES["dlr"](logits * scale, aim), LOSSES["dlr"](logits, aim))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_extreme_logits_stay_finite(self, name: str, classes: int, dtype: torch.dtype) -> None:
        ends = torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4])[:classes].expand(6, classes)
        for raw in (ends, torch.zeros(6, classes), torch.full((6, classes), -1e4), -ends):
            logits = raw.to(dtype).clone().requires_grad_()
            for goal, aim in loss_cases(classes):
                value = LOSSES[name](logits, aim)
                (gradient,) = torch.autograd.grad(value.sum(), logits)
                assert torch.isfinite(value).all(), goal
                assert torch.isfinite(gradient).all(), goal

    @pytest.mark.parametrize("name", LOSSES)
    def test_a_sample_does_not_see_its_neighbours(self, name: str) -> None:
        logits = random_logits(6, 5)
        aim = bind(Untargeted(), LABELS, 5)
        whole = LOSSES[name](logits, aim)
        assert whole.shape == (6,)
        for i in range(6):
            torch.testing.assert_close(LOSSES[name](logits[i : i + 1], bind(Untargeted(), LABELS[i : i + 1], 5))[0], whole[i])

    @pytest.mark.parametrize("name", LOSSES)
    def test_losses_grow_towards_the_goal(self, name: str) -> None:
        logits = random_logits(6, 5)
        for _, aim in loss_cases(5):
            if aim.goal.top_k > 1 and name in ("probability_margin",):
                continue
            nearer = torch.where(aim.wanted, logits + 0.05, logits)
            assert (LOSSES[name](nearer, aim) >= LOSSES[name](logits, aim) - 1e-9).all()
