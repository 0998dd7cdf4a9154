"""Ascent along gradients that are estimated from scores: differences of the loss at random points around the iterate.

    g_k = mean_i (L(x_k + s u_i) - L(x_k - s u_i)) / (2 s) * u_i,    E[u u^T] = 1

The points around the iterate are clipped to the input range, not to the ball: there they only tell of the loss. The iterate
itself is asked about as well, and that is what counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.carlini_wagner import DECAY, DECAY_SQUARES, TINY, Range
from saddlepoint.attacks.penalty import unit, wide
from saddlepoint.attacks.planes import enlarged, planes
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Answers, Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Loss, loss_named
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows, tree_map

LEAST_STEP = 1 / 200  # of the first one: how small NES's steps may become
LARGEST_TILES = 50  # tiles along a side
SLACK = 1 - 1e-5  # of eps: rounding leads no sample out of the l2 ball
BOTH = frozenset({Norm.LINF, Norm.L2})


def around(problem: Problem, x: Tensor, moves: Tensor) -> Tensor:
    """x + moves (B, m, ...) in the input range, (B, m, ...)."""
    box = problem.without_ball().region
    return (x[:, None] + moves).clamp_(box.lower[:, None], box.upper[:, None]).to(x.dtype)


def ask_near(problem: Problem, x: Tensor, moves: Tensor, look: Tensor) -> Answers:
    """What the model says of x where `look` (B,), and of x + moves (B, m, ...) in the input range: (B, 1 + m)."""
    points = torch.cat([x[:, None], around(problem, x, moves)], 1)
    wanted = look[:, None] | (torch.arange(points.shape[1], device=x.device) > 0)
    return problem.ask(points, wanted)


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Pairs (B, 2 p, ...) of (B, p, ...): where a budget ends, whole pairs have been answered."""
    return torch.stack([first, second], 2).flatten(1, 2)


def differences(values: Tensor, answered: Tensor) -> tuple[Tensor, Tensor]:
    """First less second of pairs (B, 2 p), 0 where one of them has no answer; and which have both, (B, p) each."""
    both = answered[:, ::2] & answered[:, 1::2]
    return torch.where(both, values[:, ::2] - values[:, 1::2], torch.zeros_like(values[:, ::2])), both


def mean_direction(weights: Tensor, directions: Tensor, count: Tensor) -> Tensor:
    """Sum of weights (B, p) times directions (B, p, ...), divided by count (B,)."""
    total = torch.bmm(weights.to(directions.dtype)[:, None], directions.flatten(2))[:, 0]
    return (total / count.clamp(min=1).to(total.dtype)[:, None]).view(directions[:, 0].shape)


def columns(values: Tensor, like: Tensor) -> Tensor:
    """View numbers (B, m) so that they broadcast over points (B, m, ...) of inputs like (B, ...)."""
    return values.view(*values.shape, *[1] * (like.dim() - 1))


def range_width(problem: Problem) -> Tensor:
    """The width of each sample's input range (B, 1, ...), 1 without one."""
    return unit(problem.without_ball().region)


def at_least_a_level(problem: Problem, size: Tensor) -> Tensor:
    """Lengths of moves, no shorter than the spacing of the values that inputs may take."""
    return size.clamp(min=problem.region.threat.grid or 0.0)


def moved(problem: Problem, x: Tensor) -> Tensor:
    """Which points differ from the inputs, about which the engine has asked: (B,) bool."""
    return (x != problem.origin).flatten(1).any(1)


