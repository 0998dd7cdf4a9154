"""Feature squeezing, and what else asks whether a change of the input changes the prediction."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from scipy.special import log_softmax, softmax

import saddlepoint as sp
from saddlepoint.defenses.transforms import BitDepth, Gaussian, GaussianNoise, Median
from saddlepoint.detectors import roc_auc
from saddlepoint.detectors.squeezing import change
from saddlepoint.errors import InputError, UnknownNameError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:200], DIGITS.test.y[:200]


@pytest.fixture(scope="module")
def model() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def examples(model) -> torch.Tensor:
    """Just across the boundary."""
    result = sp.attack(
        model,
        X[:60],
        Y[:60],
        sp.attacks.CarliniWagnerL2(steps=40, searches=3, initial_c=1.0, learning_rate=0.05),
        sp.Minimize("l2"),
    )
    return result.adversarial[result.success]


def smooth(dtype=torch.float64) -> sp.Model:
    """Without ReLU, for finite differences."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).to(dtype)
    return sp.Model(net)


def differences(logits, others, norm):
    p, q = softmax(logits.double().numpy(), 1), softmax(others.double().numpy(), 1)
    if norm == "kl":
        return (p * (log_softmax(logits.double().numpy(), 1) - log_softmax(others.double().numpy(), 1))).sum(1)
    return np.abs(p - q).sum(1) if norm == "l1" else np.sqrt(((p - q) ** 2).sum(1))


@pytest.mark.parametrize("norm", ["l1", "l2", "kl"])
def test_the_change_of_probabilities_is_that_of_the_formula(norm):
    logits, others = 5 * torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(change(logits, others, norm).numpy(), differences(logits, others, norm), rtol=1e-10)
    far = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert torch.isfinite(change(*far, norm)).all()


@pytest.mark.parametrize("norm", ["l1", "l2", "kl"])
def test_no_change_has_a_finite_gradient(norm):
    logits = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(change(logits, logits.detach().clone(), norm).sum(), logits)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("joint", ["max", "mean"])
@pytest.mark.parametrize("norm", ["l1", "kl"])
def test_squeezing_joins_the_changes_by_bit_depth_and_median_as_the_paper_has_it(model, norm, joint):
    detector = sp.detectors.FeatureSqueezing(norm=norm, joint=joint).fit(model, DIGITS.train)
    rounded = torch.from_numpy(np.round(X.numpy()))
    median = torch.from_numpy(median_filter(X.numpy(), size=(1, 1, 2, 2), mode="reflect"))
    each = [differences(model.logits(X), model.logits(other), norm) for other in (rounded, median)]
    expected = np.max(each, 0) if joint == "max" else np.mean(each, 0)
    np.testing.assert_allclose(detector.score(X).numpy(), expected, atol=1e-5)


def test_what_is_coarse_already_scores_nothing(model):
    detector = sp.detectors.FeatureSqueezing(squeezers=(BitDepth(1),)).fit(model, DIGITS.train)
    assert float(detector.score(X.round()).abs().max()) == 0
    assert float(detector.score(X).abs().max()) > 0.1


def test_defaults_are_the_papers_for_colours_and_bit_depth_for_what_is_no_image():
    colours = sp.Model(lambda x: torch.stack([x.sum((1, 2, 3)), x.square().sum((1, 2, 3))], 1))
    x = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    papers = sp.detectors.FeatureSqueezing(squeezers=(BitDepth(5), Median(2), sp.transforms.NonLocalMeans(13, 3, 2 / 255))).fit(
        colours, x
    )
    torch.testing.assert_close(sp.detectors.FeatureSqueezing().fit(colours, x).score(x), papers.score(x))
    rows = sp.Model(lambda x: torch.stack([x.sum(1), x.square().sum(1)], 1))
    assert sp.detectors.FeatureSqueezing().fit(rows, x.flatten(1)).score(x.flatten(1)).shape == (4,)


