"""Smallest perturbations by a penalty: minimise distance + c * loss, and search for the smallest c that succeeds.

    delta(c) = argmin  D(delta) + c * L(x + delta),    x + delta in the input range

One `Search` over c serves L-BFGS and EAD (both here) and the attacks of Carlini & Wagner. Distances, and c with them, are in
units of the input range's width, so that an attack does the same on inputs in [0, 255] as in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.engine import Attack, Declaration, Problem, State
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim, Loss
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Region
from saddlepoint.trees import rows, select

PROGRESS = 0.9999  # a run whose smallest loss stays above so much of what it was a tenth of its steps ago gets nowhere,
SWINGS = 50  # or as many steps ago: so long may Adam overshoot before it comes down again
MEMORY = 5  # pairs that L-BFGS remembers; ten took as many evaluations
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring (Armijo)
FLAT = 1e-5  # largest entry of the projected gradient at which L-BFGS is through, SciPy's default
SETTLED = 1e7 * 2.0**-52  # relative decrease at which it is, too


@dataclass(frozen=True)
class Search:
    """Each sample's search over the weight c of the loss: one run of a solver after another, (B,) each.

    low: the largest c that failed; high: the smallest that succeeded. lowest: the smallest loss of this run; checked: what
    that was a tenth of a run ago. found: whether this run has succeeded. k: steps made in it; number: runs made before it.
    """

    c: Tensor  # float64, like the next four
    low: Tensor
    high: Tensor
    lowest: Tensor
    checked: Tensor
    found: Tensor
    k: Tensor  # int64, like number
    number: Tensor

    @staticmethod
    def start(like: Tensor, c: float) -> Search:
        """The first run, with weight c; `like` (B,) float64."""
        zero, never = torch.zeros_like(like), torch.full_like(like, torch.inf)
        none, count = torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like, dtype=torch.int64)
        return Search(torch.full_like(like, c), zero, never, never, never, none, count, count)

    def stepped(self, success: Tensor, steps: int) -> tuple[Search, Tensor]:
        """After a step, which may be a success. Also which runs are over, (B,) bool: those that have made `steps` steps."""
        return replace(self, found=self.found | success, k=self.k + 1), self.k + 1 >= steps

    def watched(self, loss: Tensor, steps: int) -> tuple[Search, Tensor]:
        """Before `stepped`, with the step's loss. Also which runs got nowhere for a tenth of their steps, (B,) bool."""
        look = self.k % max(steps // 10, SWINGS) == 0
        lowest = torch.minimum(self.lowest, loss)
        checked = torch.where(look, lowest, self.checked)
        return replace(self, lowest=lowest, checked=checked), look & (lowest > PROGRESS * self.checked)

    def anew(self, over: Tensor, c: Tensor) -> Search:
        """Where a run is over, another one with weight c."""
        fresh = Search.start(c, 0.0)
        return select(over, replace(fresh, c=c, low=self.low, high=self.high, number=self.number + 1), self)

    def narrowed(self, over: Tensor, *, geometric: bool = False) -> Search:
        """Where a run is over: ten times c until a run succeeds, then the middle of low and high.

        geometric: the middle of their logarithms, and a tenth of c until a run fails.
        """
        won, lost = over & self.found, over & ~self.found
        high = torch.where(won, torch.minimum(self.high, self.c), self.high)
        low = torch.where(lost, torch.maximum(self.low, self.c), self.low)
        middle = torch.where(low > 0, (low * high).sqrt(), self.c / 10) if geometric else (low + high) / 2
        c = torch.where(torch.isinf(high), 10 * self.c, middle)
        return replace(self, low=low, high=high).anew(over, c)


def wide(values: Tensor) -> Tensor:
    """In float32 at least: what sums up small steps needs more digits than bfloat16 has."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(region: Region) -> Tensor:
    """The width of each sample's input range (B, 1, ...), 1 without one."""
    width = wide(region.upper - region.lower).flatten(1).amax(1)
    return rows(torch.where(torch.isfinite(width) & (width > 0), width, torch.ones_like(width)), region.origin)


def summed(values: Tensor) -> Tensor:
    """Sums of rows (B, ...), (B,) float64."""
    return values.flatten(1).sum(1, dtype=torch.float64)


class Penalised(Attack):
    """Base of the attacks that search over c: at most `searches` runs of at most `steps` steps, from the input on."""

    steps: int
    searches: int
    initial_c: float

    def __post_init__(self) -> None:
        for name in ("steps", "searches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number >= 1; got {value}")
        self.positive("initial_c")

    def positive(self, *names: str) -> None:
        """Refuse settings that are no positive numbers."""
        for name in names:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number; got {value}")

    @property
    @final
    def iterations(self) -> int:
        return self.steps * self.searches

    @property
    def starts_at_origin(self) -> bool:
        return True

    @property
    def randomized(self) -> bool:
        return False

    def done(self, state: State) -> Tensor:
        finished: Tensor = state.search.number >= self.searches
        return finished


def likelihood(logits: Tensor, aim: Aim) -> Tensor:
    """log p(wanted): minus the cross-entropy to the target or, untargeted, to all classes that are not the label's."""
    return logits.masked_fill(~aim.wanted, -math.inf).logsumexp(1) - logits.logsumexp(1)


@dataclass(frozen=True)
class Descent:
    """State of L-BFGS. x: the point to evaluate next (B, ...). The rest is in units of the input range, features flat.

    base (B, D): the iterate's displacement; value (B,) and slope (B, D): objective and gradient there; won (B,): whether it
    succeeds. x is base + size * direction, clipped. moves and turns (B, m, D): differences of the last iterates and of their
    gradients; rates (B, m): one over their products, 0 for none; scale (B,): what the last pair tells of the inverse Hessian.
    """

    x: Tensor
    base: Tensor
    value: Tensor
    slope: Tensor
    won: Tensor
    direction: Tensor
    size: Tensor
    moves: Tensor
    turns: Tensor
    rates: Tensor
    scale: Tensor
    search: Search


@register(
    Declaration(
        summary="distance and loss minimised by L-BFGS in the box, with a search for their weight",
        reference="Szegedy et al. 2014, arXiv:1312.6199",
        norms=frozenset({Norm.L2}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class LBFGS(Penalised):
    """The first attack of the field: min ||r||_2^2 + c * L(x + r) for x + r in the box, with the smallest c that succeeds.

    The paper has its c at |r| instead, and so seeks the largest. L is the cross-entropy to the target; untargeted, to all
    classes that are not the label's. c grows tenfold until a minimiser succeeds, or falls until one fails, and is then bisected
    on a logarithmic scale.

    The minimiser is projected L-BFGS: the two-loop recursion, on the features that no bound holds back, and Armijo's rule along
    the projected path. steps: evaluations in a run; one that has converged ends before. The paper states no settings.

    Source: Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow & Fergus (2014), Intriguing properties of neural networks,
    arXiv:1312.6199, section 4.1.
    """

    steps: int = 60
    searches: int = 10
    initial_c: float = 0.01

    @property
    def objective(self) -> Loss:
        return likelihood

    def init(self, problem: Problem) -> Descent:
        x = problem.origin
        still = torch.zeros_like(wide(x)).flatten(1)
        pairs, rates = still[:, None].repeat(1, MEMORY, 1), still.new_zeros(len(still), MEMORY)
        unknown, one = torch.full_like(problem.eps, torch.inf), torch.ones_like(problem.eps)
        search = Search.start(problem.eps, self.initial_c)
        return Descent(x, still, unknown, still, unknown < 0, still, one, pairs, pairs, rates, one / 2, search)

    def step(self, problem: Problem, state: Descent) -> Descent:
        region, origin, width = problem.region, problem.origin, unit(problem.region)
        low, high = (((end - origin) / width).flatten(1) for end in (region.lower, region.upper))
        found = problem.loss_and_grad(state.x, likelihood)
        here = ((state.x - origin) / width).flatten(1)
        value = summed(here**2) - state.search.c * found.loss.double()
        slope = 2 * here - (found.gradient * (width * rows(state.search.c.to(width.dtype), width))).flatten(1)

        promised, first = summed(state.slope * (here - state.base)), torch.isinf(state.value)
        better = first | ((promised < 0) & (value <= state.value + SUFFICIENT * promised))
        settled = ~first & better & (state.value - value <= SETTLED * state.value.abs().clamp(min=1))
        bend = -promised / (2 * (value - state.value - promised)).clamp(min=1e-300)  # where a parabola has its minimum
        size = torch.where(better, torch.ones_like(value), state.size * bend.clamp(0.1, 0.5))
        new = remembered(state, here - state.base, slope - state.slope, better & ~first)
        won = torch.where(better, problem.surplus(found.logits) >= 0, state.won)
        base, value, slope = select(better, (here, value, slope), (state.base, state.value, state.slope))
        free = ((base > low) | (slope < 0)) & ((base < high) | (slope > 0))
        direction = torch.where(better[:, None], newton(new, slope * free) * free, state.direction)
        there = torch.clamp(base + size.to(base.dtype)[:, None] * direction, low, high)

        flat = (torch.clamp(base - slope, low, high) - base).abs().amax(1) <= FLAT
        hopeless = summed(slope * (there - base)) > -torch.finfo(origin.dtype).eps * value.abs()
        search, spent = state.search.stepped(won, self.steps)
        over = spent | flat | settled | hopeless
        search = replace(search, found=won).narrowed(over, geometric=True)  # the minimiser counts, not the way there
        # a new run begins at the input, and remembers nothing
        again = over & (search.number < self.searches)
        there, base = (t.masked_fill(again[:, None], 0.0) for t in (there, base))
        x = torch.clamp((origin + width * there.view(origin.shape)).to(origin.dtype), region.lower, region.upper)
        return replace(
            new, x=x, base=base, value=value.masked_fill(again, torch.inf), slope=slope, won=won, direction=direction,
            size=size.masked_fill(again, 1.0), rates=new.rates.masked_fill(again[:, None], 0.0),
            scale=new.scale.masked_fill(again, 0.5), search=search,
        )  # fmt: skip


def remembered(state: Descent, move: Tensor, turn: Tensor, new: Tensor) -> Descent:
    """With one more pair where it is `new` (B,) and bends upwards; the oldest goes."""
    bend, length = summed(move * turn), summed(turn * turn)
    new = new & (bend > 1e-10 * length)
    rate = (1 / bend).to(state.rates.dtype)
    kept = ((state.moves, move), (state.turns, turn), (state.rates, rate))
    moves, turns, rates = (torch.where(rows(new, old), torch.cat([old[:, 1:], one[:, None]], 1), old) for old, one in kept)
    return replace(state, moves=moves, turns=turns, rates=rates, scale=torch.where(new, bend / length, state.scale))


def newton(state: Descent, slope: Tensor) -> Tensor:
    """-H * slope (B, D), H the inverse Hessian that the pairs tell: the two-loop recursion of L-BFGS.

    Without pairs H is that of the squared distance, 1/2, but so much less that the step is shorter than 1.
    """
    shares = torch.zeros_like(state.rates)
    for i in reversed(range(MEMORY)):
        shares[:, i] = state.rates[:, i] * (state.moves[:, i] * slope).sum(1)
        slope = slope - shares[:, i, None] * state.turns[:, i]
    scale = state.scale.to(slope.dtype)
    short = 1 / (1 / scale + slope.norm(dim=1))
    result = slope * torch.where((state.rates > 0).any(1), scale, short)[:, None]
    for i in range(MEMORY):
        share = shares[:, i] - state.rates[:, i] * (state.turns[:, i] * result).sum(1)
        result = result + share[:, None] * state.moves[:, i]
    return -result


@dataclass(frozen=True)
class Shrunk:
    """State of EAD: the iterate x (B, ...), its displacement and the point where the gradient is taken, as a displacement."""

    x: Tensor
    delta: Tensor
    ahead: Tensor
    search: Search


@register(
    Declaration(
        summary="elastic-net distance and margin minimised by iterative shrinkage, with a search for their weight",
        reference="Chen et al. 2018, arXiv:1709.04114",
        norms=frozenset({Norm.L1, Norm.L2}),
        minimizes=True,
        no_oracle="the smallest elastic net is neither the smallest l1 nor the smallest l2 distance: beta decides between them",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class EAD(Penalised):
    """Elastic-net attack: min c * max(-margin, 0) + ||delta||_2^2 + beta * ||delta||_1 in the box.

        x_(k+1) = S_beta(y_k - alpha_k * grad g(y_k)),    y_(k+1) = x_(k+1) + k / (k + 3) * (x_(k+1) - x_k)

    g is all but the l1 term. S_beta shrinks every displacement by beta, to 0 where it is smaller, and clips. alpha_k falls as
    sqrt(1 - k / steps). momentum=False takes y = x (ISTA), at two passes a step in place of three.

    The threat's norm decides which success is returned: with `Minimize("l1")` the one of least l1 distance, which is the
    paper's L1 rule; with `Minimize("l2")` the one of least l2 distance, which its elastic-net rule comes to for small beta.

    beta 1e-3, learning rate 0.01 and 9 runs of 1000 steps from c = 1e-3 on are the paper's. The authors' code also ends runs
    that get nowhere for a tenth of their steps; here they go on, since the falling step size lets them come down late.

    Source: Chen, Sharma, Zhang, Yi & Hsieh (2018), EAD: elastic-net attacks to deep neural networks via adversarial examples,
    arXiv:1709.04114, algorithm 1.
    """

    steps: int = 1000
    searches: int = 9
    initial_c: float = 1e-3
    learning_rate: float = 0.01
    beta: float = 1e-3
    momentum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("learning_rate")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise InputError(f"beta must be a number >= 0; got {self.beta}")

    def cost(self, classes: int) -> tuple[int, int]:
        return (2, 1) if self.momentum else (1, 1)

    @property
    def starts_at_origin(self) -> bool:
        return not self.momentum  # with it the first step looks at two points, and a sample that is wrong would pay both

    def init(self, problem: Problem) -> Shrunk:
        still = torch.zeros_like(wide(problem.origin))
        return Shrunk(problem.origin, still, still, Search.start(problem.eps, self.initial_c))

    def step(self, problem: Problem, state: Shrunk) -> Shrunk:
        region, origin, width, k = problem.region, problem.origin, unit(problem.region), state.search.k.double()
        point = state.x if not self.momentum else (origin + width * state.ahead).to(origin.dtype)
        found = problem.loss_and_grad(point, "margin")
        surplus = problem.surplus(found.logits).double()
        push = torch.where(surplus < 0, state.search.c, torch.zeros_like(surplus))
        gradient = 2 * state.ahead - width * rows(push.to(width.dtype), width) * found.gradient
        rate = self.learning_rate * (1 - k / self.steps).clamp(min=0).sqrt()
        moved = state.ahead - rows(rate.to(width.dtype), width) * gradient
        shrunk = moved.sign() * (moved.abs() - self.beta).clamp(min=0)
        x = torch.clamp((origin + width * shrunk).to(origin.dtype), region.lower, region.upper)
        delta = (x - origin) / width
        if self.momentum:
            surplus = problem.surplus(problem.logits(x)).double()
        search, over = state.search.stepped(surplus >= 0, self.steps)
        # a step that leads from the input to itself is followed by shorter ones, which do the same
        over = over | ~((state.ahead != 0) | (delta != 0)).flatten(1).any(1)
        inertia = rows((k / (k + 3)).to(width.dtype), width) if self.momentum else 0.0
        new = Shrunk(x, delta, delta + inertia * (delta - state.delta), search.narrowed(over))
        again = over & (new.search.number < self.searches)
        return select(again, replace(self.init(problem), search=new.search), new) if bool(again.any()) else new
