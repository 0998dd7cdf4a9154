"""What a training step minimises. An objective is a small part of the one training loop in `loop.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from saddlepoint.attacks.facade import check_combination, perturb
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.distributed import processes
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.goals import Goal, Targeted
from saddlepoint.models.base import Classifier
from saddlepoint.rng import Keys
from saddlepoint.threats import Threat

Mode = Literal["eval", "train"]
AttackLabels = Literal["true", "predicted", "least_likely"]


@dataclass(frozen=True)
class Batch:
    """What an objective is given: the model in train mode, inputs (B, ...), classes (B,), and the samples' ids (B,).

    Where several processes train, it is this one's share; what changes the weights in them must come out alike in all.
    y: classes, or soft labels (B, C) where an objective around this one made such. seed: another one each epoch. progress:
    epochs done, with fraction. memory: what must outlive the batch, tensors and numbers by name; it is part of the checkpoint.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    ids: Tensor
    seed: int
    progress: float
    memory: dict[str, Any] = field(default_factory=dict)  # Any: tensors, numbers, and dicts of them

    def keys(self, purpose: int) -> Keys:
        """Random numbers for each sample (B,), others for each purpose."""
        return Keys.of(self.seed, self.ids).absorb(purpose)

    def common_keys(self) -> Keys:
        """Random numbers for the batch as a whole (1,), the same in all processes that share it."""
        return Keys.of(self.seed, processes().from_main(self.ids[:1]))

    @property
    def net(self) -> nn.Module:
        """The network that is trained."""
        (net,) = self.model.networks()
        return net

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.model.num_classes or self.model.probe(self.x).num_classes


class Objective(ABC):
    """A loss for a batch, and what it costs and trains against."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimise, differentiable with respect to the parameters."""

    @property
    def adversary(self) -> tuple[Attack, Threat] | None:
        """The attack and threat that the network is trained against, which validation uses too; None for clean training."""
        return None

    def settings(self) -> dict[str, object]:
        """What defines this objective, ready for JSON: its name and fields."""
        names: list[str] = [each.name for each in fields(self)] if is_dataclass(self) else []
        return {"name": type(self).__name__, **{name: plain(getattr(self, name)) for name in names}}

    @property
    def replays(self) -> int:
        """How many steps are made with each batch."""
        return 1

    def after_backward(self, batch: Batch) -> None:  # noqa: B027  # nothing is to be done, as a rule
        """The parameters' gradients are there; or there was an error, or no step was wanted, and there are none."""

    def after_step(self, batch: Batch) -> None:  # noqa: B027
        """The optimiser has moved the weights."""

    def after_epoch(self, model: Classifier, epoch: int, memory: dict[str, Any]) -> bool:
        """An epoch is over; `memory` is that of the batches. Whether to stop the training."""
        return False


class MinMax(Objective):
    """An objective whose inputs are made by an attack: first the examples x', which are constants, then the loss there.

    By Danskin's theorem the gradient at the maximiser x' is a descent direction of the maximum.
    """

    @abstractmethod
    def examples(self, batch: Batch) -> Tensor:
        """x' (B, ...), detached."""

    @abstractmethod
    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        """The scalar to minimise, given x'."""

    @final
    def loss(self, batch: Batch) -> Tensor:
        return self.loss_at(batch, self.examples(batch))


@dataclass(frozen=True)
class Around(Objective):
    """An objective made from another one, whose every part is passed on."""

    inner: Objective

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Objective):
            raise InputError(f"{type(self).__name__} goes around an objective, such as sp.Standard(); got {self.inner!r}")

    @property
    def adversary(self) -> tuple[Attack, Threat] | None:
        return self.inner.adversary

    @property
    def replays(self) -> int:
        return self.inner.replays

    def after_backward(self, batch: Batch) -> None:
        self.inner.after_backward(batch)

    def after_step(self, batch: Batch) -> None:
        self.inner.after_step(batch)

    def after_epoch(self, model: Classifier, epoch: int, memory: dict[str, Any]) -> bool:
        return self.inner.after_epoch(model, epoch, memory)


