"""Smallest perturbations by projections on linearised decision boundaries, pulled towards the input.

    x_(k+1) = (1 - alpha) * (x_k + eta * d_k) + alpha * (x + eta * d_0)

d_k and d_0 lead from the iterate and from the input to the nearest point of the hyperplane inside the input range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import UNRESOLVED, Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows, select

S = TypeVar("S")


@dataclass(frozen=True)
class Walk:
    """Where each sample is, the nearest success of all its runs, and what the final search knows.

    On the line from the input to `best`, the point at `low` fails with surplus `below`, and `best` has surplus `worth`.
    n counts the steps of the present run, then those of the search; there are `runs` runs.
    """

    x: Tensor  # (B, ...)
    best: Tensor  # (B, ...)
    size: Tensor  # distance of `best`, infinite without a success; (B,) float64 as the next three
    worth: Tensor
    low: Tensor
    below: Tensor
    targets: Tensor  # (B, T) int64, the likeliest classes at the input
    runs: Tensor  # (B,) int64 as the others
    run: Tensor
    n: Tensor


@register(
    Declaration(
        summary="projections on the nearest linearised boundary, pulled towards the input",
        reference="Croce & Hein 2020, arXiv:1907.02044",
        norms=frozenset({Norm.LINF, Norm.L2, Norm.L1}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack: the iterate and the input are projected on the nearest linearised boundary.

        l = argmin_l |f_l(x_k)| / ||grad f_l(x_k)||_q,   f_l = z_l - z_y,   P = {z : f_l(x_k) + <grad f_l(x_k), z - x_k> = 0}
        d_k = projection of x_k on P and the input range, less x_k;    d_0 the same of the input x
        alpha = min(||d_k|| / (||d_k|| + ||d_0||), alpha_max)
        x_(k+1) = clip((1 - alpha) * (x_k + eta * d_k) + alpha * (x + eta * d_0)); a success z goes back to x + beta * (z - x)

    At last `search` secant steps on the line from the input to the nearest success.
    steps: of each run. restarts: the first run starts at the input, the others in a ball around it with half the smallest
    distance found. classes: only the so many likeliest rivals of each iterate (None: all); a step makes a backward pass for
    each. targets: the targeted variant, FAB-T: that many runs of one backward pass a step, each towards one of the likeliest
    classes at the input (the paper and AutoAttack take 9); None: the plain attack. A goal that names its class has one
    boundary, and so one run of one backward pass a step.

    Source: Croce & Hein (2020), Minimally distorted adversarial examples with a fast adaptive boundary attack,
    arXiv:1907.02044, algorithm 1; the targeted variant in arXiv:2003.01690, section 3. Values are those papers'.
    """

    steps: int = 100
    restarts: int = 1
    targets: int | None = None
    classes: int | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    search: int = 3

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("targets", 1), ("classes", 1), ("search", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and not (value is None and name in ("targets", "classes")):
                raise InputError(f"{name} must be a whole number >= {least}; got {value}")
        if not 0 <= self.alpha_max <= 1 or not 0 < self.beta <= 1:
            raise InputError(f"alpha_max must lie in [0, 1] and beta in (0, 1]; got {self.alpha_max} and {self.beta}")
        if not 1 <= self.eta < math.inf:
            raise InputError(f"eta must be >= 1; got {self.eta}")

    @property
    def iterations(self) -> int:
        return self.steps * self.restarts * (self.targets or 1) + self.search

    @property
    def randomized(self) -> bool:
        return self.restarts > 1

    def cost(self, classes: int) -> tuple[int, int]:
        return 2, 1 if self.targets else max(1, min(classes - 1, self.classes or classes))

    def init(self, problem: Problem) -> Walk:
        x, number, size = problem.origin, torch.zeros_like(problem.labels), torch.full_like(problem.eps, torch.inf)
        zero = torch.zeros_like(size)
        targets = number[:, None].expand(-1, min(self.targets or 0, problem.aim.wanted.shape[1])).clone()
        return Walk(x, x, size, zero, zero, zero, targets, number + self.restarts * (self.targets or 1), number, number)

    def done(self, state: Walk) -> Tensor:
        return (state.run >= state.runs) & ((state.n >= self.search) | torch.isinf(state.size))

    def step(self, problem: Problem, state: Walk) -> Walk:
        searching = state.run >= state.runs
        state = advance(searching, self._search, problem, state)
        return advance(~searching, self._walk, problem, state)

    def _walk(self, problem: Problem, state: Walk) -> Walk:
        region, x, origin = problem.region, state.x, problem.origin
        gradient, gain, logits = self._hyperplane(problem, state)
        state = self._rank(problem, state, logits)
        state = _nearer(problem, state, x, problem.surplus(logits).double())
        from_origin = gain + (gradient.double() * (x.double() - origin.double())).flatten(1).sum(1)
        ahead, direct = region.reach(gradient, gain, x), region.reach(gradient, from_origin, origin)
        near, far = (region.threat.distance(move, torch.zeros_like(move)) for move in (ahead, direct))
        alpha = torch.where(near > 0, near / (near + far), torch.zeros_like(near)).clamp(max=self.alpha_max)
        share = rows(alpha.to(x.dtype), x)
        new = (1 - share) * (x + self.eta * ahead) + share * (origin + self.eta * direct)
        new = torch.clamp(new, region.lower, region.upper)
        moving = (gradient != 0).flatten(1).any(1).nonzero()[:, 0]
        seen = problem.surplus(problem.logits(new[moving], moving), moving).double()
        surplus = torch.full_like(state.size, -torch.inf).index_copy(0, moving, seen)
        state = _nearer(problem, state, new, surplus)
        back = torch.clamp(origin + self.beta * (new - origin), region.lower, region.upper)
        x = select(surplus >= 0, back, new)
        over = state.n + 1 >= self.steps
        run, n = state.run + over.long(), torch.where(over, torch.zeros_like(state.n), state.n + 1)
        if bool(over.any()):
            x = select(over & (run < state.runs), self._start(problem, run, state.size, x), x)
        return replace(state, x=x, run=run, n=n)

    def _hyperplane(self, problem: Problem, state: Walk) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient (B, ...) of the boundary to go to, by how much it has to grow (B,), and the logits."""
        aim = problem.aim
        if self.targets and not _one_boundary(aim):
            number = (state.run // self.restarts)[:, None]
            first = (state.run == 0) & (state.n == 0)  # nothing is ranked yet, but the likeliest class leads the margin
            led = aim.towards(torch.where(first, UNRESOLVED, state.targets.gather(1, number)[:, 0]))
            aim = replace(led, wanted=torch.where(first[:, None], aim.wanted, led.wanted))
            found = problem.loss_and_grad(state.x, "margin", aim=aim)
            return found.gradient, aimed(problem) - found.loss.double(), found.logits
        count = min(self.classes or aim.wanted.shape[1], int(aim.wanted.sum(1).amax()))
        if self.targets or count <= 1 or aim.goal.top_k > 1:
            found = problem.loss_and_grad(state.x, "margin")
            return found.gradient, aimed(problem) - found.loss.double(), found.logits

        def weights(logits: Tensor, aim: Aim) -> Tensor:
            """e_l - e_u (Q, m, C) for the likeliest wanted classes l and the likeliest unwanted class u."""
            likeliest = logits.masked_fill(~aim.wanted, -torch.inf).topk(count, dim=1).indices
            rival = logits.masked_fill(~aim.unwanted, -torch.inf).argmax(1)
            unit = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
            return unit[likeliest] - unit[rival][:, None]

        logits, gradients = problem.jacobian(state.x, weights)
        sums = weights(logits, problem.aim)
        gains = aimed(problem) - (sums * logits[:, None]).sum(2).double()
        slope = torch.linalg.vector_norm(gradients.flatten(2).double(), problem.region.threat.norm.dual, dim=2)
        possible = (slope > 0) & ((sums > 0) & problem.aim.wanted[:, None]).any(2)  # fewer wanted classes than asked for
        nearest = torch.where(possible, gains.abs() / slope, torch.full_like(slope, torch.inf)).argmin(1, keepdim=True)
        chosen = gradients[torch.arange(len(gradients), device=gradients.device), nearest[:, 0]]
        return chosen, gains.gather(1, nearest)[:, 0], logits

    def _rank(self, problem: Problem, state: Walk, logits: Tensor) -> Walk:
        """Note what the first look at the input tells."""
        first = (state.run == 0) & (state.n == 0)
        if not bool(first.any()):
            return state
        wanted, below, runs, targets = problem.aim.wanted, problem.surplus(logits).double(), state.runs, state.targets
        if self.targets:
            targets = logits.masked_fill(~wanted, -torch.inf).topk(targets.shape[1], dim=1).indices
            boundaries = torch.ones_like(runs) if _one_boundary(problem.aim) else wanted.sum(1).clamp(max=self.targets)
            runs = boundaries * self.restarts
        return select(first, replace(state, below=below, targets=targets, runs=runs), state)

    def _start(self, problem: Problem, run: Tensor, size: Tensor, x: Tensor) -> Tensor:
        """Where the runs begin: at the input, or at a random point nearer than the best so far (else than the last)."""
        if self.restarts == 1:
            return problem.origin
        radius = torch.where(torch.isfinite(size), size, problem.region.distance(x)) / 2
        return select(run % self.restarts > 0, problem.within(radius).random_point(), problem.origin)

    def _search(self, problem: Problem, state: Walk) -> Walk:
        aimed = 0.01 * state.worth  # at the boundary itself every second point would fail by its rounding
        share = ((aimed - state.below) / (state.worth - state.below).clamp(min=1e-300)).clamp(0, 1)
        at = state.low + (1 - state.low) * share
        x = problem.origin + (state.best - problem.origin) * rows(at.to(state.x.dtype), state.x)
        x = torch.clamp(x, problem.region.lower, problem.region.upper)
        surplus = problem.surplus(problem.logits(x)).double()
        shorter = replace(state, best=x, worth=surplus, low=state.low / at.clamp(min=1e-300))
        state = select(surplus >= 0, shorter, replace(state, low=at, below=surplus))
        return replace(state, n=state.n + 1)


def _one_boundary(aim: Aim) -> bool:
    """Whether the goal names its class, or asks for more than one class to win, so that its margin is what leads there."""
    return aim.goal.targeted or aim.goal.top_k > 1


def aimed(problem: Problem) -> float:
    """The margin to go to: beyond what success needs by the model's numerical noise, which would decide at the boundary."""
    return 2 * problem.needed - problem.aim.goal.confidence


def _nearer(problem: Problem, state: Walk, points: Tensor, surplus: Tensor) -> Walk:
    """The state with these points as the best ones where they are."""
    size = problem.region.distance(points)
    return select((surplus >= 0) & (size < state.size), replace(state, best=points, size=size, worth=surplus), state)
