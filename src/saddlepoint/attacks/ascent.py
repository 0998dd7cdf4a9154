"""Steepest ascent: one mechanism, and the names that the literature gave to its settings.

    x_0     = x, or a random point of the ball
    g_k     = grad_x L(x_k)                                  (a targeted goal's loss is minus the distance to the target)
    x_(k+1) = project(x_k + alpha_k * argmax_{||d|| <= 1} <g_k, d>)

The step direction is the ball's own: sign(g) for l-infinity, g / ||g|| for l2, the largest entries for l1 and l0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.engine import ALL_NORMS, Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Goal, Loss, Targeted, loss_named
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows, take

Schedule = Literal["constant", "linear", "cosine"]
Start = Literal["origin", "uniform", "sign"]
_EXACT = 1.0  # oracle factor of what reaches the optimum on linear models


@dataclass(frozen=True)
class Iterate:
    """State of steepest ascent: the point, and the accumulated gradient where there is momentum. (B, ...) each.

    before, slope: where there is variance tuning, the point at which the last step took its gradient, and that gradient.
    """

    x: Tensor
    velocity: Tensor
    before: Tensor
    slope: Tensor


class Slope(Protocol):
    """An estimate of the gradient at points (Q, ...) of the samples `owner` (Q,), in place of the gradient itself.

    rows: how many evaluations it makes for a point, all forward and backward. own: whether the last one is the point itself,
    and nothing is random.
    """

    @property
    def rows(self) -> int: ...

    @property
    def own(self) -> bool: ...

    def __call__(self, problem: Problem, points: Tensor, loss: str | Loss, owner: Tensor | None, keys: Keys) -> Tensor: ...


@dataclass(frozen=True)
class Recipe:
    """The settings of one member of the family.

    step_size: absolute, in input units; None means `path` * eps / steps. start_radius: share of eps of the random start.
    direction: "steepest"; "scaled", the gradient stretched to the step's norm; "raw", step size times the gradient.
    momentum: decay mu of the accumulated g / mean|g|, which is the papers' g / ||g||_1 times the number of features.
    look_ahead: take the gradient at x + alpha * mu * that; in l2 divided by the length of (1, ..., 1).
    slope: how the gradient is estimated.
    neighbours: by the mean gradient of so many random points around the last point, less the gradient there, the gradient is
    corrected (variance tuning). They lie in a ball of `neighbourhood` times eps.
    """

    steps: int
    loss: str | Loss = "cross_entropy"
    step_size: float | None = None
    path: float = 1.0
    schedule: Schedule = "constant"
    start: Start = "origin"
    start_radius: float = 1.0
    direction: Literal["steepest", "scaled", "raw"] = "steepest"
    momentum: float = 0.0
    look_ahead: bool = False
    slope: Slope | None = None
    neighbours: int = 0
    neighbourhood: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps}")
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise InputError(f"step_size must be a positive number or None; got {self.step_size}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise InputError(f'schedule must be "constant", "linear" or "cosine"; got {self.schedule!r}')
        if not self.momentum >= 0:
            raise InputError(f"momentum must be >= 0; got {self.momentum}")
        if not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise InputError(f"neighbours must be a whole number >= 0; got {self.neighbours}")
        if not (self.neighbourhood > 0 and math.isfinite(self.neighbourhood)):
            raise InputError(f"neighbourhood must be a positive number, times eps; got {self.neighbourhood}")
        loss_named(self.loss)

    @property
    def rows(self) -> int:
        """Evaluations that the gradient at one point takes."""
        return 1 if self.slope is None else self.slope.rows

    @property
    def blurred(self) -> bool:
        """Whether the gradient is that of random views, not of the point."""
        return self.slope is not None and not self.slope.own

    @property
    def elsewhere(self) -> bool:
        """Whether steps may not evaluate their iterate."""
        return self.look_ahead or self.blurred

    def factors(self) -> Tensor:
        """The schedule's factor for each iteration, (steps,) float64."""
        progress = torch.arange(self.steps, dtype=torch.float64) / self.steps
        match self.schedule:
            case "linear":
                return 1 - progress
            case "cosine":
                return (1 + torch.cos(math.pi * progress)) / 2
            case _:
                return torch.ones(self.steps, dtype=torch.float64)

    def sizes(self, problem: Problem) -> Tensor:
        """Step size of each sample at its iteration, (B,) float64."""
        base = self.path / self.steps * problem.eps if self.step_size is None else torch.full_like(problem.eps, self.step_size)
        return base * self.factors()[problem.k].to(base.device) if self.schedule != "constant" else base


