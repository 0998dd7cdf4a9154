"""Logistic regression, what logits tell, and the detectors that are no densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from saddlepoint.detectors.regression import logistic_regression
from saddlepoint.errors import InputError

# ---- logistic regression


@pytest.mark.parametrize("shift", [0.5, 50.0])  # overlapping, and separable
def test_logistic_regression_is_scikit_learns(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(300) % 3 == 0
    features = torch.randn(300, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e4, 1e-4, 1.0])
    features[:, 3] = 7.0  # says nothing
    features[:, 0] += shift * target
    found = logistic_regression(features, target, l2=2.0)
    scaled = ((features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-9)).numpy()
    known = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(scaled, target.numpy())
    np.testing.assert_allclose(found.log_odds(features), known.decision_function(scaled), atol=1e-4)
    assert found.weights[3] == 0
    weights, bias, mean, std = found
    torch.testing.assert_close((features - mean) / std @ weights + bias, found.log_odds(features))


def test_logistic_regression_refuses() -> None:
    features, target = torch.zeros(4, 2), torch.tensor([True, False, True, False])
    with pytest.raises(InputError, match="both kinds"):
        logistic_regression(features, torch.ones(4))
    with pytest.raises(InputError, match="not finite"):
        logistic_regression(features / 0, target)
    with pytest.raises(InputError, match="features"):
        logistic_regression(features, target[:3])
    with pytest.raises(InputError, match="l2"):
        logistic_regression(features, target, l2=0)
