"""The contract of attacks that look for the smallest perturbation, generated from the registry."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from contract_support import CASES, Case, Counting, linear, small
from torch import Tensor, nn

import saddlepoint as sp

MINIMAL = [case for case in CASES if case.attack.declaration.minimizes and not case.wrapped]
each_case = pytest.mark.parametrize("case", MINIMAL, ids=str)
each_norm = pytest.mark.parametrize("case", [case for case in MINIMAL if case.goal is None], ids=str)
Samples = tuple[Tensor, Tensor]


def run(case: Case, model: sp.Classifier, x: Tensor, y: Tensor, **options: object) -> sp.AttackResult:
    options = {"attack": case.attack, "threat": sp.Minimize(case.norm), "goal": case.goal} | options
    return sp.attack(model, x, y, **options)


def patient(case: Case) -> dict[str, object]:
    """The attack with time to converge."""
    if case.asks_for_labels:  # whose steps cost more and more
        return {"attack": type(case.attack)(), "budget": sp.Budget(queries=300)}
    return {"attack": small(type(case.attack), steps=100, searches=9)}


def test_there_are_attacks_for_every_norm() -> None:
    assert {case.norm for case in MINIMAL} == set(sp.Norm)
    assert set(sp.attacks.find(minimizes=True)) == {type(case.attack) for case in MINIMAL}


@each_case
def test_distances_are_true(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples
    result = run(case, model, x, y, **patient(case) if case.goal is None else {})
    adversarial = result.adversarial
    assert adversarial.shape == x.shape
    assert torch.isfinite(adversarial).all()
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    for size in (24, 1, 5):
        predicted = model.predict(adversarial, batch_size=size)
        reached = predicted == result.targets if case.targeted else predicted != y
        assert reached[result.success].all()
    found = result.success
    measured = sp.Minimize(case.norm).distance(adversarial, x)
    torch.testing.assert_close(result.distance[found], measured[found], rtol=0, atol=0)
    failed = result.having("survived")
    assert torch.isinf(result.distance[failed]).all()
    assert (result.distance[result.having("already_wrong")] == 0).all()
    if case.goal is None:
        assert found.float().mean() > 0.5


@each_case
def test_independence(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples[0].double(), samples[1]  # in float32 two roundings can lead to two boundaries
    if case.asks_for_labels:  # one by one, their thousands of questions take long
        x, y = x[:5], y[:5]
    model = sp.Model(copy.deepcopy(model.net).double())
    ids = torch.arange(len(x)) * 7 + 3
    whole = run(case, model, x, y, ids=ids, batch_size=64)
    for size in (1, 5) if case.goal is None else (1,):
        other = run(case, model, x, y, ids=ids, batch_size=size)
        assert (other.status == whole.status).all()
        torch.testing.assert_close(other.distance, whole.distance, rtol=1e-4, atol=1e-4)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    permuted = run(case, model, x[order], y[order], ids=ids[order], batch_size=3)
    assert (permuted.status == whole.status[order.numpy()]).all()
    torch.testing.assert_close(permuted.distance, whole.distance[order], rtol=1e-4, atol=1e-4)


@each_norm
def test_budgets_and_counts(case: Case, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:9], samples[1][:9]
    for limit in (1, 5, 13, 40):
        counting = Counting(mlp)
        result = run(case, sp.Model(counting), x, y, **patient(case) | {"budget": sp.Budget(passes=limit)}, batch_size=4)
        assert (result.queries.total <= limit).all()
        queries = result.queries
        assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
        assert counting.backward_rows == int(queries.backward.sum())


@each_norm
def test_bounds_ranks_and_dtypes(case: Case, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:6], samples[1][:6]
    for shape in ((64,), (4, 16), (1, 4, 4, 4)):
        result = run(case, sp.Model(mlp), x.reshape(6, *shape), y)
        assert result.adversarial.shape == (6, *shape)
    half = run(case, sp.Model(copy.deepcopy(mlp).to(torch.bfloat16)), x.to(torch.bfloat16), y)
    assert half.adversarial.dtype == torch.bfloat16
    binary = (x > 0.5).float()
    edge = run(case, sp.Model(mlp), binary, y)
    assert ((edge.adversarial >= 0) & (edge.adversarial <= 1)).all()
    if case.norm is sp.Norm.L0:
        with pytest.raises(sp.CapabilityError, match="bounds"):
            run(case, sp.Model(mlp, bounds=None), x, y)
        return
    with contextlib.suppress(sp.CapabilityError):  # a change of variable needs them
        assert torch.isfinite(run(case, sp.Model(mlp, bounds=None), x, y).adversarial).all()


@each_norm
def test_masked_features_stay(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[..., ::2] = True
    result = run(case, model, x, y, threat=sp.Minimize(case.norm, mask=mask))
    assert torch.equal(result.adversarial[..., 1::2], x[..., 1::2])


@each_norm
def test_a_constant_model_has_no_boundary(case: Case, samples: Samples) -> None:
    x, y = samples[0][:6], torch.zeros(6, dtype=torch.int64)
    net = linear(torch.zeros(4, 64), torch.tensor([3.0, 2.0, 1.0, 0.0]))
    result = run(case, sp.Model(net), x, y)
    assert result.status.tolist() == ["survived"] * 6
    assert torch.isinf(result.distance).all()
    assert torch.isfinite(result.adversarial).all()


@pytest.mark.parametrize("norm", sorted(sp.Norm))
@pytest.mark.parametrize("passes", [1, 12, 30, 200])
def test_the_recommended_sequence_keeps_its_budget(norm: sp.Norm, passes: int, model: sp.Model, samples: Samples) -> None:
    result = sp.attack(model, *samples, "minimal", sp.Minimize(norm), budget=sp.Budget(passes=passes))
    assert (result.queries.total <= passes).all()
    if passes >= 30:
        assert result.having("survived").sum() == 0
    if passes == 200:
        attacked = result.having("fooled")
        assert (result.queries.total[attacked] >= (180 if norm is sp.Norm.L0 else 195)).all(), "and spends it"


def test_more_passes_find_smaller_perturbations(model: sp.Model, samples: Samples) -> None:
    for norm in sp.Norm:
        means = [
            float(sp.attack(model, *samples, "minimal", sp.Minimize(norm), budget=sp.Budget(passes=n)).distance.mean())
            for n in (30, 400)
        ]
        assert means[1] <= means[0]
        assert math.isfinite(means[0])