def plain(value: object) -> object:
    """A field of an objective as JSON values."""
    match value:
        case Attack() | Threat() | Objective() | Goal():
            return value.settings()
        case Classifier():
            return value.describe()
        case tuple() | list():
            return [plain(each) for each in value]
        case Mapping():
            return {str(name): plain(each) for name, each in value.items()}
        case _:
            return value


def check_number(owner: object, *, above: float | None = None, least: float | None = None, most: float | None = None,
                 **values: float) -> None:  # fmt: skip
    """Raise `InputError` unless each of the values lies in its range: > above, >= least, <= most."""
    for name, value in values.items():
        low = (above is None or value > above) and (least is None or value >= least)
        if not (low and (most is None or value <= most) and abs(value) < float("inf")):
            parts = [f"{sign} {end:g}" for sign, end in ((">", above), (">=", least), ("<=", most)) if end is not None]
            raise InputError(f"{type(owner).__name__}: {name} must be a number {' and '.join(parts)}; got {value}")


def check_adversary(attack: Attack | str, threat: Threat, goal: Goal | None = None) -> Attack:
    """The attack, if it can be trained against within this threat. `CapabilityError` or `InputError` otherwise."""
    chosen = as_attack(attack)
    check_combination(chosen, threat, goal if goal is not None else chosen.default_goal())
    if not isinstance(threat.eps, float | int):
        raise InputError("training needs one eps for all samples")
    return chosen


def radius(threat: Threat) -> float:
    """The one eps of a threat that `check_adversary` let pass."""
    assert isinstance(threat.eps, float | int)
    return float(threat.eps)


def each_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample (B,), for classes (B,) or soft labels (B, C)."""
    return cross_entropy(logits, y, reduction="none")


def soft(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Labels (B, C) of classes (B,); soft labels as they are."""
    return y if y.is_floating_point() else one_hot(y, num_classes).to(dtype)


def craft(
    batch: Batch,
    attack: Attack | str,
    threat: Threat,
    *,
    labels: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    goal: Goal | None = None,
    mode: Mode = "eval",
    source: Classifier | None = None,
) -> Tensor:
    """`sp.perturb` for a batch. Soft labels are attacked through their cross-entropy; a target is one whatever the label is.

    source: where the gradients come from.
    """
    y = batch.y if labels is None else labels
    if loss is None and y.is_floating_point():
        if (goal if goal is not None else as_attack(attack).default_goal()).targeted:
            y = y.argmax(1)
        else:
            loss = each_loss
    model = batch.model if source is None else source
    return perturb(model, batch.x, y, attack, threat, loss, goal=goal, seed=batch.seed, ids=batch.ids, mode=mode)


def frozen_logits(model: Classifier, x: Tensor) -> Tensor:
    """Logits (B, C) in eval mode and without gradients, as the inner attacks see the network."""
    with model.frozen(), torch.no_grad():
        return model.forward(x)


@final
@dataclass(frozen=True)
class Standard(Objective):
    """Mean cross-entropy on the clean inputs."""

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(batch.model.forward(batch.x), batch.y)