def test_its_gradient_is_right_where_the_squeezer_is_smooth_and_bpda_elsewhere():
    model, x = smooth(), X[:3].double()
    exact = sp.detectors.FeatureSqueezing(squeezers=(Gaussian(1.0),), norm="kl").fit(model, X[:9].double())
    assert torch.autograd.gradcheck(exact.forward, x.clone().requires_grad_())
    rounding = sp.detectors.FeatureSqueezing(squeezers=(BitDepth(1),)).fit(model, X[:9].double())
    point = x.clone().requires_grad_()
    (through,) = torch.autograd.grad(rounding.forward(point).sum(), point)
    point = x.clone().requires_grad_()
    coarse = point + (x.round() - x)  # the identity's gradient, at the rounded value
    expected = (model.forward(point).softmax(1) - model.forward(coarse).softmax(1)).abs().sum()
    (wanted,) = torch.autograd.grad(expected, point)
    torch.testing.assert_close(through, wanted)


def test_it_is_random_only_where_a_squeezer_is(model):
    assert not sp.detectors.FeatureSqueezing().random
    assert not sp.detectors.FeatureSqueezing(squeezers=(Median(2),)).random
    noisy = sp.detectors.FeatureSqueezing(squeezers=(Median(2), GaussianNoise(0.1)))
    assert noisy.random
    noisy.fit(model, DIGITS.train).calibrate(X)
    assert sp.Guarded(model, noisy).draws > 1


def test_the_adaptive_choice_takes_what_separates_and_as_few_as_that_takes(model, examples):
    useless, useful = Median(1), BitDepth(3)
    detector = sp.detectors.AdaptiveSqueezing(candidates=(useless, useful)).fit(model, X[100:], examples)
    assert detector.chosen == (useful,)
    fixed = sp.detectors.FeatureSqueezing(squeezers=(useful,)).fit(model, DIGITS.train)
    torch.testing.assert_close(detector.score(X), fixed.score(X))


def test_the_adaptive_choice_is_the_best_of_all_sets(model, examples):
    candidates = (BitDepth(1), BitDepth(2), Median(2), Median(3))
    detector = sp.detectors.AdaptiveSqueezing(candidates=candidates, most=2).fit(model, X[100:], examples)
    found = roc_auc(detector.score(X[100:]), detector.score(examples))
    for first in candidates:
        for second in candidates:
            other = sp.detectors.FeatureSqueezing(squeezers=(first, second)).fit(model, X[100:])
            assert found >= roc_auc(other.score(X[100:]), other.score(examples))


def test_bad_settings_are_refused(model):
    for settings in ({"squeezers": ()}, {"squeezers": (lambda x: x,)}, {"norm": "l3"}, {"joint": "min"}):
        with pytest.raises(InputError):
            sp.detectors.FeatureSqueezing(**settings)
    for settings in ({"candidates": ()}, {"most": 0}):
        with pytest.raises(InputError):
            sp.detectors.AdaptiveSqueezing(**settings)
    for settings in ({"sigma": 0}, {"sigma": float("nan")}, {"draws": 0}, {"norm": "l3"}):
        with pytest.raises(InputError):
            sp.detectors.NoiseConsistency(**settings)
    with pytest.raises(UnknownNameError):
        sp.detectors.RotationConsistency(norm="l3")
    for settings in ({"degrees": (), "pixels": 0}, {"pixels": -1}, {"degrees": (float("inf"),)}):
        with pytest.raises(InputError):
            sp.detectors.RotationConsistency(**settings)
    with pytest.raises(InputError, match="images"):
        sp.detectors.RotationConsistency().fit(smooth(torch.float32), X.flatten(1))


@pytest.mark.parametrize("norm", ["l1", "kl"])
def test_noise_consistency_is_the_mean_change_over_its_draws(model, norm):
    detector = sp.detectors.NoiseConsistency(sigma=0.2, draws=5, norm=norm).fit(model, DIGITS.train)
    noise = detector.arrays["noise"]
    assert noise.shape == (5, 1, 8, 8)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.15)
    logits = model.logits(X)
    with torch.no_grad():
        expected = np.mean([differences(logits, model.forward(X + one), norm) for one in noise], 0)
    np.testing.assert_allclose(detector.score(X).numpy(), expected, atol=1e-5)
    assert not torch.equal(sp.detectors.NoiseConsistency(sigma=0.2, draws=5, seed=1).fit(model, X).arrays["noise"], noise)
    of_rows = sp.detectors.NoiseConsistency().fit(smooth(torch.float32), X.flatten(1))
    with pytest.raises(InputError, match="shape"):
        of_rows.score(X)


