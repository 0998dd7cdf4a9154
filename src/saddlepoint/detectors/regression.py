"""Logistic regression by Newton's method, for detectors that weigh several scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from saddlepoint.errors import InputError

_STEPS, _HALVINGS, _CONVERGED = 100, 30, 1e-10


class Logistic(NamedTuple):
    """P(true | f) = sigmoid(w . (f - mean) / std + b): weights, mean and std (F,), bias ()."""

    weights: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def log_odds(self, features: Tensor) -> Tensor:
        """w . (f - mean) / std + b of features (N, F), (N,), differentiable."""
        return (features - self.mean) / self.std @ self.weights + self.bias


def logistic_regression(features: Tensor, target: Tensor, l2: float = 1.0) -> Logistic:
    """The weights that tell target (N,) true from false by features (N, F), columns standardised first.

        min over w, b of  sum_i log(1 + exp(-s_i (w . z_i + b))) + l2 / 2 |w|^2,  s_i = 1 where true, else -1

    z are the columns less their mean, over their standard deviation; constant columns are 0. Newton's method with halved steps
    in float64; what is returned has the dtype of the features. With l2 = 1 it is scikit-learn's default.
    Errors: `InputError` where features aren't finite, or only one of the two kinds is there.

    >>> import torch
    >>> found = logistic_regression(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([False, False, True, True]))
    >>> (found.log_odds(torch.tensor([[1.4], [1.6]])) > 0).tolist()
    [False, True]
    """
    if features.dim() != 2 or target.shape != (len(features),):
        raise InputError(f"needed are features (N, F) and target (N,); got {tuple(features.shape)}, {tuple(target.shape)}")
    if l2 <= 0:
        raise InputError(f"l2 must be positive; got {l2}")
    target = target.bool()
    if bool(target.all()) or not bool(target.any()):
        raise InputError("logistic regression needs samples of both kinds; all of these are of one")
    if not bool(features.isfinite().all()):
        raise InputError(f"{int((~features.isfinite()).sum())} of the features for logistic regression are not finite")
    wide = features.detach().double()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, 1.0)
    z = torch.cat([(wide - mean) / std, torch.ones_like(wide[:, :1])], 1)
    penalty = torch.full_like(z[0], l2)
    penalty[-1] = 0
    sign = torch.where(target, 1.0, -1.0).to(z)

    def loss(w: Tensor) -> Tensor:
        return softplus(-sign * (z @ w)).sum() + (penalty * w * w).sum() / 2

    w = torch.zeros_like(penalty)
    for _ in range(_STEPS):
        p = (z @ w).sigmoid()
        gradient = z.T @ (p - target.to(z)) + penalty * w
        curvature = (z * (p * (1 - p))[:, None]).T @ z + torch.diag(penalty.clamp(min=1e-9))
        step = torch.linalg.solve(curvature, gradient)
        before, decrease = loss(w), gradient @ step
        if decrease <= _CONVERGED * (1 + before):
            break
        for halving in range(_HALVINGS):
            if loss(w - step / 2**halving) <= before - decrease / 2**halving / 4:
                break
        w = w - step / 2**halving
    return Logistic(*(found.to(features.dtype) for found in (w[:-1], w[-1], mean, std)))
