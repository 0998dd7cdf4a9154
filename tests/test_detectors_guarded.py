"""Guarded models, goals on them, combinations, metrics, and attacks on a classifier and its detector at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.detectors import (
    DETECTORS,
    AnyOf,
    Detector,
    Guarded,
    MaxProbability,
    Regression,
    auc_limits,
    average_precision,
    load,
    make,
    roc_auc,
    roc_curve,
)
from saddlepoint.detectors.base import row_fingerprints
from saddlepoint.errors import CapabilityError, DataError, InputError, ModelError, UnknownNameError
from saddlepoint.goals import Untargeted, bind

DIGITS = sp.data.load("digits")
FIT, CALIBRATE = DIGITS.train.take(400), DIGITS.test.x[:99]
X, Y = DIGITS.test.x[100:140], DIGITS.test.y[100:140]


@dataclass(eq=False, kw_only=True)
class FirstPixel(Detector):
    """The sum of the first row: what an attack has to keep low is known exactly."""

    summary: ClassVar[str] = "the first row is bright"
    reference: ClassVar[str] = "none, 2026"

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {"mean": clean.flatten(1)[:, :8].sum(1).mean()}

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :8].sum(1) - self.arrays["mean"]


del DETECTORS["first-pixel"]  # the tests of every detector are for those of the package


@pytest.fixture(scope="module")
def model() -> sp.Model:
    return sp.train(sp.zoo.build("digits-cnn"), DIGITS.train, epochs=8).model


@pytest.fixture(scope="module")
def detector(model: sp.Model) -> FirstPixel:
    return FirstPixel().fit(model, FIT).calibrate(CALIBRATE, 0.05)


# ---- guarded models


def test_it_rejects_exactly_what_the_detector_flags(model: sp.Model, detector: Detector) -> None:
    guarded = Guarded(model, detector)
    bright = X.clone()
    bright[::2, :, 0] = 1
    flagged = detector.predict(bright)
    assert flagged[::2].all()
    assert not flagged.all()
    found = guarded.predict(bright)
    assert torch.equal(found == 10, flagged)
    assert torch.equal(found[~flagged], model.predict(bright)[~flagged])
    assert torch.equal(guarded.predict_or_abstain(bright) == -1, flagged)
    assert guarded.probe(X).num_classes == 11


def test_a_model_of_labels_gives_labels(model: sp.Model, detector: Detector) -> None:
    labels = sp.Model(model.net, access=sp.Access.LABELS)
    detector = FirstPixel()
    detector.__class__.access = sp.Access.LABELS  # type: ignore[misc]
    guarded = Guarded(labels, detector.fit(labels, FIT).calibrate(CALIBRATE))
    FirstPixel.access = sp.Access.GRADIENTS  # type: ignore[misc]
    with guarded.frozen():
        rows = guarded.forward(X)
    assert set(rows.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rows.sum(1), torch.ones(len(X)))


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda m, d: Guarded(m.net, d), "sp.Model"),
        (lambda m, d: Guarded(m, m), "one of sp.detectors"),
        (lambda m, d: Guarded(sp.Model(m.net), d), "fitted for another model"),
        (lambda m, d: Guarded(Guarded(m, d), d), "has a detector already"),
        (lambda m, d: Guarded(m, FirstPixel().fit(m, FIT)), "calibrate"),
        (lambda m, d: Guarded(m, FirstPixel()), "not fitted"),
    ],
)
def test_what_cannot_be_guarded(model: sp.Model, detector: Detector, make_it: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_it(model, detector)


# ---- goals


def test_the_margin_is_the_smaller_of_both() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.5], [1.0, 3.0, 0.0, 5.0], [4.0, 3.0, 0.0, 2.0]])
    aim = bind(Untargeted(), torch.zeros(3, dtype=torch.int64), torch.full((3,), -1), 4, rejects=True)
    fooled, accepted = aim.margins(logits)
    assert fooled.tolist() == [2.0, 2.0, -1.0]
    assert accepted.tolist() == [0.5, -2.0, 2.0]
    assert aim.margin(logits).tolist() == [0.5, -2.0, -1.0]
    assert aim.wanted[:, 3].tolist() == [False] * 3
    assert aim.towards(torch.tensor([1, 1, 2])).rejects


@pytest.mark.parametrize("goal", [None, sp.Targeted("next"), sp.Targeted("random"), sp.Targeted("least_likely")], ids=str)
def test_success_is_wrong_and_unnoticed(model: sp.Model, detector: Detector, goal: sp.Untargeted | None) -> None:
    found = sp.attack(model, X, Y, sp.attacks.APGD(steps=30, loss="margin"), sp.Linf(0.3), sp.Evade(detector, goal))
    won = found.success
    assert int(won.sum()) > 0
    assert not detector.predict(found.adversarial)[won].any()
    predicted = model.predict(found.adversarial)
    assert (predicted != Y)[won].all()
    if goal is not None:
        assert int(found.targets.max()) < 10  # the eleventh stands for rejection
        assert torch.equal(predicted[won], found.targets[won])


def test_to_be_noticed_is_no_success(model: sp.Model) -> None:
    """The detector fires for whatever is changed at all: nothing gets through."""
    strict = FirstPixel().fit(model, FIT).calibrate(CALIBRATE)
    guarded = Guarded(model, strict, threshold=-1e6)
    assert sp.attack(guarded, X, Y, "pgd", sp.Linf(0.3)).success_rate == 0


def test_labels_stay_among_the_classes(model: sp.Model, detector: Detector) -> None:
    with pytest.raises(InputError, match="0 to 9"):
        sp.attack(Guarded(model, detector), X, torch.full_like(Y, 10), "fgsm", sp.Linf(0.1))


def test_evaluate_counts_what_is_accepted_and_wrong(model: sp.Model, detector: Detector) -> None:
    guarded = Guarded(model, detector)
    found = sp.evaluate(guarded, X, Y, sp.Linf(0.1), "quick")
    assert found.clean_accuracy == float((guarded.predict(X) == Y).double().mean())
    broken = found.adversarial[found.right & ~found.stands]
    assert len(broken)
    assert not detector.predict(broken).any()


def test_perturb_knows_the_rejected_class(model: sp.Model, detector: Detector) -> None:
    guarded = Guarded(model, detector)
    moved = sp.perturb(guarded, X, Y, sp.attacks.PGD(steps=10, loss="margin"), sp.Linf(0.3))
    assert (guarded.predict(moved) != Y).double().mean() > 0.3


# ---- attacks that keep gradients apart


class Planes(nn.Module):
    """Two classes by x_0; the detector below looks at x_1: both gradients are known."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] + 0.5 * x[:, 1], -x[:, 0] - 0.5 * x[:, 1]], 1)


