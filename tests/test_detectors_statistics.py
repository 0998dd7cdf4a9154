"""Logistic regression, what logits tell, and the detectors that are no densities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax, xlogy
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.detectors import (
    Detector,
    DropoutUncertainty,
    Energy,
    Entropy,
    LogitMargin,
    MaxProbability,
    SubsetScan,
    TailVariance,
)
from saddlepoint.detectors.regression import logistic_regression
from saddlepoint.detectors.uncertainty import dropout_on
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.reproduce.detection_statistics import _kinds, with_dropout


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


# ---- tail variance


def gradient_checks(detector: Detector, x: Tensor) -> bool:
    return torch.autograd.gradcheck(detector.forward, x.clone().requires_grad_())


def test_tail_variance_is_that_of_whitened_coefficients() -> None:
    """Against scikit-learn's PCA where no component is floored."""
    mixed = normal(8, 8, seed=5)
    model = sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double(), bounds=None)
    x, new = (normal(count, 8, seed=seed) @ mixed + 3 for count, seed in ((500, 0), (20, 1)))
    shape = (-1, 2, 2, 2)
    detector = TailVariance(start=5, floor=1e-12).fit(model, x.reshape(shape))
    z = PCA(whiten=True).fit(x).transform(new)[:, 5:] * np.sqrt(500 / 499)  # scikit-learn divides by n - 1
    np.testing.assert_allclose(detector.score(new.reshape(shape)), z.var(1), rtol=1e-7)
    assert gradient_checks(detector, new[:3].reshape(shape))
    by_share = TailVariance(start=0.7, floor=1e-12).fit(model, x.reshape(shape))
    assert torch.equal(by_share.score(new.reshape(shape)), detector.score(new.reshape(shape)))


def test_tail_variance_of_constant_features() -> None:
    """Of four features one is constant: moving it counts by the floor; samples fewer than features do no harm."""
    model = sp.Model(nn.Linear(4, 3), bounds=None)
    x = normal(400, 4, dtype=torch.float32) * torch.tensor([3.0, 2.0, 1.0, 0.0])
    for floor in (1e-2, 1e-4):
        detector = TailVariance(start=2, floor=floor).fit(model, x)
        moved = torch.zeros(1, 4)
        moved[0, 3] = 1.0
        unit = float(floor * x.double().var(0, correction=0).mean()) ** -0.5
        known = (moved[0] - x.mean(0)) @ detector.arrays["whiten"]
        assert float(known.abs().max()) == pytest.approx(unit, rel=0.05)
        assert float(detector.score(moved)) == pytest.approx((unit / 2) ** 2, rel=0.1)
    for few in (x[:3], x[:1].repeat(5, 1)):
        scores = TailVariance(start=2).fit(model, few).score(1e4 * x)
        assert scores.isfinite().all()


def test_tail_variance_detects() -> None:
    data = sp.data.load("digits")
    net = sp.zoo.build("digits-cnn")
    detector = TailVariance().fit(sp.Model(net), data.train)
    x = data.test.x[:200]
    moved = (x + 0.05 * torch.where(normal(*x.shape) > 0, 1.0, -1.0)).clamp(0, 1)
    scores = torch.cat([detector.score(x), detector.score(moved)])
    assert roc_auc_score([0] * 200 + [1] * 200, scores) > 0.9