class _Estimating(Attack):
    """What the four share: `steps` steps with a loss to ascend, as many queries each as `width` says at most."""

    steps: int
    loss: str | Loss

    def __post_init__(self) -> None:
        self.whole(steps=1)
        loss_named(self.loss)

    def whole(self, **least: int) -> None:
        """Refuse settings that are no whole numbers of this size at least."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} must be a whole number >= {smallest}; got {value!r}")

    def positive(self, *names: str, optional: bool = False) -> None:
        """Refuse settings that are no positive numbers (nor None, where that is allowed)."""
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None) and not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number{' or None' if optional else ''}; got {value!r}")

    @property
    @final
    def iterations(self) -> int:
        return self.steps

    @property
    @final
    def objective(self) -> str | Loss:
        return self.loss

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)


class _Around(_Estimating):
    """NES and SPSA: `samples` points around the iterate, in opposite pairs."""

    samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole(samples=2)
        if self.samples % 2:
            raise InputError(f"samples must be even, for they come in opposite pairs; got {self.samples}")

    @property
    @final
    def width(self) -> int:
        return 1 + self.samples

    @property
    @final
    def takes_start(self) -> bool:
        return True

    @final
    def estimate(self, problem: Problem, x: Tensor, directions: Tensor, size: float) -> tuple[Tensor, Tensor]:
        """The gradient (B, ...) from pairs along directions (B, p, ...), and the mean loss around x (B,)."""
        length = at_least_a_level(problem, size * range_width(problem))
        moves = directions * length[:, None]
        answers = ask_near(problem, x, in_turn(moves, -moves), moved(problem, x))
        values, answered = problem.losses(answers, self.loss)[:, 1:], answers.answered[:, 1:]
        difference, both = differences(values, answered)
        level = torch.where(answered, values, torch.zeros_like(values)).sum(1) / answered.sum(1).clamp(min=1)
        return mean_direction(difference, directions, both.sum(1)) / (2 * length), level


@dataclass(frozen=True)
class Climb:
    """State of NES: the iterate and the running mean of gradients (B, ...); step size (B,), the last mean losses (B, n)."""

    x: Tensor
    gradient: Tensor
    size: Tensor
    levels: Tensor


@register(
    Declaration(
        summary="sign or normalised steps along gradients from opposite Gaussian samples, with momentum",
        reference="Ilyas et al. 2018, arXiv:1804.08598",
        norms=BOTH,
        access=Access.SCORES,
        linear_oracle=1.5,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class NES(_Around):
    """Ascent along gradients from natural evolution strategies: u_i are Gaussian, in opposite pairs.

        v_k = mu * v_(k-1) + (1 - mu) * g_k,    x_(k+1) = project(x_k + a_k * sign(v_k)), in l2 v_k / ||v_k||

    The step size a_k is divided by `drop` where the mean loss of the samples is lower than `plateau` - 1 steps before, but is
    never less than 1/200 of the first one.

    50 samples, sigma 0.001 (in widths of the input range), momentum 0.9, plateau 5 and drop 2 are the authors', as is a first
    step of eps / 5, which step_size=None means. Their loss is the cross-entropy, which a confident network rounds to 0; here it
    is the margin.

    Source: Ilyas, Engstrom, Athalye & Lin (2018), Black-box adversarial attacks with limited queries and information,
    arXiv:1804.08598, algorithm 1 and section 3.1; momentum and step size from the authors' code.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.SCORES)
    >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    >>> result = sp.attack(model, x, y, sp.attacks.NES(), sp.Linf(0.1), budget=sp.Budget(queries=200))
    >>> bool((result.queries.forward <= 200).all())
    True
    """

    steps: int = 200
    samples: int = 50
    sigma: float = 0.001
    step_size: float | None = None
    momentum: float = 0.9
    plateau: int = 5
    drop: float = 2.0
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("sigma")
        self.positive("step_size", optional=True)
        self.whole(plateau=2)
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must lie in [0, 1); got {self.momentum}")
        if not 1 <= self.drop < math.inf:
            raise InputError(f"drop must be a number >= 1; got {self.drop}")

    def _first_size(self, problem: Problem) -> Tensor:
        return problem.eps / 5 if self.step_size is None else torch.full_like(problem.eps, self.step_size)

    def init(self, problem: Problem) -> Climb:
        x = problem.begin(problem.origin)
        unknown = torch.full((len(x), self.plateau), -torch.inf, dtype=torch.float64, device=x.device)
        return Climb(x, torch.zeros_like(wide(x)), self._first_size(problem), unknown)

    def step(self, problem: Problem, state: Climb) -> Climb:
        shape = (self.samples // 2, *state.x.shape[1:])
        directions = problem.random().normal(shape, state.gradient.dtype)
        gradient, level = self.estimate(problem, state.x, directions, self.sigma)
        gradient = self.momentum * state.gradient + (1 - self.momentum) * gradient
        levels = torch.cat([state.levels[:, 1:], level[:, None].double()], 1)
        worse = levels[:, -1] < levels[:, 0]
        size = torch.where(worse, torch.maximum(state.size / self.drop, LEAST_STEP * self._first_size(problem)), state.size)
        x = problem.project((state.x + problem.steepest(gradient, size, state.x)).to(state.x.dtype))
        return Climb(x, gradient, size, levels.masked_fill(worse[:, None], -torch.inf))


@dataclass(frozen=True)
class Adapted:
    """State of SPSA: the iterate and Adam's two means, (B, ...) each."""

    x: Tensor
    mean: Tensor
    square: Tensor


