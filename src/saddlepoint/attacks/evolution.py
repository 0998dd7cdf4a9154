"""Evolutionary search: a population of perturbations for each sample, judged by the model's scores alone.

A step is a generation: one query for each individual that is new. Where the budget ends within a generation, those without an
answer are worth -inf. As in `square`, the last two dimensions of an input are its plane (H, W), all leading ones its channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.estimation import SLACK, columns
from saddlepoint.attacks.planes import enlarged, planes
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.goals import Aim, Loss, loss_named
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import L0
from saddlepoint.trees import rows

# Elements of the images that are made of genes and asked about together; a CPU takes twice as long where they leave its cache.
_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
_MOST_PIXELS = 5  # of the paper
_PLATEAU = 100  # generations without progress after which GenAttack searches more narrowly


def log_odds(logits: Tensor, aim: Aim) -> Tensor:
    """log of the wanted classes' probability over that of the unwanted ones: GenAttack's fitness, for any goal."""
    wanted, unwanted = (logits.masked_fill(~classes, -math.inf).logsumexp(1) for classes in (aim.wanted, aim.unwanted))
    return wanted - unwanted


class Evolution(Attack):
    """Base of attacks whose step asks about a population. `loss` is the fitness, None the paper's."""

    steps: int
    loss: str | Loss | None

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    @property
    @final
    def looks_last(self) -> bool:
        return False

    def _check_whole(self, *optional: str, **least: int) -> None:
        """Raise `InputError` unless these hyperparameters are whole numbers of at least this size, or optional and None."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if (value is not None or name not in optional) and (not isinstance(value, int) or value < smallest):
                raise InputError(f"{name} must be a whole number >= {smallest}; got {value!r}")
        loss_named(self.objective)

    def _check_range(self, low: float, high: float, *names: str) -> None:
        """Raise `InputError` unless these hyperparameters lie in (low, high]."""
        for name in names:
            value = getattr(self, name)
            if not low < value <= high or math.isinf(value):
                raise InputError(f"{name} must lie in ({low:g}, {high:g}]; got {value!r}")


# One pixel


@dataclass(frozen=True)
class Pixels:
    """Individuals as genes (B, P, pixels, 2 + C): row, column, and a value for each channel; their fitness (B, P).

    x: the best image so far (B, ...).
    """

    x: Tensor
    genes: Tensor
    fitness: Tensor


@register(
    Declaration(
        summary="differential evolution over the places and colours of a few pixels, with scores alone",
        reference="Su, Vargas & Sakurai 2019, arXiv:1710.08864",
        norms=frozenset({Norm.L0}),
        access=Access.SCORES,
        spatial=True,
        no_oracle="it changes a stated number of pixels, and which ones is a random search",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class FewPixel(Evolution):
    """One-pixel attack, and its form for a few pixels: differential evolution (rand/1, without crossover).

        child_i = a + F (b - c),    a, b, c three other individuals;  it replaces individual i where it is fitter

    pixels: how many change, 1, 3 and 5 in the paper; None for as many as the ball allows, 5 at most. population: 400 in the
    paper, 4 at least. steps: generations after the first population (75 here, 100 in the paper). scale: F, 0.5. loss: None is
    cross-entropy, for the paper's fitness is the probability of the true class, or of the target. Places begin uniformly,
    colours as N(128, 127) of 255, clipped. Places outside the image are drawn anew. An l0 ball that counts features counts C
    for a pixel of C channels; in a ball too small for all pixels, the first ones change as far as it goes.

    Source: Su, Vargas & Sakurai (2019), One pixel attack for fooling deep neural networks, arXiv:1710.08864, section III.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.SCORES)
    >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    >>> attack = sp.attacks.FewPixel(pixels=2, population=20, steps=5)
    >>> float(sp.attack(model, x, y, attack, sp.L0(2, per="pixel")).distance.max()) <= 2
    True
    """

    pixels: int | None = None
    population: int = 400
    steps: int = 75
    scale: float = 0.5
    loss: str | Loss | None = None

    def __post_init__(self) -> None:
        self._check_whole("pixels", pixels=1, population=4, steps=0)
        self._check_range(0, 2, "scale")

    @property
    def iterations(self) -> int:
        return self.steps + 1

    @property
    def width(self) -> int:
        return self.population

    @property
    def objective(self) -> str | Loss:
        return "cross_entropy" if self.loss is None else self.loss

    def init(self, problem: Problem) -> Pixels:
        low, high = problem.region.bounds
        if not math.isfinite(high - low):
            raise CapabilityError("FewPixel draws colours from the input range: give the model finite bounds")
        channels = planes(problem.origin)[0]
        shape, dtype = (self.population, self._count(problem)), torch.promote_types(problem.origin.dtype, torch.float32)
        colour = low + (high - low) * (128 + 127 * problem.random(2).normal((*shape, channels), dtype)) / 255
        genes = torch.cat([_places(problem, problem.random(1), shape, dtype), colour.clamp(low, high)], 3)
        return Pixels(problem.origin, genes, genes.new_full(genes.shape[:2], -math.inf))

    def step(self, problem: Problem, state: Pixels) -> Pixels:
        begun = (problem.k > 0).to(state.genes.device)
        genes = torch.where(rows(begun, state.genes), self._children(problem, state.genes), state.genes)
        fitness = []
        at_once = max(1, _AT_ONCE.get(genes.device.type, 2**22) // max(1, problem.origin.numel()))
        for some in torch.split(genes, at_once, 1):
            answers = problem.ask(_painted(problem, some))
            fitness.append(problem.losses(answers, self.objective).to(state.fitness.dtype))
        found = torch.cat(fitness, 1)
        best, which = found.max(1)
        fittest = _painted(problem, genes.gather(1, which.view(-1, 1, 1, 1).expand(-1, 1, *genes.shape[2:])))[:, 0]
        x = torch.where(rows(best > state.fitness.amax(1), fittest), fittest, state.x)
        better = found > state.fitness
        genes = torch.where(better[..., None, None], genes, state.genes)
        return Pixels(x, genes, torch.where(better, found, state.fitness))

    def _count(self, problem: Problem) -> int:
        threat = problem.region.threat
        whole = isinstance(threat, L0) and threat.per == "pixel"
        allowed = threat.largest_eps / (1 if whole else planes(problem.origin)[0])
        return self.pixels or max(1, math.floor(min(allowed, _MOST_PIXELS)))

    def _children(self, problem: Problem, genes: Tensor) -> Tensor:
        flat = genes.flatten(2)
        a, b, c = (
            flat.gather(1, other[..., None].expand_as(flat)) for other in _three_others(problem.random(1), self.population)
        )
        children = (a + self.scale * (b - c)).view_as(genes)
        place, colour = children[..., :2], children[..., 2:]
        drawn = _places(problem, problem.random(2), tuple(place.shape[1:3]), place.dtype)
        size = place.new_tensor(planes(problem.origin)[1:])
        place = torch.where((place >= 0) & (place < size), place, drawn)
        return torch.cat([place, colour.clamp(*problem.region.bounds)], 3)


def _places(problem: Problem, keys: Keys, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Places drawn uniformly from the plane, (B, *shape, 2)."""
    uniform = keys.uniform((*shape, 2), dtype)
    return uniform * uniform.new_tensor(planes(problem.origin)[1:])


