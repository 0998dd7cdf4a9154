"""Objectives that tie the outputs at x' to those at x: TRADES, MART, HAT and logit pairing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from saddlepoint.attacks.ascent import PGD
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.objectives import (
    Batch,
    MinMax,
    Mode,
    Objective,
    check_adversary,
    check_number,
    craft,
    frozen_logits,
    warmed,
)
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat

_PGD = PGD(steps=10)
_NOISE = 0x401E  # purpose of random numbers


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """KL(p || q) of each sample (B,), where p and q are the softmaxes of the logits `clean` and `moved` (B, C)."""
    return kl_div(log_softmax(moved, 1), log_softmax(clean, 1), reduction="none", log_target=True).sum(1)


@dataclass(frozen=True, kw_only=True)
class _Pulled(MinMax):
    """What the following share: an attack, a threat, and eps growing over the first `warmup` epochs."""

    threat: Threat
    attack: Attack | str = _PGD
    warmup: float = 0.0
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", check_adversary(self.attack, self.threat))
        check_number(self, least=0, warmup=self.warmup)

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return as_attack(self.attack), self.threat

    @final
    def _crafted(self, batch: Batch, *, by_divergence: bool = False) -> Tensor:
        threat = warmed(self.threat, self.warmup, batch.progress)
        if not by_divergence:
            return craft(batch, self.attack, threat, mode=self.mode)
        clean = frozen_logits(batch.model, batch.x)
        return craft(
            batch, self.attack, threat, labels=clean, loss=lambda logits, target: divergence(target, logits), mode=self.mode
        )


@final
@dataclass(frozen=True, kw_only=True)
class TRADES(_Pulled):
    """The natural loss, and by how much the outputs can be moved at all:

        L(f(x), y) + beta * max_{x'} KL(p(x) || p(x'))

    x' ascends that divergence, not the loss. It is flat at x itself, so the attack must start elsewhere (PGD does: anywhere in
    the ball; the authors' code at x + 0.001 N(0, I)). beta: 6 in the paper's strongest rows (1 to 10); attack: 10 steps of
    2/255 for eps = 8/255, 40 of 0.01 for MNIST's 0.3.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui & Jordan (2019), Theoretically principled trade-off between robustness and
    accuracy, arXiv:1901.08573, eq. 5 and algorithm 1.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, beta=self.beta)

    def examples(self, batch: Batch) -> Tensor:
        return self._crafted(batch, by_divergence=True)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        clean, moved = batch.model.forward(batch.x), batch.model.forward(examples)
        return cross_entropy(clean, batch.y) + self.beta * divergence(clean, moved).mean()


@final
@dataclass(frozen=True, kw_only=True)
class MART(_Pulled):
    """Misclassification-aware training: samples that are wrong anyway are pulled hardest.

        BCE(p(x'), y) + lambda * KL(p(x) || p(x')) * (1 - p_y(x)),   BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)

    x' maximises the cross-entropy. strength: lambda, 5 in the paper (its code: 6 for ResNet-18). Classes only, no soft labels.

    Source: Wang, Zou, Yi, Bailey, Ma & Gu (2020), Improving adversarial robustness requires revisiting misclassified
    examples, ICLR, eq. 11.
    """

    strength: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)

    def examples(self, batch: Batch) -> Tensor:
        return self._crafted(batch)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        if batch.y.is_floating_point():
            raise InputError("MART asks which class is right: it can't be combined with soft labels")
        wide = torch.promote_types(batch.x.dtype, torch.float32)
        clean, moved = (batch.model.forward(x).to(wide) for x in (batch.x, examples))
        y = batch.y[:, None]
        rival = moved.scatter(1, y, -torch.inf).argmax(1, keepdim=True)
        rest = moved.scatter(1, rival, -torch.inf).logsumexp(1)  # 1 - p_k as the sum of the others, so that nothing cancels
        boosted = cross_entropy(moved, batch.y, reduction="none") + moved.logsumexp(1) - rest
        doubt = 1 - clean.softmax(1).gather(1, y)[:, 0]
        return (boosted + self.strength * divergence(clean, moved) * doubt).mean()