@dataclass(eq=False, kw_only=True)
class Second(Detector):
    """score = x_1 + x_0 / 4."""

    summary: ClassVar[str] = "the second feature"
    reference: ClassVar[str] = "none, 2026"

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1] + 0.25 * x[:, 0]


del DETECTORS["second"]


def test_orthogonal_steps_are_at_right_angles_to_the_other_gradient() -> None:
    """In l2, the first step goes along -(1, 1/2) less its part along the detector's (1/4, 1)."""
    model = sp.Model(Planes().double(), bounds=None)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    detector = Second().fit(model, clean[:30]).calibrate(clean[30:], 0.1)
    x, y = torch.tensor([[1.0, -3.0]], dtype=torch.float64) + 1.0, torch.zeros(1, dtype=torch.int64)
    steps: list[Tensor] = []
    for orthogonal in (True, False):
        attack = sp.attacks.OrthogonalPGD(steps=1, step_size=0.1, orthogonal=orthogonal)
        found = sp.attack(model, x, y, attack, sp.L2(5.0), sp.Evade(detector), keep="last")
        steps.append((found.adversarial - x)[0])
    g, h = torch.tensor([-1.0, -0.5]).double(), torch.tensor([0.25, 1.0]).double()
    across = g - (g @ h) / (h @ h) * h
    torch.testing.assert_close(steps[0], 0.1 * across / across.norm())
    torch.testing.assert_close(steps[1], 0.1 * g / g.norm())


def test_it_finds_what_lies_behind_both(model: sp.Model, detector: Detector) -> None:
    for orthogonal in (True, False):
        attack = sp.attacks.OrthogonalPGD(steps=40, orthogonal=orthogonal)
        found = sp.attack(model, X, Y, attack, sp.Linf(0.3), sp.Evade(detector))
        assert found.success_rate > 0.8