def _three_others(keys: Keys, count: int) -> list[Tensor]:
    """For each of `count` individuals three others, all different: indices (B, count) each."""
    draw = keys.uniform((3, count), torch.float64)
    one, two, three = (1 + (draw[:, i] * (count - 1 - i)).long().clamp(max=count - 2 - i) for i in range(3))
    two = two + (two >= one)  # steps ahead from the individual itself; each skips those that are taken
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    three = three + (three >= low)
    three = three + (three >= high)
    place = torch.arange(count, device=draw.device)
    return [(place + ahead) % count for ahead in (one, two, three)]


def _painted(problem: Problem, genes: Tensor) -> Tensor:
    """The images (B, m, ...) of individuals (B, m, pixels, 2 + C): feasible, for no more pixels change than the ball allows."""
    region, (channels, height, width) = problem.region, planes(problem.origin)
    count, pixels, shape = genes.shape[1], genes.shape[2], (len(genes), 1, channels, height * width)
    whole_pixels = isinstance(region.threat, L0) and region.threat.per == "pixel"
    lower, upper, origin = (part.view(shape).expand(-1, count, -1, -1) for part in (region.lower, region.upper, region.origin))
    image = origin.clone()
    limit = (height, width)
    row, column = (genes[..., axis].long().clamp(0, limit[axis] - 1) for axis in (0, 1))
    channel = torch.arange(channels, device=genes.device)
    for pixel in range(pixels):
        at = (row * width + column)[:, :, pixel, None, None].expand(-1, -1, channels, 1)
        value = genes[:, :, pixel, 2:, None].to(image.dtype).clamp(lower.gather(3, at), upper.gather(3, at))
        unit = channel * 0 + pixel if whole_pixels else pixel * channels + channel
        allowed = (unit < torch.floor(region.eps + 1e-9)[:, None])[:, None, :, None]
        image.scatter_(3, at, torch.where(allowed, value, image.gather(3, at)))
    return image.view(len(genes), count, *problem.origin.shape[1:])