@final
@dataclass(frozen=True, kw_only=True)
class Adversarial(MinMax):
    """Adversarial training: examples x' of the inner `attack` within `threat`, made anew for every batch.

    form="replace": L(x'), the min-max objective (Madry et al. 2018, arXiv:1706.06083, eq. 2.1).
    form="add": the batch holds x and x' in equal parts (Kurakin et al. 2017, arXiv:1611.01236, with lambda = 1).
    form="regularize": alpha * L(x) + (1 - alpha) * L(x') (Goodfellow et al. 2015, arXiv:1412.6572, section 6; alpha = 0.5).
    form="weighted": of m samples the first k = share * m are replaced (share 0.5) and weigh `weight` (lambda = 0.3),
        (sum_{i > k} L(x_i) + lambda sum_{i <= k} L(x'_i)) / (m - k + lambda k)   (Kurakin et al. 2017, eq. 1).

    attack: one, or several, of which one is drawn for each batch, such as (PGD(steps=7), ILLC()); the first validates.
    labels: what x' moves away from. "true"; "predicted", the network's own classes, or towards the "least_likely" class: with
    one step along the true label's gradient the network learns to read the label off x' ("label leaking", Kurakin et al. 2017,
    section 4.3), which the other two don't tell.
    warmup: epochs over which eps grows from 0, for large eps. mode: what normalisation layers do during the attack, see
    `sp.perturb`.
    """

    attack: Attack | str | tuple[Attack | str, ...]
    threat: Threat
    form: Literal["replace", "add", "regularize", "weighted"] = "replace"
    alpha: float = 0.5
    share: float = 0.5
    weight: float = 0.3
    labels: AttackLabels = "true"
    warmup: float = 0.0
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        if self.form not in ("replace", "add", "regularize", "weighted"):
            raise InputError(f'form must be "replace", "add", "regularize" or "weighted"; got {self.form!r}')
        if self.labels not in ("true", "predicted", "least_likely"):
            raise InputError(f'labels must be "true", "predicted" or "least_likely"; got {self.labels!r}')
        check_number(self, least=0, most=1, alpha=self.alpha, share=self.share)
        check_number(self, least=0, weight=self.weight, warmup=self.warmup)
        if not self.weight and self.share == 1:
            raise InputError("Adversarial: with weight = 0 and share = 1 nothing is left to minimise")
        several = self.attack if isinstance(self.attack, tuple) else (self.attack,)
        if not several:
            raise InputError("Adversarial: attack is empty")
        checked = tuple(check_adversary(attack, self.threat, self._goal) for attack in several)
        object.__setattr__(self, "attack", checked if isinstance(self.attack, tuple) else checked[0])

    @property
    def _goal(self) -> Goal | None:
        return Targeted("least_likely") if self.labels == "least_likely" else None

    @property
    def _attacks(self) -> tuple[Attack, ...]:
        return tuple(as_attack(each) for each in (self.attack if isinstance(self.attack, tuple) else (self.attack,)))

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return self._attacks[0], self.threat

    def examples(self, batch: Batch) -> Tensor:
        threat, attacks = warmed(self.threat, self.warmup, batch.progress), self._attacks
        attack = attacks[0] if len(attacks) == 1 else attacks[drawn(batch, len(attacks))]
        labels = frozen_logits(batch.model, batch.x).argmax(1) if self.labels == "predicted" else None
        return craft(batch, attack, threat, labels=labels, goal=self._goal, mode=self.mode)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        forward, x, y = batch.model.forward, batch.x, batch.y
        match self.form:
            case "replace":
                return cross_entropy(forward(examples), y)
            case "add":
                return cross_entropy(forward(torch.cat([x, examples])), torch.cat([y, y]))
            case "regularize":
                return self.alpha * cross_entropy(forward(x), y) + (1 - self.alpha) * cross_entropy(forward(examples), y)
            case "weighted":
                k = round(self.share * len(x))
                losses = each_loss(forward(torch.cat([examples[:k], x[k:]])), y)
                return (losses[k:].sum() + self.weight * losses[:k].sum()) / (len(x) - k + self.weight * k)


def warmed(threat: Threat, warmup: float, progress: float) -> Threat:
    """The threat at its share of eps, which grows linearly over the first `warmup` epochs."""
    return threat.at(radius(threat) * progress / warmup) if progress < warmup else threat


_CHOICE = 0x5EED


def drawn(batch: Batch, count: int) -> int:
    """One of 0..count-1 for the whole batch, another one each epoch."""
    return int(batch.common_keys().absorb(_CHOICE).uniform((), torch.float64) * count)
