"""Auto-PGD: projected gradient ascent that chooses its own step sizes from how the loss develops.

    z       = project(x_k + size_k * argmax_{||d|| <= 1} <g_k, d>)
    x_(k+1) = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_(k-1)))                    (l-infinity and l2)

At checkpoints, closer and closer together, a sample whose loss has stopped rising goes back to its best point with half the
step. In l1 a step moves a few features, as many as the best point so far suggests, and there is no momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from saddlepoint.attacks.deepfool import candidates
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim, Loss, loss_named
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows, select

_NORMS = frozenset({Norm.LINF, Norm.L2, Norm.L1})
_MOMENTUM = 0.75
_RANKED = 100  # classes of which gradients are taken to rank them, as in MALT
_LARGER = ((3.0, 0.3), (2.0, 0.3))  # radii in eps of the l1 balls that come first, and their shares of the steps


@dataclass(frozen=True)
class Progress:
    """What a checkpoint looks at, (B,) each.

    last: the loss at the previous iterate. rises: how often it rose since the last checkpoint. checked: the best loss there.
    kept: whether the step size was kept there.
    """

    last: Tensor
    rises: Tensor
    checked: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Sparsity:
    """In l1, (B,) float64 each: features that the best point changed at the last check, and features that a step moves."""

    changed: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Climb:
    """The next point to evaluate and the one before it, the best one with its gradient and loss, the step size (B,) float64."""

    x: Tensor
    previous: Tensor
    best: Tensor
    gradient: Tensor
    loss: Tensor
    size: Tensor
    progress: Progress | Sparsity


class _AutoPGD(Attack):
    """What a run towards one aim is; `APGD` makes one and `APGDT` one for each class."""

    steps: int
    loss: str | Loss
    rho: float
    multi_eps: bool

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps}")
        if not 0 <= self.rho <= 1:
            raise InputError(f"rho must lie in [0, 1]; got {self.rho}")
        loss_named(self.loss)

    @property
    @final
    def objective(self) -> str | Loss:
        return self.loss

    @property
    @final
    def randomized(self) -> bool:
        return True

    def _windows(self) -> Tensor:
        """For each iterate (steps,): iterations since the last checkpoint if it is one, 0 if it is none.

        p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), checkpoints at ceil(p_j * steps).
        """
        windows, earlier, share, last = [0] * (self.steps + 1), 0.0, 0.22, 0
        while share <= 1:
            here = math.ceil(share * self.steps - 1e-9)
            if here > last:
                windows[here], last = here - last, here
            earlier, share = share, share + max(share - earlier - 0.03, 0.06)
        return torch.tensor(windows)

    def _phases(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each iteration of an l1 run (steps + 1,): its radius in eps, whether it begins a phase, whether it is a check."""
        phases = [(factor, int(share * self.steps + 1e-9)) for factor, share in _LARGER] if self.multi_eps else []
        phases.append((1.0, self.steps - sum(n for _, n in phases) + 1))
        radius = torch.cat([torch.full((n,), factor, dtype=torch.float64) for factor, n in phases])
        place = torch.cat([torch.arange(n) for _, n in phases])
        every = torch.cat([torch.full((n,), max(int(0.04 * n), 1)) for _, n in phases])
        return radius, place == 0, (place > 0) & (place % every == 0)

    def _begin(self, problem: Problem) -> Climb:
        """On the surface of the ball in a random direction; in l1 normal noise, projected."""
        keys, shape = problem.random(), tuple(problem.origin.shape[1:])
        eps, norm, origin = problem.eps, problem.region.threat.norm, problem.origin
        free = problem.region.upper > problem.region.lower
        if norm is Norm.LINF:
            noise = 2 * keys.uniform(shape, torch.float64) - 1
            noise = noise * rows(eps / noise.flatten(1).abs().amax(1), noise)
        else:
            noise = keys.normal(shape, torch.float64) * free
            if norm is Norm.L2:
                noise = problem.steepest(noise, eps, origin)
        loss = torch.full_like(origin.flatten(1)[:, 0], -torch.inf)
        zero = torch.zeros_like(eps)
        if norm is not Norm.L1:
            x = problem.begin(problem.project((origin + noise).to(origin.dtype)))
            progress = Progress(-loss, zero, loss, zero > 0)
            return Climb(x, x, x, torch.zeros_like(x), loss, 2 * eps, progress)
        radius = self._phases()[0][0] * eps
        x = replace(problem.region, eps=radius).project((origin + noise * rows(_span(problem), noise)).to(origin.dtype))
        x = problem.begin(x)
        changed = _changed(x, origin) if self.multi_eps else zero + x[0].numel()
        moved = changed / 1.5 if self.multi_eps else 0.2 * changed
        return Climb(x, x, x, torch.zeros_like(x), loss, radius, Sparsity(changed, moved))

    def _climb(self, problem: Problem, state: Climb, aim: Aim | None = None) -> Climb:
        found = problem.loss_and_grad(state.x, self.loss, aim=aim)
        here = (state.x, found.gradient, found.loss)
        best = select(found.loss > state.loss, here, (state.best, state.gradient, state.loss))
        if isinstance(state.progress, Sparsity):
            return self._sparse(problem, state, state.progress, here, best)
        return self._dense(problem, state, state.progress, here, best)

    def _dense(self, problem: Problem, state: Climb, seen: Progress, here: _Point, best: _Point) -> Climb:
        """l-infinity and l2: halve the step and go back to the best point where the loss stopped rising (conditions 1, 2)."""
        k = problem.k.to(state.size.device)
        window = self._windows().to(k)[k]
        rises, check = seen.rises + (here[2] > seen.last), window > 0
        stuck = (rises < self.rho * window) | (seen.kept & (seen.checked >= best[2]))
        back = check & stuck
        x, gradient, last = select(back, best, here)
        progress = Progress(
            last,
            torch.where(check, torch.zeros_like(rises), rises),
            torch.where(check, best[2], seen.checked),
            torch.where(check, ~back, seen.kept),
        )
        size = torch.where(back, state.size / 2, state.size)
        share = rows(torch.where(k == 0, 1.0, _MOMENTUM).to(x.dtype), x)
        z = problem.project(x + problem.steepest(gradient, size, x))
        after = problem.project(x + share * (z - x) + (1 - share) * (x - state.previous))
        return Climb(after, x, *best, size, progress)

    def _sparse(self, problem: Problem, state: Climb, seen: Sparsity, here: _Point, best: _Point) -> Climb:
        """l1: the sparser the best point becomes, the fewer features a step moves; else the step shrinks, by 10 at most."""
        k, origin = problem.k.to(state.size.device), problem.origin
        radius, begins, checks = (table.to(k.device) for table in self._phases())
        full, check = radius[k] * problem.eps, checks[k]
        changed = _changed(best[0], origin)
        sparser = check & (changed < 0.95 * seen.changed)
        smaller = torch.maximum(state.size / 1.5, full / 10)
        size = torch.where(check, torch.where(sparser, full, smaller), state.size)
        moved = torch.where(check, changed / 1.5, seen.moved)
        changed = torch.where(check, changed, seen.changed)
        x, gradient, _ = select(sparser, best, here)
        over, radius = begins[k + 1], radius[k + 1] * problem.eps
        x = replace(problem.region, eps=radius).project(
            torch.where(rows(over, x), best[0], x + _largest(gradient, moved, size, problem))
        )
        fresh = _changed(x, origin)
        progress = select(over, Sparsity(fresh, fresh / 1.5), Sparsity(changed, moved))
        loss = torch.where(over, torch.full_like(best[2], -torch.inf), best[2])
        return Climb(x, x, best[0], best[1], loss, torch.where(over, radius, size), progress)