def test_tail_variance_refuses() -> None:
    x = normal(5, 8, dtype=torch.float32)
    model = sp.Model(nn.Linear(8, 3), bounds=None)
    for settings in ({"start": 1.5}, {"start": -0.1}, {"start": float("nan")}, {"floor": 0.0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            TailVariance(**settings)
    for start in (7, 700, 0.99):
        with pytest.raises(InputError, match="8 features"):
            TailVariance(start=start).fit(model, x)
    with pytest.raises(InputError, match="16,385 features"):
        TailVariance().fit(sp.Model(lambda z: z[:, :3], bounds=None), torch.zeros(2, 2**14 + 1))


# ---- what logits tell


def test_statistics_of_logits() -> None:
    model = sp.Model(nn.Identity(), bounds=None)
    z = torch.cat([3 * normal(9, 4), torch.tensor([[0.0, 0, 0, 0], [800.0, 0, 0, -800], [1e30, 0, -1e30, 1]])])
    p = softmax(z, axis=1)
    for detector, expected in (
        (MaxProbability(), -p.max(1)),
        (Entropy(), entropy(p, axis=1)),
        (LogitMargin(), np.sort(z, 1)[:, -2] - np.sort(z, 1)[:, -1]),
        (Energy(), -logsumexp(z, axis=1)),
        (Energy(temperature=10.0), -10 * logsumexp(z / 10, axis=1)),
    ):
        detector.fit(model, z)
        np.testing.assert_allclose(detector.score(z), expected, rtol=1e-9, atol=1e-12)
        assert gradient_checks(detector, z[:9])
        low = z.float().requires_grad_()
        (gradient,) = torch.autograd.grad(detector.forward(low).sum(), low)
        assert gradient.isfinite().all()
        with pytest.raises(CapabilityError):
            type(detector)().fit(sp.Model(nn.Identity(), bounds=None, access=sp.Access.LABELS), z.float())
    for temperature in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="temperature"):
            Energy(temperature=temperature)


# ---- subset scanning


@pytest.mark.parametrize("statistic", ["berk-jones", "higher-criticism"])
@pytest.mark.parametrize("tail", ["upper", "lower", "both"])
def test_scan_is_the_best_of_all_subsets(statistic: str, tail: str) -> None:
    """Over every subset of 6 units and every alpha that a p-value can be, with counts by hand; ties included."""
    model = sp.Model(nn.Sequential(nn.Identity(), nn.Linear(6, 3)).double(), bounds=None)
    clean, new = (normal(count, 6, seed=seed).mul(4).round() for count, seed in ((30, 0), (8, 1)))
    detector = SubsetScan(layer="0", statistic=statistic, tail=tail).fit(model, clean)
    for row, score in zip(new, detector.score(new), strict=True):
        upper, lower = ((1 + extreme.sum(0).double()) / 31 for extreme in (clean >= row, clean <= row))
        p = {"upper": upper, "lower": lower, "both": (2 * torch.minimum(upper, lower)).clamp(max=1)}[tail].numpy()
        best = 0.0
        for subset in itertools.product([False, True], repeat=6):
            for alpha in p[(p <= 0.5)]:
                n, hits = sum(subset), (p[list(subset)] <= alpha).sum()
                if n and hits / n > alpha:
                    share = hits / n
                    kl = xlogy(share, share / alpha) + xlogy(1 - share, (1 - share) / (1 - alpha))
                    criticism = (hits - n * alpha) / np.sqrt(n * alpha * (1 - alpha))
                    best = max(best, n * kl if statistic == "berk-jones" else criticism)
        assert float(score) == pytest.approx(best, rel=1e-9)


def test_scan_of_units_that_are_always_zero() -> None:
    """They say nothing while they stay so, and everything once they don't."""
    model = sp.Model(nn.Sequential(nn.Identity(), nn.Linear(3, 3)), bounds=None)
    detector = SubsetScan(layer="0", samples=99, statistic="berk-jones", tail="upper")
    detector.fit(model, torch.zeros(300, 3))
    assert detector.arrays["sorted.0"].shape == (3, 99)
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 1], [-1, -1, -1]])
    torch.testing.assert_close(detector.score(x), torch.tensor([0, 1, 2, 0]) * float(np.log(100)))


def test_scan_refuses() -> None:
    for settings in ({"statistic": "median"}, {"tail": "left"}, {"largest_alpha": 1.0}, {"samples": 0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            SubsetScan(**settings)


# ---- the entries of reproduce, which run in test_reproduce.py


def test_noise_is_of_the_size_of_the_perturbation() -> None:
    clean = torch.full((50, 1, 8, 8), 0.5)
    adversarial = clean + 0.1 * normal(*clean.shape, dtype=torch.float32).sign()
    _, noisy, same = _kinds(clean, adversarial, seed=0)
    assert torch.equal(same, adversarial)
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
def test_the_network_with_dropout(shape: tuple[int, ...]) -> None:
    net = with_dropout(shape, 10)
    assert net(torch.zeros(2, *shape)).shape == (2, 10)
    assert isinstance(net[-2], nn.Dropout)
