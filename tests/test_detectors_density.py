"""Densities and distances in hidden layers, against the papers' equations written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity as Independent
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks import FGSM, CarliniWagnerL2
from saddlepoint.detectors import (
    LAST,
    Detector,
    DropoutUncertainty,
    Energy,
    Entropy,
    KernelDensity,
    LocalIntrinsicDimensionality,
    LogitMargin,
    Mahalanobis,
    MaxProbability,
    SubsetScan,
)
from saddlepoint.detectors.density import at_most, likeliest_bandwidth
from saddlepoint.detectors.layers import squared_distances
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")


@pytest.fixture(scope="module")
def trained() -> sp.Model:
    net = sp.zoo.build("digits-cnn")
    return sp.train(sp.Model(net), DIGITS.train, epochs=8).model


@pytest.fixture(scope="module")
def examples(trained: sp.Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Successful examples beside their clean images."""
    x, y = DIGITS.test.x[:150], DIGITS.test.y[:150]
    found = {}
    for name, method, threat in (
        ("fgsm", FGSM(), sp.Linf(0.2)),
        ("carlini-wagner", CarliniWagnerL2(steps=40, searches=3, initial_c=1.0, learning_rate=0.05), sp.threats.Minimize("l2")),
    ):
        result = sp.attack(trained, x, y, method, threat)
        found[name] = (x[result.success], result.adversarial[result.success])
    return found


def area(detector: Detector, pair: tuple[Tensor, Tensor]) -> float:
    clean, adversarial = (detector.score(x) for x in pair)
    return float(roc_auc_score([0] * len(clean) + [1] * len(adversarial), torch.cat([clean, adversarial])))


