"""Smallest perturbations by gradient steps on a sphere that shrinks after a success and grows after a failure.

    x_(k+1) = project_(eps_(k+1)) (x_k + alpha_k * g_k / ||g_k||_2),      eps_(k+1) = (1 -+ gamma_k) * eps_k

DDN holds the iterate on the l2 sphere; FMN projects it into the ball of any norm, and takes its first radii from where the
linearised margin vanishes; sigma-zero replaces the l0 ball by a smooth count of the features and a threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping
from saddlepoint.engine import ALL_NORMS, Declaration, Problem
from saddlepoint.goals import Loss, loss_named
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import distance
from saddlepoint.trees import rows

DUAL = {Norm.LINF: Norm.L1, Norm.L2: Norm.L2, Norm.L1: Norm.LINF}


def cosine(steps: int, first: float, last: float, k: Tensor) -> Tensor:
    """Cosine annealing from `first` (k = 0) to `last` (k = steps), at k (B,): float64."""
    return last + (first - last) * (1 + torch.cos(math.pi * k.double() / steps)) / 2


def length(gradient: Tensor, norm: Norm = Norm.L2) -> Tensor:
    """Norm of each row (B, ...), (B,) float64."""
    return distance(gradient, torch.zeros_like(gradient), norm)


def unit(gradient: Tensor, norm: Norm = Norm.L2) -> Tensor:
    """Each row over its norm; 0 stays 0."""
    size = length(gradient, norm)
    return (gradient.double() * rows(torch.where(size > 0, 1 / size, torch.zeros_like(size)), gradient)).to(gradient.dtype)


_OVER = 1 + 1e-4  # the linearised distance alone would stop a rounding error short of the boundary of a linear model


@dataclass(frozen=True)
class OnSphere:
    """The iterate (B, ...) and its radius (B,) float64."""

    x: Tensor
    eps: Tensor


@dataclass(frozen=True)
class InBall(OnSphere):
    """And the smallest distance of a success (B,) float64."""

    best: Tensor


@register(
    Declaration(
        summary="steps on an l2 sphere that shrinks after a success and grows after a failure",
        reference="Rony et al. 2019, arXiv:1811.09600",
        norms=frozenset({Norm.L2}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class DDN(Stepping):
    """Decoupled direction and norm: the gradient turns the perturbation, successes and failures set its length.

        delta_(k+1) = delta_k + alpha_k * g / ||g||_2,    eps_(k+1) = (1 - gamma) eps_k if x_k succeeds, else (1 + gamma) eps_k
        x_(k+1) = clip(x + eps_(k+1) * delta_(k+1) / ||delta_(k+1)||_2)

    steps: the paper has 100, 300 and 1000. alpha falls from 1 to 0.01 on a cosine, in input units. init_eps: first radius.
    With `Minimize("l2", grid=1/255)` every point lies on the grid, as in the paper.

    Source: Rony, Hafemann, Oliveira, Ben Ayed, Sabourin & Granger (2019), Decoupling direction and norm for efficient
    gradient-based l2 adversarial attacks and defenses, arXiv:1811.09600, algorithm 1.
    """

    steps: int = 100
    gamma: float = 0.05
    init_eps: float = 1.0
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        self._check_whole(steps=1)
        self._check_positive("gamma", "init_eps")
        loss_named(self.loss)

    @property
    def objective(self) -> str | Loss:
        return self.loss

    def init(self, problem: Problem) -> OnSphere:
        return OnSphere(problem.origin, torch.full_like(problem.eps, self.init_eps))

    def step(self, problem: Problem, state: OnSphere) -> OnSphere:
        found = problem.loss_and_grad(state.x, self.loss)
        success = problem.surplus(found.logits) >= 0
        eps = state.eps * torch.where(success, 1 - self.gamma, 1 + self.gamma)
        alpha = cosine(self.steps, 1.0, 0.01, problem.k).to(eps)
        delta = state.x - problem.origin + unit(found.gradient) * rows(alpha.to(state.x.dtype), state.x)
        x = problem.origin + unit(delta) * rows(eps.to(delta.dtype), delta)
        return OnSphere(torch.clamp(x, problem.region.lower, problem.region.upper), eps)


@register(
    Declaration(
        summary="steps in a ball that shrinks after a success and grows after a failure",
        reference="Pintor et al. 2021, arXiv:2102.12827",
        norms=ALL_NORMS,
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class FMN(Stepping):
    """Fast minimum-norm attack: normalised steps along the margin's gradient, projected into a ball of changing radius.

        eps_k = ||delta_k||_p + |margin| / ||g||_q                             before the first success (lp norms)
        eps_k = min((1 - gamma_k) eps_(k-1), ||best||_p) if x_k succeeds, else (1 + gamma_k) eps_(k-1)
        x_(k+1) = project_(eps_k) (x_k + alpha_k * g / ||g||_2)

    In l0 the radius starts at 1 and changes by at least one feature. alpha_init: in input units; the paper takes the best of
    {1, 5, 10}. alpha and gamma fall on a cosine, alpha to a hundredth, gamma from 0.05 to 1e-4 (the paper's values). The
    projection is the exact one on the ball and the input range together, where the paper clips after projecting.

    Source: Pintor, Roli, Brendel & Biggio (2021), Fast minimum-norm adversarial attacks through adaptive norm constraints,
    arXiv:2102.12827, algorithm 1.
    """

    steps: int = 1000
    alpha_init: float = 1.0
    gamma_init: float = 0.05
    gamma_final: float = 1e-4

    def __post_init__(self) -> None:
        self._check_whole(steps=1)
        self._check_positive("alpha_init", "gamma_init", "gamma_final")

    def init(self, problem: Problem) -> InBall:
        nothing = torch.full_like(problem.eps, torch.inf)
        first = torch.ones_like(nothing) if problem.region.threat.norm is Norm.L0 else nothing
        return InBall(problem.origin, first, nothing)

    def step(self, problem: Problem, state: InBall) -> InBall:
        found = problem.loss_and_grad(state.x, "margin")
        surplus = problem.surplus(found.logits).double()
        success, away = surplus >= 0, problem.region.distance(state.x)
        best = torch.where(success, torch.minimum(state.best, away), state.best)
        gamma = cosine(self.steps, self.gamma_init, self.gamma_final, problem.k).to(best)
        alpha = cosine(self.steps, self.alpha_init, self.alpha_init / 100, problem.k).to(best)
        smaller, larger = state.eps * (1 - gamma), state.eps * (1 + gamma)
        norm = problem.region.threat.norm
        if norm is Norm.L0:
            smaller = torch.minimum(state.eps - 1, smaller.floor()).clamp(min=0)
            larger = torch.maximum(state.eps + 1, larger.floor())
        else:
            steepness = length(found.gradient, DUAL[norm])
            reach = torch.where(steepness > 0, -surplus / steepness, torch.full_like(surplus, torch.inf))
            larger = torch.where(torch.isfinite(best), larger, _OVER * (away + reach))
        eps = torch.where(success, torch.minimum(smaller, best), larger)
        move = unit(found.gradient) * rows(alpha.to(state.x.dtype), state.x)
        return InBall(problem.within(eps).project(state.x + move), eps, best)


@dataclass(frozen=True)
class Thresholded:
    """The iterate and ADAM's moments (B, ...), and the size below which a feature's change is dropped, (B,) float64."""

    x: Tensor
    mean: Tensor
    square: Tensor
    threshold: Tensor


@register(
    Declaration(
        summary="gradient steps on the margin and a smooth count of features; small changes are dropped",
        reference="Cinà et al. 2024, arXiv:2402.01879",
        norms=frozenset({Norm.L0}),
        minimizes=True,
        no_oracle="features are dropped by size, not by gain; on linear models it ends within a few features of the optimum",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SigmaZero(Stepping):
    """Sigma-zero: the smallest number of features, by descent on a smooth approximation of the l0 norm.

        g = grad [ max(-margin, 0) + (1 / d) * sum_i delta_i^2 / (delta_i^2 + sigma) ]
        delta = drop_tau (clip(delta - eta_k * ADAM(g / ||g||_inf))),    tau += t * eta_k if it succeeds, else tau -= t * eta_k

    eta falls from 1 to 0.1 on a cosine, in units of the input range (1 without one). sigma 1e-3, first tau 0.3, t 0.01, in the
    same units, are the paper's. ADAM (0.9, 0.999), which the algorithm box does not show, is in the authors' code, and matters:
    its first step moves every feature that has a gradient.

    Source: Cinà, Villani, Pintor, Schönherr, Biggio & Pelillo (2024), sigma-zero: gradient-based optimization of l0-norm
    adversarial examples, arXiv:2402.01879, algorithm 1.
    """

    steps: int = 1000
    step_size: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    rate: float = 0.01

    def __post_init__(self) -> None:
        self._check_whole(steps=1)
        self._check_positive("step_size", "sigma", "threshold", "rate")

    def init(self, problem: Problem) -> Thresholded:
        zero = torch.zeros_like(problem.origin)
        return Thresholded(problem.origin, zero, zero, torch.full_like(problem.eps, self.threshold))

    def step(self, problem: Problem, state: Thresholded) -> Thresholded:
        origin = problem.origin
        found = problem.loss_and_grad(state.x, "margin")
        success = problem.surplus(found.logits) >= 0
        span = _span(problem)
        delta = (state.x - origin) / span
        count = 2 * self.sigma * delta / (delta**2 + self.sigma) ** 2 / max(delta[:1].numel(), 1)
        ascend = torch.where(rows(success, delta), torch.zeros_like(delta), found.gradient * span) - count
        ascend, number = unit(ascend, Norm.LINF), (problem.k + 1).to(state.threshold)
        mean, square = torch.lerp(ascend, state.mean, 0.9), torch.lerp(ascend**2, state.square, 0.999)
        unbiased = (square / rows((1 - 0.999**number).to(delta.dtype), delta)).sqrt() + 1e-8
        eta = cosine(self.steps, self.step_size, 0.1 * self.step_size, (problem.k - 1).clamp(min=0)).to(number)
        delta = delta + mean / unbiased * rows((eta / (1 - 0.9**number)).to(delta.dtype), delta)
        x = torch.clamp(origin + delta * span, problem.region.lower, problem.region.upper)
        change = self.rate * cosine(self.steps, self.step_size, 0.1 * self.step_size, problem.k).to(number)
        threshold = (state.threshold + torch.where(success, change, -change)).clamp(0, 1)
        kept = (x - origin).abs() / span >= rows(threshold.to(x.dtype), x)
        return Thresholded(torch.where(kept, x, origin), mean, square, threshold)


def _span(problem: Problem) -> Tensor:
    """Width of the input range, a scalar; 1 without one."""
    width = (problem.region.upper - problem.region.lower).amax() if problem.origin.numel() else torch.ones(())
    return torch.where(torch.isfinite(width) & (width > 0), width, torch.ones_like(width)).to(problem.origin.dtype)
