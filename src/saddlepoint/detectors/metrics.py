"""How well scores tell adversarial inputs from clean ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from saddlepoint.errors import InputError

_Z = 1.959964  # two-sided 95 %
_HALVINGS = 60


def roc_curve(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """False- and true-positive rates of every threshold, from (0, 0) to (1, 1); (K,) float64 each.

    clean (N,), adversarial (M,): scores, higher for what looks more adversarial. Errors: `InputError` where one is empty.
    """
    clean, adversarial = _checked(clean), _checked(adversarial)
    cuts = torch.cat([clean, adversarial]).sort(descending=True).values
    rates = [_share_from(cuts, scores) for scores in (clean, adversarial)]
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, rates[0]]), torch.cat([zero, rates[1]])


def roc_auc(clean: Tensor, adversarial: Tensor) -> float:
    """Area under the ROC curve: the chance that an adversarial input scores above a clean one, ties counting half."""
    clean, adversarial = _checked(clean).sort().values, _checked(adversarial)
    below = torch.searchsorted(clean, adversarial, right=False)
    upto = torch.searchsorted(clean, adversarial, right=True)
    return float((below + upto).double().mean() / (2 * len(clean)))


def average_precision(clean: Tensor, adversarial: Tensor) -> float:
    """Area under the precision-recall curve: the mean over adversarial inputs of the precision at their own score.

    Unlike the ROC's it depends on how many of the inputs are adversarial: M of N + M here, a half where both are as many.
    """
    clean, adversarial = _checked(clean), _checked(adversarial)
    found, false = (len(scores) * _share_from(adversarial, scores) for scores in (adversarial, clean))
    return float((found / (found + false)).mean())


def auc_limits(auc: float, clean: int, adversarial: int) -> tuple[float, float]:
    """95 % limits of an AUC that was found on so many inputs: the areas that such a finding doesn't contradict.

    Those theta with |auc - theta| <= 1.96 s(theta), s^2 being Hanley & McNeil's (1982) variance; inverted like this the limits
    make sense also where the AUC is 1 (Newcombe 2006, Statistics in Medicine 25, 559-573).
    """

    def fits(theta: float) -> bool:
        q1, q2 = theta / (2 - theta) - theta**2, 2 * theta**2 / (1 + theta) - theta**2
        variance = (theta * (1 - theta) + (adversarial - 1) * q1 + (clean - 1) * q2) / (clean * adversarial)
        return abs(auc - theta) <= _Z * math.sqrt(max(variance, 0.0))

    return _furthest(fits, auc, 0.0), _furthest(fits, auc, 1.0)


def _furthest(fits: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last point from `inside` towards `outside` that fits."""
    if fits(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside


def _checked(scores: Tensor) -> Tensor:
    if scores.dim() != 1 or not len(scores):
        raise InputError(f"scores must be (N,), at least one; got {tuple(scores.shape)}")
    return scores.detach().double().cpu().contiguous()


def _share_from(cuts: Tensor, scores: Tensor) -> Tensor:
    """The share of scores that reach each cut."""
    return (len(scores) - torch.searchsorted(scores.sort().values, cuts, right=False)).double() / len(scores)