@pytest.mark.parametrize("settings", [{"steps": 0}, {"step_size": 0.0}, {"step_size": float("nan")}])
def test_settings_of_orthogonal_pgd(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        sp.attacks.OrthogonalPGD(**settings)


# ---- combinations


@pytest.fixture(scope="module")
def attacked(model: sp.Model) -> Tensor:
    found = sp.attack(model, FIT.x[:200], FIT.y[:200], "pgd", sp.Linf(0.15))
    return found.adversarial[found.success]


def test_any_of_is_the_largest_in_units_of_clean_scores(model: sp.Model) -> None:
    both = AnyOf(parts=("max-probability", "energy")).fit(model, FIT)
    held = torch.arange(len(FIT.x)) % 3 == 0
    scores = np.stack(
        [make(name).fit(model, FIT).score(FIT.x[held]).double().numpy() for name in ("max-probability", "energy")]
    )
    now = np.stack([make(name).fit(model, FIT).score(X).double().numpy() for name in ("max-probability", "energy")])
    median = torch.from_numpy(scores).median(1).values.numpy()[:, None]
    spread = np.quantile(scores, 0.95, axis=1)[:, None] - median
    np.testing.assert_allclose(both.score(X).numpy(), ((now - median) / spread).max(0), rtol=1e-4, atol=1e-5)
    assert (both.calibrate(CALIBRATE, 0.1).predict(CALIBRATE)).double().mean() <= 0.1


def test_regression_is_that_of_scikit_learn(model: sp.Model, attacked: Tensor) -> None:
    parts = ("max-probability", "energy")
    joint = Regression(parts=parts).fit(model, FIT, attacked)
    held = torch.arange(len(FIT.x)) % 3 == 0

    def columns(x: Tensor) -> np.ndarray:
        return np.stack([make(name).fit(model, FIT).score(x).double().numpy() for name in parts], 1)

    rows = np.concatenate([columns(FIT.x[held]), columns(attacked)])
    target = np.arange(len(rows)) >= int(held.sum())
    mean, std = rows.mean(0), rows.std(0)
    reference = LogisticRegression(tol=1e-10, max_iter=1000).fit((rows - mean) / std, target)
    np.testing.assert_allclose(
        joint.score(X).numpy(), reference.decision_function((columns(X) - mean) / std), rtol=1e-3, atol=1e-3
    )


def test_noise_counts_as_clean(model: sp.Model, attacked: Tensor) -> None:
    parts = ("max-probability", "tail-variance")
    noisy = (X + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    plain, taught = (Regression(parts=parts, noise=noise).fit(model, FIT, attacked) for noise in (0.0, 0.1))
    assert taught.score(noisy).median() < plain.score(noisy).median()


def test_combinations_within_combinations_are_saved(model: sp.Model, attacked: Tensor, tmp_path: Any) -> None:
    inner = Regression(parts=("max-probability", "energy"))
    outer = AnyOf(parts=(inner, "tail-variance:start=32")).fit(model, FIT, attacked).calibrate(CALIBRATE)
    assert outer.learns_attacks
    outer.save(tmp_path / "outer.safetensors")
    assert torch.equal(load(tmp_path / "outer.safetensors", model).score(X), outer.score(X))


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        (("energy",), InputError, "at least two"),
        (("energy", "enrgy"), UnknownNameError, "energy"),
        (("energy", "tail-variance:begin=3"), UnknownNameError, "start"),
    ],
)
def test_parts_that_cannot_be_combined(parts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AnyOf(parts=parts)


def test_fitted_parts_are_refused(model: sp.Model) -> None:
    with pytest.raises(InputError, match="not fitted"):
        AnyOf(parts=(MaxProbability().fit(model, FIT), MaxProbability()))


def test_a_detector_of_a_reformed_model(model: sp.Model) -> None:
    """What stands before the network belongs to the model: detector and reformer are attacked together."""
    reformed = sp.Defended(model, [sp.transforms.Median(3)])
    detector = make("energy").fit(reformed, FIT).calibrate(CALIBRATE)
    found = sp.attack(reformed, X, Y, sp.attacks.APGD(steps=20, loss="margin"), sp.Linf(0.3), sp.Evade(detector))
    won = found.success
    assert int(won.sum()) > 0
    assert (reformed.predict(found.adversarial) != Y)[won].all()
    assert not detector.predict(found.adversarial)[won].any()


# ---- metrics


def test_areas_and_curves_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, bad = (
        torch.randn(50, generator=generator).round(decimals=1),
        torch.randn(70, generator=generator).round(decimals=1) + 0.5,
    )
    truth = np.r_[np.zeros(50), np.ones(70)]
    scores = torch.cat([clean, bad]).numpy()
    assert roc_auc(clean, bad) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert average_precision(clean, bad) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    false, true = roc_curve(clean, bad)
    expected = sklearn_roc(truth, scores, drop_intermediate=False)
    points = {(round(a, 9), round(b, 9)) for a, b in zip(false.tolist(), true.tolist(), strict=True)}
    assert points == {(round(a, 9), round(b, 9)) for a, b in zip(*expected[:2], strict=True)}


def test_limits_of_an_area() -> None:
    """Wider for fewer inputs, sensible at 1, and they hold the truth about as often as they say."""
    assert auc_limits(1.0, 50, 50)[1] == 1.0
    assert 0.9 < auc_limits(1.0, 50, 50)[0] < 0.99
    low, high = auc_limits(0.8, 100, 100)
    assert 0.72 < low < 0.8 < high < 0.87
    assert auc_limits(0.8, 10, 10)[0] < low
    generator = torch.Generator().manual_seed(3)
    truth = 0.760250  # of two unit normals that are 1 apart
    hits = 0
    for _ in range(200):
        found = roc_auc(torch.randn(40, generator=generator), 1 + torch.randn(40, generator=generator))
        low, high = auc_limits(found, 40, 40)
        hits += low <= truth <= high
    assert 180 <= hits <= 199


def test_metrics_need_scores() -> None:
    with pytest.raises(InputError, match="at least one"):
        roc_auc(torch.empty(0), torch.ones(3))


# ---- the base


def test_fingerprints_tell_rows_apart() -> None:
    x = torch.rand(200, 3, 4)
    prints = row_fingerprints(x)
    assert len(set(prints.tolist())) == 200
    assert torch.equal(row_fingerprints(x.flip(0)), prints.flip(0))
    changed = x.clone()
    changed[:, 1, 2] += 1e-6
    assert not torch.isin(row_fingerprints(changed), prints)[(changed != x).flatten(1).any(1)].any()


def test_calibration_is_valid_on_average(model: sp.Model) -> None:
    """Over many splits the rate of false alarms is what was asked for, not less by much."""
    detector = FirstPixel().fit(model, FIT)
    generator, rates = torch.Generator().manual_seed(0), []
    for _ in range(60):
        order = torch.rand(250, generator=generator)
        x = order[:, None, None, None].expand(-1, 1, 8, 8)
        detector.calibrate(x[:99], 0.1)
        rates.append(float(detector.predict(x[99:]).double().mean()))
    assert 0.07 < sum(rates) / len(rates) < 0.13


def test_p_values_are_ranks(model: sp.Model, detector: Detector) -> None:
    scores, found = detector.score(CALIBRATE), detector.score(X)
    expected = [(1 + int((scores >= one).sum())) / 100 for one in found]
    assert detector.p_value(X).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: MaxProbability().fit(m, FIT.x[:1]), InputError, "at least two"),
        (lambda m: MaxProbability().fit(m.net, FIT), InputError, "sp.Model"),
        (lambda m: MaxProbability().fit(m, (FIT.x, FIT.y[:3])), InputError, "one is needed for each"),
        (lambda m: MaxProbability().fit(m, FIT, FIT.x[:5, :, :4]), InputError, "adversarial inputs have shape"),
        (lambda m: MaxProbability().fit(m, FIT).calibrate(CALIBRATE, 0.0), InputError, "fpr"),
        (lambda m: MaxProbability().fit(m, FIT).calibrate(CALIBRATE[:5], 0.01), InputError, "at least 99 samples"),
        (lambda m: MaxProbability().fit(m, FIT).threshold, InputError, "calibrate"),
        (lambda m: MaxProbability().fit(m, FIT).save("d.pt"), DataError, "safetensors"),
        (lambda m: load("/nowhere/d.safetensors", m), DataError, "no such file"),
        (lambda m: make("max-probabilty"), UnknownNameError, "max-probability"),
        (lambda m: sp.detectors.activations(m, X, ("77",)), UnknownNameError, "'7'"),
        (lambda m: sp.detectors.activations(sp.Model(lambda x: m.net(x)), X), InputError, "no network"),
    ],
)
def test_bad_input(model: sp.Model, call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(model)


def test_files_that_are_no_detectors(model: sp.Model, detector: Detector, tmp_path: Any) -> None:
    path = tmp_path / "d.safetensors"
    MaxProbability().fit(model, FIT).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        load(path, model)
    sp.zoo.save_weights(model.net, path)
    with pytest.raises(DataError, match="not a saved detector"):
        load(path, model)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="another model"):
        load(path, sp.Model(sp.zoo.build("mlp", in_shape=(1, 8, 8))))


