"""The contract of every attack, generated from the registry: a new attack is checked here without a line of test."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from contract_support import (
    CASES,
    EPS,
    ONE_EACH,
    Case,
    Counting,
    Failing,
    Recording,
    linear,
    random_states,
    rows_of,
    same,
    small,
    snapshot,
    train,
)
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.engine.slots import beyond_confidence
from saddlepoint.threats import ball
from saddlepoint.trees import tree_map

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_norm = pytest.mark.parametrize("case", [case for case in CASES if case.goal is None], ids=str)
each_attack = pytest.mark.parametrize("case", ONE_EACH, ids=str)
Samples = tuple[Tensor, Tensor]


def run(case: Case, model: sp.Classifier, x: Tensor, y: Tensor, **options: object) -> sp.AttackResult:
    options = {"goal": case.goal, "threat": case.threat} | options
    return sp.attack(model, x, y, case.attack, **options)


def check_output(result: sp.AttackResult, x: Tensor, threat: sp.threats.Threat, bounds: tuple[float, float] | None) -> None:
    adversarial = result.adversarial
    assert adversarial.shape == x.shape
    assert adversarial.dtype == x.dtype
    assert adversarial.device == x.device
    assert torch.isfinite(adversarial).all()
    if bounds is not None:
        assert ((adversarial >= bounds[0]) & (adversarial <= bounds[1])).all()
    assert threat.contains(adversarial, x, bounds).all()
    if threat.norm is sp.Norm.LINF and threat.grid is None:
        assert ((adversarial - x).abs().double() <= threat.eps).all()  # in the arithmetic of the output's dtype
    assert (threat.distance(adversarial, x) <= threat.eps).all()


def check_truth(result: sp.AttackResult, model: sp.Classifier, x: Tensor, y: Tensor, goal: object) -> None:
    """Success is what the bare model says, alone and in any batch."""
    for size in (len(x), 1, 5):
        predicted = model.predict(result.adversarial, batch_size=size)
        reached = predicted == result.targets if goal.targeted else predicted != y
        assert torch.equal(result.success, reached & result.success), f"claims that fail in batches of {size}"
        assert torch.equal(predicted[result.success], result.predicted[result.success])
        margins = beyond_confidence(goal.aim(y, result.targets, 10), model.logits(result.adversarial, batch_size=size))
        assert torch.equal(margins[~result.success] > 2 * result.tau, torch.zeros_like(y, dtype=torch.bool)[~result.success])


# 1, 3 and 4: output, goal, truth


@each_case
def test_output_and_truth(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples
    goal = case.goal or case.attack.default_goal()
    for keep in ("first", "margin"):
        result = run(case, model, x, y, keep=keep)
        check_output(result, x, case.threat, model.bounds)
        check_truth(result, model, x, y, goal)
        clean = model.predict(x)
        assert torch.equal(result.clean_predicted, clean)
        wrong = (clean != y) & (not goal.targeted)
        assert torch.equal(result.having("already_wrong"), wrong)
        assert (result.distance[wrong] == 0).all()
        assert torch.equal(result.adversarial[wrong], x[wrong])
        assert (result.queries.forward[wrong] == 1).all()
        assert torch.equal(result.index, torch.arange(len(x)))
        if goal.targeted:
            at_target = clean == result.targets
            assert (result.status[at_target.numpy()] == "fooled").all()
            assert (result.distance[at_target] == 0).all()
            assert (result.queries.forward[at_target] == 1).all()
        torch.testing.assert_close(case.threat.distance(result.adversarial, x), result.distance, rtol=0, atol=0)


@each_norm
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-0.4242, 2.8215), None], ids=str)
def test_other_bounds(case: Case, bounds: tuple[float, float] | None, mlp: nn.Module, samples: Samples) -> None:
    if bounds is None and (case.norm is sp.Norm.L0 or isinstance(case.attack, sp.attacks.RayS)):
        with pytest.raises(sp.CapabilityError, match="bounds"):
            run(case, sp.Model(mlp, bounds=None), *samples)
        return
    low, high = bounds or (0.0, 1.0)
    x, y = samples[0][:8] * (high - low) + low, samples[1][:8]
    net = nn.Sequential(Shift(low, high - low), mlp)
    threat = case.with_eps(case.threat.eps * (high - low) if case.norm is not sp.Norm.L0 else case.threat.eps)
    x = x.clamp(low, high)
    check_output(run(case, sp.Model(net, bounds=bounds), x, y, threat=threat), x, threat, bounds)


@each_norm
def test_start(case: Case, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:10], samples[1][:10]
    recording = Recording(mlp)
    model = sp.Model(recording)
    start = (x + torch.linspace(-1, 1, x.numel()).view_as(x)).clamp(0, 1)  # outside the ball
    if not case.attack.takes_start:
        with pytest.raises(sp.CapabilityError, match="start"):
            run(case, model, x, y, start=start)
        return
    result = run(case, model, x, y, start=start)
    check_output(result, x, case.threat, (0, 1))
    clean, asked = mlp(x).argmax(1), torch.cat(recording.points)
    from_afar = case.attack.declaration.minimizes  # then it may begin anywhere in the input range
    begin = start if from_afar else case.threat.around(x, (0, 1)).project(start)
    for row in ((clean == y) | torch.tensor(not case.attack.declaration.untargeted)).nonzero()[:, 0]:
        assert bool((asked == begin[row]).flatten(1).all(1).any()), f"sample {row}: the model was not asked about its start"
    halves = [run(case, model, x[part], y[part], start=start[part], ids=part) for part in torch.arange(10).split(5)]
    torch.testing.assert_close(torch.cat([half.adversarial for half in halves]), result.adversarial, rtol=0, atol=1e-5)
    for bad, told in ((start[:3], "like x"), (start.double(), "float64"), (start / 0, "NaN or infinite"), (3, "int")):
        with pytest.raises(sp.InputError, match=told):
            run(case, model, x, y, start=bad)


class Shift(nn.Module):
    def __init__(self, low: float, width: float) -> None:
        super().__init__()
        self.low, self.width = low, width

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.low) / self.width


@each_case
def test_mask_and_grid(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples[0][:10], samples[1][:10]
    x = torch.round(x * 255) / 255
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:6] = True
    threat = type(case.threat)(case.threat.eps, mask=mask, grid=1 / 255)
    result = run(case, model, x, y, threat=threat)
    check_output(result, x, threat, (0, 1))
    assert torch.equal(result.adversarial[:, ~mask], x[:, ~mask])
    levels = (result.adversarial.double() * 255 - torch.round(result.adversarial.double() * 255)).abs()
    assert levels.max() < 1e-4
    check_truth(result, model, x, y, case.goal or case.attack.default_goal())


@each_norm
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:8].to(dtype), samples[1][:8]
    model = sp.Model(copy.deepcopy(mlp).to(dtype))
    result = run(case, model, x, y)
    check_output(result, x, case.threat, (0, 1))
    check_truth(result, model, x, y, case.goal or case.attack.default_goal())


# 2: side effects


@each_attack
@pytest.mark.parametrize("ending", ["normally", "by an error", "by Ctrl-C"])
def test_side_effects(case: Case, ending: str, cnn: nn.Module, samples: Samples) -> None:
    net: nn.Module = copy.deepcopy(cnn)
    net.train()
    net[1].eval()  # a mixture that must come back module by module
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.full_like(net[5].weight, 0.5)
    if ending != "normally":
        error = ValueError("the network fails") if ending == "by an error" else KeyboardInterrupt()
        net = Failing(net, error, after=11 if case.attack.iterations == 0 else 12)
    model = sp.Model(net)
    x, y = samples[0].clone().requires_grad_(), samples[1].clone()
    ids = torch.arange(24) + 5
    kept, before, states = (x.detach().clone(), x._version), snapshot(net), random_states()
    before["calls"] = None
    options = {"batch_size": 4, "ids": ids, "threat": case.with_eps(1e-3 if case.norm is not sp.Norm.L0 else 1)}
    if ending == "normally":
        run(case, model, x, y, **options)
    else:
        with pytest.raises(ValueError if ending == "by an error" else sp.Interrupted):
            run(case, model, x, y, **options)
    after = snapshot(net)
    after["calls"] = None
    for name, value in before.items():
        assert after[name] == value, name
    assert random_states() == states
    assert torch.equal(x.detach(), kept[0])
    assert x._version == kept[1]
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(y, samples[1])
    assert torch.equal(ids, torch.arange(24) + 5)


# 3: what doesn't fit is an error before any query


@pytest.mark.parametrize("cls", sp.attacks.find(), ids=lambda cls: cls.__name__)
def test_unsupported_combinations(cls: type[sp.attacks.PGD], mlp: nn.Module, samples: Samples) -> None:
    counting = Counting(mlp)
    can, attack, norm = cls.declaration, cls(), min(cls.declaration.norms)

    def refused(
        threat: sp.threats.Threat, goal: object = None, access: sp.Access = sp.Access.PARAMETERS, x: Tensor = samples[0]
    ) -> None:
        with pytest.raises(sp.CapabilityError):
            sp.attack(sp.Model(counting, access=access), x, samples[1], attack, threat, goal)
        assert counting.calls == []

    for other in set(sp.Norm) - can.norms:
        refused(ball(other, EPS[other]))
    if not can.minimizes:
        refused(sp.Minimize(norm))
    if not can.untargeted:
        refused(ball(norm, EPS[norm]), sp.Untargeted())
    if not can.targeted:
        refused(ball(norm, EPS[norm]), sp.Targeted("next"))
    for access in sp.Access:
        if access < can.access:
            refused(ball(norm, EPS[norm]), access=access)
    if sp.Norm.L0 in can.norms:
        refused(sp.L0(3, per="pixel"), x=samples[0].flatten(1))


# 5: best, not last


@each_case
@pytest.mark.parametrize("keep", ["first", "margin"])
def test_best_of_all_evaluated(case: Case, keep: str, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:6], samples[1][:6]
    goal = case.goal or case.attack.default_goal()
    threat = case.with_eps(2 if case.norm is sp.Norm.L0 else case.threat.eps / 2)
    for i in range(len(x)):
        recording = Recording(mlp)
        model = sp.Model(recording)
        model.probe(x[:1])
        recording.points.clear()
        result = run(case, model, x[i : i + 1], y[i : i + 1], keep=keep, threat=threat, ids=torch.tensor([i]))
        points = torch.cat(recording.points)
        feasible = threat.contains(points, x[i].expand_as(points), (0, 1))
        label = y[i].expand(len(points))
        aim = goal.aim(label, result.targets.expand(len(points)), 10)
        margin = beyond_confidence(aim, mlp(points).detach()).masked_fill(~feasible, -torch.inf)
        if result.status[0] == "already_wrong":
            continue
        assert (points == result.adversarial).flatten(1).all(1).any(), "the returned point was evaluated"
        if keep == "first" and result.success[0]:
            first = int((margin >= result.tau).nonzero()[0])
            assert torch.equal(points[first], result.adversarial[0])
            done = first >= len(points) - 1 - case.inner.width  # but for the rest of its step, and its confirmation
            assert done or case.looks_back
        else:
            best = float(margin.max())
            torch.testing.assert_close(float(result.margin[0]), best, rtol=1e-4, atol=1e-4)
        if not result.success[0]:
            assert margin.max() < 2 * result.tau


@each_attack
def test_a_step_writes_into_no_tensor_of_its_state(
    case: Case, model: sp.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves alone isn't copied, so a change that PyTorch can't see would be lost."""
    steps = []

    def watched(self: sp.Attack, problem: sp.engine.Problem, state: object) -> object:
        before = tree_map(torch.clone, state)
        after = original(self, problem, state)
        tree_map(lambda old, now: steps.append(torch.equal(old.nan_to_num(), now.nan_to_num())) or old, before, state)
        return after

    original = type(case.attack).step
    monkeypatch.setattr(type(case.attack), "step", watched)
    run(case, model, samples[0][:6], samples[1][:6])
    assert steps or not case.attack.iterations
    assert all(steps)


