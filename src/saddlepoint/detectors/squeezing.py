"""Feature squeezing: what adversarial inputs are made of is lost when they are coarsened, and the prediction changes."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from saddlepoint.defenses.transforms import BitDepth, Median, NonLocalMeans
from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.metrics import roc_auc
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.transforms import InputTransform
from saddlepoint.taxonomy import Access

Change = Literal["l1", "l2", "kl"]
Joint = Literal["max", "mean"]
GREY: tuple[InputTransform, ...] = (BitDepth(1), Median(2))
COLOUR: tuple[InputTransform, ...] = (BitDepth(5), Median(2), NonLocalMeans(13, 3, 2 / 255))


def change(logits: Tensor, others: Tensor, norm: Change) -> Tensor:
    """How far the distributions p and q of two batches of logits (N, C) are apart: |p - q|_1, |p - q|_2 or KL(p, q); (N,)."""
    log_p, log_q = logits.log_softmax(1), others.log_softmax(1)
    if norm == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(1)
    away: Tensor = torch.linalg.vector_norm(log_p.exp() - log_q.exp(), {"l1": 1, "l2": 2}[norm], dim=1)
    return away


def check_change(norm: str) -> None:
    """Raise `UnknownNameError` for a norm that `change` doesn't have."""
    if norm not in get_args(Change):
        raise UnknownNameError("norm", norm, get_args(Change))


@dataclass(eq=False, kw_only=True)
class _Squeezing(Detector, ABC):
    """What squeezing detectors share: the scores of squeezers, and how several become one.

    norm: of the change of probabilities. joint: what is taken over squeezers.
    """

    access: ClassVar[Access] = Access.SCORES

    norm: Change = "l1"
    joint: Joint = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_change(self.norm)
        if self.joint not in get_args(Joint):
            raise UnknownNameError("joint score", self.joint, get_args(Joint))

    def _changes(self, x: Tensor, squeezers: Sequence[InputTransform]) -> Tensor:
        """How much each squeezer changes the prediction, (N, number of squeezers)."""
        logits = self.model.forward(x)
        squeezed = [self.model.forward(squeezer(x, self.model.bounds)) for squeezer in squeezers]
        return torch.stack([change(logits, others, self.norm) for others in squeezed], 1)

    def _joined(self, changes: Tensor) -> Tensor:
        return changes.amax(1) if self.joint == "max" else changes.mean(1)


@final
@dataclass(eq=False, kw_only=True)
class FeatureSqueezing(_Squeezing):
    """Coarser, the input would be another class: score(x) = max_k |softmax(z(x)) - softmax(z(s_k(x)))|_1 over squeezers s_k.

    squeezers: of `sp.transforms`. Default those of the paper: `BitDepth(1), Median(2)` for images of one channel; `BitDepth(5),
    Median(2), NonLocalMeans(13, 3, 2 / 255)` for others; `BitDepth(4)` for what is no image. An attack differentiates them as
    they declare it, rounding by BPDA. norm: "l1" in the paper, "l2" or "kl". joint: "max" in the paper, or "mean".

    Errors: `InputError` unless squeezers are such settings, and at least one.
    Source: Xu, Evans & Qi (2018), Feature squeezing: detecting adversarial examples in deep neural networks,
    arXiv:1704.01155, section V and table III.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.FeatureSqueezing(squeezers=(sp.transforms.Median(3),)).fit(model, digits.train)
    >>> detector.calibrate(digits.test.x[:200], fpr=0.05).predict(digits.test.x[200:204]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "coarser, the input would be another class"
    reference: ClassVar[str] = "Xu, Evans & Qi 2018, arXiv:1704.01155"

    squeezers: tuple[InputTransform, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squeezers is not None:
            self.squeezers = _checked(self.squeezers, "squeezers")
            self.random = _random(self.squeezers)  # type: ignore[misc]  # a class's, but here it depends on a setting

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return self._joined(self._changes(x, self.squeezers or _papers(x)))


@final
@dataclass(eq=False, kw_only=True)
class AdaptiveSqueezing(_Squeezing):
    """Feature squeezing with the squeezers that tell given adversarial inputs from clean ones best.

    All sets of at most `most` candidates are tried on the fitting samples; that with the largest area under the ROC curve is
    taken, of equal ones the smallest. So it suits the attacks that it was shown.
    candidates: default bit depths 1 to 5 and, for images, medians and non-local means. most: 3, as many as the paper joins.

    Errors: `InputError` as of `FeatureSqueezing`, and unless 1 <= most.
    Source: Xu, Evans & Qi (2018), arXiv:1704.01155, section V, which chooses by hand.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> noisy = (digits.train.x[:50] + 0.3).clamp(max=1)
    >>> len(sp.detectors.AdaptiveSqueezing(most=1).fit(model, digits.train.x[50:100], noisy).chosen)
    1
    """

    summary: ClassVar[str] = "coarser in the way that works best, the input would be another class"
    reference: ClassVar[str] = "Xu, Evans & Qi 2018, arXiv:1704.01155"
    learns_attacks: ClassVar[bool] = True

    candidates: tuple[InputTransform, ...] | None = None
    most: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise InputError(f"most must be at least 1 squeezer; got {self.most}")
        if self.candidates is not None:
            self.candidates = _checked(self.candidates, "candidates")
            self.random = _random(self.candidates)  # type: ignore[misc]  # a class's, but here it depends on a setting

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        assert adversarial is not None  # fit sees to it
        candidates = self._candidates(clean)
        of_clean, of_attacks = (self.over(lambda part: self._changes(part, candidates), x) for x in (clean, adversarial))
        sets = [c for size in range(1, self.most + 1) for c in combinations(range(len(candidates)), size)]
        best = max(sets, key=lambda chosen: roc_auc(self._joined(of_clean[:, chosen]), self._joined(of_attacks[:, chosen])))
        return {"chosen": torch.tensor(best)}

    @property
    def chosen(self) -> tuple[InputTransform, ...]:
        """The squeezers that were taken. Errors: `KeyError` before `fit`."""
        candidates = self._candidates(None)
        return tuple(candidates[number] for number in self.arrays["chosen"].tolist())

    def _candidates(self, x: Tensor | None) -> tuple[InputTransform, ...]:
        """In an order in which those that suit any input come first."""
        if self.candidates is not None:
            return self.candidates
        depths = tuple(BitDepth(bits) for bits in range(1, 6))
        if x is not None and x.dim() != 4:
            return depths
        return (*depths, Median(2), Median(3), NonLocalMeans(11, 3, 4 / 255), NonLocalMeans(13, 3, 2 / 255))

    def forward(self, x: Tensor) -> Tensor:
        return self._joined(self._changes(x, self.chosen))


def _papers(x: Tensor) -> tuple[InputTransform, ...]:
    if x.dim() != 4:
        return (BitDepth(4),)
    return GREY if x.shape[1] == 1 else COLOUR


def _checked(squeezers: Sequence[InputTransform], name: str) -> tuple[InputTransform, ...]:
    if not isinstance(squeezers, tuple | list) or not squeezers or any(not isinstance(s, InputTransform) for s in squeezers):
        raise InputError(f"{name} must be settings such as (sp.transforms.Median(2),), at least one; got {squeezers!r}")
    return tuple(squeezers)


def _random(squeezers: Sequence[InputTransform]) -> bool:
    return any(squeezer.transform((0.0, 1.0)).random for squeezer in squeezers)