def linear(classes: int = 3, dtype: torch.dtype = torch.float64) -> sp.Model:
    """A layer of 4 units, then 3 classes."""
    torch.manual_seed(1)
    return sp.Model(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).to(dtype), bounds=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def phi(model: sp.Model, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.net[:2](x).numpy()


def differentiable(detector: Detector, x: Tensor) -> bool:
    return torch.autograd.gradcheck(detector.forward, x.clone().requires_grad_(), eps=1e-6, atol=1e-6)


# ---- kernel density


def test_squared_distances() -> None:
    a, b = normal(6, 7) + 100, normal(9, 7, seed=1) + 100
    b[0] = a[0]
    expected = ((a[:, None] - b) ** 2).sum(2)
    torch.testing.assert_close(squared_distances(a, b), expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(squared_distances(a.float(), b.float()), expected.float(), atol=1e-4, rtol=1e-4)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(squared_distances(a, b)[0, 0], a)
    assert gradient.abs().max() < 1e-12


def test_density_is_scikit_learns_per_predicted_class() -> None:
    model, x, new = linear(), normal(60, 5), 5 * normal(40, 5, seed=1)
    y = torch.arange(60) % 2  # nobody is of class 2
    detector = KernelDensity(bandwidth=0.3).fit(model, (x, y))
    predicted = model.predict(new)
    assert set(predicted.tolist()) == {0, 1, 2}
    parts = [phi(model, x[y == 0]), phi(model, x[y == 1]), phi(model, x)]
    known = [Independent(bandwidth=0.3).fit(part).score_samples(phi(model, new)) for part in parts]
    expected = -np.stack(known)[predicted.numpy(), np.arange(40)]
    np.testing.assert_allclose(detector.score(new), expected, rtol=1e-9)
    assert differentiable(detector, new[:4])
    named = KernelDensity(bandwidth=0.3, layer="1").fit(model, (x, y))
    torch.testing.assert_close(named.score(new), detector.score(new))


def test_bandwidth_is_the_likeliest_of_points_left_out() -> None:
    points, labels = normal(80, 2), torch.arange(80) % 3
    points[labels == 1] += 9
    found = float(likeliest_bandwidth(points, labels))

    def likelihood(h: float) -> float:
        total = 0.0
        for i in range(80):
            others = (labels == labels[i]) & (torch.arange(80) != i)
            total += Independent(bandwidth=h).fit(points[others].numpy()).score_samples(points[i : i + 1].numpy())[0]
        return total

    assert likelihood(found) > max(likelihood(found / 1.3), likelihood(found * 1.3))


@pytest.mark.parametrize("points", [torch.zeros(6, 3), torch.eye(3).repeat(2, 1), torch.eye(6)])
def test_bandwidth_of_few_and_of_equal_points(points: Tensor) -> None:
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        assert 0 < float(likeliest_bandwidth(points, labels)) < np.inf


def test_at_most() -> None:
    labels = torch.tensor([3, 1, 1, 3, 3, 0, 3])
    torch.manual_seed(0)
    kept = at_most(labels, 2)
    assert sorted(labels[kept].tolist()) == [0, 1, 1, 3, 3]
    assert len(set(kept.tolist())) == 5
    draws = {tuple(sorted(at_most(labels, 2).tolist())) for _ in range(20)}
    assert len(draws) > 1


def test_density_far_away_is_finite_with_gradients() -> None:
    model = sp.Model(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), bounds=None)
    detector = KernelDensity(samples=10).fit(model, normal(60, 5, dtype=torch.float32))
    assert detector.arrays["points"].shape[0] <= 30
    far = (1e4 * normal(8, 5, seed=1, dtype=torch.float32)).requires_grad_()
    scores = detector.forward(far)
    (gradient,) = torch.autograd.grad(scores.sum(), far)
    assert scores.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().amax(1).min() > 0


def test_density_detects(trained: sp.Model, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector = KernelDensity().fit(trained, DIGITS.train)
    assert area(detector, examples["fgsm"]) > 0.75
    assert area(detector, examples["carlini-wagner"]) > 0.85


def test_density_refuses() -> None:
    for settings in ({"bandwidth": 0.0}, {"bandwidth": float("nan")}, {"samples": 0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            KernelDensity(**settings)
    with pytest.raises(InputError, match="no network"):
        KernelDensity().fit(sp.Model(lambda x: x @ torch.ones(5, 3), bounds=None), normal(10, 5, dtype=torch.float32))
    assert KernelDensity().layer == LAST


# ---- Mahalanobis


def images(count: int, seed: int = 0) -> Tensor:
    return normal(count, 1, 8, 8, seed=seed).sigmoid()


def wide_cnn() -> sp.Model:
    return sp.Model(sp.zoo.build("digits-cnn").double())


def test_mahalanobis_is_the_papers() -> None:
    """With a ridge that hardly counts, against scikit-learn's covariance of the samples less their class means."""
    model, x, new = wide_cnn(), images(300), images(20, seed=1)
    y = torch.arange(300) % 3 + 4  # most classes have no sample
    detector = Mahalanobis(layers=("1", "3"), ridge=1e-13).fit(model, (x, y))
    expected = np.zeros(20)
    for layer in ("1", "3"):
        with torch.no_grad():
            f, g = (model.features(part, layer).mean((2, 3)).numpy() for part in (x, new))
        means = np.stack([f[y == c].mean(0) for c in (4, 5, 6)])
        shared = EmpiricalCovariance(assume_centered=True).fit(f - means[y - 4])
        known, ours = (np.min([shared.mahalanobis(part - mean) for mean in means], 0) for part in (f, g))
        expected += (ours - known.mean()) / known.std()
    np.testing.assert_allclose(detector.score(new), expected, rtol=1e-6)
    assert differentiable(detector, new[:2])


def test_mahalanobis_of_constant_units_is_finite_and_sees_them_move() -> None:
    """The second of two units is always 0 on clean samples."""
    model = sp.Model(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), bounds=None)
    x = torch.stack([torch.arange(10.0), torch.zeros(10)], 1)
    detector = Mahalanobis(layers="0").fit(model, (x, torch.zeros(10, dtype=torch.int64)))
    scores = detector.score(torch.tensor([[4.5, 0.0], [4.5, 0.1], [0.0, 0.0], [1e6, 0.0]]))
    assert scores.isfinite().all()
    assert scores[0] < scores[1]
    assert scores[0] < scores[2] < scores[3]
    same = Mahalanobis(layers="0").fit(model, (torch.ones(10, 2), torch.zeros(10, dtype=torch.int64)))
    assert same.score(x).isfinite().all()


def test_mahalanobis_preprocessing_steps_towards_the_classes() -> None:
    model, x = wide_cnn(), images(100)
    plain, moved = (Mahalanobis(layers=("3",), step=step).fit(model, x) for step in (0.0, 1e-3))
    new = images(10, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(plain.forward(new).sum(), new)
    expected = plain.score((new - 1e-3 * gradient.sign()).clamp(0, 1).detach())
    torch.testing.assert_close(moved.score(new.detach()), expected)
    assert (expected < plain.score(new.detach())).all()
    (gradient,) = torch.autograd.grad(moved.forward(new).sum(), new)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_mahalanobis_detects(trained: sp.Model, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector = Mahalanobis().fit(trained, DIGITS.train)
    assert area(detector, examples["fgsm"]) > 0.9
    assert area(detector, examples["carlini-wagner"]) > 0.65


def test_mahalanobis_refuses() -> None:
    for settings, what in (
        ({"ridge": 0.0}, "ridge"), ({"step": -1.0}, "step"), ({"layers": ()}, "layers"), ({"layers": ("1", "1")}, "once"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            Mahalanobis(**settings)
    with pytest.raises(InputError, match="layer"):
        Mahalanobis(layers=("nine",)).fit(wide_cnn(), images(10))


# ---- local intrinsic dimensionality


def test_dimensionality_is_the_papers() -> None:
    model, x, new, bad = wide_cnn(), images(90), images(12, seed=1), images(40, seed=2) ** 2
    detector = LocalIntrinsicDimensionality(layers=("3", "1"), neighbours=7, samples=30).fit(model, x, bad)
    reference = detector.arrays["reference.1"]
    everything = model.features(x, "1").flatten(1)
    (used,) = (torch.cdist(everything, reference).argmin(0),)
    assert len(set(used.tolist())) == 30
    rest = [i for i in range(90) if i not in set(used.tolist())]

    def estimates(part: Tensor) -> np.ndarray:
        columns = []
        for layer in ("1", "3"):
            with torch.no_grad():
                f, g = (model.features(z, layer).flatten(1).numpy() for z in (part, x[used]))
            r = np.sort(np.linalg.norm(f[:, None] - g, axis=2), 1)[:, :7]
            columns.append(-1 / np.log(r / r[:, -1:]).mean(1))
        return np.stack(columns, 1)

    np.testing.assert_allclose(detector.dimensions(new, detector.arrays).detach(), estimates(new), rtol=1e-8)
    learnt = np.concatenate([estimates(x[rest]), estimates(bad)])
    mean, std = learnt.mean(0), learnt.std(0)
    known = LogisticRegression(tol=1e-10).fit((learnt - mean) / std, [0] * 60 + [1] * 40)
    np.testing.assert_allclose(detector.score(new), known.decision_function((estimates(new) - mean) / std), atol=1e-4)
    assert differentiable(detector, new[:2])


def test_dimensionality_is_that_of_the_space() -> None:
    """Points in a cube of d dimensions: the estimate at its centre is near d."""
    model = sp.Model(nn.Sequential(nn.Identity(), nn.Linear(6, 3)).double(), bounds=None)
    for d in (1, 3):
        x = torch.zeros(8000, 6, dtype=torch.float64)
        x[:, :d] = normal(8000, d).clamp(-3, 3)
        detector = LocalIntrinsicDimensionality(layers="0", neighbours=200, samples=4000).fit(model, x, x[:10] + 1)
        assert float(detector.dimensions(torch.zeros(1, 6).double(), detector.arrays)) == pytest.approx(d, rel=0.25)


def test_dimensionality_far_away_and_on_a_sample_is_finite(trained: sp.Model) -> None:
    x = DIGITS.train.x[:200]
    detector = LocalIntrinsicDimensionality().fit(trained, x, x[:50].flip(3))
    flat = torch.cat([x, torch.zeros_like(x[:2]), torch.ones_like(x[:2])]).requires_grad_()
    scores = detector.forward(flat)
    (gradient,) = torch.autograd.grad(scores.sum(), flat)
    assert scores.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(detector.score(x, batch_size=3), detector.score(x), rtol=1e-3, atol=1e-3)


def test_dimensionality_detects_what_it_has_learnt(trained: sp.Model, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    for clean, adversarial in examples.values():
        half = len(clean) // 2
        detector = LocalIntrinsicDimensionality(samples=400).fit(trained, DIGITS.train, adversarial[:half])
        assert area(detector, (clean[half:], adversarial[half:])) > 0.68


def test_dimensionality_refuses(trained: sp.Model) -> None:
    with pytest.raises(InputError, match="neighbours"):
        LocalIntrinsicDimensionality(neighbours=1)
    with pytest.raises(InputError, match="samples"):
        LocalIntrinsicDimensionality(samples=20)
    x = DIGITS.train.x
    with pytest.raises(InputError, match="at least 42"):
        LocalIntrinsicDimensionality().fit(trained, x[:41], x[50:60])
    with pytest.raises(InputError, match="adversarial"):
        LocalIntrinsicDimensionality().fit(trained, x[:100])


# ---- dropout, logits and subset scanning, of which test_detectors_statistics.py has the equations


def test_boundary_examples_look_unsure(trained: sp.Model, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Examples at the smallest distance have two classes level, and a mask decides which one wins."""
    *hidden, last = trained.net.children()
    dropped = sp.Model(nn.Sequential(*hidden, nn.Dropout(0.5), last))
    bounds = {MaxProbability(): 0.9, LogitMargin(): 0.9, Entropy(): 0.8, Energy(): 0.65, DropoutUncertainty(): 0.85}
    for detector, least in bounds.items():
        assert area(detector.fit(dropped, DIGITS.train), examples["carlini-wagner"]) > least


def test_scan_detects(trained: sp.Model, examples: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert area(SubsetScan().fit(trained, DIGITS.train), examples["fgsm"]) > 0.9
    assert area(SubsetScan(statistic="berk-jones", layer="0").fit(trained, DIGITS.train), examples["fgsm"]) > 0.6


def test_settings_in_text() -> None:
    """Modules of a plain sequence are named by numbers."""
    assert sp.detectors.make("kernel-density:layer=3,bandwidth=0.5").layer == "3"
    assert sp.detectors.make("subset-scan:layer=3,tail=upper").layer == "3"
    assert sp.detectors.make("mahalanobis:layers=3").layers == ("3",)
    assert sp.detectors.make("local-intrinsic-dimensionality:layers=conv1").layers == ("conv1",)