# 6: independence


@each_case
def test_independence(case: Case, model: sp.Model, samples: Samples) -> None:
    x, y = samples[0].double(), samples[1]  # for a search that turns at a rounding error goes elsewhere
    if case.asks_for_labels:  # one by one, their thousands of questions take long
        x, y = x[:8], y[:8]
    model = sp.Model(copy.deepcopy(model.net).double())
    ids = torch.arange(len(x)) * 7 + 3
    whole = run(case, model, x, y, ids=ids, batch_size=64)
    same(whole, run(case, model, x, y, ids=ids, batch_size=1), exact=False)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    same(rows_of(whole, order), run(case, model, x[order], y[order], ids=ids[order], batch_size=5), exact=False)
    if case in ONE_EACH:
        parts = [run(case, model, x[s], y[s], ids=ids[s]) for s in (slice(0, 5), slice(5, None))]
        assert [*parts[0].status, *parts[1].status] == whole.status.tolist()
        torch.testing.assert_close(torch.cat([p.distance for p in parts]), whole.distance, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([p.adversarial for p in parts]), whole.adversarial, rtol=1e-3, atol=1e-3)


@each_attack
def test_seed(case: Case, model: sp.Model, samples: Samples) -> None:
    same(run(case, model, *samples, seed=3), run(case, model, *samples, seed=3))
    tiny = case.with_eps(1 if case.norm is sp.Norm.L0 else 1e-3)  # all survive, so the end of the search is returned
    seen = []
    for seed in (0, 1):
        recording = Recording(model.net)
        run(case, sp.Model(recording), *samples, seed=seed, keep="last", threat=tiny)
        seen.append(torch.cat(recording.points))
    assert torch.equal(*seen) != case.attack.randomized


