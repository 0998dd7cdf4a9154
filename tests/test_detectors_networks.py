"""Detectors that are networks: what they see, what they learn, and how they come back from their arrays."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu

import saddlepoint as sp
from saddlepoint.detectors import roc_auc
from saddlepoint.errors import InputError, UnknownNameError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:200], DIGITS.test.y[:200]
FEW = DIGITS.train.take(300)


@pytest.fixture(scope="module")
def model() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


def fgsm(model, split) -> torch.Tensor:
    result = sp.attack(model, split.x, split.y, sp.attacks.FGSM(), sp.Linf(0.2))
    return result.adversarial[result.success]


@pytest.fixture(scope="module")
def shown(model) -> torch.Tensor:
    return fgsm(model, DIGITS.train)


@pytest.fixture(scope="module")
def unseen(model) -> torch.Tensor:
    return fgsm(model, DIGITS.test.take(200))


def rows(dtype=torch.float32) -> sp.Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sp.Model(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).to(dtype))


@pytest.fixture(scope="module")
def on_inputs(model, shown) -> sp.detectors.InputNetwork:
    return sp.detectors.InputNetwork(epochs=5, width=8).fit(model, DIGITS.train, shown)


@pytest.fixture(scope="module")
def on_a_layer(model, shown) -> sp.detectors.LayerNetwork:
    return sp.detectors.LayerNetwork(epochs=5, width=8).fit(model, DIGITS.train, shown)


@pytest.fixture(scope="module")
def one_more(model, shown) -> sp.detectors.ExtraClass:
    return sp.detectors.ExtraClass(epochs=3).fit(model, DIGITS.train, shown)


@pytest.mark.parametrize(("name", "least"), [("on_inputs", 0.95), ("on_a_layer", 0.95), ("one_more", 0.9)])
def test_the_attack_that_was_shown_is_detected_on_unseen_images(request, name, least, unseen):
    detector = request.getfixturevalue(name)
    assert roc_auc(detector.score(X), detector.score(unseen)) > least


def test_images_are_seen_by_three_convolutions_of_standardised_inputs(on_inputs):
    a = {name.removeprefix("network."): array.double() for name, array in on_inputs.arrays.items()}
    assert float(a["0.mean"]) == pytest.approx(float(DIGITS.train.x[:1000].mean()), rel=1e-5)
    assert float(a["0.std"]) == pytest.approx(float(DIGITS.train.x[:1000].std()), rel=1e-5)
    h = (X.double() - a["0.mean"]) / a["0.std"]
    for layer, stride in ((1, 1), (3, 2), (5, 2)):
        h = conv2d(h, a[f"{layer}.weight"], a[f"{layer}.bias"], stride=stride, padding=1).clamp(min=0)
    expected = h.mean((2, 3)) @ a["9.weight"].T + a["9.bias"]
    torch.testing.assert_close(on_inputs.score(X).double(), expected[:, 0], atol=1e-4, rtol=1e-4)


def test_rows_are_seen_by_a_hidden_layer():
    bad = (FEW.x.flatten(1) + 0.2).clamp(max=1)
    detector = sp.detectors.InputNetwork(epochs=4, width=4).fit(rows(), FEW.x.flatten(1), bad)
    a = {name.removeprefix("network."): array for name, array in detector.arrays.items()}
    assert a["2.weight"].shape == (32, 64)
    h = gelu((X.flatten(1) - a["0.mean"]) / a["0.std"] @ a["2.weight"].T + a["2.bias"])
    torch.testing.assert_close(detector.score(X.flatten(1)), (h @ a["4.weight"].T + a["4.bias"])[:, 0], atol=1e-5, rtol=1e-4)
    assert roc_auc(detector.score(X.flatten(1)), detector.score((X.flatten(1) + 0.2).clamp(max=1))) > 0.9


def test_a_layers_network_sees_that_layer_by_default_one_in_the_middle(model, on_a_layer):
    names = sp.detectors.hidden_layers(model, X)
    assert on_a_layer.chosen == names[len(names) // 2]
    inside = model.features(X, on_a_layer.chosen)
    with torch.no_grad():
        torch.testing.assert_close(on_a_layer.score(X), on_a_layer.network(inside)[:, 0], atol=1e-5, rtol=1e-5)
    first = sp.detectors.LayerNetwork(layer=names[0], epochs=1, width=4).fit(model, FEW, FEW.x[:50] * 0.5)
    assert first.chosen == names[0]
    with pytest.raises(UnknownNameError):
        sp.detectors.LayerNetwork(layer="nowhere", epochs=1).fit(model, FEW, FEW.x[:50] * 0.5)


def test_both_kinds_count_the_same_however_many_there_are(model, shown):
    """With a tenth as many adversarial inputs the logits must not sink."""
    detector = sp.detectors.InputNetwork(epochs=8, width=8).fit(model, DIGITS.train, shown[:130])
    scores = detector.score(DIGITS.test.x[200:400])
    assert float((scores > 0).double().mean()) < 0.3
    assert float((detector.score(shown[130:400]) > 0).double().mean()) > 0.5


def test_the_extra_class_is_added_to_a_copy_and_scored_by_its_log_odds(model, one_more):
    last = [name for name, module in model.net.named_modules() if isinstance(module, nn.Linear)][-1]
    grown = one_more.arrays[f"network.0.{last}.weight"]
    assert grown.shape[0] == 11
    assert model.predict(X).max() <= 9
    wide = copy.deepcopy(model.net)
    linear = wide.get_submodule(last)
    linear.weight = nn.Parameter(grown.clone())
    linear.bias = nn.Parameter(one_more.arrays[f"network.0.{last}.bias"].clone())
    wide.load_state_dict({k.removeprefix("network.0."): v for k, v in one_more.arrays.items()})
    with torch.no_grad():
        z = wide.eval()(X).double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(one_more.score(X).numpy(), np.log(p[:, 10] / p[:, :10].sum(1)), atol=1e-3)


def test_fitting_an_extra_class_leaves_the_model_as_it_was(shown):
    net = sp.zoo.build("digits-cnn", seed=1).requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sp.detectors.ExtraClass(epochs=1).fit(sp.Model(net), FEW, shown[:100])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in net.parameters())


class Scaled(nn.Module):
    """Logits that are more than the last layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x) * torch.ones(10)


