"""One linearisation at the input, then a search along one path: the closed form for linear models, and Hot/Cold."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.deepfool import candidates, inner, plain
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping, advance
from saddlepoint.engine import ALL_NORMS, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Region
from saddlepoint.trees import rows, take

_ELEMENTS = 2**20  # numbers that projections onto many hyperplanes work on at once


def how_far(region: Region, gradients: Tensor, gain: Tensor, points: Tensor, owner: Tensor) -> Tensor:
    """How far (R,) hyperplanes are from the points (B, ...) of their owners (R,), inside the box: infinitely if it doesn't hold
    enough. gradients (R, ...), gain (R,)."""
    far = []
    for part in torch.split(torch.arange(len(gain), device=gain.device), max(1, _ELEMENTS // points[0].numel())):
        w, mine = gradients[part], owner[part]
        move = take(region, mine).reach(w, gain[part], points[mine])
        size = region.threat.distance(move, torch.zeros_like(move))
        far.append(torch.where(inner(w, move) >= 0.999 * gain[part], size, torch.full_like(size, torch.inf)))
    return torch.cat(far)


@dataclass(frozen=True)
class Path:
    """The point to look at (B, ...), the gradient or direction (B, ...) that leads there, how far it leads (B,) float64, the
    largest size that failed and the smallest that succeeded (B,) float64, and whether there is an end (B,)."""

    x: Tensor
    gradient: Tensor
    size: Tensor
    low: Tensor
    high: Tensor
    over: Tensor


class _AlongPath(Stepping):
    """What both share: the first step linearises at the input, the others look at points of the path that it gives."""

    def __post_init__(self) -> None:
        self._check_whole(steps=1)

    def init(self, problem: Problem) -> Path:
        none = torch.zeros_like(problem.eps)
        return Path(problem.origin, problem.origin, none, none, torch.full_like(none, torch.inf), none > 0)

    @final
    def step(self, problem: Problem, state: Path) -> Path:
        first = problem.k == 0
        state = advance(~first & ~state.over.cpu(), self._search, problem, state)
        return advance(first, self._linearise, problem, state)

    @abstractmethod
    def _linearise(self, problem: Problem, state: Path) -> Path:
        """The path."""

    @abstractmethod
    def _search(self, problem: Problem, state: Path) -> Path:
        """Look at a point of it, and choose the next one."""

    @final
    def done(self, state: Path) -> Tensor:
        return state.over


@register(
    Declaration(
        summary="the exact smallest perturbation of a linear classifier; elsewhere that of its linearisation",
        reference="Goodfellow, Shlens & Szegedy 2015, arXiv:1412.6572, section 5; Karpathy 2015",
        norms=ALL_NORMS,
        minimizes=True,
        iterative=False,
        linear_oracle=1.01,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class LinearClosedForm(_AlongPath):
    """The nearest of the hyperplanes between classes, in any norm and inside the input range.

        min ||d||  with  <w_k - w_j, d> = (z_j - z_k)(x)  for a wanted class k and the unwanted class j,   over all k

    Away from the ends of the range the distance is |z_j - z_k| / ||w_k - w_j||_q, and d = sign(w) times it in l-infinity, which
    is FGSM's step; at the ends d is the water-filling solution, and exact as well, in all four norms. Untargeted, the nearest
    class counts, and the result is the optimum. Towards a target, the furthest of its hyperplanes counts: the optimum if no
    other rival is in the lead there, which two classes have no room for; `DeepFool` goes on from there.
    On a model that isn't linear it is one step of linearisation. One forward pass and classes - 1 backward ones, then a look at
    the point. steps: that, and looks; after a failed one the gain in logits that is aimed at is 1 + overshoot times the exact
    one, then 1 + 3 overshoot, 1 + 7 overshoot, and so on, for roundings and for bent boundaries.

    Source: Goodfellow, Shlens & Szegedy (2015), Explaining and harnessing adversarial examples, arXiv:1412.6572, section 5
    (binary, l-infinity); Karpathy (2015), Breaking linear classifiers on ImageNet (softmax regression).
    """

    steps: int = 15
    overshoot: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.overshoot > 0 and math.isfinite(self.overshoot)):
            raise InputError(f"overshoot must be a positive number; got {self.overshoot}")

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, classes - 1)

    def _linearise(self, problem: Problem, state: Path) -> Path:
        logits, gradients = problem.jacobian(problem.origin, _sums)
        if plain(problem.aim):
            w, gain = self._nearest(problem, logits.double(), torch.cat([torch.zeros_like(gradients[:, :1]), gradients], 1))
        else:
            w, gain = gradients[:, 0], -problem.surplus(logits).double()
        return replace(state, x=self._point(problem, w, gain), gradient=w, size=gain)

    def _nearest(self, problem: Problem, logits: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """w_k - w_j (B, ...) of the wanted class k whose furthest hyperplane is nearest, and the gain that leads there (B,)."""
        aim, x, (count, classes) = problem.aim, problem.origin, logits.shape
        sample, k, j = _pairs(aim.wanted, aim.unwanted)
        gain = (problem.needed - logits[sample, k] + logits[sample, j]).clamp(min=0)
        far = how_far(problem.region, gradients[sample, k] - gradients[sample, j], gain, x, sample)
        hardest = torch.full_like(logits, -torch.inf).flatten().scatter_reduce(0, sample * classes + k, far, "amax")
        best = hardest.view(count, classes).masked_fill(~aim.wanted, torch.inf).argmin(1)
        chosen = (k == best[sample]) & (far == hardest[sample * classes + k])
        rival = torch.zeros_like(best).scatter_reduce(0, sample[chosen], j[chosen], "amax")
        each = torch.arange(count, device=x.device)
        lead = logits[each, best] - logits[each, rival]
        return gradients[each, best] - gradients[each, rival], (problem.needed - lead).clamp(min=0)

    def _search(self, problem: Problem, state: Path) -> Path:
        success = problem.surplus(problem.logits(state.x)) >= 0
        more = self.overshoot * (2.0 ** problem.k.to(state.size) - 1)
        x = self._point(problem, state.gradient, (1 + more) * state.size)
        return replace(state, x=torch.where(rows(success, x), state.x, x), over=success)

    def _point(self, problem: Problem, w: Tensor, gain: Tensor) -> Tensor:
        region = problem.region
        return torch.clamp(region.origin + region.reach(w, gain, region.origin), region.lower, region.upper)


def _sums(logits: Tensor, aim: Aim) -> Tensor:
    """Weights (Q, C - 1, C) of the logits' differences to the first one; (Q, 1, C) for margins that aren't such differences."""
    if not plain(aim):
        return candidates(logits, aim, 2)
    one_hot = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return (one_hot[1:] - one_hot[:1]).expand(len(logits), -1, -1)


def _pairs(wanted: Tensor, unwanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a wanted and an unwanted class: the samples, wanted and unwanted classes (R,) each."""
    sample, k = wanted.nonzero(as_tuple=True)
    rivals = unwanted.sum(1)
    times = rivals[sample]
    row = torch.arange(len(sample), device=sample.device).repeat_interleave(times)
    within = torch.arange(len(row), device=row.device) - (times.cumsum(0) - times)[row]
    sample, k = sample[row], k[row]
    return sample, k, unwanted.nonzero(as_tuple=True)[1][(rivals.cumsum(0) - rivals)[sample] + within]


