"""What the adversary wants, and the losses that lead there.

A goal splits the classes of each sample into those it wants predicted and those it does not (an `Aim`). The margin, the
success test and every loss follow from that split, so none of them asks whether the attack is targeted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.rng import Keys
from saddlepoint.trees import SHARED

Chooser = Literal["random", "next", "least_likely", "all"]
_CHOOSERS = ("random", "next", "least_likely", "all")
UNRESOLVED = -1  # target of a sample whose target waits for the first prediction (least likely), or that has none


@dataclass(frozen=True)
class Aim:
    """A goal bound to a batch: which classes (B, C) shall win, and which shall lose. Sums are per sample.

    rejects: whether the last column is no class but stands for inputs that the model rejects; it is always among the losers.
    """

    goal: Goal = field(metadata=SHARED)
    wanted: Tensor  # (B, C) bool
    unwanted: Tensor  # (B, C) bool
    rejects: bool = field(default=False, metadata=SHARED)

    def margin(self, logits: Tensor) -> Tensor:
        """By how much the goal is reached, in logits: positive when it is. (B,)

        A model that rejects must besides accept the input: the smaller of both margins counts.
        """
        return torch.minimum(*self.margins(logits)) if self.rejects else self.goal.margin(logits, self)

    def margins(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Where the model rejects: the goal's margin among the classes, and by how much the input is accepted, (B,) each."""
        classes = logits[:, :-1]
        among = Aim(self.goal, self.wanted[:, :-1], self.unwanted[:, :-1])
        return self.goal.margin(classes, among), classes.amax(1) - logits[:, -1]

    def bound_again(self, labels: Tensor, targets: Tensor) -> Aim:
        """The same goal with other targets (B,)."""
        return bind(self.goal, labels, targets, self.wanted.shape[1], self.rejects)

    def best(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value among the wanted and among the unwanted classes, (B,) each."""
        return self._largest(values, self.wanted), self._largest(values, self.unwanted)

    def towards(self, classes: Tensor) -> Aim:
        """The same, led to one class (B,) each: losses then are the targeted ones, z_t against the unwanted classes.

        For untargeted attacks that run from target to target; what counts as success stays with the goal.
        """
        wanted = _one_hot(classes, self.wanted.shape[1])
        return Aim(_DIRECTED, wanted, self.unwanted & ~wanted, self.rejects)

    @staticmethod
    def _largest(values: Tensor, allowed: Tensor) -> Tensor:
        # mask with -inf: a factor of 0 would invent a logit of 0
        return values.masked_fill(~allowed, -math.inf).max(1).values


@dataclass(frozen=True, kw_only=True)
class Goal(ABC):
    """Base of the goals.

    confidence: how far the margin (in logits) must be above zero, kappa of Carlini & Wagner (arXiv:1608.04644).
    top_k: the label must leave the k most likely classes (untargeted), or the target must be among them (targeted).
    """

    confidence: float = 0.0
    top_k: int = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.confidence) or self.confidence < 0:
            raise InputError(f"confidence must be a number >= 0; got {self.confidence}")
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise InputError(f"top_k must be a whole number >= 1; got {self.top_k}")

    @property
    @abstractmethod
    def targeted(self) -> bool:
        """Whether certain classes are to be reached, rather than one to be left."""

    @property
    def needs_scores(self) -> bool:
        """Whether a label alone can't tell that the goal is reached."""
        return self.confidence > 0 or self.top_k > 1

    @property
    def needs_labels(self) -> bool:
        """Whether the true labels matter."""
        return True

    @abstractmethod
    def targets(self, labels: Tensor, num_classes: int, keys: Keys) -> Tensor:
        """The target of each sample (B,), `UNRESOLVED` where there is none or where the first prediction decides."""

    def resolve(self, targets: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Fill in the targets that wait for the clean prediction `logits` (B, C)."""
        return targets

    @abstractmethod
    def aim(self, labels: Tensor, targets: Tensor, num_classes: int) -> Aim:
        """Bind to labels and targets (B,)."""

    def margin(self, logits: Tensor, aim: Aim) -> Tensor:
        """See `Aim.margin`."""
        if self.top_k == 1:
            wanted, unwanted = aim.best(logits)
            return wanted - unwanted
        rivals = aim.unwanted if self.targeted else aim.wanted
        kth = logits.masked_fill(~rivals, -math.inf).topk(self.top_k, dim=1).values[:, -1]
        wanted, unwanted = aim.best(logits)
        return wanted - kth if self.targeted else kth - unwanted

    def settings(self) -> dict[str, object]:
        """What defines this goal, ready for JSON."""
        return {
            "name": type(self).__name__,
            "targeted": self.targeted,
            "confidence": self.confidence,
            "top_k": self.top_k,
        }


def bind(goal: Goal, labels: Tensor, targets: Tensor, num_classes: int, rejects: bool = False) -> Aim:
    """The goal's aim (B, num_classes). rejects: the last of them is no class; see `Aim`."""
    aim = goal.aim(labels, targets, num_classes - rejects)
    if not rejects:
        return aim
    column = aim.wanted.new_zeros(len(aim.wanted), 1)
    return Aim(goal, torch.cat([aim.wanted, column], 1), torch.cat([aim.unwanted, ~column], 1), rejects=True)


class Guard(Protocol):
    """What tells adversarial inputs from clean ones, and can be put before a model."""

    def guard(self, model: Any) -> Any:  # Any: models are not known here
        """The model, which then rejects what is told to be adversarial."""


@dataclass(frozen=True)
class Evade:
    """Reach a goal and go unnoticed by a detector: fool both (Carlini & Wagner 2017, arXiv:1705.07263).

    `sp.attack(model, ..., goal=Evade(detector))` is an attack on `Guarded(model, detector)`: what is rejected is no success.
    goal: what is to be reached, default any wrong class.
    """

    detector: Guard
    goal: Goal | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.detector, "guard"):
            raise InputError(f"Evade takes a calibrated detector, one of sp.detectors; got {type(self.detector).__name__}")


def _checked(aim: Aim) -> Aim:
    """The aim, if its goal can be missed as well as reached: `InputError` where there are fewer rivals than top_k."""
    rivals, goal = aim.unwanted if aim.goal.targeted else aim.wanted, aim.goal
    fewest = int(rivals.sum(1).amin()) if len(rivals) else goal.top_k
    if fewest < goal.top_k:
        raise InputError(f"{goal} needs at least {goal.top_k} classes on the other side; with this model there are {fewest}")
    return aim


def _members(classes: Collection[int], num_classes: int) -> list[int]:
    """The classes in order. `InputError` for one that the model doesn't have."""
    for unknown in (c for c in classes if not 0 <= c < num_classes):
        raise InputError(f"class {unknown} is not one of the model's: it has classes 0 to {num_classes - 1}")
    return sorted(classes)


def _one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """(B, C) bool with one True per row, none where the class is `UNRESOLVED`."""
    return classes[:, None] == torch.arange(num_classes, device=classes.device)


@dataclass(frozen=True, kw_only=True)
class Untargeted(Goal):
    """Any class but the true one. `groups` are sets of classes that count as the same ({dog breeds}, {cats})."""

    groups: tuple[frozenset[int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", tuple(frozenset(int(c) for c in group) for group in self.groups))

    @property
    def targeted(self) -> bool:
        return False

    def targets(self, labels: Tensor, num_classes: int, keys: Keys) -> Tensor:
        return torch.full_like(labels, UNRESOLVED)

    def aim(self, labels: Tensor, targets: Tensor, num_classes: int) -> Aim:
        unwanted = _one_hot(labels, num_classes)
        for group in self.groups:
            members = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
            members[_members(group, num_classes)] = True
            unwanted = unwanted | (members[labels][:, None] & members)
        aim = Aim(self, ~unwanted, unwanted)
        return _checked(aim) if self.groups or self.top_k > 1 else aim

    def settings(self) -> dict[str, object]:
        return super().settings() | {"groups": [sorted(group) for group in self.groups]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Targeted(Goal):
    """A given class, one per sample or one of a set, or chosen: "random", "next", "least_likely".

    "all" attacks every sample once towards each other class; the result then has N * (C - 1) rows.
    """

    classes: int | Tensor | Collection[int] | Chooser = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        classes = self.classes
        if isinstance(classes, str) and classes not in _CHOOSERS:
            raise UnknownNameError("target chooser", classes, _CHOOSERS)
        if isinstance(classes, Tensor) and (classes.is_floating_point() or classes.dim() != 1):
            raise InputError(f"targets must be integers of shape (N,); got {classes.dtype} {tuple(classes.shape)}")
        if isinstance(classes, Integral):  # numpy's too
            object.__setattr__(self, "classes", int(classes))
        elif not isinstance(classes, str | Tensor):
            if not isinstance(classes, Collection) or hasattr(classes, "__array__") or not classes:
                raise InputError(f"targets must be a class, a set of classes or a tensor with one per sample; got {classes!r}")
            object.__setattr__(self, "classes", frozenset(int(c) for c in classes))

    @property
    def targeted(self) -> bool:
        return True

    def targets(self, labels: Tensor, num_classes: int, keys: Keys) -> Tensor:
        match self.classes:
            case Tensor() as given:
                raise AssertionError(f"per-sample targets {tuple(given.shape)} are handed out by the engine")
            case "random":
                draw = (keys.uniform((), torch.float64) * (num_classes - 1)).long().clamp(max=num_classes - 2)
                return draw + (draw >= labels)
            case "next":
                return (labels + 1) % num_classes
            case int() as one:
                return torch.full_like(labels, one)
            case _:
                return torch.full_like(labels, UNRESOLVED)

    def resolve(self, targets: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if self.classes != "least_likely":
            return targets
        others = logits.masked_fill(_one_hot(labels, logits.shape[1]), math.inf)
        return torch.where(targets == UNRESOLVED, others.argmin(1), targets)

    def aim(self, labels: Tensor, targets: Tensor, num_classes: int) -> Aim:
        if isinstance(self.classes, frozenset):
            wanted = torch.zeros(len(labels), num_classes, dtype=torch.bool, device=labels.device)
            wanted[:, _members(self.classes, num_classes)] = True
        else:
            wanted = _one_hot(targets, num_classes)
        aim = Aim(self, wanted, ~wanted)
        return _checked(aim) if self.top_k > 1 or isinstance(self.classes, frozenset) else aim

    def settings(self) -> dict[str, object]:
        classes = self.classes
        if isinstance(classes, Tensor):
            classes = classes.tolist()
        return super().settings() | {"classes": sorted(classes) if isinstance(classes, frozenset) else classes}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Targeted) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(repr(self.settings()))


_DIRECTED = Targeted("all")  # of aims that lead to a class that an attack chose


@dataclass(frozen=True, kw_only=True)
class FalsePositive(Goal):
    """Rubbish that the model takes for a class with at least this probability (Goodfellow et al. 2015; Nguyen et al. 2015).

    target: the class; None for any. The labels are not used.
    probability: what the model must state, in (0, 1).
    """

    target: int | None = None
    probability: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability < 1:
            raise InputError(f"probability must lie in (0, 1); got {self.probability}")
        if self.top_k != 1:
            raise InputError(f"FalsePositive asks for the most likely class, so top_k is 1; got {self.top_k}")

    @property
    def targeted(self) -> bool:
        return True

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def needs_labels(self) -> bool:
        return False

    def targets(self, labels: Tensor, num_classes: int, keys: Keys) -> Tensor:
        return torch.full_like(labels, UNRESOLVED if self.target is None else self.target)

    def aim(self, labels: Tensor, targets: Tensor, num_classes: int) -> Aim:
        if self.target is not None:
            _members([self.target], num_classes)
        wanted = _one_hot(targets, num_classes)
        return Aim(self, wanted, ~wanted)

    def resolve(self, targets: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Without a target, the losses lead to the class that the start looks most like."""
        return torch.where(targets == UNRESOLVED, logits.argmax(1), targets)

    def margin(self, logits: Tensor, aim: Aim) -> Tensor:
        """Log-odds of the target (or of the most likely class) above those of `probability`."""
        allowed = logits if self.target is None else logits.masked_fill(~aim.wanted, -math.inf)
        top, index = allowed.max(1)
        rest = logits.scatter(1, index[:, None], -math.inf).logsumexp(1)
        return top - rest - math.log(self.probability / (1 - self.probability))

    def settings(self) -> dict[str, object]:
        return super().settings() | {"target": self.target, "probability": self.probability}


Loss = Callable[[Tensor, Aim], Tensor]
"""A loss to ascend: logits (B, C) and the aim give (B,); never averaged, so that no result depends on the batch."""


def cross_entropy(logits: Tensor, aim: Aim) -> Tensor:
    """-log p(unwanted) for untargeted goals, log p(wanted) for targeted ones (Goodfellow et al. 2015)."""
    whole = logits.logsumexp(1)
    if aim.goal.targeted:
        return logits.masked_fill(~aim.wanted, -math.inf).logsumexp(1) - whole
    return whole - logits.masked_fill(~aim.unwanted, -math.inf).logsumexp(1)


def logit(logits: Tensor, aim: Aim) -> Tensor:
    """The largest wanted logit alone for targeted goals, minus the largest unwanted one for others (Zhao et al. 2021).

    For examples that are to fool other models as well: it doesn't fade when their own model is sure (arXiv:2012.11207).
    Of an `Ensemble(fuse="loss")` it is the mean of the members' losses.
    """
    wanted, unwanted = aim.best(logits)
    return wanted if aim.goal.targeted else -unwanted


def margin(logits: Tensor, aim: Aim) -> Tensor:
    """The goal's own margin in logits, f_6 of Carlini & Wagner (2017, arXiv:1608.04644)."""
    return aim.margin(logits)


def probability_margin(logits: Tensor, aim: Aim) -> Tensor:
    """Largest wanted minus largest unwanted probability."""
    wanted, unwanted = aim.best(logits.softmax(1))
    return wanted - unwanted


def difference_of_logits_ratio(logits: Tensor, aim: Aim) -> Tensor:
    """DLR and targeted DLR, invariant to shift and scale (Croce & Hein 2020, arXiv:2003.01690, eq. 6 and 7).

    Untargeted: margin / (z_(1) - z_(3)). Targeted: margin / (z_(1) - (z_(3) + z_(4)) / 2), with z_(3) alone where there are
    three classes; the paper's numerator is z_t - z_y, which is the margin while the label y is the strongest rival.
    With two classes the ratio would be constant, so the logit margin takes its place.
    """
    difference = aim.margin(logits)
    count = logits.shape[1]
    if count < 3:
        return difference
    ranked = logits.topk(min(count, 4), dim=1).values
    lower = ranked[:, 2:].mean(1) if aim.goal.targeted else ranked[:, 2]
    return difference / (ranked[:, 0] - lower).clamp(min=max(1e-12, torch.finfo(logits.dtype).tiny))


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "margin": margin,
    "logit": logit,
    "probability_margin": probability_margin,
    "dlr": difference_of_logits_ratio,
}


def loss_named(loss: str | Loss) -> Loss:
    """The loss of that name (or the callable itself). Errors: `UnknownNameError`."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    return LOSSES[loss]