def test_log_odds_are_standardised_by_the_predicted_class_and_its_rival(model):
    detector = sp.detectors.LogOdds(sigma=0.3, draws=4).fit(model, DIGITS.train)
    clean = DIGITS.train.x
    with torch.no_grad():
        z = model.forward(clean).double().numpy()
        shifted = np.mean([model.forward(clean + one).double().numpy() for one in detector.arrays["noise"]], 0)
    k = z.argmax(1)
    rows = np.arange(len(k))
    g = (shifted - shifted[rows, k][:, None]) - (z - z[rows, k][:, None])
    worst = np.full(len(k), -np.inf)
    for own in range(10):
        for rival in set(range(10)) - {own}:
            members = g[k == own, rival]
            unusual = (members - members.mean()) / members.std(ddof=1)
            worst[k == own] = np.maximum(worst[k == own], unusual)
    np.testing.assert_allclose(detector.score(clean).numpy(), worst, atol=2e-3)


def test_log_odds_of_classes_without_samples_are_finite(model):
    few = DIGITS.train.x[DIGITS.train.y < 3]
    detector = sp.detectors.LogOdds(draws=2).fit(model, few)
    assert torch.isfinite(detector.score(X)).all()
    assert torch.isfinite(detector.score((X + torch.rand(X.shape)).clamp(0, 1))).all()


def test_a_shift_by_a_pixel_and_a_quarter_turn_are_those_of_torch(model):
    shifts = sp.detectors.RotationConsistency(degrees=(), pixels=1)._moved(X)
    for moved, (dim, by) in zip(shifts, [(3, -1), (3, 1), (2, -1), (2, 1)], strict=True):
        inner = (..., slice(1, -1), slice(1, -1))
        torch.testing.assert_close(moved[inner], X.roll(by, dim)[inner], atol=1e-5, rtol=0)
    (turned,) = sp.detectors.RotationConsistency(degrees=(90,), pixels=0)._moved(X)
    torch.testing.assert_close(turned, X.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_a_rotation_keeps_circles_where_images_are_no_squares():
    y, x = torch.meshgrid(torch.arange(20.0) - 9.5, torch.arange(40.0) - 19.5, indexing="ij")
    disc = torch.sigmoid(6 - (x.square() + y.square()).sqrt())[None, None]
    (turned,) = sp.detectors.RotationConsistency(degrees=(30,), pixels=0)._moved(disc)
    torch.testing.assert_close(turned, disc, atol=0.05, rtol=0)


def test_rotation_consistency_is_the_mean_change(model):
    detector = sp.detectors.RotationConsistency(degrees=(-5, 5)).fit(model, DIGITS.train)
    moved = detector._moved(X)
    assert len(moved) == 6
    expected = np.mean([differences(model.logits(X), model.logits(other.clamp(0, 1)), "l1") for other in moved], 0)
    np.testing.assert_allclose(detector.score(X).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "detector",
    [
        sp.detectors.NoiseConsistency(draws=3, norm="kl"),
        sp.detectors.LogOdds(draws=3),
        sp.detectors.RotationConsistency(norm="kl"),
    ],
    ids=lambda detector: detector.name,
)
def test_gradients_are_those_of_finite_differences(detector):
    detector.fit(smooth(), DIGITS.train.x.double())
    x = (0.1 + 0.8 * X[:3].double()).requires_grad_()
    assert torch.autograd.gradcheck(detector.forward, x)


@pytest.mark.parametrize(
    ("detector", "least"),
    [
        (sp.detectors.FeatureSqueezing(squeezers=(BitDepth(3),)), 0.85),
        (sp.detectors.NoiseConsistency(sigma=0.1), 0.85),
        (sp.detectors.RotationConsistency(degrees=(-10, 10), pixels=0.5), 0.7),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_examples_across_the_boundary_are_detected(model, examples, detector, least):
    detector.fit(model, DIGITS.train)
    assert roc_auc(detector.score(X), detector.score(examples)) > least