class SteepestAscent(Attack):
    """Base of the family: a member states its `recipe` and nothing else."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """This attack's settings of the mechanism."""

    def __post_init__(self) -> None:
        self.recipe()  # bad hyperparameters are refused here

    @property
    @final
    def iterations(self) -> int:
        return self.recipe().steps

    @property
    @final
    def objective(self) -> str | Loss:
        return self.recipe().loss

    @property
    @final
    def starts_at_origin(self) -> bool:
        recipe = self.recipe()
        return recipe.start == "origin" and not recipe.elsewhere and recipe.rows == 1

    @property
    @final
    def takes_start(self) -> bool:
        return not self.recipe().blurred

    @property
    @final
    def randomized(self) -> bool:
        recipe = self.recipe()
        return recipe.start != "origin" or recipe.neighbours > 0 or recipe.blurred

    @property
    @final
    def judge(self) -> bool:
        return self.recipe().elsewhere

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        recipe = self.recipe()
        gradients = recipe.rows * (1 + recipe.neighbours)
        return gradients + recipe.elsewhere, gradients

    @final
    def opening(self, classes: int) -> tuple[int, int]:
        recipe = self.recipe()
        return recipe.rows + recipe.elsewhere, recipe.rows

    @final
    def init(self, problem: Problem) -> Iterate:
        recipe, x = self.recipe(), problem.origin
        if recipe.start == "uniform":
            x = problem.random_point()
        elif recipe.start == "sign":
            noise = problem.random().sign(tuple(x.shape[1:]), x.dtype)
            x = problem.project(x + noise * rows((recipe.start_radius * problem.eps).to(x.dtype), x))
        x = problem.begin(x)
        nothing = x.new_zeros(len(x))
        velocity, before = (torch.zeros_like(x) if used else nothing for used in (recipe.momentum, recipe.neighbours))
        return Iterate(x, velocity, before, before)

    @final
    def step(self, problem: Problem, state: Iterate) -> Iterate:
        recipe, x, velocity = self.recipe(), state.x, state.velocity
        size = recipe.sizes(problem)
        look = x
        if recipe.look_ahead:
            unit = x.shape[1:].numel() ** -0.5 if problem.region.threat.norm is Norm.L2 else 1.0  # 1 / ||(1, ..., 1)||
            look = x + recipe.momentum * velocity * rows((unit * size).to(x.dtype), x)
        variance = self._variance(problem, state) if recipe.neighbours else None
        gradient = self._slope(problem, look)
        before, slope = state.before, state.slope
        if variance is not None:
            before, slope, gradient = look, gradient, gradient + variance
        if recipe.momentum:
            velocity = gradient = recipe.momentum * velocity + gradient * _inverse(gradient.flatten(1).abs().mean(1), x)
        match recipe.direction:
            case "steepest":
                move = problem.steepest(gradient, size, x)
            case "scaled":
                norm = problem.region.threat.distance(gradient, torch.zeros_like(gradient))
                move = gradient * (rows(size.to(x.dtype), x) * _inverse(norm, x))
            case "raw":
                move = gradient * rows(size.to(x.dtype), x)
        return Iterate(problem.project(x + move), velocity, before, slope)

    def _slope(self, problem: Problem, points: Tensor, owner: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        recipe = self.recipe()
        if recipe.slope is None:
            return problem.loss_and_grad(points, recipe.loss, owner).gradient
        return recipe.slope(problem, points, recipe.loss, owner, problem.random() if keys is None else keys)

    def _variance(self, problem: Problem, state: Iterate) -> Tensor:
        """Mean gradient at random points around the last one, less the gradient there; 0 in the first step.

        In the papers each step ends with this, for the next one: so the last step's would be of no use.
        """
        recipe, region = self.recipe(), problem.region
        later = (problem.k > 0).nonzero()[:, 0].to(state.x.device)
        if not len(later):
            return torch.zeros_like(state.x)
        owner = later.repeat_interleave(recipe.neighbours)
        number = torch.arange(recipe.neighbours, device=owner.device).repeat(len(later))
        keys = take(problem.random(stream=1), owner).absorb(number)
        ball = take(region, owner)
        away = region.threat.draw_in(replace(ball, eps=recipe.neighbourhood * ball.eps), keys)
        around = self._slope(problem, state.before[owner] + away.to(state.x.dtype), owner, keys.absorb(2))
        mean = around.view(len(later), recipe.neighbours, *state.x.shape[1:]).mean(1)
        return torch.zeros_like(state.x).index_copy(0, later, mean - state.slope[later])


def _inverse(size: Tensor, like: Tensor) -> Tensor:
    """1 / size (B,), 0 where size is 0, in the shape and dtype to multiply `like` with."""
    return rows(torch.where(size > 0, 1 / size, torch.zeros_like(size)).to(like.dtype), like)


def _one_step(summary: str, reference: str, norms: frozenset[Norm] = frozenset({Norm.LINF})) -> Declaration:
    return Declaration(summary=summary, reference=reference, norms=norms, iterative=False, linear_oracle=_EXACT)


@register(_one_step("one signed gradient step of size eps", "Goodfellow, Shlens & Szegedy 2015, arXiv:1412.6572"))
@final
@dataclass(frozen=True, kw_only=True)
class FGSM(SteepestAscent):
    """Fast gradient sign method: x' = x + eps * sign(grad_x L(x, y)), or x - eps * sign(grad_x L(x, t)) when targeted.

    For a model with one logit f and labels +-1 this is x - eps * y * sign(grad f), which is exact on linear models.
    loss="margin" gives that form without the cross-entropy's underflow on confident inputs.

    Source: Goodfellow, Shlens & Szegedy (2015), Explaining and harnessing adversarial examples, arXiv:1412.6572, section 4.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 2), bounds=None)
    >>> sp.attack(model, torch.zeros(3, 4), torch.tensor([0, 1, 0]), sp.attacks.FGSM(), sp.Linf(0.1)).adversarial.shape
    torch.Size([3, 4])
    """

    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(steps=1, loss=self.loss)


@register(
    _one_step(
        "one steepest step of size eps in the threat's norm",
        "Goodfellow et al. 2015, arXiv:1412.6572; Miyato et al. 2017, arXiv:1605.07725",
        ALL_NORMS,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class FGM(SteepestAscent):
    """Fast gradient method: FGSM with the steepest step of the threat's own norm.

    l2: x + eps * g / ||g||_2. l1: eps is spent on the entries of largest |g|, each up to its room in the input
    range. l0: the eps features of largest |g_i| * room_i go to the end of their range.

    Source: the norm-ball form of Goodfellow et al. (2015, arXiv:1412.6572); l2 as in Miyato, Dai & Goodfellow (2017,
    arXiv:1605.07725), eq. 5.
    """

    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(steps=1, loss=self.loss)


@register(
    Declaration(
        summary="one step along the raw gradient, without the sign",
        reference="Rozsa, Rudd & Boult 2016, arXiv:1605.01775",
        norms=frozenset({Norm.LINF, Norm.L2}),
        iterative=False,
        no_oracle="the raw gradient is not the steepest direction of the l-infinity ball; how far off depends on its entries",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class FastGradientValue(SteepestAscent):
    """Fast gradient value: a step along grad_x L itself, which keeps the ratios of its entries.

    step_size: None stretches the gradient to the ball's surface, x + eps * g / ||g|| in the threat's norm; a number takes
        x + step_size * g as it is, and projects.

    Source: Rozsa, Rudd & Boult (2016), Adversarial diversity and hard positive generation, arXiv:1605.01775, section 3.
    """

    step_size: float | None = None
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        direction: Literal["scaled", "raw"] = "scaled" if self.step_size is None else "raw"
        return Recipe(steps=1, loss=self.loss, step_size=self.step_size, direction=direction)


@register(
    Declaration(
        summary="a random sign step, then a gradient sign step for what is left of eps",
        reference="Tramèr et al. 2018, arXiv:1705.07204",
        norms=frozenset({Norm.LINF}),
        iterative=False,
        linear_oracle=3.0,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class RFGSM(SteepestAscent):
    """R+FGSM: x1 = x + alpha * sign(N(0, I)), then x' = x1 + (eps - alpha) * sign(grad L(x1)).

    The random step leaves the flat spot that single-step training makes around each input.
    random_share: alpha / eps; the paper's default is 1/2 (its MNIST code: 0.05 / 0.3).

    Source: Tramèr, Kurakin, Papernot, Goodfellow, Boneh & McDaniel (2018), Ensemble adversarial training, arXiv:1705.07204,
    eq. 7. On linear models half of eps goes astray, hence the oracle factor.
    """

    random_share: float = 0.5
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        if not 0 < self.random_share < 1:
            raise InputError(f"random_share must lie in (0, 1); got {self.random_share}")
        return Recipe(steps=1, loss=self.loss, start="sign", start_radius=self.random_share, path=1 - self.random_share)


_LEAST_LIKELY = "Kurakin, Goodfellow & Bengio 2017, arXiv:1611.01236"


@register(
    Declaration(
        summary="one signed step towards a class, by default the least likely one",
        reference=_LEAST_LIKELY,
        norms=frozenset({Norm.LINF}),
        untargeted=False,
        iterative=False,
        linear_oracle=_EXACT,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class OTCM(SteepestAscent):
    """One-step target class method: x' = x - eps * sign(grad_x L(x, t)), with t the least likely class unless a goal says.

    Source: Kurakin, Goodfellow & Bengio (2017), Adversarial machine learning at scale, arXiv:1611.01236, section 3.
    """

    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(steps=1, loss=self.loss)

    def default_goal(self) -> Goal:
        return Targeted("least_likely")


_BALLS = frozenset({Norm.LINF, Norm.L2, Norm.L1})


@register(
    Declaration(
        summary="signed gradient steps from the input, clipped to the ball",
        reference="Kurakin, Goodfellow & Bengio 2017, arXiv:1607.02533",
        norms=_BALLS,
        linear_oracle=_EXACT,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class BIM(SteepestAscent):
    """Basic iterative method (I-FGSM): x_(k+1) = clip(x_k + alpha * sign(grad L(x_k))), from x_0 = x.

    step_size: alpha in input units; None means eps / steps. The paper has alpha = 1/255 and min(eps + 4, 1.25 eps) steps,
    eps in 1/255.

    Source: Kurakin, Goodfellow & Bengio (2017), Adversarial examples in the physical world, arXiv:1607.02533, section 2.2.
    """

    steps: int = 10
    step_size: float | None = None
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, loss=self.loss, step_size=self.step_size)


@register(
    Declaration(
        summary="signed gradient steps towards a class, by default the least likely one",
        reference="Kurakin, Goodfellow & Bengio 2017, arXiv:1607.02533",
        norms=_BALLS,
        untargeted=False,
        linear_oracle=_EXACT,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class ILLC(SteepestAscent):
    """Iterative least-likely class method: x_(k+1) = clip(x_k - alpha * sign(grad L(x_k, y_LL))).

    step_size: as in `BIM`. A `Targeted` goal puts another class in place of the least likely one.

    Source: Kurakin, Goodfellow & Bengio (2017), Adversarial examples in the physical world, arXiv:1607.02533, section 2.3.
    """

    steps: int = 10
    step_size: float | None = None
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, loss=self.loss, step_size=self.step_size)

    def default_goal(self) -> Goal:
        return Targeted("least_likely")


@register(
    Declaration(
        summary="projected gradient ascent from a random point of the ball",
        reference="Madry et al. 2018, arXiv:1706.06083",
        norms=_BALLS,
        linear_oracle=1.05,  # 2.5 eps of steps on an l2 sphere turn a right angle into one of 9 degrees, not 0
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class PGD(SteepestAscent):
    """Projected gradient descent on the negative loss, the reference attack of min-max training.

    steps: the paper uses 40 (MNIST) and 7 or 20 (CIFAR-10). step_size: in input units; None means 2.5 * eps / steps, which can
    cross the ball. schedule: "constant", "linear" or "cosine" decay of the step size. `Restarts(PGD(), 10)` restarts it.

    Source: Madry, Makelov, Schmidt, Tsipras & Vladu (2018), Towards deep learning models resistant to adversarial
    attacks, arXiv:1706.06083, section 2.1.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 2), bounds=(0, 1))
    >>> x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    >>> bool((sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.L2(0.5)).distance <= 0.5).all())
    True
    """

    steps: int = 40
    step_size: float | None = None
    loss: str | Loss = "cross_entropy"
    schedule: Schedule = "constant"
    random_start: bool = True

    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            loss=self.loss,
            step_size=self.step_size,
            path=2.5,
            schedule=self.schedule,
            start="uniform" if self.random_start else "origin",
        )


@register(
    Declaration(
        summary="iterative steps along an accumulated gradient",
        reference="Dong et al. 2018, arXiv:1710.06081",
        norms=frozenset({Norm.LINF, Norm.L2}),
        linear_oracle=_EXACT,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class MIFGSM(SteepestAscent):
    """Momentum iterative FGSM: g_(k+1) = mu * g_k + grad / ||grad||_1, then a step of sign(g_(k+1)) (l2: g / ||g||_2).

    momentum: the decay mu, 1.0 in the paper. step_size: None means eps / steps.

    Source: Dong, Liao, Pang, Su, Zhu, Hu & Li (2018), Boosting adversarial attacks with momentum, arXiv:1710.06081,
    algorithm 1.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            loss=self.loss,
            step_size=self.step_size,
            momentum=self.momentum,
        )


@register(
    Declaration(
        summary="momentum with the gradient taken at the point ahead",
        reference="Lin et al. 2020, arXiv:1908.06281",
        norms=frozenset({Norm.LINF, Norm.L2}),
        linear_oracle=_EXACT,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class NIFGSM(SteepestAscent):
    """Nesterov iterative FGSM: MI-FGSM with the gradient taken at x_k + alpha * mu * g_k.

    g_k sums up gradients over the mean of their entries' sizes, as in the authors' code; over their l1 norm, as printed, the
    point ahead would hardly be another one. What is evaluated is not the iterate, so each step costs one more forward pass,
    which judges the iterate.
    momentum, step_size: as in `MIFGSM`.

    Source: Lin, Song, He, Wang & Hopcroft (2020), Nesterov accelerated gradient and scale invariance for adversarial
    attacks, arXiv:1908.06281, eq. 6 to 8.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    loss: str | Loss = "cross_entropy"

    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            loss=self.loss,
            step_size=self.step_size,
            momentum=self.momentum,
            look_ahead=True,
        )


@register(
    Declaration(
        summary="a short ascent with momentum from a random corner of the ball, the step size falling from eps to 0",
        reference="ours; after Madry et al. 2018, arXiv:1706.06083, and Dong et al. 2018, arXiv:1710.06081",
        norms=_BALLS,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class Sprint(SteepestAscent):
    """The first attack of `sp.evaluate`: most of what falls at all falls to a few large steps on the margin.

        x_0 = a random corner of the ball,    step size eps * (1 + cos(pi k / steps)) / 2,    momentum as in `MIFGSM`

    Ours, of known parts: PGD's start and projection, momentum of MI-FGSM, a cosine schedule from eps.
    """

    steps: int = 10
    loss: str | Loss = "margin"
    momentum: float = 0.75

    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            loss=self.loss,
            path=self.steps,
            schedule="cosine",
            start="sign",
            momentum=self.momentum,
        )
