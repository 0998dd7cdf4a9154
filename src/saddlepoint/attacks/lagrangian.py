"""Smallest perturbations by descent on a Lagrangian of distance and misclassification, whose multiplier follows the iterates.

    min_delta  D(delta) + mu * violation(x + delta)

ALMA takes a penalty function for the second term and scaled gradient steps. PDGD and PDPGD have a dual variable that grows
while the point fails and shrinks while it succeeds; PDPGD steps on the distance through its proximal operator.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping
from saddlepoint.engine import ALL_NORMS, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows


def _span(problem: Problem) -> Tensor:
    """Width of each sample's input range, (B,) float64; 1 without one."""
    width = (problem.region.upper - problem.region.lower).flatten(1).amax(1).double()
    return torch.where(torch.isfinite(width) & (width > 0), width, torch.ones_like(width))


def _away(delta: Tensor, norm: Norm) -> Tensor:
    """Gradient of ||delta||_2 or ||delta||_1; 0 at 0."""
    if norm is Norm.L1:
        return delta.sign()
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)
    return delta * rows(torch.where(size > 0, 1 / size, torch.zeros_like(size)).to(delta.dtype), delta)


class _Descent(Stepping):
    """What these attacks share: hyperparameters that may be None."""

    def _check(self, positive: tuple[str, ...], shares: tuple[str, ...]) -> None:
        self._check_whole(steps=1)
        self._check_positive(*(name for name in positive if getattr(self, name) is not None))
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} must lie in [0, 1); got {value}")


@dataclass(frozen=True)
class Augmented:
    """The iterate, the averages of its gradients (B, ...), and the numbers of the Lagrangian, (B,) float64."""

    x: Tensor
    velocity: Tensor
    square: Tensor
    rate: Tensor
    multiplier: Tensor
    penalty: Tensor
    checked: Tensor  # the violation at the last check
    unit: Tensor  # what violations are divided by
    found: Tensor  # (B,) int64, iteration of the first success; `steps` + 1 before


