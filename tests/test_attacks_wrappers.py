"""Sequences and bisections of attacks: what they find, what they cost, and that nothing depends on the batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contract_support import Counting, Failing, Recording, linear, same
from test_linear_models import COUNT, DUAL, direction, gain_in_box, lead, smallest_eps
from test_linear_models import problem as linear_problem
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.apgd import APGD
from saddlepoint.engine import ALL_NORMS, Attack, Declaration, Problem
from saddlepoint.errors import InputError

A = sp.attacks
Bisect, Sequence = A.Bisect, A.Sequence
Samples = tuple[Tensor, Tensor]

ROUNDS = (  # wrapped attacks, and what they are asked for
    (Bisect(A.FGM(), 6), sp.Minimize("l2"), None),
    (Bisect(A.FGM(), 6), sp.Minimize("l0"), None),
    (Bisect(A.PGD(steps=4), 5), sp.Minimize("linf"), None),
    (Bisect(A.PGD(steps=4), 5), sp.Minimize("l2"), sp.Targeted("next")),
    (Bisect(A.NIFGSM(steps=4), 5), sp.Minimize("linf"), None),
    (Bisect(APGD(steps=4), 5), sp.Minimize("l1"), None),
    (Bisect(A.Restarts(A.PGD(steps=3), 2), 4), sp.Minimize("linf"), None),
    (Bisect(Sequence(A.FGM(), A.PGD(steps=3)), 4), sp.Minimize("l2"), None),
    (Sequence(A.DDN(steps=4), A.FMN(steps=5)), sp.Minimize("l2"), None),
    (Sequence(Bisect(A.PGD(steps=2), 3), A.DDN(steps=4)), sp.Minimize("l2"), sp.Targeted("next")),
    (Sequence(A.FGM(), A.PGD(steps=4), A.NIFGSM(steps=3)), sp.Linf(0.05), None),
    (Sequence(A.UniformNoise(), A.Restarts(A.PGD(steps=2), 3), A.FGSM()), sp.Linf(0.05), None),
    (A.Fork(A.DualAveraging(steps=12, hand_over=1.0), A.DDN(steps=4), A.FMN(steps=6)), sp.Minimize("l2"), None),
    (A.Fork(A.DualAveraging(steps=12, hand_over=1.1), Sequence(A.FMN(steps=2), A.FMN(steps=4))), sp.Minimize("l1"), None),
    (A.Fork(A.DualAveraging(steps=12, hand_over=1.1), A.DDN(steps=4), otherwise=A.FMN(steps=6)), sp.Minimize("l2"), None),
    (Sequence(A.FMN(steps=3), A.DualAveraging(steps=12, again=5)), sp.Minimize("linf"), None),
    (A.Finally(A.FMN(steps=5), A.Trim(steps=4)), sp.Minimize("l1"), None),
    (A.Finally(Sequence(A.FMN(steps=4), A.Trim(steps=3), A.FMN(steps=3)), A.Trim(steps=3)), sp.Minimize("l0"), None),
    (A.Finally(A.Fork(A.DualAveraging(steps=9, hand_over=1.1), A.DDN(steps=4)), A.FMN(steps=2)), sp.Minimize("l2"), None),
)
each_round = pytest.mark.parametrize(("attack", "threat", "goal"), ROUNDS, ids=lambda part: str(part)[:60])


# What holds for every wrapped attack


@each_round
def test_counts_are_what_the_model_sees(
    attack: Attack, threat: sp.threats.Threat, goal: sp.Targeted | None, mlp: nn.Module, samples: Samples
) -> None:
    for size in (5, 64):
        counting = Counting(mlp)
        result = sp.attack(sp.Model(counting), samples[0][:12], samples[1][:12], attack, threat, goal, batch_size=size)
        queries = result.queries
        assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
        assert counting.backward_rows == int(queries.backward.sum())
        (forward, backward), (_, opening) = attack.cost(10), attack.opening(10)
        assert (queries.forward <= attack.iterations * forward + 2).all()
        assert (queries.backward <= attack.iterations * backward + opening).all()
        assert (result.iterations <= attack.iterations).all()


@each_round
def test_budgets_are_never_exceeded(
    attack: Attack, threat: sp.threats.Threat, goal: sp.Targeted | None, mlp: nn.Module, samples: Samples
) -> None:
    x, y = samples[0][:6], samples[1][:6]
    clean = sp.Model(mlp).predict(x)
    for limit in (1, 2, 3, 13):
        for budget in (sp.Budget(passes=limit), sp.Budget(queries=limit)):
            result = sp.attack(sp.Model(mlp), x, y, attack, threat, goal, budget=budget, batch_size=3)
            spent = result.queries.total if budget.passes else result.queries.forward
            assert (spent <= limit).all()
            assert torch.equal(result.clean_predicted, clean)
            assert torch.isfinite(result.margin).all()


@each_round
def test_independence_of_the_batch(
    attack: Attack, threat: sp.threats.Threat, goal: sp.Targeted | None, mlp: nn.Module, samples: Samples
) -> None:
    model, x, y = sp.Model(mlp), samples[0][:12], samples[1][:12]
    whole = sp.attack(model, x, y, attack, threat, goal)
    found = torch.isfinite(whole.distance)
    alone = sp.attack(model, x, y, attack, threat, goal, batch_size=1)
    assert alone.status.tolist() == whole.status.tolist()
    torch.testing.assert_close(alone.distance[found], whole.distance[found], rtol=1e-3, atol=1e-4)
    order, ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)), torch.arange(len(x))
    permuted = sp.attack(model, x[order], y[order], attack, threat, goal, ids=ids[order], batch_size=7)
    assert permuted.status.tolist() == whole.status[order.numpy()].tolist()
    torch.testing.assert_close(permuted.distance, whole.distance[order], rtol=1e-3, atol=1e-4)


@each_round
def test_resume(attack: Attack, threat: sp.threats.Threat, goal: sp.Targeted | None, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:14].double(), samples[1][:14]  # in float32 a decision can hang on the company in the batch
    net, options = copy.deepcopy(mlp).double(), {"goal": goal, "batch_size": 4}
    with pytest.raises(sp.Interrupted) as stopped:
        sp.attack(sp.Model(Failing(net, KeyboardInterrupt(), after=25)), x, y, attack, threat, **options)
    done = stopped.value.result
    assert len(done) < len(x)
    lasting = sp.Model(Failing(net, KeyboardInterrupt(), after=-1))
    whole = sp.attack(lasting, x, y, attack, threat, **options)
    resumed = sp.attack(lasting, x, y, attack, threat, **options, resume=done)
    same(whole, resumed, exact=False)
    assert torch.equal(whole.queries.forward, resumed.queries.forward)
    kept = ~whole.having("already_wrong")  # whether those shared a first backward pass depends on their company
    assert torch.equal(whole.queries.backward[kept], resumed.queries.backward[kept])


@each_round
def test_repr_and_settings(attack: Attack, threat: sp.threats.Threat, goal: sp.Targeted | None) -> None:
    names = {name: getattr(A, name) for name in A.__all__} | {"APGD": APGD}
    rebuilt = eval(repr(attack), names)  # the repr is Python, that is what is tested
    assert rebuilt == attack
    assert hash(rebuilt) == hash(attack)
    settings = attack.settings()
    assert settings["name"] == type(attack).__name__
    inner = settings["attacks"] if "attacks" in settings else [settings["attack"]]
    parts = attack.attacks if isinstance(attack, (Sequence, A.Fork, A.Finally)) else (attack.attack,)
    assert inner == [part.settings() for part in parts]


# Bisect


@pytest.mark.parametrize("boxed", [False, True], ids=["no box", "box"])
@pytest.mark.parametrize(
    ("attack", "norm", "factor"),
    [
        (A.FGSM(), "linf", 1.005),
        (A.FGM(), "linf", 1.005),
        (A.FGM(), "l2", 1.005),
        (A.FGM(), "l1", 1.005),
        (A.MIFGSM(steps=5), "linf", 1.005),
        (A.PGD(steps=15), "linf", 1.005),
        (A.PGD(steps=15), "l2", 1.03),
        (A.PGD(steps=15), "l1", 1.03),
        (APGD(steps=15), "linf", 1.005),
        (APGD(steps=15), "l2", 1.02),
        (APGD(steps=15), "l1", 1.05),
    ],
    ids=str,
)
def test_closed_form(attack: Attack, norm: str, factor: float, boxed: bool) -> None:
    weight, bias, x, y, targets = linear_problem(3)
    w, needed, norm = direction(weight, y), lead(weight, bias, x, y), sp.Norm(norm)
    distance = needed / w.norm(p=DUAL[norm], dim=1)
    if boxed:
        distance = smallest_eps(lambda eps: gain_in_box(w, x, eps, norm), needed, norm)
        if isinstance(attack, A.FGM) and norm is sp.Norm.L2:
            factor = 1.1  # a clipped single step is shorter than its radius
    model = sp.Model(linear(weight, bias), bounds=(0, 1) if boxed else None)
    goal = sp.Targeted(targets) if boxed else None
    result = sp.attack(model, x, y, Bisect(attack), sp.Minimize(norm), goal)
    assert result.status.tolist() == ["fooled"] * COUNT
    assert (result.distance >= distance * (1 - 1e-6)).all()
    assert (result.distance <= distance * factor).all()


def test_closed_form_in_whole_numbers() -> None:
    """l0: the smallest number of features, and no run at a number that is known to fail."""
    weight, bias, x, y, _ = linear_problem(3)
    w, needed = direction(weight, y), lead(weight, bias, x, y)
    distance = smallest_eps(lambda eps: gain_in_box(w, x, eps, sp.Norm.L0), needed, sp.Norm.L0)
    result = sp.attack(sp.Model(linear(weight, bias)), x, y, Bisect(A.FGM(loss="margin"), 20), sp.Minimize("l0"))
    assert torch.equal(result.distance, distance)
    assert (result.iterations <= 1 + 2 + torch.log2(2 * distance).ceil()).all(), "halving an interval of whole numbers"


def test_levels_of_a_grid() -> None:
    """8-bit images: the smallest number of levels, and no run between two levels."""
    weight, bias, x, y, _ = linear_problem(2)
    x = torch.round(x * 255) / 255
    y = (x @ weight.T + bias).argmax(1)
    w, needed = direction(weight, y), lead(weight, bias, x, y)
    distance = smallest_eps(
        lambda eps: gain_in_box(w, x, torch.floor(255 * eps + 1e-6) / 255, sp.Norm.LINF), needed, sp.Norm.LINF
    )
    levels = torch.round(distance * 255)
    assert levels.amin() < levels.amax()
    model = sp.Model(linear(weight, bias))
    attack = Bisect(A.FGM(loss="margin"), 20, tolerance=0)
    result = sp.attack(model, x, y, attack, sp.Minimize("linf", grid=1 / 255))
    torch.testing.assert_close(result.distance * 255, levels)
    assert (result.iterations <= 8).all()


def test_first_radius_lies_where_the_margin_grows() -> None:
    """At a corner of the box there is room on one side only: the first radius is start times the distance on that side."""
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[1] = torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    model = sp.Model(linear(weight, torch.tensor([2.0, 0.0], dtype=torch.float64)))
    x, y = torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    result = sp.attack(model, x, y, Bisect(A.FGM(), 1, start=1.5), sp.Minimize("linf"))
    torch.testing.assert_close(result.distance, torch.tensor([1.5 * 0.2], dtype=torch.float64), rtol=1e-4, atol=0)


def test_first_radius_is_doubled_until_a_success() -> None:
    weight, bias, x, y, _ = linear_problem(2)
    model = sp.Model(linear(weight, bias), bounds=None)
    result = sp.attack(model, x, y, Bisect(A.FGM(), 4, start=0.3), sp.Minimize("l2"))
    distance = lead(weight, bias, x, y) / direction(weight, y).norm(dim=1)
    torch.testing.assert_close(result.distance, 1.2 * distance, rtol=1e-3, atol=0)


class Flat(nn.Module):
    """Without a gradient until the mean input has grown by a little; two classes."""

    def forward(self, x: Tensor) -> Tensor:
        far = torch.relu(x.flatten(1).mean(1) - 0.501)
        return torch.stack([torch.full_like(far, 0.5), 50 * far], 1)


def test_no_gradient_at_the_input() -> None:
    """A hundredth of the way to the far corner is tried first, doubled until something happens."""
    x, y = torch.full((3, 16), 0.5), torch.zeros(3, dtype=torch.int64)
    result = sp.attack(sp.Model(Flat()), x, y, Bisect(A.PGD(steps=10), 20), sp.Minimize("linf"))
    assert result.success.all()
    assert (result.distance < 0.05).all()


def test_nothing_to_find() -> None:
    net = linear(torch.zeros(3, 8), torch.tensor([3.0, 2.0, 1.0]))
    x, y = torch.full((2, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    result = sp.attack(sp.Model(net), x, y, Bisect(A.PGD(steps=3), 5), sp.Minimize("l2"))
    assert result.status.tolist() == ["survived"] * 2
    assert torch.isinf(result.distance).all()


def test_within_a_ball(mlp: nn.Module, samples: Samples) -> None:
    """In a ball it finds what is in it, and stops where the whole ball held nothing."""
    model, attack = sp.Model(mlp), Bisect(A.FGM(), 30, tolerance=1e-4)
    free = sp.attack(model, *samples, attack, sp.Minimize("l2"))
    eps = float(free.distance[free.having("fooled")].median())
    held = sp.attack(model, *samples, attack, sp.L2(eps), keep="smallest")
    assert (held.distance <= eps).all()
    # one step has other successes at other radii: near eps the two searches may differ
    clear = (free.distance < 0.95 * eps) | (free.distance > 1.05 * eps)
    assert clear.sum() > 18
    assert torch.equal(held.success[clear], (free.distance <= eps)[clear])
    survived = held.having("survived")
    assert survived.sum() > 3
    assert (held.iterations[survived] < 12).all(), "thirty runs in the same ball would find the same"


def test_tolerance_ends_it(mlp: nn.Module, samples: Samples) -> None:
    results = [
        sp.attack(sp.Model(mlp), *samples, Bisect(A.FGM(), 30, tolerance=tolerance), sp.Minimize("l2"))
        for tolerance in (0.3, 0.03, 0.003)
    ]
    fooled = results[0].having("fooled")
    coarse, middle, fine = (result.iterations[fooled] for result in results)
    assert (coarse <= middle).all()
    assert (middle <= fine).all()
    assert coarse.float().mean() + 1 < middle.float().mean() < fine.float().mean() - 1
    assert (fine < 31).all()


def test_random_starts_differ_between_runs() -> None:
    """The ninth run is not the first one again."""
    recording = Recording(linear(torch.zeros(2, 6), torch.tensor([2.0, 1.0])))
    x, y = torch.full((1, 6), 0.5), torch.zeros(1, dtype=torch.int64)
    sp.attack(sp.Model(recording), x, y, Bisect(A.PGD(steps=1), 3), sp.Minimize("linf"), batch_size=1)
    starts = {tuple((point[0] - 0.5).sign().tolist()) for point in recording.points if not torch.equal(point, x)}
    assert len(starts) >= 3


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (A.DDN(), {}), (A.UniformNoise(), {}), (A.PGD(), {"runs": 0}), (A.PGD(), {"runs": 2.0}),
        (A.PGD(), {"start": 0}), (A.PGD(), {"tolerance": -1}), (3, {}),
    ],
)  # fmt: skip
def test_bad_bisections(attack: object, settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Bisect(attack, **settings)


# Sequence


@dataclass(frozen=True)
class Seen:
    x: Tensor
    first: Tensor
    k: Tensor


@dataclass(frozen=True, kw_only=True)
class Watch(Attack):
    """Remembers what the sequence had found when its turn came, and is done after as many steps as the label says."""

    declaration: ClassVar[Declaration] = Declaration(summary="", reference="", norms=ALL_NORMS, minimizes=True, no_oracle="-")
    log: ClassVar[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = []

    @property
    def iterations(self) -> int:
        return 12

    def init(self, problem: Problem) -> Seen:
        found = problem.best
        return Seen(found.points, torch.where(found.success, found.distance, -1.0), problem.labels * 0)

    def step(self, problem: Problem, state: Seen) -> Seen:
        problem.loss_and_grad(state.x, "margin")
        self.log.append((problem.labels, problem.k, state.first, state.x))
        return Seen(state.x, state.first, torch.where(problem.k >= problem.labels, 1, 0))

    def done(self, state: Seen) -> Tensor:
        return state.k > 0


def test_a_later_stage_sees_what_was_found(mlp: nn.Module, samples: Samples) -> None:
    Watch.log.clear()
    model = sp.Model(mlp)
    alone = sp.attack(model, *samples, A.DDN(steps=6), sp.Minimize("l2"))
    result = sp.attack(model, *samples, Sequence(A.DDN(steps=6), Watch()), sp.Minimize("l2"))
    same(alone, result, exact=False)
    fooled = alone.having("fooled")
    labels, k, first = (torch.cat(column) for column in list(zip(*Watch.log, strict=True))[:3])
    seen = {(int(y), round(float(d), 4)) for y, d in zip(labels[k == 0], first[k == 0], strict=True)}
    assert seen == {(int(y), round(float(d), 4)) for y, d in zip(samples[1][fooled], alone.distance[fooled], strict=True)}


def test_stages_share_a_batch(mlp: nn.Module, samples: Samples) -> None:
    """Samples leave the first stage at different times; each makes the steps that it would make alone, in joint calls."""
    x, y = samples[0][:8], torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    net = linear(torch.eye(10, 64) * 1e-4, -torch.arange(10.0) * 1e-9)
    with torch.no_grad():  # every label is predicted, so that all are attacked, and nothing succeeds
        net[1].weight.zero_()
        x = x.clone()
        x.flatten(1)[:, :10] = nn.functional.one_hot(y, 10).float()
        net[1].weight[:, :10] = 50 * torch.eye(10)
    Watch.log.clear()
    counting = Counting(net)
    model = sp.Model(counting)
    model.probe(x)
    counting.calls.clear()
    result = sp.attack(model, x, y, Sequence(Watch(), A.BIM(steps=3)), sp.Linf(1e-3))
    assert result.status.tolist() == ["survived"] * 8
    assert result.iterations.tolist() == [1 + int(label) + 3 for label in y]
    # Watch: one a step; a look at its end; BIM: one a step; a look at its end; and the clean prediction
    assert result.queries.forward.tolist() == [1 + 1 + int(label) + 1 + 3 + 1 for label in y]
    assert counting.forward_rows == int(result.queries.forward.sum())
    assert len(counting.calls) < 35, "those in the second stage go through the model together"
    assert max(counting.calls) == 8


@dataclass
class Written:
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Writing(Watch):
    """Steps along the gradient, and writes the new iterate into the state that it was given."""

    @property
    def iterations(self) -> int:
        return 5

    def init(self, problem: Problem) -> Written:
        return Written(problem.best.points)

    def step(self, problem: Problem, state: Written) -> Written:
        gradient = problem.loss_and_grad(state.x, "margin").gradient
        state.x = problem.region.project(state.x + 0.02 * gradient.sign())
        return state

    def done(self, state: Written) -> Tensor:
        return torch.zeros(len(state.x), dtype=torch.bool)


def test_state_may_be_written_into(mlp: nn.Module, samples: Samples) -> None:
    attack = Sequence(Watch(), Writing())
    alone = sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(0.1), batch_size=1)
    assert 5 < int(alone.having("fooled").sum()) < 24
    same(alone, sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(0.1)), exact=False)


def test_best_of_all_stages(mlp: nn.Module, samples: Samples) -> None:
    model, threat = sp.Model(mlp), sp.Minimize("l2")
    parts = (A.DDN(steps=10), A.FMN(steps=10, alpha_init=0.3))
    each = torch.stack([sp.attack(model, *samples, part, threat).distance for part in parts])
    joint = sp.attack(model, *samples, Sequence(*parts), threat)
    assert (each.argmin(0) == 0).any()
    assert (each.argmin(0) == 1).any(), "each of the two is better somewhere"
    torch.testing.assert_close(joint.distance, each.amin(0), rtol=1e-4, atol=1e-5)


def test_first_success_ends_the_sequence(mlp: nn.Module, samples: Samples) -> None:
    result = sp.attack(sp.Model(mlp), *samples, Sequence(A.FGM(), A.PGD(steps=20)), sp.Linf(0.3))
    one = sp.attack(sp.Model(mlp), *samples, A.FGM(), sp.Linf(0.3)).having("fooled")
    assert one.sum() > 10
    assert (result.iterations[one] == 1).all()
    assert result.success.sum() >= one.sum()


def test_targeted_sequence(mlp: nn.Module, samples: Samples) -> None:
    goal = sp.Targeted("next")
    result = sp.attack(sp.Model(mlp), *samples, Sequence(A.FGM(), A.PGD(steps=10)), sp.Linf(0.3), goal)
    assert result.success.sum() > 8
    assert torch.equal(result.predicted[result.success], ((samples[1] + 1) % 10)[result.success])


@dataclass(frozen=True)
class Told:
    """Each sample's branch, and what has been asked."""

    x: Tensor
    branch: Tensor


