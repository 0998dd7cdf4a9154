"""How much a network's answer varies when its dropout stays on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from saddlepoint.detectors.base import Detector
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@final
@dataclass(eq=False, kw_only=True)
class DropoutUncertainty(Detector):
    """The network's answers vary while its dropout is on:

        score(x) = 1 / T sum_t |p_t|^2 - |1 / T sum_t p_t|^2

    p_1 to p_T are the softmax outputs of T passes with different dropout masks: an estimate of a Bayesian network's variance,
    summed over the classes. Everything but the dropout modules is in eval mode. It costs as much as T predictions.

    passes: T, 50 in the paper.

    Errors: `InputError` in fitting for networks without a dropout module; functional dropout isn't seen.
    Source: Feinman, Curtin, Shintre & Gardner (2017), Detecting adversarial samples from artifacts, arXiv:1703.00410,
    section 4.2; the estimate is that of Gal & Ghahramani (2016), arXiv:1506.02142.

    >>> import torch, saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> net = torch.nn.Sequential(*sp.zoo.build("digits-cnn")[:-1], torch.nn.Dropout(0.5), torch.nn.Linear(128, 10))
    >>> detector = sp.detectors.DropoutUncertainty(passes=10).fit(sp.Model(net), digits.train)
    >>> bool((detector.score(digits.test.x[:4]) > 0).all())
    True
    """

    summary: ClassVar[str] = "the softmax outputs vary with dropout on"
    reference: ClassVar[str] = "Feinman et al. 2017, arXiv:1703.00410"
    random: ClassVar[bool] = True

    passes: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 2:
            raise InputError(f"passes must be at least 2: one has no variance; got {self.passes}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        if not _dropouts(self.model):
            raise InputError(
                "DropoutUncertainty needs a network with dropout: this one has no nn.Dropout module with p > 0, and "
                "functional dropout can't be switched on from outside"
            )
        return {}

    def forward(self, x: Tensor) -> Tensor:
        with dropout_on(self.model):
            p = torch.stack([self.model.forward(x).softmax(1) for _ in range(self.passes)])
        return p.var(0, correction=0).sum(1)


@contextmanager
def dropout_on(model: Classifier) -> Iterator[None]:
    """All in eval mode but the dropout modules."""
    with model.frozen():
        modules = _dropouts(model)
        before = [module.training for module in modules]
        try:
            for module in modules:
                module.training = True
            yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training


def _dropouts(model: Classifier) -> list[nn.Module]:
    found = [module for net in model.networks() for module in net.modules()]
    return [module for module in found if isinstance(module, _DROPOUTS) and module.p > 0]
