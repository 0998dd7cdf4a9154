"""Adversarial training for the price of one or two passes: fast, N-FGSM, free; and the check for its sudden collapse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from saddlepoint.attacks.ascent import PGD
from saddlepoint.attacks.facade import perturb
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.distributed import processes
from saddlepoint.defenses.gradients import input_gradient
from saddlepoint.defenses.objectives import (
    Around,
    Batch,
    MinMax,
    Objective,
    check_adversary,
    check_number,
    craft,
    radius,
    warmed,
)
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError, SaddlepointWarning
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat

_PGD = PGD(steps=5)
_NOISE, _BESIDE = 0x0F65, 0x6A11  # purposes of random numbers


def check_ball(owner: object, threat: Threat) -> None:
    """A ball of one finite size in linf, l2 or l1; no other error than the attack's own where PGD fits."""
    check_adversary(PGD(steps=1), threat)
    check_number(owner, above=0, eps=radius(threat))


@dataclass(frozen=True, kw_only=True)
class _OneStep(MinMax):
    """What one-step trainings share.

    threat: a ball, in linf, l2 or l1. warmup: epochs over which eps grows from 0. Validation is under PGD with 10 steps, since
    accuracy under the one step trained against says nothing.
    """

    threat: Threat
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_ball(self, self.threat)
        check_number(self, least=0, warmup=self.warmup)

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return PGD(steps=10), self.threat

    @final
    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        return cross_entropy(batch.model.forward(examples), batch.y)


@final
@dataclass(frozen=True, kw_only=True)
class Fast(_OneStep):
    """One step from a random point of the ball, a little longer than the ball's radius:

        x' = project(x + u + alpha eps * steepest(grad L(x + u))),   u uniform in the ball;   minimise L(x')

    step: alpha, 1.25 in the paper. With a longer one, more epochs or a larger eps the network learns to fool the one step
    ("catastrophic overfitting"): put `StopAtCollapse` around it, or take `NFGSM` or `GradAlign`. A cyclic learning rate over 15
    to 30 epochs goes with it.

    Source: Wong, Rice & Kolter (2020), Fast is better than free: revisiting adversarial training, arXiv:2001.03994,
    algorithm 3.
    """

    step: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, above=0, step=self.step)

    def examples(self, batch: Batch) -> Tensor:
        threat = warmed(self.threat, self.warmup, batch.progress)
        eps = radius(threat)
        return craft(batch, PGD(steps=1, step_size=self.step * eps), threat) if eps else batch.x


@final
@dataclass(frozen=True, kw_only=True)
class NFGSM(_OneStep):
    """Noise, then a step, and no projection: what lies outside the ball stays there.

        x' = x + k u + alpha eps * steepest(grad L(x + k u)),   u uniform in the ball

    Noise of twice the radius is enough against catastrophic overfitting, at no cost. Only the input range is kept.
    noise: k = 2, step: alpha = 1 in the paper for CIFAR-10 and 8/255 (k = 3 for SVHN).

    Source: de Jorge, Bibi, Volpi, Sanyal, Torr, Rogez & Dokania (2022), Make some noise: reliable and efficient single-step
    adversarial training, arXiv:2202.01181, algorithm 1.
    """

    noise: float = 2.0
    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, noise=self.noise)
        check_number(self, above=0, step=self.step)

    def examples(self, batch: Batch) -> Tensor:
        threat = warmed(self.threat, self.warmup, batch.progress)
        eps = radius(threat)
        if not eps:
            return batch.x
        region = threat.around(batch.x, None)
        start = within(batch, batch.x + self.noise * (region.random(batch.keys(_NOISE)) - batch.x))
        with batch.model.frozen():
            gradient = input_gradient(batch, start, graph=False)
        size = torch.full((len(start),), self.step * eps, dtype=torch.float64, device=start.device)
        step = threat.around(start, batch.model.bounds).steepest(gradient, size, start)
        return within(batch, start + step).detach()


def within(batch: Batch, x: Tensor) -> Tensor:
    """x inside the model's input range."""
    return x if batch.model.bounds is None else x.clamp(*batch.model.bounds)


@final
@dataclass(frozen=True)
class GradAlign(Around):
    """Another objective, and a penalty on how much the loss's gradient turns within the ball:

        inner + lambda * mean (1 - cos(grad L(x), grad L(x + u))),   u uniform in the ball

    Where gradients are aligned one step is as good as many, so `Fast` doesn't collapse. It costs a second derivative, about
    three times the time. strength: lambda, 0.2 for CIFAR-10 at 8/255, where it grows as 0.02 * 10^(255 eps / 8).

    Source: Andriushchenko & Flammarion (2020), Understanding and improving fast adversarial training, arXiv:2007.02617.
    """

    threat: Threat
    strength: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ball(self, self.threat)
        check_number(self, least=0, strength=self.strength)

    def loss(self, batch: Batch) -> Tensor:
        beside = self.threat.around(batch.x, batch.model.bounds).random(batch.keys(_BESIDE))
        here, there = (input_gradient(batch, x, graph=True).flatten(1) for x in (batch.x, beside))
        turned = 1 - cosine_similarity(here, there, dim=1)
        return self.inner.loss(batch) + self.strength * turned.mean()