@register(
    Declaration(
        summary="the direction that heats one class and cools another, and the smallest step along it",
        reference="Rozsa, Rudd & Boult 2016, arXiv:1605.01775",
        norms=frozenset({Norm.LINF, Norm.L2}),
        minimizes=True,
        no_oracle="its direction weighs the two classes by their logits, which is not the normal of their boundary",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class HotCold(_AlongPath):
    """Hot/cold: one gradient that raises a hot class and lowers the label, the cold one, then the smallest step along it.

        omega = |h_hot| on the hot class, -|h_cold| on the cold one, 0 elsewhere    (h: the logits at the input less their mean)
        eta = grad_x <omega, h(x)>,    x' = clip(x + t eta) with the smallest t that succeeds

    In l2 the direction is eta itself, in l-infinity sign(eta), which the paper's MNIST experiments take. t doubles until there
    is a success, and is then bisected. The paper has -h_cold, which a negative logit would turn into heat, hence the modulus;
    and it has h as it is, which would let a common shift of the logits, of no meaning to the model, change the direction.
    hot: which class an untargeted goal heats, by its rank among the wanted ones at the input: the paper's HC-1 to HC-9. Each
    gives another direction; that diversity is what the paper is about. steps: the gradient, and points on the line.
    With `Minimize(norm, grid=1/255)` points have whole pixel values, as in the paper. Its similarity score PASS is no part of
    the attack, nor are the "hard positives", which are x + c t eta for c > 1.

    Source: Rozsa, Rudd & Boult (2016), Adversarial diversity and hard positive generation, arXiv:1605.01775, sections 4.2, 4.3.
    """

    hot: int = 1
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.hot, int) or self.hot < 1:
            raise InputError(f"hot is a rank, a whole number >= 1; got {self.hot}")

    def _linearise(self, problem: Problem, state: Path) -> Path:
        def weights(logits: Tensor, aim: Aim) -> Tensor:
            hot, cold, h_hot, h_cold = self._features(logits, aim)
            return torch.zeros_like(logits).scatter(1, hot, h_hot.abs()).scatter(1, cold, -h_cold.abs())[:, None]

        logits, gradients = problem.jacobian(problem.origin, weights)
        _, _, h_hot, h_cold = self._features(logits.double(), problem.aim)
        direction = problem.steepest(gradients[:, 0], torch.ones_like(problem.eps), problem.origin)
        weight = (h_hot.abs() + h_cold.abs())[
            :, 0
        ] / 2  # if both had it, the margin would grow by <gradient, direction> / weight
        size = -problem.surplus(logits).double() * weight / inner(gradients[:, 0], direction)
        lost = ~(torch.isfinite(size) & (size > 0))
        size = torch.where(lost, torch.zeros_like(size), size)
        return replace(state, x=self._point(problem, direction, size), gradient=direction, size=size, over=lost)

    def _features(self, logits: Tensor, aim: Aim) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hot and the cold class and their h, (Q, 1) each."""
        likeliest = logits.masked_fill(~aim.wanted, -torch.inf).argsort(dim=1, descending=True, stable=True)
        hot = likeliest.gather(1, aim.wanted.sum(1, keepdim=True).clamp(max=self.hot) - 1)
        cold = logits.masked_fill(~aim.unwanted, -torch.inf).argmax(1, keepdim=True)
        h = logits - logits.mean(1, keepdim=True)
        return hot, cold, h.gather(1, hot), h.gather(1, cold)

    def _search(self, problem: Problem, state: Path) -> Path:
        success = problem.surplus(problem.logits(state.x)) >= 0
        low, high = torch.where(success, state.low, state.size), torch.where(success, state.size, state.high)
        size = torch.where(torch.isinf(high), 2 * state.size, (low + high) / 2)
        x = self._point(problem, state.gradient, size)
        return replace(state, x=x, size=size, low=low, high=high)

    def _point(self, problem: Problem, direction: Tensor, size: Tensor) -> Tensor:
        x = problem.origin + rows(size, direction).to(direction.dtype) * direction
        return torch.clamp(x, problem.region.lower, problem.region.upper)