_Point = tuple[Tensor, Tensor, Tensor]  # a point, its gradient and its loss


def _likeliest(logits: Tensor, problem: Problem) -> Tensor:
    """Classes (B, C), the likeliest wanted ones first."""
    return logits.masked_fill(~problem.aim.wanted, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _changed(x: Tensor, origin: Tensor) -> Tensor:
    """Number of changed features, (B,) float64."""
    return (x != origin).flatten(1).sum(1).double()


def _span(problem: Problem) -> Tensor:
    """Width of each input's range (B,); 1 without one."""
    width = (problem.region.upper - problem.region.lower).flatten(1).amax(1).double()
    return torch.where(torch.isfinite(width) & (width > 0), width, torch.ones_like(width))


def _largest(gradient: Tensor, moved: Tensor, size: Tensor, problem: Problem) -> Tensor:
    """`size` (B,) shared equally by the `moved` (B,) features of largest gradient, with its signs.

    A fraction of a feature is dropped: rounding up, as the authors' code does, a point with two features never gets sparser.
    """
    flat = torch.where(problem.region.upper > problem.region.lower, gradient, torch.zeros_like(gradient)).flatten(1)
    place = moved.clamp(1, flat.shape[1]).long() - 1
    least = flat.abs().sort(1, descending=True).values.gather(1, place[:, None])
    sign = torch.where(flat.abs() >= least, flat.sign(), torch.zeros_like(flat))
    return (sign * (size[:, None] / sign.abs().sum(1, dtype=torch.float64).clamp(min=1)[:, None]).to(sign)).view_as(gradient)


@register(
    Declaration(
        summary="gradient ascent with momentum that halves its step where the loss stops rising",
        reference="Croce & Hein 2020, arXiv:2003.01690; l1: 2021, arXiv:2103.01208",
        norms=_NORMS,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class APGD(_AutoPGD):
    """Auto-PGD, with no step size to choose.

    loss: the paper runs "cross_entropy" and "dlr". rho: a checkpoint goes back if the loss rose in fewer than rho of the steps
    since the last one. multi_eps: in l1, 30 % of the steps in the ball of 3 eps, 30 % in that of 2 eps, then in the
    ball itself (multi-eps-APGD); what is found outside the ball does not count. Where the paper clips to the range of the
    inputs after projecting on the l2 ball, the projection here is the one on both together.

    Source: Croce & Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, algorithm 1; l1: Croce & Hein (2021), Mind the box: l1-APGD for sparse adversarial attacks
    on image classifiers, arXiv:2103.01208, algorithm 1 and section 3.2.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> x, y = torch.rand(3, 4), torch.tensor([0, 1, 2])
    >>> bool((sp.attack(model, x, y, sp.attacks.APGD(steps=10), sp.L2(0.5)).distance <= 0.5).all())
    True
    """

    steps: int = 100
    loss: str | Loss = "cross_entropy"
    rho: float = 0.75
    multi_eps: bool = True

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def takes_start(self) -> bool:
        return True

    def init(self, problem: Problem) -> Climb:
        return self._begin(problem)

    def step(self, problem: Problem, state: Climb) -> Climb:
        return self._climb(problem, state)


@dataclass(frozen=True)
class Tour:
    """The run towards the present class, and the classes in their order (B, targets).

    number: how many of them are different. left: runs to come after this one, -1 at the end. (B,) each.
    """

    run: Climb
    classes: Tensor
    number: Tensor
    left: Tensor


@register(
    Declaration(
        summary="Auto-PGD from target class to target class, likeliest first",
        reference="Croce & Hein 2020, arXiv:2003.01690; l1: 2021, arXiv:2103.01208",
        norms=_NORMS,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class APGDT(_AutoPGD):
    """Targeted Auto-PGD (APGD-T of AutoAttack): a run of `steps` towards each of the `targets` first wanted classes.

    order: "logits", the likeliest class at the clean input first, as in the papers; "linear", the class whose linearised
    boundary is nearest first, (z_y - z_t) / ||grad(z_t - z_y)|| in the dual norm, which is the idea of MALT and costs one more
    backward pass for each of the 100 likeliest classes. "dlr" with a target is eq. 7 of the paper, (z_t - z_y) over
    z_(1) - (z_(3) + z_(4)) / 2. A goal that wants one class only has one run. rho, multi_eps: as in `APGD`.

    Source: Croce & Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, sections 4.3 and 6 (9 targets; 5 in l1, arXiv:2103.01208). "linear": after Melamed, Yehudai
    & Shamir (2024), MALT powers up adversarial attacks, arXiv:2407.02240.
    """

    steps: int = 100
    targets: int = 9
    loss: str | Loss = "dlr"
    rho: float = 0.75
    multi_eps: bool = True
    order: Literal["logits", "linear"] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.targets, int) or self.targets < 1:
            raise InputError(f"targets must be a whole number >= 1; got {self.targets}")
        if self.order not in ("logits", "linear"):
            raise InputError(f'order must be "logits" or "linear"; got {self.order!r}')

    @property
    def iterations(self) -> int:
        return self.targets * (self.steps + 1)

    @property
    def starts_at_origin(self) -> bool:
        return True

    def opening(self, classes: int) -> tuple[int, int]:
        return 1, 0 if self.order == "logits" else min(classes - 1, _RANKED)

    def init(self, problem: Problem) -> Tour:
        classes = torch.zeros(len(problem.k), self.targets, dtype=torch.int64, device=problem.origin.device)
        number = torch.full_like(classes[:, 0], self.targets)
        return Tour(replace(self._begin(problem), x=problem.origin), classes, number, number - 1)

    def step(self, problem: Problem, state: Tour) -> Tour:
        first, begins = problem.k == 0, problem.k % (self.steps + 1) == 0
        for which, part in ((first, self._rank), (begins & ~first, self._depart), (~begins, self._go_on)):
            state = advance(which, part, problem, state)
        return state

    def _rank(self, problem: Problem, state: Tour) -> Tour:
        """Look at the clean input, which tells the order of the classes, and begin the first run."""
        likely = self._nearest(problem) if self.order == "linear" else _likeliest(problem.logits(problem.origin), problem)
        number = problem.aim.wanted.sum(1).clamp(1, self.targets)
        place = torch.arange(self.targets, device=number.device).minimum(number[:, None] - 1)
        return self._run(problem, replace(state, classes=likely.gather(1, place), number=number))

    @staticmethod
    def _nearest(problem: Problem) -> Tensor:
        """Classes (B, C), those first whose boundary is nearest by the gradients at the input."""

        def gaps(logits: Tensor, aim: Aim) -> Tensor:
            return candidates(logits, aim, _RANKED + 1)

        logits, gradients = problem.jacobian(problem.origin, gaps)
        likely, norm = _likeliest(logits, problem), problem.region.threat.norm
        missing = -(gaps(logits, problem.aim) * logits[:, None]).sum(2).double()
        slope = torch.linalg.vector_norm(gradients.flatten(2), ord=norm.dual, dim=2, dtype=torch.float64)
        away = torch.where(slope > 0, missing / slope, torch.full_like(slope, torch.inf))
        count = away.shape[1]
        nearest = likely[:, :count].gather(1, away.argsort(dim=1, stable=True))
        return torch.cat([nearest, likely[:, count:]], 1)

    def _depart(self, problem: Problem, state: Tour) -> Tour:
        """Look at where the last run ended, and begin the next one."""
        problem.logits(state.run.x)
        return self._run(problem, state)

    def _run(self, problem: Problem, state: Tour) -> Tour:
        turn = problem.k // (self.steps + 1)
        run = self._begin(problem.restarted(turn, torch.zeros_like(problem.k)))
        return replace(state, run=run, left=state.number - turn.to(state.number.device) - 1)

    def _go_on(self, problem: Problem, state: Tour) -> Tour:
        turn, k = problem.k // (self.steps + 1), problem.k % (self.steps + 1) - 1
        target = state.classes.gather(1, turn.to(state.classes.device)[:, None])[:, 0]
        run = self._climb(problem.restarted(turn, k), state.run, problem.aim.towards(target))
        last = (k + 1 == self.steps).to(state.left.device) & (state.left == 0)
        return replace(state, run=run, left=state.left - last.long())

    def current(self, state: Tour) -> Tensor:
        return state.run.x

    def done(self, state: Tour) -> Tensor:
        return state.left < 0
