"""What a training step minimises. An objective is a small part of the one training loop in `training.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saddlepoint.attacks.facade import check_combination, perturb
from saddlepoint.attacks.registry import as_attack
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat


@dataclass(frozen=True)
class Batch:
    """What an objective is given: the model in train mode, inputs (B, ...), classes (B,), and the samples' ids (B,).

    seed: another one each epoch. progress: epochs done, with fraction.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    ids: Tensor
    seed: int
    progress: float


class Objective(ABC):
    """A loss for a batch, and what it costs and trains against."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimise, differentiable with respect to the parameters."""

    @property
    def adversary(self) -> tuple[Attack, Threat] | None:
        """The attack and threat that the network is trained against, which validation uses too; None for clean training."""
        return None

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What defines this objective, ready for JSON."""


@final
@dataclass(frozen=True)
class Standard(Objective):
    """Mean cross-entropy on the clean inputs."""

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(batch.model.forward(batch.x), batch.y)

    def settings(self) -> dict[str, object]:
        return {"name": "Standard"}


@final
@dataclass(frozen=True, kw_only=True)
class Adversarial(Objective):
    """Adversarial training: examples x' of the inner `attack` within `threat`, made anew for every batch.

    form="replace": L(x'), the min-max objective (Madry et al. 2018, arXiv:1706.06083, eq. 2.1).
    form="add": the batch holds x and x' in equal parts (Kurakin et al. 2017, arXiv:1611.01236, with lambda = 1).
    form="regularize": alpha * L(x) + (1 - alpha) * L(x') (Goodfellow et al. 2015, arXiv:1412.6572, section 6; alpha = 0.5).

    x' is a constant for the gradient: by Danskin's theorem that gives a descent direction of the maximum.
    warmup: epochs over which eps grows from 0, for large eps. mode: what normalisation layers do during the attack, see
    `sp.perturb`.
    """

    attack: Attack | str
    threat: Threat
    form: Literal["replace", "add", "regularize"] = "replace"
    alpha: float = 0.5
    warmup: float = 0.0
    mode: Literal["eval", "train"] = "eval"

    def __post_init__(self) -> None:
        if self.form not in ("replace", "add", "regularize"):
            raise InputError(f'form must be "replace", "add" or "regularize"; got {self.form!r}')
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must lie in [0, 1]; got {self.alpha}")
        if not self.warmup >= 0:
            raise InputError(f"warmup must be >= 0 epochs; got {self.warmup}")
        attack = as_attack(self.attack)
        object.__setattr__(self, "attack", attack)
        check_combination(attack, self.threat, attack.default_goal())
        if not isinstance(self.threat.eps, float | int):
            raise InputError("training needs one eps for all samples")

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return as_attack(self.attack), self.threat

    def loss(self, batch: Batch) -> Tensor:
        threat = self.threat
        if batch.progress < self.warmup:
            assert isinstance(threat.eps, float | int)  # __post_init__ saw to it
            threat = threat.at(threat.eps * batch.progress / self.warmup)
        adversarial = perturb(
            batch.model, batch.x, batch.y, self.attack, threat, seed=batch.seed, ids=batch.ids, mode=self.mode
        )  # fmt: skip
        match self.form:
            case "replace":
                return cross_entropy(batch.model.forward(adversarial), batch.y)
            case "add":
                return cross_entropy(batch.model.forward(torch.cat([batch.x, adversarial])), torch.cat([batch.y, batch.y]))
            case "regularize":
                clean = cross_entropy(batch.model.forward(batch.x), batch.y)
                return self.alpha * clean + (1 - self.alpha) * cross_entropy(batch.model.forward(adversarial), batch.y)

    def settings(self) -> dict[str, object]:
        return {
            "name": "Adversarial", "attack": self.adversary[0].settings(), "threat": self.threat.settings(), "form": self.form,
            "alpha": self.alpha, "warmup": self.warmup, "mode": self.mode,
        }  # fmt: skip