class Tell(Attack):
    """Looks once, and sends each sample to the branch that its label says."""

    declaration = A.FGM.declaration
    iterations = 1

    def init(self, problem: Problem) -> Told:
        return Told(problem.origin, problem.labels % 3 - 1)

    def step(self, problem: Problem, state: Told) -> Told:
        problem.logits(state.x)
        return state

    def current(self, state: Told) -> Tensor:
        return state.x

    def verdict(self, state: Told) -> Tensor:
        return state.branch


def test_a_fork_sends_each_sample_to_its_branch(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    model, none = sp.Model(mlp), sp.Linf(0.0)
    result = sp.attack(model, x, y, A.Fork(Tell(), A.BIM(steps=3), A.BIM(steps=7)), none)
    wrong = model.predict(x) != y
    steps = torch.tensor([1, 4, 8])[y % 3]
    assert len(set(steps[~wrong].tolist())) == 3
    assert torch.equal(result.iterations[~wrong], steps[~wrong])
    others = A.Fork(Tell(), A.BIM(steps=3), A.BIM(steps=7), otherwise=A.BIM(steps=5))
    assert others.iterations == 8
    steps = torch.tensor([6, 4, 8])[y % 3]
    assert torch.equal(sp.attack(model, x, y, others, none).iterations[~wrong], steps[~wrong])
    one = A.Fork(Tell(), A.BIM(steps=3), otherwise=A.BIM(steps=5))  # without a second branch
    steps = torch.tensor([6, 4, 6])[y % 3]
    assert torch.equal(sp.attack(model, x, y, one, none).iterations[~wrong], steps[~wrong])
    with pytest.raises(InputError, match="branch"):
        A.Fork("dualaveraging")
    with pytest.raises(InputError, match="no verdict"):
        A.Fork(A.PGD(), A.FGM())


@pytest.mark.parametrize("limit", [20, 33])
def test_finally_keeps_back_what_the_last_attack_costs(limit: int, mlp: nn.Module, samples: Samples) -> None:
    model, threat = sp.Model(mlp), sp.Minimize("l2")
    whole = A.Finally(A.DualAveraging(steps=100), A.Trim(steps=3))
    for budget in (sp.Budget(passes=limit), sp.Budget(queries=limit)):
        result = sp.attack(model, *samples, whole, threat, budget=budget)
        attacked = result.having("fooled")
        assert attacked.any()
        backward = int(result.queries.backward[attacked].amax())
        opening = 9  # the first step looks at nine classes
        # three passes go to Trim, and one to a look at where the attack ended
        steps = 1 + (limit - 4 - 1 - opening) // 2 if budget.passes else limit - 4
        assert backward == opening + steps - 1
        spent = result.queries.total if budget.passes else result.queries.forward
        assert (spent[attacked] >= limit - 1).all()
    free = sp.attack(model, *samples, A.Finally(A.FMN(steps=5), A.Trim(steps=3)), threat)
    alone = sp.attack(model, *samples, A.FMN(steps=5), threat)
    assert int(free.iterations.max()) == 8
    both = free.having("fooled") & alone.having("fooled")
    assert (free.distance <= alone.distance)[both].all()
    assert (free.distance < 0.999 * alone.distance)[both].any()


def test_finally_goes_on_where_nothing_is_found(mlp: nn.Module, samples: Samples) -> None:
    """A budget as small as what is kept back is the attack's where there is no point to go on from."""
    model, threat = sp.Model(mlp), sp.Minimize("l2")
    for limit in (7, 9, 13, 30):
        budget = sp.Budget(passes=limit)
        alone = sp.attack(model, *samples, A.FMN(steps=100), threat, budget=budget)
        whole = sp.attack(model, *samples, A.Finally(A.FMN(steps=100), A.Trim(steps=8)), threat, budget=budget)
        assert torch.equal(whole.having("fooled"), alone.having("fooled"))
        assert int(whole.queries.total.max()) <= limit


def test_what_is_kept_back_is_for_the_last(mlp: nn.Module, samples: Samples) -> None:
    """All of its steps are made: with gradients of its own, in nests, after attacks that ask, and with draws."""
    made: list[int] = []

    class Count(A.DDN):  # type: ignore[misc]
        def step(self, problem: Problem, state: object) -> object:
            made.append(len(problem.labels))
            return super().step(problem, state)

    for attack, budget in (
        (A.Finally(A.FMN(steps=99), Count(steps=4)), sp.Budget(passes=41)),
        (A.Finally(A.Finally(A.FMN(steps=99), Count(steps=4)), A.Trim(steps=5)), sp.Budget(passes=60)),
        (A.Finally(A.CGBA(), Count(steps=4)), sp.Budget(passes=200)),
        (A.Finally(A.FMN(steps=99), Count(steps=4)), sp.Budget(queries=24)),
    ):
        made.clear()
        result = sp.attack(sp.Model(mlp), *samples, attack, sp.Minimize("l2"), budget=budget)
        assert result.having("fooled").sum() > 10
        assert sum(made) == 4 * int(result.having("fooled").sum())


def test_stages_spend_the_budget(mlp: nn.Module, samples: Samples) -> None:
    """What a stage's step costs is known while a sample is in it: the dearest stage doesn't end all of them."""
    dear = A.LinearClosedForm(steps=1)  # a forward and nine backward passes
    result = sp.attack(sp.Model(mlp), *samples, Sequence(A.DDN(steps=50), dear), sp.Minimize("l2"), budget=sp.Budget(passes=31))
    attacked = result.having("fooled")
    assert attacked.any()
    assert (result.queries.total[attacked] >= 30).all()


def test_declaration_of_a_sequence() -> None:
    whole = Sequence("fgm", A.PGD(steps=5), A.Restarts(A.PGD(steps=2), 3))
    assert whole.iterations == 1 + 5 + 6
    assert whole.declaration.norms == A.FGM.declaration.norms & A.PGD.declaration.norms
    assert whole.declaration.access is sp.Access.GRADIENTS
    assert not whole.declaration.minimizes
    assert whole.starts_at_origin
    assert whole.randomized
    assert not Sequence(A.FGM(), A.BIM()).randomized
    assert Sequence(A.DDN(), A.FMN()).declaration.minimizes
    assert not Sequence(A.OTCM(), A.PGD()).declaration.untargeted
    assert Sequence(A.UniformNoise(), A.FGM()).declaration.access is sp.Access.GRADIENTS
    with pytest.raises(sp.CapabilityError):
        sp.attack(sp.Model(nn.Flatten()), torch.rand(2, 3), torch.zeros(2).long(), whole, sp.Minimize("l2"))
    with pytest.raises(InputError):
        Sequence()
    with pytest.raises(InputError):
        Sequence(A.FGM(), 3)


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (sp.attacks.Bisect("fgsm", runs=3), "Bisect(FGSM) within Minimize(linf)"),
        (sp.attacks.Sequence("fmn", "dualaveraging"), "Sequence(FMN, DualAveraging) within Minimize(linf)"),
        (sp.attacks.Bisect(sp.attacks.Restarts("pgd", 2), runs=2), "Bisect(Restarts(PGD, 2)) within Minimize(linf)"),
    ],
)
def test_summaries_name_what_they_are_made_of(attack: sp.attacks.Bisect, name: str) -> None:
    net = torch.nn.Linear(4, 3, dtype=torch.float64)
    x = torch.full((3, 4), 0.5, dtype=torch.float64)
    model = sp.Model(net)
    result = sp.attack(model, x, model.predict(x), attack, sp.Minimize("linf"), budget=sp.Budget(passes=20))
    text = result.summary()
    assert text.startswith(name)
    assert "robust accuracy" not in text  # no ball, no robustness


def test_minimal_needs_a_norm_inside_of_others() -> None:
    with pytest.raises(sp.InputError, match=r"sp\.attacks\.minimal\(norm"):
        sp.attacks.Sequence("ddn", "minimal")


def test_a_budget_below_one_step_is_said() -> None:
    net = torch.nn.Linear(4, 3, dtype=torch.float64)
    x = torch.full((3, 4), 0.5, dtype=torch.float64)
    model = sp.Model(net)
    result = sp.attack(model, x, model.predict(x), "ddn", sp.Minimize("l2"), budget=sp.Budget(passes=2))
    assert any("does not pay for one step" in note for note in result.notes)
