"""Steps along coordinates, with scores alone: of the input itself, of coarser grids, or of the cosine transform.

A direction lies in one channel and is the outer product of a column and a row: of unit vectors for single features, of the
hats of bilinear interpolation for coarse grids, of cosines for frequencies. Planes are the last two dimensions; an input of one
dimension is a single row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.attacks.carlini_wagner import DECAY, DECAY_SQUARES, TINY
from saddlepoint.attacks.estimation import around, in_turn
from saddlepoint.attacks.frequencies import cosines
from saddlepoint.attacks.penalty import Penalised, Search, summed, unit, wide
from saddlepoint.attacks.planes import planes
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Loss, loss_named
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows, select, tree_map

REGIONS = 8  # along a side, for importance sampling
LEAST_WEIGHT = 0.1  # of the mean one: so likely is a region where nothing has changed
LEAST_CURVATURE = 0.1  # that Newton's method divides by


def low_frequencies_first(height: int, width: int, share: float) -> Tensor:
    """In which turn frequencies come, (height, width): 0 for the lowest `share` along each side, then ring by ring."""
    first = [max(round(share * side), 1) for side in (height, width)]
    beyond = [torch.arange(side) - start for side, start in zip((height, width), first, strict=True)]
    ring = torch.maximum(beyond[0][:, None], beyond[1])
    return torch.where(ring < 0, torch.zeros_like(ring), 1 + ring // max(max(first) // 4, 1))


@dataclass(frozen=True)
class Trial:
    """State of SimBA. x: the point to ask about next, and `best`: the best one so far, with its `loss` (B,).

    change and kept (B, ...): the sums of steps that lead to them, not projected. order: each sample's directions (B, d), the
    first `count` (B,) of them of any use. place: which one is tried (B,), and whether `backwards`. idle: trials since the last
    improvement (B,).
    """

    x: Tensor
    best: Tensor
    loss: Tensor
    change: Tensor
    kept: Tensor
    order: Tensor
    count: Tensor
    place: Tensor
    backwards: Tensor
    idle: Tensor


@register(
    Declaration(
        summary="one direction of an orthonormal basis after another, kept where the loss grows",
        reference="Guo et al. 2019, arXiv:1905.07121",
        norms=frozenset({Norm.LINF, Norm.L2}),
        access=Access.SCORES,
        spatial=True,
        no_oracle="steps of one size along fixed directions come near the optimum in no stated number of queries",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SimBA(Attack):
    """Simple black-box attack: one direction q after another, forwards or backwards, whichever raises the loss first.

        x_k = project(x + delta_k),    delta_(k+1) = delta_k + a q or delta_k - a q, where that raises L, else delta_k

    basis: "dct" takes the cosine transform of the planes, in random order within the lowest `share` of the frequencies along
    each side, then within rings of a quarter of that; "pixel" takes single features in random order. After the last direction
    the first comes again; a sample is done when none has helped. A step is a query, or none where the point is the best itself.

    step_size: the l2 norm of a q in l2, its largest entry in l-infinity; None for 0.3 * eps in l2 and eps in l-infinity. The
    paper has 0.2 and no ball; the authors' code clips delta in l-infinity, as here. Its loss is the label's probability, which
    is rounded where it is nearly 1; here it is the margin.

    Source: Guo, Gardner, You, Wilson & Weinberger (2019), Simple black-box adversarial attacks, arXiv:1905.07121, algorithm 1
    and section 3.2; the rings are those of the authors' code.
    """

    steps: int = 10_000
    basis: Literal["dct", "pixel"] = "dct"
    share: float = 1 / 8
    step_size: float | None = None
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps!r}")
        if self.basis not in ("dct", "pixel"):
            raise InputError(f'basis must be "dct" or "pixel"; got {self.basis!r}')
        if not 0 < self.share <= 1:
            raise InputError(f"share must lie in (0, 1]; got {self.share}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise InputError(f"step_size must be a positive number or None; got {self.step_size}")
        loss_named(self.loss)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def objective(self) -> str | Loss:
        return self.loss

    @property
    def starts_at_origin(self) -> bool:
        return True

    @property
    def randomized(self) -> bool:
        return True

    @property
    def takes_start(self) -> bool:
        return True

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def done(self, state: Trial) -> Tensor:
        return state.idle >= 2 * state.count

    def init(self, problem: Problem) -> Trial:
        origin, count = problem.origin, torch.zeros_like(problem.labels)
        channels, height, width = planes(origin)
        turn = problem.random().uniform((channels * height * width,), torch.float64)
        if self.basis == "dct":
            ring = low_frequencies_first(height, width, self.share).to(turn.device)
            useful = torch.ones_like(turn, dtype=torch.bool)
            turn = turn + ring.flatten().repeat(channels)
        else:
            useful = (problem.region.upper > problem.region.lower).flatten(1)
            turn = turn + ~useful
        order = turn.argsort(1).to(torch.int32)
        x, never = problem.begin(origin), torch.full_like(problem.eps, -torch.inf)
        change = wide(x) - wide(origin)
        return Trial(x, origin, never, change, change, order, useful.sum(1), count - 1, torch.isnan(never), count)

    def step(self, problem: Problem, state: Trial) -> Trial:
        new = (state.x != state.best).flatten(1).any(1) | torch.isinf(state.loss)
        answers = problem.ask(state.x[:, None], new[:, None])
        loss = problem.losses(answers, self.loss)[:, 0].double()
        better = loss > state.loss
        best, kept, loss = select(better, (state.x, state.change, loss), (state.best, state.kept, state.loss))
        onwards = better | state.backwards
        place = (state.place + onwards).clamp(min=0)
        index = state.order.gather(1, (place % state.count.clamp(min=1))[:, None])[:, 0].long()
        change = kept + self._step(problem, index) * rows(torch.where(onwards, 1.0, -1.0).to(kept.dtype), kept)
        x = problem.project((problem.origin + change).to(best.dtype))
        idle = torch.where(better, 0, state.idle + 1)
        return Trial(x, best, loss, change, kept, state.order, state.count, place, ~onwards, idle)

    def _step(self, problem: Problem, index: Tensor) -> Tensor:
        """a q for the directions `index` (B,): (B, ...)."""
        origin, linf = problem.origin, problem.region.threat.norm is Norm.LINF
        channels, height, width = planes(origin)
        channel, place = index // (height * width), index % (height * width)
        dtype = wide(origin).dtype
        sides = ((height, place // width), (width, place % width))
        if self.basis == "dct":
            column, row = (cosines(side).to(index.device, dtype)[at] for side, at in sides)
        else:
            column, row = (functional.one_hot(at, side).to(dtype) for side, at in sides)
        plane = column[:, :, None] * row[:, None]
        size = problem.eps * (1.0 if linf else 0.3) if self.step_size is None else torch.full_like(problem.eps, self.step_size)
        if linf:
            size = size / plane.flatten(1).abs().amax(1)
        result = plane.new_zeros(len(index), channels, height, width)
        result[torch.arange(len(index), device=index.device), channel] = plane * size.to(dtype)[:, None, None]
        return result.view(origin.shape)


@dataclass(frozen=True)
class Coordinates:
    """State of ZOO: the point x (B, ...), its coordinates y (B, C, h, w) and Adam's means and steps for each of them."""

    x: Tensor
    y: Tensor
    mean: Tensor
    square: Tensor
    age: Tensor
    search: Search