@final
@dataclass(frozen=True, kw_only=True)
class HAT(_Pulled):
    """Helper-based training: TRADES, and examples beyond the ball with the label that a standard network gives them.

        L(f(x), y) + beta * KL(p(x) || p(x')) + gamma * L(f(x + h (x' - x)), y_h),   y_h = argmax f_std(x')

    It keeps the margin from growing along the attack's direction without need, which is what costs clean accuracy.
    helper: the standard network, trained on the same data. beta = 2.5, gamma = 0.5 and h = 2 (`stretch`) in the paper for
    CIFAR-10. x' ascends the divergence, as in `TRADES`. x + h (x' - x) is not clipped.

    Source: Rade & Moosavi-Dezfooli (2022), Reducing excessive margin to achieve a better accuracy vs. robustness trade-off,
    ICLR, algorithm 1.
    """

    helper: Classifier
    beta: float = 2.5
    gamma: float = 0.5
    stretch: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, beta=self.beta, gamma=self.gamma)
        check_number(self, least=1, stretch=self.stretch)
        if not isinstance(self.helper, Classifier):
            raise InputError(f"HAT: helper must be a trained sp.Model; got {type(self.helper).__name__}")

    def examples(self, batch: Batch) -> Tensor:
        return self._crafted(batch, by_divergence=True)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        forward = batch.model.forward
        clean, moved = forward(batch.x), forward(examples)
        beyond = forward(batch.x + self.stretch * (examples - batch.x))
        helped = frozen_logits(self.helper, examples).argmax(1)
        pull = self.beta * divergence(clean, moved).mean()
        return cross_entropy(clean, batch.y) + pull + self.gamma * cross_entropy(beyond, helped)


@final
@dataclass(frozen=True, kw_only=True)
class AdversarialLogitPairing(_Pulled):
    """Clean and adversarial examples in equal parts, whose logits z should agree:

        (L(x) + L(x')) / 2 + lambda * mean ||z(x) - z(x')||^2

    strength: lambda, 0.5 for ImageNet in the paper. It moves gradients more than it removes examples: under long attacks little
    of the gain is left (Engstrom, Ilyas & Athalye 2018, arXiv:1807.10272).

    Source: Kannan, Kurakin & Goodfellow (2018), Adversarial logit pairing, arXiv:1803.06373, section 3.2.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)

    def examples(self, batch: Batch) -> Tensor:
        return self._crafted(batch)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        clean, moved = batch.model.forward(torch.cat([batch.x, examples])).chunk(2)
        both = (cross_entropy(clean, batch.y) + cross_entropy(moved, batch.y)) / 2
        return both + self.strength * (clean - moved).square().sum(1).mean()


@final
@dataclass(frozen=True, kw_only=True)
class CleanLogitPairing(Objective):
    """Noisy inputs x + sigma N(0, I), clipped to the range, and logits that agree between unrelated samples, or vanish:

        L(x) + lambda * mean ||z(x_i) - z(x_j)||^2   (partner="other": the sample half a batch further, of any class)
        L(x) + lambda * mean ||z(x)||                (partner="zero": logit squeezing)

    strength: lambda; sigma: 0.5 for MNIST in the paper. Without any adversary; what it gives is mostly masked gradients.

    Source: Kannan, Kurakin & Goodfellow (2018), Adversarial logit pairing, arXiv:1803.06373, sections 3.3 and 3.4.
    """

    strength: float = 0.5
    sigma: float = 0.5
    partner: Literal["other", "zero"] = "other"

    def __post_init__(self) -> None:
        check_number(self, least=0, strength=self.strength, sigma=self.sigma)
        if self.partner not in ("other", "zero"):
            raise InputError(f'partner must be "other" or "zero"; got {self.partner!r}')

    def loss(self, batch: Batch) -> Tensor:
        noise = batch.keys(_NOISE).normal(tuple(batch.x.shape[1:]), batch.x.dtype)
        noisy = batch.x + self.sigma * noise
        logits = batch.model.forward(noisy if batch.model.bounds is None else noisy.clamp(*batch.model.bounds))
        half = len(logits) // 2
        if self.partner == "zero":
            pairing: Tensor = torch.linalg.vector_norm(logits, dim=1).mean()
        else:
            pairing = (logits[:half] - logits[half : 2 * half]).square().sum() / max(half, 1)
        loss: Tensor = cross_entropy(logits, batch.y) + self.strength * pairing
        return loss
