"""Square attack: random search over square windows of the input, with the model's scores alone.

    x_(k+1) = project(x_best + change of a random window),    kept if the loss grows

The windows lie in the last two dimensions (H, W) and run through all leading ones, the channels; an input of one dimension is
a single row of W. The share of the plane that a window covers falls with the queries made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.attacks.planes import planes
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim, Loss, cross_entropy, loss_named, margin
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # after so many of 10,000 queries the share is halved
_FIRST_SHARES = {Norm.LINF: 0.3, Norm.L2: 0.8, Norm.L1: 0.8}
_TINY = 1e-12
_SLACK = 1 - 2**-20  # of eps: rounding does not lead out of the ball, and the projection has nothing to do


def published(logits: Tensor, aim: Aim) -> Tensor:
    """The paper's losses: the margin for untargeted goals, cross-entropy towards the target for targeted ones."""
    return cross_entropy(logits, aim) if aim.goal.targeted else margin(logits, aim)


@dataclass(frozen=True)
class Search:
    """The next point to ask about, the best one so far, and its loss (B,)."""

    x: Tensor
    best: Tensor
    loss: Tensor


@register(
    Declaration(
        summary="random search over square windows that shrink, with scores alone",
        reference="Andriushchenko et al. 2020, arXiv:1912.00049; l1: Croce & Hein 2021, arXiv:2103.01208",
        norms=frozenset({Norm.LINF, Norm.L2, Norm.L1}),
        access=Access.SCORES,
        spatial=True,
        no_oracle="random search comes close to the optimum only after thousands of queries",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack, one query a step and no gradient.

    l-infinity: it starts with vertical stripes of +-eps, and sets a window of each channel to one end of the ball. l2 and l1:
    it starts with a grid of 5 x 5 pyramids, adds a pyramid to one window, and pays with the perturbation of another.

    steps: queries after the first one; the paper has 10,000 in l-infinity and l2, AutoAttack 5,000. p_init: share of the plane
    that the first windows cover; None for 0.3 in l-infinity, the authors' for MNIST and CIFAR-10, and AutoAttack's 0.8 in l2
    and l1 (the authors have 0.1 in l2). It is halved at 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 % of the steps. loss: None is the
    paper's (`published`). Windows are square where the plane is large enough, otherwise as wide as their area asks. Positions,
    signs and directions are each sample's own. Where the paper scales to the l2 ball and clips, the projection here is the one
    on ball and range together.

    Source: Andriushchenko, Croce, Flammarion & Hein (2020), Square attack: a query-efficient black-box adversarial attack via
    random search, arXiv:1912.00049, algorithms 1 to 3; l1: Croce & Hein (2021), Mind the box, arXiv:2103.01208, section 4.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.SCORES)
    >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    >>> sp.attack(model, x, y, sp.attacks.Square(steps=20), sp.Linf(0.1)).queries.backward.tolist()
    [0, 0]
    """

    steps: int = 5000
    p_init: float | None = None
    loss: str | Loss | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps}")
        if self.p_init is not None and not 0 < self.p_init <= 1:
            raise InputError(f"p_init must lie in (0, 1], or be None; got {self.p_init}")
        loss_named(self.objective)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def objective(self) -> str | Loss:
        return published if self.loss is None else self.loss

    @property
    def takes_start(self) -> bool:
        return True

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def init(self, problem: Problem) -> Search:
        origin = problem.origin
        start = self._stripes(problem) if problem.region.threat.norm is Norm.LINF else self._tiles(problem)
        return Search(problem.begin(start), origin, torch.full_like(origin.flatten(1)[:, 0], -torch.inf))

    def step(self, problem: Problem, state: Search) -> Search:
        loss = loss_named(self.objective)(problem.logits(state.x), problem.aim)
        better = loss > state.loss
        best, loss = torch.where(rows(better, state.x), state.x, state.best), torch.where(better, loss, state.loss)
        change = self._corner if problem.region.threat.norm is Norm.LINF else self._move
        return Search(change(problem, best), best, loss)

    def _first_share(self, problem: Problem) -> float:
        return self.p_init or _FIRST_SHARES[problem.region.threat.norm]

    # l-infinity

    def _stripes(self, problem: Problem) -> Tensor:
        channels, _, width = planes(problem.origin)
        sign = problem.random(5).sign((channels, 1, width), problem.origin.dtype)
        return _ends(problem, sign, torch.ones((), dtype=torch.bool, device=sign.device), problem.origin)

    def _corner(self, problem: Problem, best: Tensor) -> Tensor:
        """A window of every channel goes to one end of the ball: x_best +- 2 eps, projected."""
        channels, height, width = planes(best)
        size = _schedule(self.steps, self._first_share(problem), height, width, 0).sizes[problem.k].to(best.device)
        inside = _Window.drawn(problem.random(1), size, height, width).inside()
        return _ends(problem, problem.random(2).sign((channels, 1, 1), best.dtype), inside, best)

    # l2 and l1

    def _tiles(self, problem: Problem) -> Tensor:
        """A grid of tiles, each a pyramid with random signs, as large as the ball."""
        origin, power, norm = problem.origin, *_shape(problem)
        channels, height, width = planes(origin)
        side = torch.tensor([[max(height // 5, 1), max(width // 5, 1)]], device=origin.device)
        down, across = ((n - n // s * s) // 2 for n, s in zip((height, width), side[0].tolist(), strict=True))
        tiles = height // int(side[0, 0]), width // int(side[0, 1])
        i, j = torch.arange(height, device=origin.device) - down, torch.arange(width, device=origin.device) - across
        tile = (i // side[0, 0]).clamp(0, tiles[0] - 1)[:, None] * tiles[1] + (j // side[0, 1]).clamp(0, tiles[1] - 1)
        covered = ((i >= 0) & (i // side[0, 0] < tiles[0]))[:, None] & (j >= 0) & (j // side[0, 1] < tiles[1])
        turned = problem.random(5).uniform((tiles[0] * tiles[1],)) > 0.5
        table = _pyramids([(int(side[0, 0]), int(side[0, 1]))], power).to(origin.device)
        bump = table[turned[:, tile].long(), (i % side[0, 0])[:, None], j % side[0, 1]] * covered
        sign = problem.random(6).sign((channels, tiles[0] * tiles[1]), torch.float64)[:, :, tile]
        delta = (bump[:, None] * sign).reshape(origin.shape)
        reach = problem.eps if norm == 2 else torch.maximum(problem.eps, delta.flatten(1).abs().sum(1) * _span(problem))
        length = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)
        return problem.project((origin + delta * rows(reach / length, delta)).to(origin.dtype))

    def _move(self, problem: Problem, best: Tensor) -> Tensor:
        """Algorithm 3: window 1 gets a pyramid and what window 2 and the unused part of eps had."""
        power, norm = _shape(problem)
        channels, height, width = planes(best)
        schedule = _schedule(self.steps, self._first_share(problem), height, width, power)
        size, which = (column[problem.k].to(best.device) for column in (schedule.sizes, schedule.which))
        table = schedule.pyramids.to(best.device)
        first = _Window.drawn(problem.random(1), size, height, width)
        second = _Window.drawn(problem.random(2), size, height, width)
        dtype = torch.promote_types(best.dtype, torch.float32)
        turned = problem.random(3).uniform() > 0.5
        sign = problem.random(4).sign((channels, 1, 1), dtype)

        delta = (best - problem.origin).to(dtype).reshape(len(best), channels, height, width)
        inside, spent = first.inside()[:, None], second.inside()[:, None]
        bump = table[(2 * which + turned)[:, None, None], *first.places(table)][:, None].to(dtype)
        old = delta * inside
        fresh = (sign * bump + old / (_length(old, norm) + _TINY)) * inside
        used = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1, dtype=torch.float64)
        unused = ((_SLACK * problem.eps) ** norm - used**norm).clamp(min=0) / channels
        budget = rows(unused.to(dtype), delta) + _length(delta * (inside | spent), norm) ** norm
        if norm == 1:  # the l1 projection takes back what is too much, and keeps the peaks
            budget = budget * channels
        fresh = fresh / (_length(fresh, norm) + _TINY) * budget ** (1 / norm)
        moved = torch.where(inside, fresh, delta * ~spent)
        return problem.project((problem.origin + moved.reshape(best.shape)).to(best.dtype))


@dataclass(frozen=True)
class _Window:
    """A window of each sample in the plane: offsets of every row (B, H) and column (B, W), and its size (B, 2)."""

    i: Tensor
    j: Tensor
    size: Tensor

    @staticmethod
    def drawn(keys: Keys, size: Tensor, height: int, width: int) -> _Window:
        room = torch.tensor([height, width], device=size.device) - size + 1
        corner = (keys.uniform((2,), torch.float64) * room).long()
        i, j = (torch.arange(n, device=size.device) - corner[:, axis, None] for axis, n in enumerate((height, width)))
        return _Window(i, j, size)

    def inside(self) -> Tensor:
        """The window's mask (B, H, W)."""
        i, j = ((at >= 0) & (at < self.size[:, axis, None]) for axis, at in enumerate((self.i, self.j)))
        return i[:, :, None] & j[:, None]

    def places(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Where in a table (..., h, w) of windows each element of the plane is found; outside the window anywhere."""
        return self.i.clamp(0, table.shape[1] - 1)[:, :, None], self.j.clamp(0, table.shape[2] - 1)[:, None]


def _ends(problem: Problem, sign: Tensor, inside: Tensor, rest: Tensor) -> Tensor:
    """The upper or the lower end of the ball by `sign` (B, C, ...) where `inside` (B, H, W); `rest` elsewhere."""
    shape = (len(rest), *planes(rest))
    upper, lower, x = (part.reshape(shape) for part in (problem.region.upper, problem.region.lower, rest))
    inside = inside[:, None] if inside.dim() else inside
    return torch.where(inside, torch.where(sign > 0, upper, lower), x).reshape(rest.shape)


def _shape(problem: Problem) -> tuple[int, int]:
    """By which power of the distance from the middle a pyramid falls, and the order of the norm."""
    return (2, 2) if problem.region.threat.norm is Norm.L2 else (4, 1)


def _length(delta: Tensor, norm: int) -> Tensor:
    """Norm of each channel's plane (B, C, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(delta, ord=norm, dim=(2, 3), keepdim=True)
    return length


def _span(problem: Problem) -> Tensor:
    """Width of each input's range (B,) float64; 1 without one."""
    width = (problem.region.upper - problem.region.lower).flatten(1).amax(1).double()
    return torch.where(torch.isfinite(width) & (width > 0), width, torch.ones_like(width))


@dataclass(frozen=True)
class _Schedule:
    """Height and width of the window at each step (steps, 2), which of the different sizes that is, and their pyramids."""

    sizes: Tensor
    which: Tensor
    pyramids: Tensor


@lru_cache(maxsize=16)
def _schedule(steps: int, p_init: float, height: int, width: int, power: int) -> _Schedule:
    """The published halvings of the windows' area; with pyramids (power > 0) windows have odd sides of 3 at least."""
    least, sizes = 3 if power else 1, []
    for step in range(steps):
        area = p_init / 2 ** sum(step * 10000 // steps > point for point in _HALVINGS) * height * width
        side, long = (max(round(length), least) for length in (area**0.5, area / min(height, width)))
        if power:
            side, long = side + 1 - side % 2, long + 1 - long % 2
        sizes.append((side, side) if side <= min(height, width) else (min(height, long), min(width, long)))
    different = sorted(set(sizes))
    which = torch.tensor([different.index(size) for size in sizes])
    return _Schedule(torch.tensor(sizes), which, _pyramids(different, power) if power else torch.empty(0))


def _pyramids(sizes: list[tuple[int, int]], power: int) -> Tensor:
    """Of each size (h, w) the two pairs of pyramids, one above the other first: (2 * sizes, largest h, largest w) float64."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    planes = []
    for h, w in sizes:
        for halves in (0, 1):
            side = 0 if w == 1 else 1 if h == 1 else halves  # a line has one way to be halved
            n = (h, w)[side]
            parts = [(part, w) if side == 0 else (h, part) for part in (n // 2, n - n // 2)]
            pair = _normal(torch.cat([_pyramid(*parts[0], power), -_pyramid(*parts[1], power)], side), power)
            planes.append(functional.pad(pair, (0, width - w, 0, height - h)))
    return torch.stack(planes)


def _pyramid(height: int, width: int, power: int) -> Tensor:
    """The sum of 1 / (n + 1)^power over the rings n >= the place's own, n = 0 in the middle (eq. 2 of the paper)."""
    i, j = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    ring = torch.maximum(i.abs()[:, None], j.abs()[None])
    rings = 1 / torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64) ** power
    return _normal(rings.flip(0).cumsum(0).flip(0)[ring], power)


def _normal(values: Tensor, power: int) -> Tensor:
    """With norm 1, in l2 for second powers and in l1 for fourth ones."""
    length: Tensor = torch.linalg.vector_norm(values, ord=2 if power == 2 else 1)
    return values / length.clamp(min=_TINY)
