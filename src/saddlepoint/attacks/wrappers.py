"""Attacks made of attacks: repeated from other starts, one after another, or at one radius after another."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import as_attack
from saddlepoint.engine import Attack, Problem, State
from saddlepoint.errors import InputError
from saddlepoint.goals import Goal, Loss
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import put, select, take


def _length(attack: Attack) -> int:
    """Steps of a run; an attack without steps has one, which looks at its point."""
    return max(attack.iterations, 1)


def _advance(attack: Attack, problem: Problem, inner: State, k: Tensor, run: Tensor) -> tuple[State, Tensor]:
    """One step of an attack's run number `run` (B,), at its iteration k (B,): the state, and which runs are over."""
    if attack.iterations:
        inner = attack.step(problem.restarted(run, k), inner)
    over = k + 1 >= _length(attack)
    done = attack.done(inner)
    return inner, over if done is None else over | done.cpu()


def _look(attack: Attack, problem: Problem, inner: State, which: Tensor) -> None:
    """Evaluate the last iterates of the runs that are over, unless their steps did."""
    which = which & attack.unseen(inner)
    if bool(which.any()):
        owner = which.nonzero()[:, 0].to(problem.origin.device)
        problem.predictions(attack.current(inner)[owner], owner)


def _with_look(attack: Attack, cost: tuple[int, int]) -> tuple[int, int]:
    """The cost of a step that may be the attack's last, after which it is looked at where it ended."""
    counted = isinstance(attack, _OfOne | _Staged)  # whose own steps may end with a look
    return cost[0] + (attack.looks_last and not counted), cost[1]


class _OfOne(Attack):
    """An attack made of runs of `attack`, which says what it is."""

    attack: Attack

    @property
    @final
    def judge(self) -> bool:
        return self.attack.judge

    @property
    @final
    def looks_last(self) -> bool:
        return self.attack.looks_last

    @final
    def unseen(self, state: State) -> Tensor | bool:
        return self.attack.unseen(state.inner)

    @property
    @final
    def width(self) -> int:
        return self.attack.width

    @property
    @final
    def objective(self) -> str | Loss:
        return self.attack.objective

    @final
    def default_goal(self) -> Goal:
        return self.attack.default_goal()

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        forward, backward = self.attack.cost(classes)
        # a run's last step also looks at where it ended
        return max(forward + self.looks_last, 1), max(backward, self._least_backward)

    @property
    def _least_backward(self) -> int:
        return 0

    @final
    def current(self, state: State) -> Tensor:
        return self.attack.current(state.inner)