# 7: edge cases


@each_case
def test_edge_cases(case: Case, model: sp.Model, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    one = run(case, model, x[1:2], y[1:2])
    assert len(one) == 1
    empty = run(case, sp.Model(Counting(mlp)), x[:0], y[:0])
    assert len(empty) == 0
    assert empty.adversarial.shape == x[:0].shape
    assert "samples" in empty.summary()
    if not case.targeted:
        wrong = run(case, model, x[:6], (model.predict(x[:6]) + 1) % 10)
        assert wrong.status.tolist() == ["already_wrong"] * 6
        assert wrong.queries.forward.tolist() == [1] * 6
        assert wrong.queries.backward.sum() == 0
        assert wrong.queries.verify.sum() == 0
        assert math.isnan(wrong.success_rate)
    still = run(case, model, x, y, threat=case.with_eps(0))
    assert torch.equal(still.adversarial, x)
    assert not (still.having("fooled") & (still.clean_predicted == y)).any()
    binary = (x > 0.5).float()
    check_output(run(case, model, binary, y), binary, case.threat, (0, 1))


@each_norm
def test_few_classes(case: Case, digits: Samples) -> None:
    for classes in (2, 3, 1):
        chosen = digits[1] < max(classes, 2)
        x, y = digits[0][chosen], digits[1][chosen]
        torch_state = torch.get_rng_state()
        torch.manual_seed(0)
        outputs = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        torch.set_rng_state(torch_state)
        if classes > 1:
            train(outputs, x[:100], y[:100], epochs=20)
        else:
            with torch.no_grad():
                difference = x[y == 1].mean(0) - x[y == 0].mean(0)
                middle = (x[y == 1].mean(0) + x[y == 0].mean(0)) / 2
                outputs[1].weight.copy_(3 * difference.flatten()[None])
                outputs[1].bias.copy_(-3 * (difference * middle).sum()[None])
        model, x, y = sp.Model(outputs), x[:12], y[:12]
        result = run(case, model, x, y)
        check_output(result, x, case.threat, (0, 1))
        predicted = model.predict(result.adversarial)
        assert torch.equal(predicted[result.success], result.predicted[result.success])
        assert (predicted[result.success] != y[result.success]).all() or (result.clean_predicted != y).any()
        if case.attack.declaration.access is sp.Access.GRADIENTS:
            patient = case
            if case.attack.declaration.minimizes:
                patient = replace(case, attack=small(type(case.attack), steps=200, searches=9, initial_c=0.1))
            huge = run(patient, model, x, y, threat=case.with_eps(64 if case.norm in (sp.Norm.L1, sp.Norm.L0) else 8))
            assert huge.success.float().mean() > 0.5


@each_norm
def test_negative_logits(case: Case, mlp: nn.Module, samples: Samples) -> None:
    """Shifting all logits far below 0 changes nothing (but roundings)."""
    x, y = samples[0].double(), samples[1]
    net = copy.deepcopy(mlp).double()
    plain = run(case, sp.Model(net), x, y)
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted[3].bias -= 60
    below = run(case, sp.Model(shifted), x, y)
    assert (sp.Model(shifted).logits(x) < 0).all()
    near = plain.margin.abs() < 0.01
    differ = (plain.status != below.status) & ~near.numpy()
    assert differ.sum() <= (2 if case.asks_for_labels else 0)  # of 24


@each_norm
def test_zero_gradient(case: Case, samples: Samples) -> None:
    """A constant model: nothing is found, nothing breaks, and it is said."""
    x, y = samples[0][:6], torch.zeros(6, dtype=torch.int64)
    net = linear(torch.zeros(4, 64), torch.tensor([3.0, 2.0, 1.0, 0.0]))
    result = run(case, sp.Model(net), x, y)
    check_output(result, x, case.threat, (0, 1))
    assert result.status.tolist() == ["survived"] * 6
    if case.attack.declaration.access is sp.Access.GRADIENTS:
        assert (result.zero_gradients > 0).all()
        assert any("zero" in note for note in result.notes)


def alike(case: Case, first: sp.AttackResult, second: sp.AttackResult) -> None:
    if case.asks_for_labels:
        assert int((first.status != second.status).sum()) <= 1  # of eight
    else:
        same(first, second, exact=False)


@each_norm
def test_ranks_and_layouts(case: Case, mlp: nn.Module, cnn: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:8], samples[1][:8]
    reference = run(case, sp.Model(mlp), x, y)
    for shape in ((64,), (4, 16), (1, 8, 8), (1, 4, 4, 4)):
        reshaped = x.reshape(8, *shape)
        result = run(case, sp.Model(mlp), reshaped, y)
        check_output(result, reshaped, case.threat, (0, 1))
        if not case.attack.declaration.spatial:
            alike(case, reference, result)
    wide = torch.zeros(8, 1, 8, 16)
    wide[..., ::2] = x
    for layout in (wide[..., ::2], x.flip(3).flip(3), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(layout, x)
        alike(case, reference, run(case, sp.Model(mlp), layout, y))
    plain = run(case, sp.Model(cnn), x, y)
    alike(case, plain, run(case, sp.Model(cnn), x.contiguous(memory_format=torch.channels_last), y))


# 9: cost


def cost_of_survivors(case: Case) -> tuple[int, int]:
    """The table of the engine's page."""
    attack, times = case.inner, case.attack.times if case.wrapped else 1
    steps, extra = attack.iterations * times, 0 if attack.judge else times - 1
    if attack.width > 1:
        return attack.width * steps + 2 + extra, 0
    first = attack.opening(10)
    forward_steps, backward_steps = (
        one + (steps - 1) * each if steps else 0 for one, each in zip(first, attack.cost(10), strict=True)
    )
    return forward_steps + (not attack.starts_at_origin) + (not attack.judge) + extra, backward_steps


@each_case
def test_cost(case: Case, mlp: nn.Module, samples: Samples) -> None:
    samples = (samples[0][:12], samples[1][:12]) if case.asks_for_labels else samples
    for eps, size in ((case.threat.eps, 7), (1 if case.norm is sp.Norm.L0 else 1e-3, 64)):
        counting = Counting(mlp)
        model = sp.Model(counting)
        result = run(case, model, *samples, threat=case.with_eps(eps), batch_size=size)
        queries = result.queries
        assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
        assert counting.backward_rows == int(queries.backward.sum())
        assert model.queries.forward == counting.forward_rows
        assert model.queries.backward == counting.backward_rows
        fooled, survived = result.having("fooled"), result.having("survived")
        assert (queries.verify == fooled.long()).all()
        forward, backward = cost_of_survivors(case)
        assert (queries.forward <= forward).all()
        assert (queries.backward <= backward).all()
        if not case.costs_vary:
            assert (queries.forward[survived] == forward).all()
            assert (queries.backward[survived] == backward).all()
            assert (result.iterations[survived] == case.attack.iterations).all()


@each_attack
def test_budgets(case: Case, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:9], samples[1][:9]
    tiny = case.with_eps(1 if case.norm is sp.Norm.L0 else 0.02)
    clean = sp.Model(mlp).predict(x)
    best = torch.full((9,), -torch.inf, dtype=torch.float64)
    for limit in (1, 2, 3, 5, 8):
        for budget in (sp.Budget(passes=limit), sp.Budget(queries=limit)):
            result = run(case, sp.Model(mlp), x, y, threat=tiny, budget=budget, batch_size=4, keep="margin")
            spent = result.queries.total if budget.passes else result.queries.forward
            assert (spent <= limit).all()
            assert torch.equal(result.clean_predicted, clean), "everyone gets a clean prediction"
            assert torch.isfinite(result.margin).all()
            check_output(result, x, tiny, (0, 1))
            if budget.passes and not case.attack.randomized:
                assert (result.margin >= best - 1e-4).all(), "more budget, no worse"
                best = result.margin


@each_attack
def test_model_calls_do_not_grow_with_samples(case: Case, mlp: nn.Module, digits: Samples) -> None:
    tiny = case.with_eps(1 if case.norm is sp.Norm.L0 else 1e-3)
    survivor = int(run(case, sp.Model(mlp), digits[0][:8], digits[1][:8], threat=tiny).having("survived").nonzero()[0])
    x, y = digits[0][survivor], digits[1][survivor]

    def calls(count: int) -> int:
        counting = Counting(mlp)
        model = sp.Model(counting)
        model.probe(digits[0][:64])
        counting.calls.clear()
        batch = 64 * case.inner.width if case.inner.width > 1 else None
        run(case, model, x.expand(count, *x.shape), y.expand(count), threat=tiny, batch_size=batch)
        return len(counting.calls)

    # samples of attacks in phases ask apart, and the one that takes longest is alone in the end
    assert calls(64) <= (4 if case.asks_for_labels else 1.5) * calls(1)