def test_nan_scores_are_an_error(model: sp.Model) -> None:
    detector = FirstPixel().fit(model, FIT)
    detector.attach(model, {"mean": torch.tensor(torch.nan)})
    with pytest.raises(ModelError, match="NaN"):
        detector.score(X)


def test_a_fit_that_fails_leaves_the_old_one(model: sp.Model) -> None:
    detector = FirstPixel().fit(model, FIT)
    before = detector.score(X)
    with pytest.raises(InputError):
        detector.fit(model, FIT.x[:1])
    assert torch.equal(detector.score(X), before)


def test_access_is_asked_for(model: sp.Model) -> None:
    with pytest.raises(CapabilityError, match="scores"):
        MaxProbability().fit(sp.Model(model.net, access=sp.Access.LABELS), FIT)


# ---- what newcomers ran into


def test_lists_and_layers_in_text(model: sp.Model) -> None:
    both = make("any-of:parts=energy+tail-variance")
    assert [part.name for part in both.detectors] == ["energy", "tail-variance"]  # type: ignore[attr-defined]
    assert make("mahalanobis:layers=1+3").layers == ("1", "3")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: make("kernel-density:bandwidth=abc"), InputError, "a number or None"),
        (lambda m: make("layer-network:epochs=1.5"), InputError, "a whole number"),
        (lambda m: make("any-of"), InputError, "any-of:parts="),
        (lambda m: AnyOf(parts="energy"), InputError, "detectors or names|their names"),
        (lambda m: make("energy").fit(m, FIT).score(X.flatten(1)), InputError, r"fitted on \(1, 8, 8\)"),
        (lambda m: make("energy").fit(m, torch.rand(5, 3, 8, 8)), ModelError, "fails on inputs of shape"),
        (lambda m: make("energy").fit(m, (FIT.x, FIT.y + 90)), InputError, "classes 0 to 9"),
        (lambda m: make("energy").fit(m, (FIT.x, FIT.y[:5])), InputError, "one is needed for each"),
        (lambda m: make("energy").fit(m, FIT).calibrate(CALIBRATE, "a"), InputError, "fpr must be a number"),
        (lambda m: sp.Evade("kd"), InputError, "one of sp.detectors"),
        (lambda m: load("/tmp", m), DataError, "no such file"),
    ],
)
def test_misuse(model: sp.Model, call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(model)


def test_a_model_with_other_weights_is_another_model(model: sp.Model, detector: Detector, tmp_path: Any) -> None:
    MaxProbability().fit(model, FIT).save(tmp_path / "d.safetensors")
    with pytest.raises(DataError, match="weights changed"):
        load(tmp_path / "d.safetensors", sp.Model(sp.zoo.build("digits-cnn", seed=5)))


def test_what_is_rejected_is_not_right(model: sp.Model, detector: Detector) -> None:
    guarded = Guarded(model, detector, threshold=float(detector.score(X).median()))
    found = sp.attack(guarded, X, Y, sp.attacks.APGD(steps=3), sp.Linf(1e-4))
    assert found.robust_accuracy <= found.clean_accuracy < 0.7


def test_a_guarded_model_is_not_guarded_again(model: sp.Model, detector: Detector) -> None:
    with pytest.raises(InputError, match="has a detector already"):
        make("energy").fit(Guarded(model, detector), FIT)