@register(
    Declaration(
        summary="Adam along gradients from opposite random sign vectors",
        reference="Uesato et al. 2018, arXiv:1802.05666",
        norms=BOTH,
        access=Access.SCORES,
        linear_oracle=1.5,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SPSA(_Around):
    """Simultaneous perturbation stochastic approximation: u_i are vectors of random signs, and Adam makes the steps.

        x_(k+1) = project(x_k + Adam(g_k))

    L is the goal's margin. delta is by how much samples differ from x_k in every feature, in widths of the input range.

    delta 0.01 is the paper's. learning_rate (Adam's) is its 0.01 at eps = 8/255: None means a third of eps. In l2, where the
    paper has nothing, it is a third of eps / sqrt(d) for d features. 64 samples suit some thousand queries; the paper has up to
    8,192.

    Source: Uesato, O'Donoghue, van den Oord & Kohli (2018), Adversarial risk and the dangers of evaluating against weak
    attacks, arXiv:1802.05666, algorithm 1.
    """

    steps: int = 100
    samples: int = 64
    delta: float = 0.01
    learning_rate: float | None = None
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("delta")
        self.positive("learning_rate", optional=True)

    def init(self, problem: Problem) -> Adapted:
        x = problem.begin(problem.origin)
        zero = torch.zeros_like(wide(x))
        return Adapted(x, zero, zero)

    def step(self, problem: Problem, state: Adapted) -> Adapted:
        shape = (self.samples // 2, *state.x.shape[1:])
        directions = problem.random().sign(shape, state.mean.dtype)
        gradient, _ = self.estimate(problem, state.x, directions, self.delta)
        mean = DECAY * state.mean + (1 - DECAY) * gradient
        square = DECAY_SQUARES * state.square + (1 - DECAY_SQUARES) * gradient**2
        age = (problem.k + 1).double().to(mean.device)
        first, second = (rows((1 - decay**age).to(mean.dtype), mean) for decay in (DECAY, DECAY_SQUARES))
        step = rows(self._rate(problem).to(mean.dtype), mean) * (mean / first) / ((square / second).sqrt() + TINY)
        return Adapted(problem.project((state.x + step).to(state.x.dtype)), mean, square)

    def _rate(self, problem: Problem) -> Tensor:
        if self.learning_rate is not None:
            return torch.full_like(problem.eps, self.learning_rate)
        features = math.prod(problem.origin.shape[1:]) if problem.region.threat.norm is Norm.L2 else 1
        return problem.eps / (3 * math.sqrt(features))


@dataclass(frozen=True)
class Guess:
    """State of Bandits: the iterate (B, ...); the tiles' guess (B, C, h, w); whether to ask about the iterate (B,)."""

    x: Tensor
    guess: Tensor
    look: Tensor


@register(
    Declaration(
        summary="steps along a guess of the gradient on tiles, bettered with two queries a step",
        reference="Ilyas, Engstrom & Madry 2019, arXiv:1807.07978",
        norms=BOTH,
        access=Access.SCORES,
        spatial=True,
        no_oracle="two queries a step: the guess comes close to the gradient only after thousands of them",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class Bandits(_Estimating):
    """Bandits with time and data priors: the guess v of the gradient outlives the step, and is constant on tiles.

        q_(1,2) = v_k +- delta * u / sqrt(d),    d_k = (L(x_k + eta q_1 / ||q_1||) - L(x_k + eta q_2 / ||q_2||)) / (eta * delta)
        v_(k+1) = v_k + rate * d_k * delta * u / sqrt(d),    x_(k+1) = project(x_k + a * sign(v_(k+1))), in l2 v / ||v||

    u is Gaussian on the d tiles of all channels. In l-infinity the guess is tanh(v) and the update one of exponentiated
    gradients, as in the paper: tanh is its mirror map.

    tiles: along each of the last two dimensions; None for half their length, at most 50, which are the authors' 50 on ImageNet.
    Inputs of one dimension have no tiles. A step costs two queries, and a third one about the iterate itself where one of the
    last two was a success. eta is in widths of the input range.

    None means the authors' values for l-infinity and l2: exploration (delta) 1.0 and 0.01, eta 0.1 and 0.01, prior_rate 100 and
    0.1, step_size eps / 5 and eps / 10. 5,000 steps are their 10,000 queries.

    Source: Ilyas, Engstrom & Madry (2019), Prior convictions: black-box adversarial attacks with bandits and priors,
    arXiv:1807.07978, algorithms 1 to 3; values from the authors' code.
    """

    steps: int = 5000
    tiles: int | None = None
    exploration: float | None = None
    eta: float | None = None
    prior_rate: float | None = None
    step_size: float | None = None
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("exploration", "eta", "prior_rate", "step_size", optional=True)
        if self.tiles is not None:
            self.whole(tiles=1)

    @property
    def width(self) -> int:
        return 3

    @property
    def takes_start(self) -> bool:
        return True

    def init(self, problem: Problem) -> Guess:
        x = problem.begin(problem.origin)
        channels, *sides = planes(x)
        if x.dim() > 2:
            sides = [min(self.tiles or LARGEST_TILES, side if self.tiles else max(side // 2, 1)) for side in sides]
        guess = torch.zeros(len(x), channels, *sides, dtype=wide(x).dtype, device=x.device)
        return Guess(x, guess, moved(problem, x))

    def step(self, problem: Problem, state: Guess) -> Guess:
        linf = problem.region.threat.norm is Norm.LINF
        delta, eta, rate, share = (1.0, 0.1, 100.0, 1 / 5) if linf else (0.01, 0.01, 0.1, 1 / 10)
        delta, eta, rate = self.exploration or delta, self.eta or eta, self.prior_rate or rate
        size = share * problem.eps if self.step_size is None else torch.full_like(problem.eps, self.step_size)

        shape = tuple(state.guess.shape[1:])
        noise = problem.random().normal(shape, state.guess.dtype) * (delta / math.sqrt(math.prod(shape)))
        guess = torch.tanh(state.guess) if linf else state.guess
        tried = enlarged(torch.stack([guess + noise, guess - noise], 1), state.x, "nearest")
        length = torch.linalg.vector_norm(tried.flatten(2), dim=2).clamp(min=torch.finfo(tried.dtype).tiny)
        moves = tried / columns(length, state.x) * (eta * range_width(problem))[:, None]
        answers = ask_near(problem, state.x, moves, state.look)
        values, answered = problem.losses(answers, self.loss)[:, 1:], answers.answered[:, 1:]
        difference = differences(values, answered)[0][:, 0].to(noise.dtype)

        guess = state.guess + noise * rows(rate * difference / (eta * delta), noise)
        ahead = enlarged((torch.tanh(guess) if linf else guess)[:, None], state.x, "nearest")[:, 0]
        x = problem.project((state.x + problem.steepest(ahead, size, state.x)).to(state.x.dtype))
        return Guess(x, guess, answers.reached[:, 1:].any(1))


@dataclass(frozen=True)
class Distribution:
    """State of NAttack: the distribution's mean (B, C, h, w), and the point that it stands for (B, ...)."""

    mean: Tensor
    x: Tensor


@register(
    Declaration(
        summary="the mean of a Gaussian in tanh space is learned, so that its samples are successes",
        reference="Li et al. 2019, arXiv:1905.00441",
        norms=BOTH,
        access=Access.SCORES,
        spatial=True,
        no_oracle="it looks for a distribution of successes, and its samples are not at the ball's far end",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class NAttack(_Estimating):
    """NATTACK: learns the mean m of a Gaussian whose samples, mapped into the ball, are successes.

        x(z) = clip_eps(middle + half * tanh(artanh((x - middle) / half) + up(z))),    z_i = m_k + sigma * u_i
        m_(k+1) = m_k + rate / (n * sigma) * sum_i (L(x(z_i)) - mean) / std * u_i

    L is the goal's margin. up is bilinear, from a plane of at most grid x grid; inputs of one dimension are not enlarged.
    clip_eps clips in l-infinity and shortens in l2. All samples lie in the ball, so each may be the success.

    sigma 0.1 and the grid of 32 are the paper's. It has 300 samples and a learning rate of 0.02, for some hundred steps; 100
    and 0.1 go further with some thousand queries. As in our attacks of Carlini & Wagner, tanh's range is 10 % wider than the
    inputs', so that black and white pixels can move.

    Source: Li, Li, Wang, Zhang & Gong (2019), NATTACK: learning the distributions of adversarial examples for an improved
    black-box attack on deep neural networks, arXiv:1905.00441, algorithm 1 and section 3.
    """

    steps: int = 500
    samples: int = 100
    sigma: float = 0.1
    learning_rate: float = 0.1
    grid: int = 32
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole(samples=2, grid=1)
        self.positive("sigma", "learning_rate")

    @property
    def width(self) -> int:
        return self.samples

    def init(self, problem: Problem) -> Distribution:
        x = problem.origin
        channels, *sides = planes(x)
        if x.dim() > 2:
            sides = [min(side, self.grid) for side in sides]
        mean = 0.001 * problem.random(1).normal((channels, *sides), wide(x).dtype)
        return Distribution(mean, problem.project(self._points(problem, mean[:, None])[:, 0]))

    def step(self, problem: Problem, state: Distribution) -> Distribution:
        directions = problem.random().normal((self.samples, *state.mean.shape[1:]), state.mean.dtype)
        answers = problem.ask(self._points(problem, state.mean[:, None] + self.sigma * directions))
        values, count = problem.losses(answers, self.loss).to(directions.dtype), answers.answered.sum(1)
        values = values.masked_fill(~answers.answered, 0.0)
        centred = (values - (values.sum(1) / count.clamp(min=1))[:, None]).masked_fill(~answers.answered, 0.0)
        deviation = (centred.square().sum(1) / count.clamp(min=1)).sqrt()
        score = centred / (deviation + 1e-7)[:, None]
        mean = state.mean + self.learning_rate / self.sigma * mean_direction(score, directions, count)
        return Distribution(mean, problem.project(self._points(problem, mean[:, None])[:, 0]))

    def _points(self, problem: Problem, z: Tensor) -> Tensor:
        """x(z) of z (B, m, C, h, w): (B, m, ...)."""
        ball, box, origin = problem.region, problem.without_ball().region, problem.origin
        curve = Range.of(box)
        place = enlarged(z, origin, "bilinear") + curve.back(origin)[:, None]
        if bool(curve.bounded.all()):
            points = place.tanh_().mul_(curve.half[:, None]).add_(curve.middle[:, None])
        else:
            points = tree_map(lambda part: part[:, None], curve).point(place)
        if ball.threat.norm is Norm.LINF:
            return points.clamp_(ball.lower[:, None], ball.upper[:, None]).to(origin.dtype)
        delta = points.clamp_(box.lower[:, None], box.upper[:, None]).sub_(origin[:, None])
        length = torch.linalg.vector_norm(delta.flatten(2), dim=2).clamp(min=torch.finfo(delta.dtype).tiny)
        share = (SLACK * problem.eps.to(delta.dtype)[:, None] / length).clamp(max=1)
        return delta.mul_(columns(share, origin)).add_(origin[:, None]).to(origin.dtype)
