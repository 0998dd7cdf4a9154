"""Detectors that reconstruct: from what the classifier knows, or by an autoencoder."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.nn.functional import gelu

import saddlepoint as sp
from saddlepoint.detectors import roc_auc
from saddlepoint.errors import InputError, SaddlepointWarning

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:200], DIGITS.test.y[:200]
FEW = DIGITS.train.take(300)
SMALL = {"structure": (4,), "epochs": 12, "batch_size": 16, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def model() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def examples(model) -> torch.Tensor:
    result = sp.attack(model, X, Y, sp.attacks.PGD(steps=15), sp.Linf(0.25))
    return result.adversarial[result.success]


@pytest.fixture(scope="module")
def decoder(model) -> sp.detectors.LogitsDecoder:
    return sp.detectors.LogitsDecoder(epochs=10).fit(model, DIGITS.train)


@pytest.fixture(scope="module")
def by_class(model) -> sp.detectors.ClassReconstruction:
    return sp.detectors.ClassReconstruction(hidden=(64,), size=4).fit(model, DIGITS.train)


@pytest.fixture(scope="module")
def restoring(model) -> sp.detectors.ReconstructionError:
    return sp.detectors.ReconstructionError(**SMALL).fit(model, FEW)


@pytest.fixture(scope="module")
def diverging(model) -> sp.detectors.ReconstructionDivergence:
    return sp.detectors.ReconstructionDivergence(**SMALL, temperature=2.0).fit(model, FEW)


def rows(dtype=torch.float64) -> sp.Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sp.Model(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).to(dtype))


@pytest.mark.parametrize(("name", "least"), [("decoder", 0.75), ("by_class", 0.8), ("restoring", 0.9), ("diverging", 0.85)])
def test_examples_are_detected(request, name, least, examples):
    detector = request.getfixturevalue(name)
    assert roc_auc(detector.score(X), detector.score(examples)) > least


def learnt(detector) -> dict[str, torch.Tensor]:
    return {name.removeprefix("network."): array for name, array in detector.arrays.items()}


def test_logits_and_hidden_layer_are_decoded_through_the_bottleneck(model, decoder):
    a = learnt(decoder)
    logits, (hidden,) = sp.detectors.activations(model, X)
    known = (torch.cat([logits, hidden], 1) - a["0.mean"]) / a["0.std"]
    assert [tuple(a[f"{layer}.weight"].shape) for layer in (2, 4, 6)] == [(10, known.shape[1]), (256, 10), (64, 256)]
    for layer in (2, 4, 6):
        known = known @ a[f"{layer}.weight"].T + a[f"{layer}.bias"]
        known = gelu(known) if layer < 6 else known
    expected = (X.flatten(1) - known).abs().mean(1).detach()
    torch.testing.assert_close(decoder.score(X), expected, atol=1e-5, rtol=1e-4)


def test_it_has_learnt_to_decode(decoder):
    """Better than the mean image, which knows of no class."""
    assert float(decoder.score(X).mean()) < 0.75 * float((X - DIGITS.train.x.mean(0)).abs().mean())


def test_only_the_predicted_classs_code_is_decoded(model, by_class):
    a = learnt(by_class)
    logits, (hidden,) = sp.detectors.activations(model, X)
    code = ((hidden - a["scale.mean"]) / a["scale.std"]) @ a["code.weight"].T + a["code.bias"]
    code, k = code.detach().numpy().reshape(-1, 10, 4).copy(), logits.argmax(1).numpy()
    for row, own in zip(code, k, strict=True):
        row[np.arange(10) != own] = 0
    h = gelu(torch.from_numpy(code.reshape(-1, 40)) @ a["decoder.2.weight"].T + a["decoder.2.bias"])
    expected = (X.flatten(1) - (h @ a["decoder.4.weight"].T + a["decoder.4.bias"])).square().mean(1)
    torch.testing.assert_close(by_class.score(X), expected, atol=1e-5, rtol=1e-4)


def test_decoded_as_another_class_it_is_farther_away(model, by_class):
    _, (hidden,) = sp.detectors.activations(model, X)
    with torch.no_grad():
        own, other = (by_class._error(X, by_class.network(hidden, (Y + shift) % 10)).mean() for shift in (0, 1))
    assert float(other) > 1.5 * float(own)


def test_classes_without_a_sample_have_finite_scores(model):
    few = FEW.x[FEW.y < 3]
    detector = sp.detectors.ClassReconstruction(hidden=(16,), epochs=1).fit(model, few)
    assert torch.isfinite(detector.score(X)).all()


@pytest.mark.parametrize("p", [1, 2])
def test_the_reconstruction_error_is_the_mean_of_powers(model, restoring, p):
    detector = sp.detectors.ReconstructionError(**SMALL, p=p).fit(model, FEW)
    torch.testing.assert_close(detector.arrays, restoring.arrays)
    with torch.no_grad():
        away = (X - detector.autoencoder(X)).double().abs().numpy()
    np.testing.assert_allclose(detector.score(X).numpy(), (away**p).mean((1, 2, 3)), rtol=1e-4)


def test_the_divergence_is_that_of_jensen_and_shannon(model, diverging):
    with torch.no_grad():
        p, q = ((model.forward(x).double() / 2).softmax(1).numpy() for x in (X, diverging.autoencoder(X)))
    np.testing.assert_allclose(diverging.score(X).numpy(), jensenshannon(p, q, axis=1) ** 2, atol=1e-5)


@pytest.mark.parametrize("kind", [sp.detectors.ReconstructionError, sp.detectors.ReconstructionDivergence])
def test_inputs_of_another_range_score_the_same(model, kind):
    """A model of inputs in [-1, 1] that does what the other does in [0, 1]."""
    shifted = sp.Model(nn.Sequential(Halved(), model.net), bounds=(-1.0, 1.0))
    expected = kind(**SMALL).fit(model, FEW).score(X)
    found = kind(**SMALL).fit(shifted, 2 * FEW.x - 1).score(2 * X - 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) / 2


def test_its_autoencoder_is_a_reformer_too(model, restoring):
    defended = sp.Defended(model, [restoring.autoencoder.transform()])
    assert float((defended.predict(X) == Y).double().mean()) > 0.8


def test_an_autoencoder_that_learns_nothing_is_told(model):
    with pytest.warns(SaddlepointWarning, match="hardly learnt"):
        sp.detectors.ReconstructionError(epochs=1, learning_rate=1e-4).fit(model, FEW)


@pytest.mark.parametrize(
    "detector",
    [
        sp.detectors.LogitsDecoder(epochs=1, error="l2"),
        sp.detectors.ClassReconstruction(epochs=1, hidden=(8,), size=2),
    ],
    ids=lambda detector: detector.name,
)
def test_gradients_are_those_of_finite_differences_on_rows(detector):
    x = FEW.x.double().flatten(1)
    detector.fit(rows(), x)
    assert torch.autograd.gradcheck(detector.forward, x[:3].clone().requires_grad_())


@pytest.mark.parametrize(
    "detector",
    [
        sp.detectors.ReconstructionError(**SMALL, p=2),
        sp.detectors.ReconstructionDivergence(**SMALL),
    ],
    ids=lambda detector: detector.name,
)
def test_gradients_are_those_of_finite_differences_on_images(detector):
    net = nn.Sequential(nn.Flatten(), *rows().networks()[0])
    detector.fit(sp.Model(net), FEW.x.double())
    x = (0.1 + 0.8 * X[:2].double()).requires_grad_()
    assert torch.autograd.gradcheck(detector.forward, x)


def test_bad_settings_and_inputs_are_refused():
    detectors = sp.detectors
    for kind, settings in (
        (detectors.LogitsDecoder, {"bottleneck": 0}), (detectors.LogitsDecoder, {"error": "l3"}),
        (detectors.ClassReconstruction, {"size": 0}), (detectors.ClassReconstruction, {"hidden": (8, 0)}),
        (detectors.ReconstructionError, {"p": 0}), (detectors.ReconstructionError, {"structure": ("pol",)}),
        (detectors.ReconstructionError, {"noise": -1}), (detectors.ReconstructionDivergence, {"temperature": 0}),
    ):  # fmt: skip
        with pytest.raises(InputError):
            kind(**settings)
    with pytest.raises(InputError, match="images"):
        detectors.ReconstructionError().fit(rows(), FEW.x.double().flatten(1))


def test_making_settings_draws_no_random_numbers():
    before = torch.get_rng_state()
    sp.detectors.ReconstructionError()
    assert torch.equal(torch.get_rng_state(), before)