# Genetic algorithm


@dataclass(frozen=True)
class Breed:
    """Perturbations in units of eps (B, P, C, h, w), the fittest first; its fitness (B,) and its image x (B, ...).

    stale: generations since it improved (B,). plateaus: how often that became too many (B,).
    """

    x: Tensor
    noise: Tensor
    fitness: Tensor
    stale: Tensor
    plateaus: Tensor


@register(
    Declaration(
        summary="genetic algorithm with selection by fitness, crossover and fading mutation, with scores alone",
        reference="Alzantot et al. 2019, arXiv:1805.11090",
        norms=frozenset({Norm.LINF}),
        access=Access.SCORES,
        spatial=True,
        no_oracle="a random search, which comes close to the optimum only after thousands of queries",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class GenAttack(Evolution):
    """GenAttack: a small population, of which the fittest survives and the others are bred anew in each generation.

    Parents are drawn with probability softmax(fitness / temperature), a child takes each value from the first of its two with
    probability p_1 / (p_1 + p_2), and each of its values moves with probability rho by U(-alpha, alpha) eps:

        rho = max(rho_min, 0.5 * 0.9^n),    alpha = max(alpha_min, 0.4 * 0.9^n),    n plateaus of 100 generations so far

    The fitness is log p_t - log sum of the others; for untargeted goals that of all classes but the true one over its.
    population: 6 in the paper; a generation costs one query less, for the fittest is known. temperature: 0.1, of the authors'
    code. rho_min, alpha_min: 0.1 and 0.15 in the paper. size: side of a smaller plane in which it searches, enlarged
    bilinearly; None for the whole (the paper has 96 of 299 for ImageNet). loss: another fitness.

    Source: Alzantot et al. (2019), GenAttack: practical black-box attacks with gradient-free optimization, arXiv:1805.11090,
    algorithm 1 and section 4.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.SCORES)
    >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    >>> bool((sp.attack(model, x, y, sp.attacks.GenAttack(steps=9), sp.Linf(0.1)).distance <= 0.1).all())
    True
    """

    steps: int = 1000
    population: int = 6
    temperature: float = 0.1
    rho_min: float = 0.1
    alpha_min: float = 0.15
    size: int | None = None
    loss: str | Loss | None = None

    def __post_init__(self) -> None:
        self._check_whole("size", steps=1, population=2, size=1)
        self._check_range(0, 1, "rho_min", "alpha_min")
        self._check_range(0, 1e6, "temperature")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def width(self) -> int:
        return self.population

    @property
    def objective(self) -> str | Loss:
        return log_odds if self.loss is None else self.loss

    def init(self, problem: Problem) -> Breed:
        origin, zero = problem.origin, torch.zeros_like(problem.labels)
        shape, dtype = _small(origin, self.size), torch.promote_types(origin.dtype, torch.float32)
        noise = 2 * problem.random(1).uniform((self.population, *shape), dtype) - 1
        return Breed(origin, noise, torch.full_like(problem.eps, -math.inf), zero, zero)

    def step(self, problem: Problem, state: Breed) -> Breed:
        points = _perturbed(problem, state.noise, problem.eps)
        known = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
        known[:, 0] = (problem.k > 0).to(points.device)
        asked = problem.losses(problem.ask(points, ~known), self.objective).double()
        fitness = torch.where(known, state.fitness[:, None], asked)
        best, which = fitness.max(1)
        improved = best > state.fitness
        stale = torch.where(improved, 0, state.stale + 1)
        plateaus = state.plateaus + (stale >= _PLATEAU)
        x = torch.where(rows(improved, state.x), _chosen(points, which[:, None])[:, 0], state.x)
        children = self._children(problem, state.noise, fitness, plateaus)
        noise = torch.cat([_chosen(state.noise, which[:, None]), children], 1)
        return Breed(x, noise, best, stale.masked_fill(stale >= _PLATEAU, 0), plateaus)

    def _children(self, problem: Problem, noise: Tensor, fitness: Tensor, plateaus: Tensor) -> Tensor:
        count, shape = self.population - 1, tuple(noise.shape[2:])
        chance = (fitness / self.temperature).softmax(1)
        draw = problem.random(1).uniform((2 * count,), torch.float64)
        parents = torch.searchsorted(chance.cumsum(1), draw).clamp(max=self.population - 1)
        first, second = torch.split(_chosen(noise, parents), count, 1)
        p_first, p_second = torch.split(chance.gather(1, parents), count, 1)
        share = (p_first / (p_first + p_second)).to(noise.dtype)[..., None, None, None]
        children = torch.where(problem.random(2).uniform((count, *shape), noise.dtype) < share, first, second)
        rho, alpha = (
            rows((start * 0.9 ** plateaus.double()).clamp(min=least).to(noise.dtype), noise)
            for start, least in ((0.5, self.rho_min), (0.4, self.alpha_min))
        )
        draws = problem.random(3).uniform((count, *shape), noise.dtype) / rho  # where below 1, itself uniform
        return torch.where(draws < 1, children + alpha * (2 * draws - 1), children).clamp(-1, 1)


# Separable CMA-ES


@dataclass(frozen=True)
class Normal:
    """Of each sample: N(mean, (step * scales)^2) over n numbers. mean, scales and the two paths (B, n), step (B,).

    path: the steps' sum in standard units, for the step size. drift: the same in slower memory, for the scales.
    x: the best image so far (B, ...), fitness: its (B,).
    """

    x: Tensor
    fitness: Tensor
    mean: Tensor
    step: Tensor
    scales: Tensor
    path: Tensor
    drift: Tensor


@dataclass(frozen=True)
class Rates:
    """The strategy's constants for n numbers and a population: weights by rank, learning rates of paths, scales and step."""

    positive: Tensor
    weights: Tensor
    mass: float  # of the selection: how many individuals the mean is made of
    path: float
    drift: float
    one: float
    many: float
    damping: float
    length: float  # of a standard normal vector


@register(
    Declaration(
        summary="evolution strategy that adapts the size of its steps in every coordinate, with scores alone",
        reference="Ros & Hansen 2008, doi:10.1007/978-3-540-87700-4_30; Hansen 2016, arXiv:1604.00772",
        norms=frozenset({Norm.LINF, Norm.L2}),
        access=Access.SCORES,
        spatial=True,
        no_oracle="a random search, which comes close to the optimum only after thousands of queries",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class CMAES(Evolution):
    """Separable CMA-ES: a normal distribution with a variance for each coordinate moves to where the loss is larger.

        z_i ~ N(0, I),    u_i = mean + step * scales * z_i,    x_i = x + eps u_i, brought into ball and range

    The mean moves by the weighted mean of the fitter half's steps; the step size grows where successive moves agree; the scales
    grow in coordinates in which the fitter ones lie far away (as in version 4 of the authors' library: by a factor, so
    that they stay positive, and with negative weights for the less fit half).

    population: None is 4 + 3 ln n for n coordinates. spread: the first standard deviation in units of eps (l-infinity), or the
    length of a first step in them (l2). size: side of the smaller plane in which it searches, enlarged bilinearly; None for
    the whole. loss: None is the margin; any that grows with it gives the same search, for only ranks matter.
    Points are brought into the ball, but the distribution learns from them as they were drawn, and its mean may leave the
    ball: then few points change in coordinates that have reached an end. (With the mean kept inside it found half as many. A
    penalty for what is outside would need a weight. Mirrored samples were no better.)

    Source: Ros & Hansen (2008), A simple modification in CMA-ES achieving linear time and space complexity; Hansen (2016), The
    CMA evolution strategy: a tutorial, arXiv:1604.00772.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.SCORES)
    >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    >>> bool((sp.attack(model, x, y, sp.attacks.CMAES(steps=9), sp.L2(0.5)).distance <= 0.5).all())
    True
    """

    steps: int = 300
    population: int | None = None
    spread: float = 2.0
    size: int | None = 8
    loss: str | Loss | None = None

    def __post_init__(self) -> None:
        self._check_whole("population", "size", steps=1, population=4, size=1)
        self._check_range(0, 1e6, "spread")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def width(self) -> int:
        return 32 if self.population is None else self.population

    @property
    def objective(self) -> str | Loss:
        return "margin" if self.loss is None else self.loss

    def init(self, problem: Problem) -> Normal:
        origin = problem.origin
        n = math.prod(_small(origin, self.size))
        zero = origin.new_zeros(len(origin), n, dtype=torch.promote_types(origin.dtype, torch.float32))
        spread = self.spread if problem.region.threat.norm is Norm.LINF else self.spread / math.sqrt(n)
        step = torch.full_like(problem.eps, spread)
        return Normal(origin, torch.full_like(problem.eps, -math.inf), zero, step, zero + 1, zero, zero)

    def step(self, problem: Problem, state: Normal) -> Normal:
        mean, shape = state.mean, _small(problem.origin, self.size)
        rates = self._rates(mean.shape[1])
        z = problem.random(1).normal((len(rates.weights), mean.shape[1]), mean.dtype)
        u = mean[:, None] + rows(state.step.to(mean.dtype), z) * state.scales[:, None] * z
        points = _perturbed(problem, u.view(*u.shape[:2], *shape), problem.eps * self._unit(problem))
        fitness = problem.losses(problem.ask(points), self.objective).double()
        best, which = fitness.max(1)
        fittest = _chosen(points, which[:, None])[:, 0]
        moved = updated(state, z, fitness, problem.k, rates)
        better = best > state.fitness
        x, fitness = torch.where(rows(better, fittest), fittest, state.x), torch.where(better, best, state.fitness)
        return replace(moved, x=x, fitness=fitness)

    def _rates(self, n: int) -> Rates:
        return strategy(n, 4 + int(3 * math.log(n)) if self.population is None else self.population)

    def _unit(self, problem: Problem) -> float:
        """What a perturbation of norm 1 in the smaller plane is worth in the whole one."""
        if problem.region.threat.norm is Norm.LINF:
            return 1.0
        return math.sqrt(math.prod(_small(problem.origin, self.size)) / max(1, problem.origin[:1].numel()))


def updated(state: Normal, z: Tensor, fitness: Tensor, k: Tensor, rates: Rates) -> Normal:
    """The distribution after generation k (B,), in which z (B, P, n) in standard units had this fitness (B, P)."""
    n, dtype = z.shape[2], z.dtype
    rank = fitness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    positive, weights = (table.to(z.device, dtype)[rank] for table in (rates.positive, rates.weights))
    selected = torch.einsum("bp,bpn->bn", positive, z)
    shift = math.sqrt(rates.mass) * selected
    path = (1 - rates.path) * state.path + math.sqrt(rates.path * (2 - rates.path)) * shift
    squares = path.double().square().sum(1)
    memory = 1 - (1 - rates.path) ** (2.0 * (k.to(z.device) + 1))
    stalled = squares / memory / n - 1 >= 1 + 4 / (n + 1)  # the step size is still too small: the scales wait for it
    drift = (1 - rates.drift) * state.drift
    drift = torch.where(stalled[:, None], drift, drift + math.sqrt(rates.drift * (2 - rates.drift)) * shift)
    one = (rates.one * (1 - stalled.double() * rates.drift * (2 - rates.drift))).to(dtype)[:, None]
    spread = one * (drift.square() - 1) + rates.many * torch.einsum("bp,bpn->bn", weights, z.square() - 1)
    growth = rates.path / rates.damping * (squares.sqrt() / rates.length - 1)
    return replace(
        state,
        mean=state.mean + rows(state.step.to(dtype), z[:, 0]) * state.scales * selected,
        step=state.step * growth.clamp(max=1).exp(),
        scales=state.scales * (math.log(2) / 2 * spread).exp(),
        path=path,
        drift=drift,
    )


@lru_cache(maxsize=16)
def strategy(n: int, count: int) -> Rates:
    """The published constants for n coordinates and a population of `count`, those of the scales for the separable form."""
    raw = math.log((count + 1) / 2) - torch.arange(1, count + 1, dtype=torch.float64).log()
    positive, negative = raw.clamp(min=0) / raw.clamp(min=0).sum(), raw.clamp(max=0) / -raw.clamp(max=0).sum()
    mass, mass_negative = (float(1 / part.square().sum()) for part in (positive, negative))
    path = min(0.5, (mass + 2) / (n + mass + 3))
    drift = (1 + 1 / n + mass / n) / (math.sqrt(n) + 1 / n + 2 * mass / n)
    one = 1 / (n + 2 * math.sqrt(n) + mass / n)
    many = min(1 - one, (0.25 + mass + 1 / mass - 2) / (n + 4 * math.sqrt(n) + mass / 2))
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + path
    length = math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
    weights = positive + negative * min(1 + one / many, 1 + 2 * mass_negative / (mass + 2))
    return Rates(positive, weights, mass, path, drift, one, many, damping, length)


# Planes


def _small(x: Tensor, size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of the plane in which to search."""
    channels, height, width = planes(x)
    return (channels, height, width) if size is None else (channels, min(size, height), min(size, width))


def _chosen(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, P, ...) those at index (B, m)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _perturbed(problem: Problem, noise: Tensor, scale: Tensor) -> Tensor:
    """Feasible points (B, m, ...) near x + scale * noise, noise (B, m, C, h, w) enlarged to the plane.

    They are clipped, and in l2 then shortened where that is not enough: the nearest feasible ones would take much longer.
    """
    region, origin = problem.region, problem.origin
    moves = enlarged(noise, origin, "bilinear")
    points = (origin[:, None] + rows(scale.to(moves.dtype), moves) * moves).to(origin.dtype)
    points = torch.clamp(points, region.lower[:, None], region.upper[:, None])
    if region.threat.norm is Norm.LINF:
        return points
    if torch.finfo(points.dtype).bits < 32:  # rounding alone leads out of the ball
        owner = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
        return problem.project(points.flatten(0, 1), owner).view_as(points)
    moves = points - origin[:, None]
    length = torch.linalg.vector_norm(moves.flatten(2), dim=2, dtype=torch.float64)
    share = (SLACK * problem.eps[:, None] / length.clamp(min=1e-300)).clamp(max=1)
    return origin[:, None] + columns(share.to(moves.dtype), origin) * moves