def test_where_no_class_can_be_added_it_says_so():
    x, bad = FEW.x.flatten(1), FEW.x.flatten(1) * 0.5
    convolutional = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 10, 8), nn.Flatten())
    for net in (
        convolutional,
        nn.Sequential(nn.Linear(64, 5), nn.Unflatten(1, (5, 1)), nn.Flatten(), nn.ConstantPad1d((0, 5), 0)),
    ):
        with pytest.raises(InputError, match="last linear layer"):
            sp.detectors.ExtraClass(epochs=1).fit(sp.Model(net), x, bad)
    with pytest.raises(InputError, match="last linear layer"):
        sp.detectors.ExtraClass(epochs=1).fit(sp.Model(Scaled()), x, bad)


def test_a_model_that_is_one_linear_layer_gets_its_class():
    detector = sp.detectors.ExtraClass(epochs=1).fit(sp.Model(nn.Linear(64, 10)), FEW.x.flatten(1), FEW.x.flatten(1) * 0.5)
    assert detector.arrays["network.0.weight"].shape == (11, 64)


@pytest.mark.parametrize("kind", [sp.detectors.InputNetwork, sp.detectors.LayerNetwork, sp.detectors.ExtraClass])
def test_gradients_are_those_of_finite_differences(kind):
    x = FEW.x.double().flatten(1)
    detector = kind(epochs=1).fit(rows(torch.float64), x, x * 0.5)
    assert all(array.dtype == torch.float64 for array in detector.arrays.values() if array.is_floating_point())
    assert torch.autograd.gradcheck(detector.forward, x[:3].clone().requires_grad_())


def test_training_with_a_dynamic_adversary_detects_it(model, shown, on_inputs):
    """Against the static detector it succeeds; against the dynamic one, with the same steps, less often."""
    hardened = sp.detectors.InputNetwork(epochs=5, width=8, dynamic=0.2).fit(model, DIGITS.train, shown)
    found = []
    for detector in (on_inputs, hardened):
        detector.calibrate(DIGITS.test.x[200:], fpr=0.1)
        made = sp.attack(model, X[:60], Y[:60], sp.attacks.PGD(steps=15), sp.Linf(0.2), sp.Evade(detector))
        found.append(made.robust_accuracy)
    assert found[1] > found[0] + 0.1


def test_the_dynamic_adversary_stays_in_its_ball_and_fools_both(model, on_inputs):
    torch.manual_seed(0)
    detector = sp.detectors.InputNetwork(dynamic=0.2, epochs=1, width=8).fit(model, FEW, FEW.x[:50] * 0.5)
    logit = lambda given: on_inputs.network(given)[:, 0]  # noqa: E731
    made = detector._examples(logit, X, Y)
    assert float((made - X).abs().max()) <= 0.2 + 1e-6
    model.check_inputs(made)
    assert float((model.predict(made) == Y).double().mean()) < 0.6
    with torch.no_grad():
        assert float(logit(made).mean()) < float(logit(fgsm(model, DIGITS.test.take(200))).mean()) - 1


def test_a_training_that_is_cut_short_gives_no_detector(model, monkeypatch):
    from saddlepoint.defenses.loop import Fit
    from saddlepoint.detectors import networks

    monkeypatch.setattr(networks, "fit", lambda *_, **__: Fit((), False, {}))
    detector = sp.detectors.InputNetwork()
    with pytest.raises(KeyboardInterrupt):
        detector.fit(model, FEW, FEW.x[:50] * 0.5)
    assert not detector.fitted


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"width": 0}, {"dynamic": -1}, {"dynamic": float("nan")}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InputError):
        sp.detectors.LayerNetwork(**settings)
