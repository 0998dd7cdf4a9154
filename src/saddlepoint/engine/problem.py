"""`Problem`: all that an attack may ask of a model, a threat and a goal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saddlepoint.errors import ModelError
from saddlepoint.goals import Aim, Loss
from saddlepoint.rng import Keys
from saddlepoint.threats import Region
from saddlepoint.trees import take


class Gradient(NamedTuple):
    """What one forward and one backward pass tell about points (Q, ...)."""

    loss: Tensor  # (Q,)
    gradient: Tensor  # (Q, ...), of the loss with respect to the points
    logits: Tensor  # (Q, C)


def input_gradient(values: Tensor, points: Tensor) -> Tensor:
    """Gradient of sum(values) with respect to points alone; parameters are not touched. `ModelError` if there is none."""
    if not values.requires_grad:
        raise ModelError(
            "the model's output does not depend differentiably on its input (detach(), no_grad() or numpy inside?): put a "
            "non-differentiable input transformation into sp.Defended with a backward, or use an attack without gradients"
        )
    (gradient,) = torch.autograd.grad(values, points, torch.ones_like(values), allow_unused=True)
    return torch.zeros_like(points) if gradient is None else gradient


class Evaluator(ABC):
    """Evaluates points for a `Problem`: with bookkeeping in the engine, without in training loops."""

    @property
    @abstractmethod
    def aim(self) -> Aim:
        """The goal, bound to the batch."""

    @abstractmethod
    def forward(self, points: Tensor, owner: Tensor | None) -> Tensor:
        """Logits (Q, C) without gradients."""

    @abstractmethod
    def gradient(self, points: Tensor, owner: Tensor | None, loss: str | Loss) -> Gradient:
        """Loss, its gradient with respect to the points, and the logits."""

    @abstractmethod
    def vjp(self, points: Tensor, owner: Tensor | None, cotangents: Tensor) -> Gradient:
        """The gradient of the sum of cotangents (Q, C) times logits."""

    @abstractmethod
    def allow(self, owner: Tensor, wanted_backward: bool) -> Tensor:
        """Which of the rows `owner` (Q,) fit into their samples' budgets, (Q,) bool."""

    @abstractmethod
    def remaining(self) -> Tensor:
        """Passes that each sample may still make, (B,) int64."""

    def trust(self, points: Tensor) -> Tensor:
        """Note that these points are feasible by construction."""
        return points


@dataclass(frozen=True)
class Problem:
    """One batch of samples under attack, as the attack sees it.

    `points` are (Q, ...) and `owner` (Q,) says to which sample of the batch each belongs; without it point i belongs to
    sample i. Every evaluated point counts for the result; the engine sees to that.

    region: the feasible sets, with `origin` (B, ...) and `eps` (B,). k: each sample's iteration (B,) int64.
    """

    region: Region
    labels: Tensor  # (B,) int64
    k: Tensor  # (B,) int64, on the CPU
    keys: Keys
    evaluator: Evaluator

    @property
    def origin(self) -> Tensor:
        """The clean inputs (B, ...)."""
        return self.region.origin

    @property
    def eps(self) -> Tensor:
        """The radius of every sample (B,), float64."""
        return self.region.eps

    @property
    def aim(self) -> Aim:
        """Which classes the goal wants, and which it does not."""
        return self.evaluator.aim

    def logits(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """(Q, C); one forward pass a point."""
        return self.evaluator.forward(points, owner)

    def margin(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """The goal's margin (Q,), positive where it is reached; one forward pass a point."""
        logits = self.logits(points, owner)
        aim = self.aim if owner is None else take(self.aim, owner)
        return aim.margin(logits)

    def scores(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """Probabilities (Q, C); one forward pass a point."""
        return self.logits(points, owner).softmax(1)

    def predictions(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """Predicted labels (Q,); one forward pass a point."""
        return self.logits(points, owner).argmax(1)

    def loss_and_grad(self, points: Tensor, loss: str | Loss = "cross_entropy", owner: Tensor | None = None) -> Gradient:
        """The loss to ascend and its gradient; one forward and one backward pass a point."""
        return self.evaluator.gradient(points, owner, loss)

    def vjp(self, points: Tensor, cotangents: Tensor, owner: Tensor | None = None) -> Gradient:
        """Gradient of sum(cotangents * logits), cotangents (Q, C); one forward and one backward pass a point."""
        return self.evaluator.vjp(points, owner, cotangents)

    def jacobian(self, points: Tensor, classes: Tensor, *, max_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and gradients (B, m, ...) of the logits of `classes` (B, m): m backward passes a point.

        Rows are cut so that about `max_bytes` of copied inputs are alive at once.
        """
        count, per_point = classes.shape
        owner = torch.arange(count, device=points.device).repeat_interleave(per_point)
        wanted = classes.reshape(-1)
        chunk = max(1, max_bytes // max(1, points[:1].numel() * points.element_size()))
        gradients, logits = [], []
        for rows in torch.split(torch.arange(len(owner), device=points.device), chunk):
            part = torch.zeros(len(rows), self.aim.wanted.shape[1], dtype=points.dtype, device=points.device)
            part[torch.arange(len(rows), device=points.device), wanted[rows]] = 1.0
            found = self.vjp(points[owner[rows]], part, owner[rows])
            gradients.append(found.gradient)
            logits.append(found.logits)
        return torch.cat(logits)[::per_point], torch.cat(gradients).view(count, per_point, *points.shape[1:])

    def project(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """The nearest feasible points."""
        if owner is not None:
            return take(self.region, owner).project(points)
        return self.evaluator.trust(self.region.project(points))

    def steepest(self, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """The displacement of norm `size` (B,) along which a function with this gradient grows most."""
        return self.region.steepest(gradient, size, points)

    def random_point(self, stream: int = 0) -> Tensor:
        """A point drawn uniformly from each ball, inside the input range (B, ...)."""
        return self.region.random(self.random(stream))

    def random(self, stream: int = 0) -> Keys:
        """Random numbers of this (sample, restart, iteration, stream)."""
        return self.keys.absorb(self.k).absorb(stream)

    def allow(self, owner: Tensor, *, backward: bool = False) -> Tensor:
        """Which of the rows `owner` (Q,) their samples can still pay for, first come first served: (Q,) bool."""
        return self.evaluator.allow(owner, backward)

    @property
    def remaining(self) -> Tensor:
        """Passes that each sample may still make, (B,) int64."""
        return self.evaluator.remaining()

    def restarted(self, restart: Tensor, k: Tensor) -> Problem:
        """The same problem with the random numbers of another restart (B,), at that restart's iteration k (B,)."""
        return replace(self, keys=self.keys.absorb(restart), k=k)
