"""What must hold for every detector, whatever it looks at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import saddlepoint as sp
from saddlepoint.detectors import DETECTORS, Detector, Guarded, load

DIGITS = sp.data.load("digits")
FIT, CALIBRATE, TEST = DIGITS.train.take(300), DIGITS.test.x[:99], DIGITS.test.x[100:116]
PARTS = ("max-probability", "kernel-density:bandwidth=1")
QUICK: dict[str, dict[str, Any]] = {  # settings that make fitting fast, or without which there is no detector
    "any-of": {"parts": PARTS},
    "regression": {"parts": PARTS, "noise": 0.05},
}
for _name, _cls in DETECTORS.items():
    if "epochs" in getattr(_cls, "__dataclass_fields__", {}):
        QUICK.setdefault(_name, {})["epochs"] = 2

pytestmark = pytest.mark.filterwarnings("ignore:the autoencoder has hardly learnt")
every = pytest.mark.parametrize("name", DETECTORS)


def with_dropout() -> torch.nn.Module:
    layers = list(sp.zoo.build("digits-cnn").children())
    return torch.nn.Sequential(*layers[:-1], torch.nn.Dropout(0.5), layers[-1])


@pytest.fixture(scope="module")
def model() -> sp.Model:
    return sp.train(with_dropout(), DIGITS.train, epochs=6).model


@pytest.fixture(scope="module")
def attacked(model: sp.Model) -> torch.Tensor:
    found = sp.attack(model, FIT.x[:150], FIT.y[:150], "pgd", sp.Linf(0.2))
    return found.adversarial[found.success]


def made(name: str) -> Detector:
    return DETECTORS[name](**QUICK.get(name, {}))


_fitted: dict[str, Detector] = {}


@pytest.fixture
def detector(name: str, model: sp.Model, attacked: torch.Tensor) -> Detector:
    if name not in _fitted:
        _fitted[name] = made(name).fit(model, FIT, attacked).calibrate(CALIBRATE, 0.1)
    return _fitted[name]


@every
def test_scores_are_finite_and_come_again(detector: Detector) -> None:
    scores = detector.score(TEST)
    assert scores.shape == (len(TEST),)
    assert scores.isfinite().all()
    assert torch.equal(scores, detector.score(TEST))
    assert detector.score(TEST[:0]).shape == (0,)
    extremes = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.eye(8)[None]])
    assert detector.score(extremes).isfinite().all()


@pytest.mark.parametrize("name", [name for name, cls in DETECTORS.items() if cls.random is not True])  # whose draws differ
def test_neighbours_make_no_difference(detector: Detector) -> None:
    whole = detector.score(TEST)
    torch.testing.assert_close(detector.score(TEST, batch_size=1), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(detector.score(TEST.flip(0), batch_size=5).flip(0), whole, rtol=1e-3, atol=1e-4)


@every
def test_the_threshold_keeps_the_rate_that_was_asked_for(detector: Detector) -> None:
    scores = detector.score(CALIBRATE)
    for fpr in (0.02, 0.1, 0.5):
        assert int((scores.double() > detector.threshold_at(fpr)).sum()) <= fpr * (len(CALIBRATE) + 1)
    assert detector.threshold == detector.threshold_at(0.1) <= detector.threshold_at(0.02)
    assert torch.equal(detector.predict(TEST), detector.score(TEST) > detector.threshold)
    assert detector.threshold_at(0.001) == torch.inf  # 99 samples can't tell


@every
def test_what_was_fitted_on_sets_no_threshold(detector: Detector) -> None:
    with pytest.raises(sp.InputError, match="2 of the 22 calibration samples"):
        detector.calibrate(torch.cat([CALIBRATE[:20], FIT.x[5:7]]), 0.1)
    assert detector.calibrated


@every
def test_saved_and_loaded_it_is_the_same(detector: Detector, model: sp.Model, tmp_path: Any) -> None:
    detector.save(tmp_path / "d.safetensors")
    again = load(tmp_path / "d.safetensors", model)
    assert again.settings() == detector.settings()
    assert torch.equal(again.score(TEST), detector.score(TEST))
    assert (again.threshold, again.spread) == (detector.threshold, detector.spread)
    with pytest.raises(sp.InputError, match="fitted on"):
        again.calibrate(FIT.x[:50], 0.1)


@every
def test_fitting_again_gives_the_same_and_leaves_everything_as_it_was(
    name: str, detector: Detector, model: sp.Model, attacked: torch.Tensor
) -> None:
    before, mode, state = copy.deepcopy(model.net.state_dict()), model.net.training, torch.get_rng_state()
    again = made(name).fit(model, FIT, attacked)
    assert torch.equal(again.score(TEST), detector.score(TEST))
    assert model.net.training == mode
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.net.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_gradients_are_as_declared(detector: Detector, model: sp.Model) -> None:
    if not detector.differentiable:
        assert Guarded(model, detector).access is sp.Access.SCORES
        return
    x = TEST.clone().requires_grad_()
    with detector.frozen():
        (gradient,) = torch.autograd.grad(detector.forward(x).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(1).double().mean() > 0.5
    assert Guarded(model, detector).access >= sp.Access.GRADIENTS


@every
def test_an_attack_on_the_pair_is_judged_by_both(detector: Detector, model: sp.Model) -> None:
    """With an eps that covers half of the range, some samples fall to it: wrong, and not noticed; no other counts."""
    x, y = DIGITS.test.x[100:130], DIGITS.test.y[100:130]
    attack = sp.attacks.APGD(steps=20, loss="margin") if detector.differentiable else sp.attacks.Square(steps=60)
    found = sp.attack(model, x, y, attack, sp.Linf(0.5), sp.Evade(detector))
    won = found.success
    fooled = model.predict(found.adversarial) != y
    if not detector.random:
        assert not bool((won & detector.predict(found.adversarial)).any())
    assert bool(fooled[won].all())


@every
def test_what_it_cannot_use_is_refused(name: str, model: sp.Model, attacked: torch.Tensor) -> None:
    fresh = made(name)
    with pytest.raises(sp.InputError, match="not fitted"):
        fresh.score(TEST)
    if fresh.learns_attacks:
        with pytest.raises(sp.InputError, match="adversarial"):
            fresh.fit(model, FIT)
    with pytest.raises(sp.InputError, match="bounds"):
        fresh.fit(model, (255 * FIT.x, FIT.y), attacked)
    assert not fresh.fitted


def test_every_detector_says_what_it_is() -> None:
    for name, cls in DETECTORS.items():
        assert cls.summary, name
        assert "arXiv" in cls.reference or "19" in cls.reference or "20" in cls.reference, name
        assert "Source:" in (cls.__doc__ or ""), name