@dataclass(frozen=True)
class Hats:
    """Bilinear interpolation from each of several grids to the inputs' planes, filled up with zeros to the finest grid.

    down (g, h, H), across (g, w, W): rows are hats. finer_down (g, h, h), finer_across (g, w, w): from a grid to the next one.
    sides (g, 2): of the grids.
    """

    down: Tensor
    across: Tensor
    finer_down: Tensor
    finer_across: Tensor
    sides: Tensor

    @staticmethod
    @lru_cache(maxsize=16)
    def of(grids: tuple[int, ...], height: int, width: int) -> Hats:
        """For grids of at most so many rows and columns."""
        sides = [[min(grid, side) for side in (height, width)] for grid in grids]
        following = [*sides[1:], sides[-1]]

        def table(axis: int, ends: list[int], room: int) -> Tensor:
            finest = sides[-1][axis]
            return torch.stack(
                [
                    functional.pad(hats(one[axis], end), (0, room - end, 0, finest - one[axis]))
                    for one, end in zip(sides, ends, strict=True)
                ]
            )

        return Hats(
            table(0, [height] * len(grids), height),
            table(1, [width] * len(grids), width),
            table(0, [one[0] for one in following], sides[-1][0]),
            table(1, [one[1] for one in following], sides[-1][1]),
            torch.tensor(sides),
        )

    def to(self, like: Tensor) -> Hats:
        """On the device and in the dtype of a tensor."""
        return tree_map(lambda part: part.to(like.device, like.dtype if part.is_floating_point() else part.dtype), self)