def penalty_slope(y: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    """dP/dy of the penalty function P_2: mu y + mu rho y^2 + rho^2 y^3 / 6 for y >= 0, mu y / (1 - rho y) for y < 0."""
    above = mu + 2 * mu * rho * y + rho**2 * y**2 / 2
    return torch.where(y >= 0, above, mu / (1 - rho * y.clamp(max=0)) ** 2)


@register(
    Declaration(
        summary="augmented Lagrangian of distance and logit difference, with scaled gradient steps",
        reference="Rony et al. 2021, arXiv:2011.11857",
        norms=frozenset({Norm.L2, Norm.L1}),
        minimizes=True,
        linear_oracle=1.3,  # l1, whose gradient has no zero but at corners; l2 within 1.01
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class ALMA(_Descent):
    """Augmented Lagrangian method for adversarial attacks.

        g = grad [D(delta) + P_2(y(x + delta), rho, mu)],    y = (needed - margin) / (z_(1) - z_(3)), the ratio of DLR
        mu = alpha * mu + (1 - alpha) * P_2'(y),    rho = gamma * rho every `check_steps` steps if y has not fallen by 1 - tau
        delta = clip(delta - eta_k * v),    v = alpha * v + g / sqrt(s),    s = alpha * s + (1 - alpha) * g^2

    The first step is along P_2 alone, and eta_0 is such that it has the length `init_distance` (in units of the input range;
    None: 0.1 in l2, 0.5 in l1, the paper's). After the first success eta falls to `lr_reduction` times that. alpha: None is
    0.5 up to 100 steps and 0.9 beyond, as in the paper's experiments. Its colour and structural distances are not here.

    Source: Rony, Granger, Pedersoli & Ben Ayed (2021), Augmented Lagrangian adversarial attacks, arXiv:2011.11857,
    algorithm 1. Where the first gradient is zero the authors' code takes a random direction; this stays at the input.
    """

    steps: int = 1000
    init_distance: float | None = None
    lr_reduction: float = 0.01
    alpha: float | None = None
    mu_init: float = 1.0
    rho_init: float = 1.0
    check_steps: int = 10
    tau: float = 0.95
    gamma: float = 1.2

    def __post_init__(self) -> None:
        self._check(("init_distance", "lr_reduction", "mu_init", "rho_init", "gamma"), ("alpha", "tau"))
        if not isinstance(self.check_steps, int) or self.check_steps < 1:
            raise InputError(f"check_steps must be a whole number >= 1; got {self.check_steps}")

    def init(self, problem: Problem) -> Augmented:
        x, one = problem.origin, torch.ones_like(problem.eps)
        mu, rho = self.mu_init * one, self.rho_init * one
        found = torch.full_like(problem.labels, self.steps + 1)
        return Augmented(x, torch.zeros_like(x), torch.ones_like(x), 0 * one, mu, rho, 0 * one, one, found)

    def step(self, problem: Problem, state: Augmented) -> Augmented:
        k, norm, alpha = problem.k.to(state.found), problem.region.threat.norm, self.alpha
        alpha = (0.5 if self.steps <= 100 else 0.9) if alpha is None else alpha
        seen = problem.loss_and_grad(state.x, _violation(problem.needed))
        y, first, earlier = seen.loss.double(), k == 0, state.found <= self.steps
        # two logits have no ratio that tells anything: their difference, over that at the input
        unit = torch.where(first, y.abs().clamp(min=1e-8), state.unit) if seen.logits.shape[1] < 3 else state.unit
        y = y / unit
        check = ~first & ((k + 1) % self.check_steps == 0)
        stuck = check & ~earlier & (y >= self.tau * state.checked)
        rho = torch.where(stuck, self.gamma * state.penalty, state.penalty)
        averaged = alpha * state.multiplier + (1 - alpha) * penalty_slope(y, rho, state.multiplier)
        mu = torch.where(first, state.multiplier, averaged.clamp(1e-6, 1e12))
        found = torch.where(~earlier & (problem.surplus(seen.logits) >= 0), k, state.found)
        span = _span(problem)
        slope = (penalty_slope(y, rho, mu) / unit * span).to(state.x.dtype)
        gradient = rows(slope, state.x) * seen.gradient + _away(state.x - problem.origin, norm)  # of 0 at the input
        rate = state.rate
        if bool(first.any()):
            size = (self.init_distance or {Norm.L2: 0.1, Norm.L1: 0.5}[norm]) * span
            rate = torch.where(first, _rate_for(problem, gradient, size), rate)
        progress = (k - found).clamp(min=0) / (self.steps - found)
        eta = rate * self.lr_reduction**progress
        square = alpha * state.square + (1 - alpha) * gradient**2
        velocity = alpha * state.velocity + gradient / (square.sqrt() + 1e-8)
        x = torch.clamp(state.x - rows(eta.to(state.x.dtype), state.x) * velocity, problem.region.lower, problem.region.upper)
        checked = torch.where(first | check, y, state.checked)
        return Augmented(x, velocity, square, rate, mu, rho, checked, unit, found)


def _violation(needed: float) -> Callable[[Tensor, Aim], Tensor]:
    """(needed - margin) over the spread of the logits, as in DLR; the difference alone where there are two classes."""

    def violation(logits: Tensor, aim: Aim) -> Tensor:
        missing, count = needed - aim.margin(logits), logits.shape[1]
        if count < 3:
            return missing
        ranked = logits.topk(min(count, 4), dim=1).values
        lower = ranked[:, 2:].mean(1) if aim.goal.targeted else ranked[:, 2]
        return missing / (ranked[:, 0] - lower + 1e-8)

    return violation


def _rate_for(problem: Problem, gradient: Tensor, size: Tensor) -> Tensor:
    """The rate (B,) at which a step along -gradient inside the input range goes as far as `size`; 0 without a gradient."""
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
    unit = gradient.double() * rows(torch.where(length > 0, 1 / length, torch.zeros_like(length)), gradient)
    low, high = torch.full_like(size, -30.0), torch.full_like(size, 30.0)
    origin, ends = problem.origin.double(), (problem.region.lower.double(), problem.region.upper.double())
    for _ in range(40):
        middle = (low + high) / 2
        moved = torch.clamp(origin - unit * rows(size * 2**middle, unit), *ends)
        larger = problem.region.threat.distance(moved, origin) > size
        low, high = torch.where(larger, low, middle), torch.where(larger, middle, high)
    return torch.where(length > 0, size * 2**low / length, torch.zeros_like(length))


@dataclass(frozen=True)
class PrimalDual:
    """The iterate and Adam's averages (B, ...); the dual variable and the averaged weight of the constraint, (B,) float64."""

    x: Tensor
    mean: Tensor
    square: Tensor
    dual: Tensor
    weight: Tensor


Ends = tuple[Tensor, Tensor]
"""The smallest and the largest perturbations (B, ...)."""


@dataclass(frozen=True, kw_only=True)
class _PrimalDual(_Descent):
    """What PDGD and PDPGD share: Adam on the perturbation, and sign steps on the log-ratio of the two weights.

    Perturbations are in units of the input range here.
    """

    steps: int = 500
    primal_lr: float = 0.1
    primal_lr_decrease: float = 0.01
    dual_ratio: float = 0.01
    dual_lr: float = 0.1
    dual_lr_decrease: float = 0.1
    dual_average: float = 0.9
    least_ratio: float = 1e-6

    def __post_init__(self) -> None:
        self._check(
            ("primal_lr", "primal_lr_decrease", "dual_ratio", "dual_lr", "dual_lr_decrease", "least_ratio"), ("dual_average",)
        )

    @final
    def init(self, problem: Problem) -> PrimalDual:
        x, dual = problem.origin, torch.full_like(problem.eps, -math.log(self.dual_ratio))
        return PrimalDual(x, torch.zeros_like(x), torch.zeros_like(x), dual, dual.sigmoid())

    @abstractmethod
    def gradient(self, problem: Problem, state: PrimalDual, constraint: Tensor) -> Tensor:
        """What Adam descends, given the gradient of the constraint's loss."""

    def finish(self, problem: Problem, state: PrimalDual, delta: Tensor, scale: Tensor, size: Tensor, ends: Ends) -> Tensor:
        """The perturbation after Adam's step, inside `ends`; scale (B, ...): its denominators, size (B,): its step size."""
        return delta

    @final
    def step(self, problem: Problem, state: PrimalDual) -> PrimalDual:
        x, origin, dtype = state.x, problem.origin, state.x.dtype
        span = rows(_span(problem).to(dtype), x)
        seen = problem.loss_and_grad(x, "margin")
        y = -problem.surplus(seen.logits).double()
        # the constraint's loss is log(1 + exp(y))
        g = self.gradient(problem, state, -seen.gradient * span * rows(y.sigmoid().to(dtype), x))
        k = problem.k.to(y)
        mean, square = 0.9 * state.mean + 0.1 * g, 0.999 * state.square + 0.001 * g**2
        scale = (square / rows((1 - 0.999 ** (k + 1)).to(dtype), x)).sqrt() + 1e-8
        size = self.primal_lr * self.primal_lr_decrease ** (k / self.steps)
        delta = (x - origin) / span - mean / scale * rows((size / (1 - 0.9 ** (k + 1))).to(dtype), x)
        ends = (problem.region.lower - origin) / span, (problem.region.upper - origin) / span
        delta = self.finish(problem, state, torch.clamp(delta, *ends), scale, size, ends)
        left = 1 - k / max(1, self.steps - 1)
        rate = self.dual_lr * (left * (1 - self.dual_lr_decrease) + self.dual_lr_decrease)
        bound = -math.log(self.least_ratio)
        dual = (state.dual + rate * y.sign()).clamp(-bound, bound)
        weight = self.dual_average * state.weight + (1 - self.dual_average) * dual.sigmoid()
        new = torch.clamp(origin + delta * span, problem.region.lower, problem.region.upper)
        return PrimalDual(new, mean, square, dual, weight)


_REFERENCE = "Matyasko & Chau 2021, arXiv:2106.01538"


@register(
    Declaration(
        summary="primal-dual gradient descent on l2 distance and margin",
        reference=_REFERENCE,
        norms=frozenset({Norm.L2}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class PDGD(_PrimalDual):
    """Primal-dual gradient descent: Adam on delta, gradient ascent on the weight of the constraint.

        delta descends  (1 - w) * ||delta||_2 + w * log(1 + exp(y)),    y = needed - margin,    clipped to the input range
        lambda = lambda + rate_k * sign(y),    w = average * w + (1 - average) * sigmoid(lambda)

    primal_lr: Adam's step, in units of the input range; falls exponentially to `primal_lr_decrease` times that. dual_lr: the
    rate, falls linearly. dual_ratio: first (1 - w) / w. least_ratio: the smallest ratio of the weights, either way.

    Source: Matyasko & Chau (2021), PDPGD: Primal-dual proximal gradient descent adversarial attack, arXiv:2106.01538,
    algorithm 1. Values are those of adversarial-library; the paper's second run with smaller steps is left to a `Sequence`.
    """

    def gradient(self, problem: Problem, state: PrimalDual, constraint: Tensor) -> Tensor:
        weight = rows(state.weight.to(state.x.dtype), state.x)
        return (1 - weight) * _away(state.x - problem.origin, Norm.L2) + weight * constraint


Proximal = Callable[[Tensor, Tensor], Tensor]
"""argmin_z 1/2 ||z - v||_2^2 + step * D(z), for v (B, D) and steps (B, 1)."""


def proximal_l1(v: Tensor, step: Tensor) -> Tensor:
    """Of ||z||_1: every entry shrinks by the step."""
    return (v.abs() - step).clamp(min=0) * v.sign()


def proximal_l2(v: Tensor, step: Tensor) -> Tensor:
    """Of ||z||_2: the length shrinks by the step."""
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v * torch.where(size > 0, 1 - step / size, torch.zeros_like(size)).clamp(min=0)


def proximal_linf(v: Tensor, step: Tensor) -> Tensor:
    """Of ||z||_inf: entries are cut to [-t, t], where what is cut off adds up to the step."""
    sizes = v.abs().sort(1, descending=True).values
    count = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    levels = (sizes.cumsum(1) - step) / count
    level = levels.amax(1, keepdim=True).clamp(min=0)  # of the m largest entries; the right m is where it is largest
    return torch.clamp(v, -level, level)


def proximal_l0(v: Tensor, step: Tensor) -> Tensor:
    """Of the number of non-zero entries: small entries become 0."""
    return torch.where(v**2 >= 2 * step, v, torch.zeros_like(v))


def proximal_two_thirds(v: Tensor, step: Tensor) -> Tensor:
    """Of sum |z_i|^(2/3), which is nearer to a count than l1 is: the larger root of z - |v| + 2/3 step z^(-1/3) = 0, or 0.

    With z = u^3 that is u^4 - |v| u + 2/3 step = 0, solved by Ferrari's formula.
    """
    size, step = v.double().abs(), step.double()
    moved = size > 2 * (2 * step / 3) ** 0.75
    size = torch.where(moved, size, torch.ones_like(size))
    step = torch.where(moved, step, torch.zeros_like(size))
    square = size**2 / 16
    root = (square**2 - 8 * step**3 / 729).clamp(min=0).sqrt()
    b = 2 * ((square + root) ** (1 / 3) + (square - root).clamp(min=0) ** (1 / 3))
    u = (b.sqrt() + (2 * size / b.sqrt() - b).clamp(min=0).sqrt()) / 2
    return torch.where(moved, u**3 * v.double().sign(), torch.zeros_like(size)).to(v.dtype)


@register(
    Declaration(
        summary="primal-dual descent on the margin, with the proximal operator of the distance",
        reference=_REFERENCE,
        norms=ALL_NORMS,
        minimizes=True,
        linear_oracle=1.5,  # l0, whose sum of powers is not the count; the other norms within 1.1
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class PDPGD(_PrimalDual):
    """Primal-dual proximal gradient descent: as `PDGD`, but the distance enters through its proximal operator.

        r = clip(Adam's step from delta on log(1 + exp(y)))
        delta = argmin_z (1 - w) / w * D(z) + 1/2 <z - r, H (z - r)>,    H = Adam's denominators over its step

    The second line is solved by up to `proximal_steps` proximal steps (until a step is shorter than `close` times the point).
    sparse: what stands for D in l0, sum |z_i|^(2/3) ("l2/3") or the count itself ("l0"). Other settings as in `PDGD`.

    Source: Matyasko & Chau (2021), PDPGD: Primal-dual proximal gradient descent adversarial attack, arXiv:2106.01538,
    algorithm 2; proximal Adam is arXiv:1910.10094. Values are those of adversarial-library.
    """

    proximal_steps: int = 5
    close: float = 0.01
    sparse: Literal["l2/3", "l0"] = "l2/3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.proximal_steps, int) or self.proximal_steps < 1:
            raise InputError(f"proximal_steps must be a whole number >= 1; got {self.proximal_steps}")
        if not self.close >= 0:
            raise InputError(f"close must be >= 0; got {self.close}")
        if self.sparse not in ("l2/3", "l0"):
            raise InputError(f'sparse must be "l2/3" or "l0"; got {self.sparse!r}')

    def gradient(self, problem: Problem, state: PrimalDual, constraint: Tensor) -> Tensor:
        return constraint

    def finish(self, problem: Problem, state: PrimalDual, delta: Tensor, scale: Tensor, size: Tensor, ends: Ends) -> Tensor:
        largest = scale.flatten(1).amax(1)
        step = ((1 - state.weight) / state.weight * size / largest.double()).to(delta.dtype)
        shape, z = scale / rows(largest, scale), delta
        going, proximal = torch.ones_like(step, dtype=torch.bool), self._proximal(problem)
        for _ in range(self.proximal_steps):
            inner = z - shape * (z - delta)
            new = torch.clamp(proximal(inner.flatten(1), step[:, None]).view_as(z), *ends)
            moved, length = ((v.flatten(1) ** 2).sum(1).sqrt() for v in (new - z, new))
            z = torch.where(rows(going, z), new, z)
            going = going & (moved > self.close * length)
        return z

    def _proximal(self, problem: Problem) -> Proximal:
        threat = problem.region.threat
        match threat.norm:
            case Norm.L1:
                return proximal_l1
            case Norm.L2:
                return proximal_l2
            case Norm.LINF:
                return proximal_linf
        return proximal_two_thirds if self.sparse == "l2/3" else proximal_l0
