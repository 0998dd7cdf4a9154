"""Several detectors as one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from saddlepoint.detectors.base import Detector, make
from saddlepoint.detectors.regression import Logistic, logistic_regression
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access

_HELD_BACK = 3  # every third sample tells how the parts' scores compare


@dataclass(eq=False, kw_only=True)
class Combination(Detector):
    """Base of those that look at the scores of others.

    parts: detectors, or their names with settings, such as ("kernel-density", "max-probability"). They are fitted on two
    thirds of the samples; on the rest it is learnt how to join them, since scores of samples that a part was fitted on mislead.
    """

    parts: tuple[Detector | str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.parts, str) or not all(isinstance(part, str | Detector) for part in self.parts):
            raise InputError(
                f"parts must be detectors or their names, such as ('energy', 'kernel-density'); got {self.parts!r}"
            )
        if len(self.parts) < 2:
            raise InputError(
                f"a combination takes at least two detectors, parts=('energy', 'kernel-density'), in text "
                f"{self.name}:parts=energy+kernel-density; got {len(self.parts)}"
            )
        self.parts = tuple(make(part) if isinstance(part, str) else part for part in self.parts)
        if any(part.fitted for part in self.detectors):
            raise InputError("a combination fits its parts itself: give detectors that are not fitted")

    @property
    @final
    def detectors(self) -> tuple[Detector, ...]:
        """The parts."""
        return tuple(part for part in self.parts if isinstance(part, Detector))

    @final
    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        held = torch.arange(len(clean), device=clean.device) % _HELD_BACK == 0
        learnt: dict[str, Tensor] = {}
        attacked, judged = adversarial, adversarial
        if adversarial is not None and any(part.learns_attacks for part in self.detectors):
            late = torch.arange(len(adversarial), device=adversarial.device) % _HELD_BACK == 0
            attacked, judged = adversarial[~late], adversarial[late]
        for number, part in enumerate(self.detectors):
            part.fit(self.model, (clean[~held], labels[~held]), attacked)
            learnt |= {f"{number}.{name}": array for name, array in part.arrays.items()}
        usual = self._scores(self.ordinary(clean[held]))
        odd = None if judged is None else self._scores(judged)
        return learnt | dict(self.join(usual, odd))

    @final
    def _scores(self, x: Tensor) -> Tensor:
        return torch.stack([part.score(x).double() for part in self.detectors], 1)

    def ordinary(self, clean: Tensor) -> Tensor:
        """What is to pass as not attacked, given clean samples."""
        return clean

    @abstractmethod
    def join(self, usual: Tensor, odd: Tensor | None) -> Mapping[str, Tensor]:
        """What is learnt from the parts' scores (N, parts) of clean samples, and of adversarial ones."""

    @abstractmethod
    def joined(self, scores: Tensor) -> Tensor:
        """One score (N,) of the parts' (N, parts)."""

    @final
    def restore(self) -> None:
        for number, part in enumerate(self.detectors):
            own = {name.removeprefix(f"{number}."): a for name, a in self.arrays.items() if name.startswith(f"{number}.")}
            part.attach(self.model, own)

    @final
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(torch.stack([part.forward(x) for part in self.detectors], 1))

    @final
    def networks(self) -> tuple[nn.Module, ...]:
        return tuple(net for part in self.detectors for net in part.networks())

    @final
    def check_access(self, model: Classifier) -> None:
        for part in self.detectors:
            part.check_access(model)

    @property
    def learns_attacks(self) -> bool:  # type: ignore[override]  # what its parts are
        return any(part.learns_attacks for part in self.detectors)

    @property
    def differentiable(self) -> bool:  # type: ignore[override]  # what its parts are
        return all(part.differentiable for part in self.detectors)

    @property
    def random(self) -> bool:  # type: ignore[override]  # what its parts are
        return any(part.random for part in self.detectors)


@final
@dataclass(eq=False, kw_only=True)
class AnyOf(Combination):
    """Adversarial if any of several detectors says so, at a false-positive rate that they share.

        score(x) = max_i (s_i(x) - median_i) / spread_i

    medians and spreads (95th percentile less median) are those of clean scores. So each part fires for as unusual a score, and
    `calibrate` sets the rate of all together, where separate thresholds would add theirs up.
    Source: the joint detection of Xu, Evans & Qi (2018), Feature squeezing, arXiv:1704.01155, section 5.2, for any detectors.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> both = sp.detectors.AnyOf(parts=("max-probability", "kernel-density:bandwidth=1")).fit(model, digits.train)
    >>> both.calibrate(digits.test.x[:100]).predict(digits.test.x[100:103]).shape
    torch.Size([3])
    """

    summary: ClassVar[str] = "any of several detectors fires"
    reference: ClassVar[str] = "Xu et al. 2018, arXiv:1704.01155"
    access: ClassVar[Access] = Access.SCORES

    def join(self, usual: Tensor, odd: Tensor | None) -> Mapping[str, Tensor]:
        median = usual.median(0).values
        spread = usual.quantile(0.95, dim=0) - median
        return {"median": median, "spread": torch.where(spread > 0, spread, usual.std(0, correction=0).clamp(min=1e-6))}

    def joined(self, scores: Tensor) -> Tensor:
        median, spread = (self.arrays[name].to(scores.dtype) for name in ("median", "spread"))
        return ((scores - median) / spread).amax(1)


@final
@dataclass(eq=False, kw_only=True)
class Regression(Combination):
    """Logistic regression over the scores of several detectors: score(x) = b + sum_i w_i (s_i(x) - mean_i) / std_i.

    noise: beside clean samples, the ones without an attack are clean samples with Gaussian noise of this size (in the input's
    units; clipped to its range), so that noise alone isn't taken for an attack; 0 for none, and the paper's choice is the mean
    size of the attack's perturbations.
    Source: Feinman, Curtin, Shintre & Gardner (2017), Detecting adversarial samples from artifacts, arXiv:1703.00410,
    section 5.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> found = sp.attack(model, digits.train.x[:100], digits.train.y[:100], "fgsm", sp.Linf(0.2))
    >>> feinman = sp.detectors.Regression(parts=("max-probability", "kernel-density:bandwidth=1"))
    >>> feinman.fit(model, digits.train, found.adversarial).score(digits.test.x[:3]).shape
    torch.Size([3])
    """

    summary: ClassVar[str] = "logistic regression over the scores of several detectors"
    reference: ClassVar[str] = "Feinman et al. 2017, arXiv:1703.00410"
    learns_attacks: ClassVar[bool] = True
    access: ClassVar[Access] = Access.SCORES

    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < float("inf"):
            raise InputError(f"noise must be a number >= 0, in the input's units; got {self.noise}")

    def ordinary(self, clean: Tensor) -> Tensor:
        if not self.noise:
            return clean
        low, high = self.model.bounds if self.model.bounds is not None else (None, None)
        return torch.cat([clean, (clean + self.noise * torch.randn_like(clean)).clamp(low, high)])

    def join(self, usual: Tensor, odd: Tensor | None) -> Mapping[str, Tensor]:
        assert odd is not None  # `fit` saw to it
        target = torch.arange(len(usual) + len(odd), device=usual.device) >= len(usual)
        return logistic_regression(torch.cat([usual, odd]), target)._asdict()

    def joined(self, scores: Tensor) -> Tensor:
        learnt = Logistic(*(self.arrays[name].to(scores.dtype) for name in Logistic._fields))
        return learnt.log_odds(scores)