@dataclass(frozen=True)
class Restarting:
    """The inner attack's state, and how far each sample has come: restart and iteration within it, (B,) each."""

    inner: State
    restart: Tensor
    k: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Restarts(_OfOne):
    """Run a randomised attack `times` times from fresh random starts; the best point of all runs counts.

    >>> import saddlepoint as sp
    >>> sp.attacks.Restarts(sp.attacks.PGD(steps=20), 5).iterations
    100
    """

    attack: Attack
    times: int

    def __init__(self, attack: Attack | str, times: int) -> None:
        attack = as_attack(attack)
        object.__setattr__(self, "attack", attack)
        object.__setattr__(self, "times", times)
        if not isinstance(times, int) or times < 1:
            raise InputError(f"times must be a whole number >= 1; got {times}")
        if not attack.randomized:
            raise InputError(f"{type(attack).__name__} has no random start: every restart would be the same")
        object.__setattr__(self, "declaration", attack.declaration)

    @property
    def iterations(self) -> int:
        return _length(self.attack) * self.times - (self.attack.iterations == 0)

    @property
    def starts_at_origin(self) -> bool:
        return self.attack.starts_at_origin

    @property
    def takes_start(self) -> bool:
        return self.attack.takes_start

    @property
    def recalls(self) -> bool:
        return self.attack.recalls

    @property
    def randomized(self) -> bool:
        return True

    def next_cost(self, state: Restarting, k: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        return self.attack.next_cost(state.inner, state.k, classes)

    def init(self, problem: Problem) -> Restarting:
        zero = torch.zeros_like(problem.k)
        return Restarting(self.attack.init(problem.restarted(zero, zero)), zero, zero)

    def step(self, problem: Problem, state: Restarting) -> Restarting:
        inner, over = _advance(self.attack, problem, state.inner, state.k, state.restart)
        k, restart = state.k + 1, state.restart
        over &= restart + 1 < self.times
        if bool(over.any()):
            _look(self.attack, problem, inner, over)
            restart = restart + over.long()
            k = torch.where(over, torch.zeros_like(k), k)
            fresh = self.attack.init(problem.restarted(restart, torch.zeros_like(k)))
            inner = select(over, fresh, inner)
        return Restarting(inner, restart, k)

    def done(self, state: Restarting) -> Tensor | None:
        done = self.attack.done(state.inner)
        return None if done is None else done & (state.restart + 1 >= self.times).to(done.device)


@dataclass(frozen=True)
class Sequential:
    """Every stage's state, the stage that each sample is in, its iteration there, and whether that was its last, (B,) each."""

    inner: tuple[State, ...]
    stage: Tensor
    k: Tensor
    over: Tensor


@dataclass(frozen=True, kw_only=True)
class _Staged(Attack):
    """Several attacks of which each sample is in one at a time. Samples in different ones share a batch."""

    attacks: tuple[Attack, ...]

    def __init__(self, *attacks: Attack | str) -> None:
        if not attacks:
            raise InputError(f"{type(self).__name__} needs at least one attack")
        parts = tuple(as_attack(attack) for attack in attacks)
        object.__setattr__(self, "attacks", parts)
        each = [part.declaration for part in parts]
        object.__setattr__(
            self,
            "declaration",
            replace(
                each[0],
                summary=", then ".join(type(part).__name__ for part in parts),
                reference="; ".join(dict.fromkeys(one.reference for one in each)),
                norms=frozenset[Norm].intersection(*(one.norms for one in each)),
                access=max((one.access for one in each), default=Access.LABELS),
                targeted=all(one.targeted for one in each),
                untargeted=all(one.untargeted for one in each),
                minimizes=all(one.minimizes for one in each),
                iterative=True,
                linear_oracle=min((one.linear_oracle for one in each if one.linear_oracle is not None), default=None),
                no_oracle="" if any(one.linear_oracle is not None for one in each) else each[0].no_oracle,
            ),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.attacks))})"

    @abstractmethod
    def _next(self, number: int, inner: State) -> Tensor | int:
        """The stage after stage `number`, one for all or (B,)."""

    def _must_end(self, problem: Problem, number: int, inner: State, k: Tensor) -> Tensor:
        """Whether stage `number` has to end before it is over, after k (B,) steps, (B,) on the CPU."""
        return torch.zeros_like(k, dtype=torch.bool)

    def _leaves(self, problem: Problem, number: int) -> tuple[Tensor, Tensor] | None:
        """Forward and backward passes that stage `number` has to leave to later ones, (B,) each on the CPU; None for none."""
        return None

    def cost(self, classes: int) -> tuple[int, int]:
        costs = [_with_look(attack, attack.cost(classes)) for attack in self.attacks]
        costs += [_with_look(attack, attack.opening(classes)) for attack in self.attacks[1:]]
        return max(forward for forward, _ in costs), max(backward for _, backward in costs)

    def opening(self, classes: int) -> tuple[int, int]:
        return _with_look(self.attacks[0], self.attacks[0].opening(classes))

    def next_cost(self, state: Sequential, k: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        forward, backward = torch.zeros_like(k), torch.zeros_like(k)
        for number, attack in enumerate(self.attacks):
            here, inner, mine = state.stage == number, state.inner[number], state.k
            if not bool(here.any()):
                continue
            costs = attack.next_cost(inner, mine, classes)
            forward, backward = torch.where(here, costs[0], forward), torch.where(here, costs[1], backward)
        return forward, backward

    @property
    def starts_at_origin(self) -> bool:
        return self.attacks[0].starts_at_origin

    @property
    def randomized(self) -> bool:
        return any(attack.randomized for attack in self.attacks)

    @property
    def takes_start(self) -> bool:
        return self.attacks[0].takes_start

    @property
    def needs_start(self) -> bool:
        return self.attacks[0].needs_start

    @property
    def recalls(self) -> bool:
        return any(attack.recalls for attack in self.attacks)

    @property
    def looks_last(self) -> bool:
        return any(attack.looks_last for attack in self.attacks)

    def unseen(self, state: Sequential) -> Tensor:
        unseen = torch.zeros_like(state.over)
        for number, attack in enumerate(self.attacks):
            unseen |= (state.stage == number) & attack.unseen(state.inner[number])
        return unseen

    @property
    def width(self) -> int:
        return max(attack.width for attack in self.attacks)

    @property
    def objective(self) -> str | Loss:
        return self.attacks[-1].objective

    def default_goal(self) -> Goal:
        return self.attacks[0].default_goal()

    def init(self, problem: Problem) -> Sequential:
        zero = torch.zeros_like(problem.k)
        inner = tuple(attack.init(problem.restarted(zero + stage, zero)) for stage, attack in enumerate(self.attacks))
        return Sequential(inner, zero, zero, zero > 0)

    def step(self, problem: Problem, state: Sequential) -> Sequential:
        inner, stage, k, ended = list(state.inner), state.stage.clone(), state.k.clone(), state.over.clone()
        for number, attack in enumerate(self.attacks):
            here = ((state.stage == number) & ~state.over).nonzero()[:, 0]
            if not len(here):
                continue
            rows, everyone = here.to(problem.origin.device), len(here) == len(k)
            part, taken = (problem, inner[number]) if everyone else (problem.only(rows), take(inner[number], rows))
            mine = copy(taken)  # a step may set attributes of what it gets
            run = torch.full_like(k[here], number)
            entering = k[here] == 0
            if number and bool(entering.any()):  # now there are points to begin from
                mine = select(entering, attack.init(part.restarted(run, k[here])), mine)
            mine, over = _advance(attack, part.keeping_back(self._leaves(part, number)), mine, k[here], run)
            over |= self._must_end(part, number, mine, k[here] + 1)
            k[here] = torch.where(over, torch.zeros_like(over, dtype=torch.int64), k[here] + 1)
            following = torch.as_tensor(self._next(number, mine)).cpu()
            ended[here] = over & (following >= len(self.attacks))
            stage[here] = torch.where(over & ~ended[here], following, number)
            if attack.judge:
                part.predictions(attack.current(mine))
            else:
                _look(attack, part, mine, over & ~ended[here])
            inner[number] = mine if everyone else put(inner[number], rows, mine, taken)
        return Sequential(tuple(inner), stage, k, ended)

    def done(self, state: Sequential) -> Tensor:
        return state.over

    def current(self, state: Sequential) -> Tensor:
        x = self.attacks[-1].current(state.inner[-1])
        for number in range(len(self.attacks) - 1):
            here = (state.stage == number).to(x.device)
            if bool(here.any()):
                x = select(here, self.attacks[number].current(state.inner[number]), x)
        return x


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Sequence(_Staged):
    """One attack after another on each sample; the best point of all counts.

    A later attack can begin where the earlier ones came (`problem.best`).

    >>> import saddlepoint as sp
    >>> sp.attacks.Sequence(sp.attacks.FGSM(), sp.attacks.PGD(steps=20)).iterations
    21
    """

    def __init__(self, *attacks: Attack | str) -> None:
        super().__init__(*attacks)

    @property
    def iterations(self) -> int:
        return sum(_length(attack) for attack in self.attacks)

    def _next(self, number: int, inner: State) -> int:
        return number + 1


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Finally(_Staged):
    """`attack` until it is over, or until it has found something and the budget has left just what `last` costs; then `last`.

    So `last` is paid for where it has a point to go on from; elsewhere `attack` goes on to the budget's end. A limit of
    seconds keeps nothing back.

    >>> import saddlepoint as sp
    >>> sp.attacks.Finally(sp.attacks.SigmaZero(steps=90), sp.attacks.Trim(steps=10)).iterations
    100
    """

    def __init__(self, attack: Attack | str, last: Attack | str) -> None:
        super().__init__(attack, last)

    @property
    def iterations(self) -> int:
        return sum(_length(attack) for attack in self.attacks)

    def _next(self, number: int, inner: State) -> int:
        return number + 1

    def _leaves(self, problem: Problem, number: int) -> tuple[Tensor, Tensor] | None:
        last, found = self.attacks[1], problem.best.success.long().cpu()
        if number or not bool(found.any()):
            return None
        classes = problem.aim.wanted.shape[1]
        (forward, backward), (later, later_back), more = last.opening(classes), last.cost(classes), _length(last) - 1
        return found * (forward + more * later + last.looks_last), found * (backward + more * later_back)

    def _must_end(self, problem: Problem, number: int, inner: State, k: Tensor) -> Tensor:
        if number:
            return super()._must_end(problem, number, inner, k)
        costs = self.attacks[0].next_cost(inner, k, problem.aim.wanted.shape[1])
        return problem.best.success.cpu() & ~problem.keeping_back(self._leaves(problem, number)).affords(*costs)


class Triage(Protocol):
    """An attack that finds out what a sample needs: `verdict(state)` is a branch's number (B,), or -1 for none."""

    def verdict(self, state: Any, /) -> Tensor: ...


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Fork(_Staged):
    """The first attack says for each sample, by its `verdict`, which of the `branches` goes on with it.

    otherwise: what goes on, once the first attack is over, with those whose verdict is no branch's number; None: nothing. It is
    the last of `attacks`.

    >>> import saddlepoint as sp
    >>> walks = sp.attacks.DualAveraging(steps=50, hand_over=2.0)
    >>> sp.attacks.Fork(walks, sp.attacks.DDN(steps=30), sp.attacks.FMN(steps=40)).iterations
    90
    """

    otherwise: Attack | None

    def __init__(self, first: Attack | str, *branches: Attack | str, otherwise: Attack | str | None = None) -> None:
        first = as_attack(first)
        if not branches:
            raise InputError("Fork needs at least one branch")
        if not hasattr(first, "verdict"):
            raise InputError(
                f"{type(first).__name__} has no verdict(state): a Fork needs a first attack that tells samples apart"
            )
        last = None if otherwise is None else as_attack(otherwise)
        object.__setattr__(self, "otherwise", last)
        super().__init__(first, *branches, *([] if last is None else [last]))

    def __repr__(self) -> str:
        if self.otherwise is None:
            return super().__repr__()
        return f"Fork({', '.join(map(repr, self.attacks[:-1]))}, otherwise={self.otherwise!r})"

    @property
    def iterations(self) -> int:
        first, *branches = (_length(attack) for attack in self.attacks)
        return first + max(branches, default=0)

    def _next(self, number: int, inner: State) -> Tensor | int:
        if number:
            return len(self.attacks)
        verdict = cast(Triage, self.attacks[0]).verdict(inner)
        rest = len(self.attacks) - (self.otherwise is not None)
        return torch.where((verdict < 0) | (verdict + 1 >= rest), rest, verdict + 1)


@dataclass(frozen=True)
class Bisection:
    """The inner attack's state, its iteration and run, the radius that it tries, and what is known of the smallest one.

    low: the largest radius without success; high: the smallest distance found. (B,) each.
    """

    inner: State
    k: Tensor
    run: Tensor
    eps: Tensor
    low: Tensor
    high: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Bisect(_OfOne):
    """The smallest radius at which an attack on a ball of stated size succeeds, by bisection for each sample.

    The first radius is `start` times the distance at which the linearised margin vanishes; it doubles until there is a
    success. Then the attack runs halfway between the largest radius that failed and the smallest distance found. A run ends
    at its first success, and after `runs` of them, or when the two are within `tolerance` of each other, the sample is done.

    >>> import saddlepoint as sp
    >>> sp.attacks.Bisect(sp.attacks.PGD(steps=20), runs=8).declaration.minimizes
    True
    """

    attack: Attack
    runs: int = 10
    start: float = 1.5
    tolerance: float = 0.005

    def __init__(self, attack: Attack | str, runs: int = 10, *, start: float = 1.5, tolerance: float = 0.005) -> None:
        attack = as_attack(attack)
        for name, value in (("attack", attack), ("runs", runs), ("start", start), ("tolerance", tolerance)):
            object.__setattr__(self, name, value)
        if attack.declaration.minimizes:
            raise InputError(f"{type(attack).__name__} looks for the smallest perturbation by itself")
        if attack.declaration.access < Access.GRADIENTS:
            raise InputError(f"Bisect takes its first radius from a gradient; {type(attack).__name__} manages without")
        if not isinstance(runs, int) or runs < 1:
            raise InputError(f"runs must be a whole number >= 1; got {runs}")
        if not start > 0 or not tolerance >= 0:
            raise InputError(f"start must be > 0 and tolerance >= 0; got {start} and {tolerance}")
        object.__setattr__(self, "declaration", replace(attack.declaration, minimizes=True, iterative=True))

    @property
    def iterations(self) -> int:
        return 1 + _length(self.attack) * self.runs

    @property
    def _least_backward(self) -> int:
        return 1

    @property
    def recalls(self) -> bool:
        return True

    @property
    def starts_at_origin(self) -> bool:
        return True

    @property
    def randomized(self) -> bool:
        return self.attack.randomized

    def init(self, problem: Problem) -> Bisection:
        zero, nothing = torch.zeros_like(problem.k), torch.zeros_like(problem.eps)
        inner = self.attack.init(problem.within(nothing).restarted(zero, zero))
        return Bisection(inner, zero, zero - 1, nothing, nothing, torch.full_like(nothing, torch.inf))

    def step(self, problem: Problem, state: Bisection) -> Bisection:
        first = state.run < 0
        eps, low, high = state.eps, state.low, state.high
        inner, over = state.inner, first.clone()
        started = (~first).nonzero()[:, 0].to(problem.origin.device)
        if bool(first.any()):
            rows = first.nonzero()[:, 0].to(problem.origin.device)
            eps = eps.index_copy(0, rows, self._first_radius(problem.only(rows)))
        if len(started):
            part, mine = problem.within(eps).only(started), take(inner, started)
            cpu = started.cpu()
            mine, ended = _advance(self.attack, part, mine, state.k[cpu], state.run[cpu])
            _look(self.attack, part, mine, ended)
            inner = put(inner, started, mine)
            over[cpu] = ended
        device = eps.device
        begun, best, unit = ~first.to(device), problem.best.distance, self._unit(problem)
        better = begun & (best < high) & (best <= eps + 0.01 * unit)  # levels of a grid are rounded
        failed = begun & over.to(device) & ~better
        high = torch.where(begun, torch.minimum(best, high), high)  # what lies outside the ball is a success as well
        low = torch.where(failed, torch.maximum(low, eps), low)
        low = torch.where(high - low < 1.5 * unit, high, low)  # there is no radius between them
        over |= better.cpu()
        middle = self._rounded(torch.where(torch.isfinite(high), (low + high) / 2, 2 * eps), unit)
        in_vain = failed & (eps >= problem.eps)  # it had the whole ball
        eps = torch.where(begun & over.to(device), middle, eps)
        run, k = state.run + over.long(), torch.where(over, torch.zeros_like(state.k), state.k + 1)
        run = torch.where(in_vain.cpu(), torch.full_like(run, self.runs), run)
        if bool(over.any()):
            fresh = self.attack.init(problem.within(eps).restarted(run, torch.zeros_like(k)))
            inner = select(over, fresh, inner)
        return Bisection(inner, k, run, eps, low, high)

    def _first_radius(self, problem: Problem) -> Tensor:
        region, origin = problem.region, problem.origin
        found = problem.loss_and_grad(origin, "margin")
        move = region.reach(found.gradient, -problem.surplus(found.logits), origin)
        size = region.threat.distance(move, torch.zeros_like(move))
        corner = region.threat.distance(torch.maximum(region.upper - origin, origin - region.lower), torch.zeros_like(move))
        blind = torch.where(torch.isfinite(corner), corner / 100, torch.ones_like(corner))  # where the gradient vanishes
        return self._rounded(torch.where(size > 0, self.start * size, blind), self._unit(problem))

    @staticmethod
    def _unit(problem: Problem) -> float:
        """By how much radii must differ to allow different points."""
        threat = problem.region.threat
        return {Norm.L0: 1.0, Norm.LINF: threat.grid or 0.0}.get(threat.norm, 0.0)

    @staticmethod
    def _rounded(eps: Tensor, unit: float) -> Tensor:
        return ((eps / unit + 1e-6).floor().clamp(min=1) * unit) if unit else eps

    def done(self, state: Bisection) -> Tensor:
        close = torch.isfinite(state.high) & (state.high - state.low <= self.tolerance * state.high)
        return close | (state.run >= self.runs).to(close.device)