@final
@dataclass(frozen=True, kw_only=True)
class Free(Objective):
    """Each batch is used `repeats` times, and one backward pass moves the weights and the perturbation:

        g_w, g_x = gradients of L(x + d);   w <- w - lr g_w;   d <- project(d + eps * steepest(g_x))

    d goes on from batch to batch. Divide the epochs by `repeats` for the price of clean training. repeats: m, 8 for CIFAR-10 in
    the paper, 4 for ImageNet; step: of the move of d, in units of eps.

    Source: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor & Goldstein (2019), Adversarial training for free!,
    arXiv:1904.12843, algorithm 1.
    """

    threat: Threat
    repeats: int = 8
    step: float = 1.0

    def __post_init__(self) -> None:
        check_ball(self, self.threat)
        check_number(self, above=0, step=self.step)
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise InputError(f"repeats must be a whole number >= 1; got {self.repeats}")

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return PGD(steps=10), self.threat

    @property
    def replays(self) -> int:
        return self.repeats

    def loss(self, batch: Batch) -> Tensor:
        kept = batch.memory.setdefault("free.delta", torch.zeros_like(batch.x))
        if kept.shape[1:] != batch.x.shape[1:]:
            raise InputError("Free: all batches must hold inputs of one shape")
        if len(kept) < len(batch.x):  # the first batch that was seen was a smaller one
            kept = torch.cat([kept, torch.zeros_like(batch.x[len(kept) :])])
            batch.memory["free.delta"] = kept
        points = within(batch, batch.x + kept[: len(batch.x)]).detach().requires_grad_()
        batch.memory["free.points"] = points
        return cross_entropy(batch.model.forward(points), batch.y)

    def after_backward(self, batch: Batch) -> None:
        points = batch.memory.pop("free.points", None)
        if points is None or points.grad is None:
            return
        x, kept = batch.x, batch.memory["free.delta"]
        region = self.threat.around(x, None)
        moved = x + kept[: len(x)]
        size = torch.full((len(x),), self.step * radius(self.threat), dtype=torch.float64, device=x.device)
        kept[: len(x)] = region.project(moved + region.steepest(points.grad, size, moved)) - x


@final
@dataclass(frozen=True)
class StopAtCollapse(Around):
    """Watches for catastrophic overfitting: robust accuracy on the first batch of each epoch, under a few steps of PGD.

    Where it falls by more than `drop` from one epoch to the next, the network has learned to fool the single step that it is
    trained against, and is worth nothing. action="stop": the weights of the epoch before are put back, and training ends.
    "warn": a `SaddlepointWarning`. attack: 5 steps and drop 0.2 in the paper's code.

    Source: Wong, Rice & Kolter (2020), Fast is better than free: revisiting adversarial training, arXiv:2001.03994,
    section 5.
    """

    threat: Threat
    attack: Attack | str = _PGD
    drop: float = 0.2
    action: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attack", check_adversary(self.attack, self.threat))
        check_number(self, above=0, most=1, drop=self.drop)
        if self.action not in ("stop", "warn"):
            raise InputError(f'action must be "stop" or "warn"; got {self.action!r}')

    def loss(self, batch: Batch) -> Tensor:
        if batch.progress == int(batch.progress):
            batch.memory["collapse.x"], batch.memory["collapse.y"] = batch.x, batch.y
        return self.inner.loss(batch)

    def after_epoch(self, model: Classifier, epoch: int, memory: dict[str, Any]) -> bool:
        x, y = memory["collapse.x"], memory["collapse.y"]
        y = y.argmax(1) if y.is_floating_point() else y
        moved = perturb(model, x, y, as_attack(self.attack), self.threat, seed=epoch)
        (net,) = model.networks()
        (mean,) = processes().mean([(model.predict(moved) == y).double().mean()], len(y))
        accuracy = float(mean)
        before = memory.get("collapse.accuracy", 0.0)
        if accuracy < before - self.drop:
            if self.action == "stop":
                net.load_state_dict(memory["collapse.weights"])
                return True
            fall = f"robust accuracy on training samples fell from {before:.0%} to {accuracy:.0%}"
            text = f"catastrophic overfitting in epoch {epoch}: {fall}. Take NFGSM or GradAlign, or a smaller step"
            warnings.warn(text, SaddlepointWarning, stacklevel=2)
        memory["collapse.accuracy"] = accuracy
        if self.action == "stop":
            memory["collapse.weights"] = {name: value.detach().clone() for name, value in net.state_dict().items()}
        return self.inner.after_epoch(model, epoch, memory)