def hats(count: int, length: int) -> Tensor:
    """Linear interpolation of `count` values to `length`, as rows (count, length) float64."""
    return functional.interpolate(torch.eye(count, dtype=torch.float64)[None], length, mode="linear")[0]


def product(planes: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Planes (B, C, h, w) with their columns mapped by down (B, h, H) and their rows by across (B, w, W): (B, C, H, W)."""
    return down.transpose(1, 2)[:, None] @ planes @ across[:, None]


@register(
    Declaration(
        summary="Carlini & Wagner's objective minimised one coordinate after another, with derivatives from two queries each",
        reference="Chen et al. 2017, arXiv:1708.03999",
        norms=frozenset({Norm.L2}),
        access=Access.SCORES,
        minimizes=True,
        spatial=True,
        no_oracle="two queries for each coordinate and step: thousands in any dimension of interest",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class ZOO(Penalised):
    """Zeroth-order optimisation: min ||x' - x||_2^2 + c * max(-margin, 0), coordinate by coordinate.

        g_i = (f(x + h e_i) - f(x - h e_i)) / (2 h),    h_i = (f(x + h e_i) - 2 f(x) + f(x - h e_i)) / h^2

    A step draws `samples` coordinates, asks twice about each and once about the iterate, and moves all of them: by Adam, with
    means and a number of steps for each coordinate, or, solver="newton", by -rate * g_i / h_i, where h_i is 0.1 at least, and 1
    where it is negative. Where a bound holds one of the two points back, the quotient is that of the points that were asked
    about. Adam begins afresh at the first success of a run. c grows tenfold until a run succeeds, and is then bisected.
    abort_early: end a run when a tenth of its steps, 50 at least, have not lowered the smallest objective.

    grids: the perturbation is interpolated from grids that get finer, such as (32, 64, 128), each followed by the next at the
    steps `grow` of a run, such as (2000, 10000). () has all features. importance: coordinates are drawn in proportion to the
    largest change in their region of the plane, 8 regions along a side, and to a tenth of the mean one at least.

    128 coordinates, h = 1e-4, rate 0.01, c from 0.01 on in 9 runs of 1,000 steps are the paper's for CIFAR-10, h and rate in
    widths of the input range. Where it has tanh for small images, the coordinates are clipped here, as it does with grids.
    They need hundreds of thousands of queries. For a few thousand, take initial_c=10, samples=32 and a coarse grid, (8,).

    Source: Chen, Zhang, Sharma, Yi & Hsieh (2017), ZOO: zeroth order optimization based black-box attacks to deep neural
    networks without training substitute models, arXiv:1708.03999, algorithms 1 to 3 and sections 3.4 to 3.6.
    """

    steps: int = 1000
    searches: int = 9
    initial_c: float = 0.01
    samples: int = 128
    h: float = 1e-4
    learning_rate: float = 0.01
    solver: Literal["adam", "newton"] = "adam"
    grids: tuple[int, ...] = ()
    grow: tuple[int, ...] = ()
    importance: bool = False
    abort_early: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("h", "learning_rate")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise InputError(f"samples must be a whole number >= 1; got {self.samples!r}")
        if self.solver not in ("adam", "newton"):
            raise InputError(f'solver must be "adam" or "newton"; got {self.solver!r}')
        for name, count in (("grids", len(self.grids)), ("grow", max(len(self.grids) - 1, 0))):
            values = getattr(self, name)
            if (
                len(values) != count
                or list(values) != sorted({*values})
                or any(not isinstance(v, int) or v < 1 for v in values)
            ):
                raise InputError(f"{name} must be {count} growing whole numbers, grow one fewer than grids; got {values}")

    @property
    def starts_at_origin(self) -> bool:
        return False  # the first step asks about other points as well

    @property
    def randomized(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 1 + 2 * self.samples

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def _hats(self, problem: Problem) -> Hats:
        height, width = planes(problem.origin)[1:]
        return Hats.of(self.grids or (max(height, width),), height, width).to(wide(problem.origin[:0]))

    def init(self, problem: Problem) -> Coordinates:
        x, hats = problem.origin, self._hats(problem)
        shape = (len(x), planes(x)[0], hats.down.shape[1], hats.across.shape[1])
        zero = torch.zeros(shape, dtype=wide(x).dtype, device=x.device)
        return Coordinates(
            x, zero, zero, zero, torch.zeros_like(zero, dtype=torch.int32), Search.start(problem.eps, self.initial_c)
        )

    def step(self, problem: Problem, state: Coordinates) -> Coordinates:
        origin, region, width, hats = problem.origin, problem.region, unit(problem.region), self._hats(problem)
        level, following = self._level(state.search.k), self._level(state.search.k + 1)
        index, useful = self._drawn(problem, state.y, hats.sides[level])
        hat = directions(hats, level, index, origin)
        moves = hat * (self.h * width).clamp(min=region.threat.grid or 0.0)[:, None]
        near = around(problem, state.x, in_turn(moves, -moves))
        wanted = torch.cat([torch.ones_like(useful[:, :1]), in_turn(useful, useful)], 1)
        answers = problem.ask(torch.cat([state.x[:, None], near], 1), wanted)

        delta, surplus = (state.x - origin) / width, answers.surplus.double()
        hinge = state.search.c[:, None] * (-surplus).clamp(min=0)
        search, again = self._searched(state.search, summed(delta**2) + hinge[:, 0], surplus[:, 0] >= 0)
        state = adam_anew(state, (surplus[:, 0] >= 0) & ~state.search.found)

        known = answers.answered[:, 1::2] & answers.answered[:, 2::2]
        state = self._moved(state, index, known, *self._derivatives(hat, near - state.x[:, None], width, delta, hinge))
        if self.grids:
            y = product(state.y, hats.finer_down[level], hats.finer_across[level])
            state = adam_anew(select(following > level, replace(state, y=y), state), following > level)
            wave = product(state.y, hats.down[following], hats.across[following])
        else:
            low, high = (((end - origin) / width).view(state.y.shape) for end in (region.lower, region.upper))
            state = replace(state, y=torch.clamp(state.y, low, high))
            wave = state.y
        x = torch.clamp((origin + width * wave.view(origin.shape)).to(origin.dtype), region.lower, region.upper)
        return replace(select(again, self.init(problem), replace(state, x=x)), search=search)

    def _level(self, k: Tensor) -> Tensor:
        """Which grid belongs to step k (B,) of a run."""
        return (k[:, None] >= torch.tensor(self.grow, dtype=k.dtype, device=k.device)).sum(1)

    def _drawn(self, problem: Problem, y: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (B, m) for a step on grids of these sides (B, 2), and which of them can be of any use."""
        height, width = y.shape[2:]
        down = torch.arange(height, device=y.device) < sides[:, :1]
        across = torch.arange(width, device=y.device) < sides[:, 1:]
        weight = (down[:, None, :, None] & across[:, None, None, :]).expand(y.shape).to(y.dtype)
        if not self.grids:
            weight = weight * (problem.region.upper > problem.region.lower).view(y.shape)
        if self.importance:
            side = max(min(self.grids or (height,)) // REGIONS, 1)
            most = functional.max_pool2d(y.abs(), side, ceil_mode=True)
            most = most.repeat_interleave(side, 2)[:, :, :height].repeat_interleave(side, 3)[:, :, :, :width]
            least = LEAST_WEIGHT * most.flatten(1).mean(1)
            weight = weight * torch.maximum(most, rows(torch.where(least > 0, least, torch.ones_like(least)), most))
        weight = weight.flatten(1)
        # the largest u^(1 / weight) are a draw without replacement, in proportion to the weights
        chance = problem.random().uniform((weight.shape[1],), y.dtype).log() / weight
        top = chance.topk(min(self.samples, weight.shape[1]), 1)
        return top.indices, torch.isfinite(top.values)

    def _searched(self, search: Search, loss: Tensor, won: Tensor) -> tuple[Search, Tensor]:
        """The search after a step, and which samples (B,) begin another run."""
        search, stalled = search.watched(loss, self.steps)
        search, over = search.stepped(won, self.steps)
        over = over | (stalled & self.abort_early)
        again = over & (search.number + 1 < self.searches)
        return select(over & ~again, search.anew(over, search.c), search.narrowed(again)), again

    def _derivatives(self, hat: Tensor, went: Tensor, width: Tensor, delta: Tensor, hinge: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivatives of the objective along the hats, (B, m) each; 1 for the second without Newton.

        went (B, 2 m, ...): from the iterate to the points that were asked about.
        """
        flat, square = hat.flatten(2), hat.flatten(2).square().sum(2)
        ahead, behind = ((went[:, i::2] / width[:, None] * hat).flatten(2).sum(2) / square for i in (0, 1))
        hinge = hinge.to(flat.dtype)
        here, forth, back = hinge[:, :1], hinge[:, 1::2], hinge[:, 2::2]
        slope = (
            quotient(forth - back, ahead - behind) + 2 * torch.bmm(flat, delta.to(flat.dtype).flatten(1)[:, :, None])[:, :, 0]
        )
        if self.solver == "adam":
            return slope, torch.ones_like(slope)
        bent = quotient(2 * (quotient(forth - here, ahead) - quotient(here - back, -behind)), ahead - behind)
        curvature = 2 * square + torch.where((ahead > 0) & (behind < 0), bent, torch.zeros_like(bent))
        return slope, torch.where(curvature < 0, torch.ones_like(curvature), curvature.clamp(min=LEAST_CURVATURE))

    def _moved(self, state: Coordinates, index: Tensor, known: Tensor, slope: Tensor, curvature: Tensor) -> Coordinates:
        """One step of the solver along the coordinates index (B, m), where `known`."""
        fields = ("y", "mean", "square", "age")
        y, mean, square, age = old = [getattr(state, name).flatten(1).gather(1, index) for name in fields]
        if self.solver == "adam":
            age = age + 1
            mean, square = DECAY * mean + (1 - DECAY) * slope, DECAY_SQUARES * square + (1 - DECAY_SQUARES) * slope**2
            rates = ((1 - decay ** age.double()).to(y.dtype) for decay in (DECAY, DECAY_SQUARES))
            slope = mean / next(rates) / ((square / next(rates)).sqrt() + TINY)
        new = (y - self.learning_rate * slope / curvature, mean, square, age)
        values = {}
        for name, before, after in zip(fields, old, new, strict=True):
            whole = getattr(state, name)
            values[name] = whole.flatten(1).scatter(1, index, torch.where(known, after, before)).view(whole.shape)
        return replace(state, **values)


def directions(hats: Hats, level: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The hats of coordinates index (B, m) on the grids `level` (B,), of inputs like (B, ...): (B, m, ...)."""
    channels, (height, width) = planes(like)[0], hats.sides[-1].tolist()
    channel, row, column = index // (height * width), index // width % height, index % width
    plane = hats.down[level[:, None], row][..., :, None] * hats.across[level[:, None], column][..., None, :]
    chosen = functional.one_hot(channel, channels).to(plane.dtype)[..., None, None]
    return (chosen * plane[:, :, None]).view(*index.shape, *like.shape[1:])


def quotient(rise: Tensor, apart: Tensor) -> Tensor:
    """rise / apart where apart > 0, else 0."""
    return torch.where(apart > 0, rise / apart, torch.zeros_like(rise))


def adam_anew(state: Coordinates, which: Tensor) -> Coordinates:
    """Adam without its past, where `which` (B,)."""
    if not bool(which.any()):
        return state
    mean, square, age = (part.masked_fill(rows(which, part), 0) for part in (state.mean, state.square, state.age))
    return replace(state, mean=mean, square=square, age=age)
