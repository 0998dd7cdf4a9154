"""What the papers count, where it differs from an `AttackResult`."""

from __future__ import annotations

import torch
from torch import Tensor

from saddlepoint.attacks import FGSM
from saddlepoint.attacks.facade import perturb
from saddlepoint.data import Split
from saddlepoint.models import Model
from saddlepoint.threats import Linf

_BATCH = 500


def fgsm(model: Model, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float] | None = None) -> Tensor:
    """FGSM examples of all samples (N, ...), inputs that were wrong before included.

    `sp.attack` leaves those as they are, for they count as wrong anyway; Goodfellow et al. (2015) perturb the whole test
    set, and average the confidence over all errors on it.
    """
    batches = zip(torch.split(x, _BATCH), torch.split(y, _BATCH), strict=True)
    return torch.cat([perturb(model.forward, *batch, FGSM(), Linf(eps), bounds=bounds) for batch in batches])


def error(model: Model, x: Tensor, y: Tensor) -> float:
    """Share of inputs whose predicted class is wrong."""
    return float((model.predict(x) != y).double().mean())


def confidence_on_errors(model: Model, x: Tensor, y: Tensor) -> float:
    """Mean probability of the predicted class over the inputs that are classified wrongly; nan where there are none."""
    probability, predicted = model.logits(x).double().softmax(1).max(1)
    return float(probability[predicted != y].mean())


def right(model: Model, split: Split) -> tuple[Tensor, Tensor]:
    """Inputs and classes of the samples that the model gets right: the others need no perturbation."""
    kept = model.predict(split.x) == split.y
    return split.x[kept], split.y[kept]
