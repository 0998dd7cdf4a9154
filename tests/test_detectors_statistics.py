"""Logistic regression, what logits tell, and the detectors that are no densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.detectors import DropoutUncertainty
from saddlepoint.detectors.regression import logistic_regression
from saddlepoint.detectors.uncertainty import dropout_on
from saddlepoint.errors import InputError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


# ---- dropout


class Dropped(nn.Module):
    """Batch normalisation and dropout, functional as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(5, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).tanh()))  # type: ignore[no-any-return]


def test_variance_over_dropout_masks() -> None:
    """A linear layer behind dropout on one unit: with p = 1/4 the logits are (4/3 a, 0) or (0, 0)."""
    net = nn.Sequential(nn.Dropout(0.25), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    detector = DropoutUncertainty(passes=20_000).fit(sp.Model(net, bounds=None), x)
    kept, dropped = torch.sigmoid(4 / 3 * x[:, 0]), 0.5
    expected = 2 * 0.25 * 0.75 * (kept - dropped) ** 2
    torch.testing.assert_close(detector.score(x), expected, rtol=0.03, atol=1e-12)


def test_only_dropout_is_on_and_only_inside() -> None:
    net = Dropped().train()
    model = sp.Model(net, bounds=None)
    x = normal(8, 5, dtype=torch.float32)
    statistics = net.norm.running_mean.clone()
    detector = DropoutUncertainty(passes=3).fit(model, x)
    with dropout_on(model):
        assert [name for name, module in net.named_modules() if module.training] == ["drop"]
        with pytest.raises(RuntimeError), dropout_on(model):
            raise RuntimeError
        assert net.drop.training
    with model.frozen():
        assert not torch.equal(detector.forward(x), detector.forward(x))
        assert not net.drop.training
        torch.testing.assert_close(model.forward(x), model.forward(x))
    assert all(module.training for module in net.modules())
    assert torch.equal(net.norm.running_mean, statistics)
    assert torch.equal(detector.score(x), detector.score(x))


def test_dropout_has_gradients() -> None:
    model, x = sp.Model(Dropped().double(), bounds=None), normal(3, 5)
    detector = DropoutUncertainty(passes=5).fit(model, x)

    def forward(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return detector.forward(z)

    assert torch.autograd.gradcheck(forward, x.requires_grad_())


def test_dropout_refuses() -> None:
    x = normal(8, 5, dtype=torch.float32)
    for net in (nn.Linear(5, 3), nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 3))):
        with pytest.raises(InputError, match="needs a network with dropout"):
            DropoutUncertainty().fit(sp.Model(net, bounds=None), x)
    with pytest.raises(InputError, match="passes"):
        DropoutUncertainty(passes=1)
