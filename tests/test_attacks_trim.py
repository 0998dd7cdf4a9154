"""`Trim`: where it stops is known in closed form, or found by trying everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from contract_support import Counting, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.engine import Problem
from saddlepoint.errors import InputError

A = sp.attacks
Samples = tuple[Tensor, Tensor]
WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0, 0.25]])
Y = torch.zeros(8, dtype=torch.int64)


def two_classes() -> nn.Module:
    """Logits (0, <w, x> - 1)."""
    return linear(torch.cat([torch.zeros_like(WEIGHT), WEIGHT]), torch.tensor([0.0, -1.0]))


def inputs() -> tuple[Tensor, Tensor]:
    """Inputs of class 0 (8, 6), and points of class 1, of which all features have changed."""
    draw = torch.Generator().manual_seed(3)
    x = 0.3 + 0.05 * torch.rand(8, 6, generator=draw)
    x[:, 1] += 0.4
    far = x + torch.tensor([0.3, -0.35, 0.1, 0.4, -0.25, 0.05]) * (0.8 + 0.4 * torch.rand(8, 6, generator=draw))
    assert (x @ WEIGHT[0] < 1).all()
    assert (far @ WEIGHT[0] > 1).all()
    return x, far


def change_at(x: Tensor, far: Tensor, share: Tensor, norm: str) -> Tensor:
    """What is left of the change (8, 6) at a share (8,) of the way from the input."""
    change, at = far - x, share[:, None]
    largest = change.abs().amax(1, keepdim=True)
    match norm:
        case "l2":
            return at * change
        case "linf":
            return torch.maximum(torch.minimum(change, at * largest), -at * largest)
    return (change.abs() - (1 - at) * largest).clamp(min=0) * change.sign()


def smallest_shares(x: Tensor, far: Tensor, norm: str) -> Tensor:
    """The smallest share of the way where the class is another, (8,), by trying many."""
    found = torch.ones(8)
    for at in torch.linspace(1, 0, 20_001):
        found = torch.where((x + change_at(x, far, at.expand(8), norm)) @ WEIGHT[0] > 1, at, found)
    return found


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("access", [sp.Access.GRADIENTS, sp.Access.LABELS])
def test_it_ends_at_the_boundary(norm: str, access: sp.Access) -> None:
    x, far = inputs()
    model = sp.Model(two_classes(), access=access)
    result = sp.attack(model, x, Y, A.Trim(steps=40), sp.Minimize(norm), start=far)
    assert result.success.all()
    change = change_at(x, far, smallest_shares(x, far, norm), norm)
    length = torch.linalg.vector_norm(change.double(), {"l1": 1, "l2": 2, "linf": torch.inf}[norm], dim=1)
    torch.testing.assert_close(result.distance, length, rtol=2e-4, atol=1e-6)


def test_scores_lead_there_sooner_than_labels() -> None:
    x, far = inputs()

    class Seeing(A.Trim):  # type: ignore[misc]
        """As a part of an attack that sees scores."""

        declaration = replace(A.Trim.declaration, access=sp.Access.SCORES)

    both = [
        sp.attack(sp.Model(two_classes()), x, Y, attack, sp.Minimize("l2"), start=far, budget=sp.Budget(passes=8)).distance
        for attack in (Seeing(steps=7), A.Trim(steps=7))
    ]
    exact = torch.linalg.vector_norm(change_at(x, far, smallest_shares(x, far, "l2"), "l2"), dim=1)
    assert (both[0] < 1.002 * exact).all()
    assert (both[1] > 1.002 * exact).any()


def test_no_feature_is_left_that_is_not_needed() -> None:
    x, far = inputs()
    result = sp.attack(sp.Model(two_classes()), x, Y, A.Trim(steps=10), sp.Minimize("l0"), start=far)
    assert result.success.all()
    for clean, point, start in zip(x, result.adversarial, far, strict=True):
        changed = (point != clean).nonzero()[:, 0].tolist()
        assert torch.equal(point[changed], start[changed]), "what stays keeps its value"
        for one in changed:
            without = point.clone()
            without[one] = clean[one]
            assert float(without @ WEIGHT[0]) <= 1, "every single one is needed"
        by_size = (start - clean).abs().argsort().tolist()
        kept = set(range(6))
        for one in by_size:  # the same by hand
            point = torch.where(torch.tensor([k in kept - {one} for k in range(6)]), start, clean)
            kept -= {one} if float(point @ WEIGHT[0]) > 1 else set()
        assert set(changed) == kept
        best = min(
            size
            for size in range(1, 7)
            if any(
                float(torch.where(torch.tensor([k in which for k in range(6)]), start, clean) @ WEIGHT[0]) > 1
                for which in combinations(range(6), size)
            )
        )
        assert best <= len(changed) <= best + 1


def test_pixels_go_whole() -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.rand(1, 12, generator=draw)
    net = linear(torch.cat([torch.zeros_like(weight), weight]), torch.tensor([0.0, -1.5]))
    x, far = torch.zeros(4, 3, 2, 2), torch.rand(4, 3, 2, 2, generator=draw)
    far[:, :, 0, 0] = torch.tensor([1e-3, 0.0, 0.0])  # of no use
    far[:, :, 1, 1] = 1.0
    assert (far.flatten(1) @ weight[0] > 1.5).all()
    result = sp.attack(sp.Model(net), x, torch.zeros(4, dtype=torch.int64), A.Trim(), sp.L0(torch.inf, per="pixel"), start=far)
    moved = (result.adversarial != x).any(1)
    assert result.success.all()
    assert not moved[:, 0, 0].any()
    assert (moved.flatten(1).sum(1) < 4).all()
    same = moved[:, None].expand_as(far)
    assert torch.equal(result.adversarial[same], far[same])


def test_a_step_is_a_forward_pass(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    found = sp.attack(sp.Model(mlp), x, y, A.FMN(steps=6), sp.Minimize("l2"))
    counting = Counting(mlp)
    model = sp.Model(counting)
    result = sp.attack(model, x, y, A.Trim(steps=5), sp.Minimize("l2"), start=found.adversarial)
    fooled = result.having("fooled")
    assert fooled.any()
    assert counting.backward_rows == 0
    assert (result.queries.forward[fooled] <= 1 + 5).all()
    assert (result.distance <= found.distance)[fooled].all()
    assert (result.distance < found.distance)[fooled].any()


def test_without_a_success_there_is_nothing_to_do(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    result = sp.attack(sp.Model(mlp), x, y, A.Trim(), sp.Minimize("l2"), start=x + 1e-4)
    assert not result.having("fooled").any()
    assert (result.iterations[result.having("survived")] == 1).all()
    for attack in (A.Trim(), A.Sequence(A.Trim(), A.FMN(steps=3))):
        with pytest.raises(InputError, match="start"):
            sp.attack(sp.Model(mlp), x, y, attack, sp.Minimize("l2"))
    both = sp.attack(sp.Model(mlp), x, y, A.Sequence(A.Trim(), A.FMN(steps=20)), sp.Minimize("l2"), start=x + 1e-4)
    assert both.having("fooled").any()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_boundary_may_be_far_below(norm: str) -> None:
    """What a cut leaves is 29 % after four successes."""
    x, far = inputs()
    near = smallest_shares(x, far, norm)
    model = sp.Model(linear(torch.cat([torch.zeros_like(WEIGHT), WEIGHT]), torch.tensor([0.0, -1.0])), bounds=(-100, 100))
    result = sp.attack(model, x, Y, A.Trim(steps=80), sp.Minimize(norm), start=x + 40 * (far - x))
    change = 40 * change_at(x, far, near / 40, norm) if norm == "l2" else None
    assert result.success.all()
    margin = (result.adversarial @ WEIGHT[0] - 1).double()
    assert (margin.abs() < 1e-4).all()
    if change is not None:
        length = torch.linalg.vector_norm(change.double(), dim=1)
        torch.testing.assert_close(result.distance, length, rtol=2e-4, atol=1e-6)


def test_training_loops_trim_too(mlp: nn.Module, samples: Samples) -> None:
    """`perturb` keeps the nearest success for attacks that go on from it."""
    x, y = samples
    model, threat = sp.Model(mlp), sp.L2(2.0)
    attack = A.Finally(A.FMN(steps=20), A.Trim(steps=5))
    point = sp.perturb(mlp, x, y, attack, threat)
    whole = sp.attack(model, x, y, attack, threat, keep="smallest")
    fooled = whole.having("fooled")
    assert fooled.sum() > 10
    moved = torch.linalg.vector_norm((point - x).flatten(1).double(), dim=1)
    torch.testing.assert_close(moved[fooled], whole.distance[fooled], rtol=1e-4, atol=1e-6)
    for norm in (sp.Linf(0.3), sp.L2(2.0), sp.L1(10.0), sp.L0(10)):
        point = sp.perturb(mlp, x, y, A.minimal(norm.norm, 100), norm)
        fooled = sp.attack(model, x, y, A.minimal(norm.norm, 100), norm, keep="smallest").having("fooled")
        assert fooled.sum() > 5
        logits = model.logits(point)[fooled]
        others = logits.scatter(1, y[fooled, None], -torch.inf).amax(1)
        assert (others - logits.gather(1, y[fooled, None])[:, 0] > -1e-4).all(), "at the boundary, where rounding decides"
    with pytest.raises(sp.CapabilityError, match="loss"):
        sp.perturb(mlp, x, y, attack, threat, lambda logits, y: logits[:, 0])
    with pytest.raises(InputError, match="Sequence"):
        sp.perturb(mlp, x, y, A.Trim(), threat)


def test_labels_tell_no_margins(mlp: nn.Module, samples: Samples) -> None:
    seen: list[Tensor] = []

    class Look(A.Trim):  # type: ignore[misc, valid-type]
        def step(self, problem: Problem, state: object) -> object:
            seen.append(problem.best.surplus)
            return super().step(problem, state)

    found = sp.attack(sp.Model(mlp), *samples, A.FMN(steps=20), sp.Minimize("l2"))
    sp.attack(sp.Model(mlp), *samples, Look(steps=3), sp.Minimize("l2"), start=found.adversarial)
    assert set(torch.cat(seen).tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 1.5}, {"cut": 0.0}, {"cut": 1.0}])
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        A.Trim(**settings)  # type: ignore[arg-type]
