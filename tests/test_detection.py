"""Detectors side by side: the figures, the splits, the adversary who knows, the report and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saddlepoint as sp
from saddlepoint.cli import main
from saddlepoint.detectors import Samples
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.evaluate import detection
from saddlepoint.evaluate.detection import Detection, bypass, detect

DIGITS = sp.data.load("digits")
ATTACKS: dict[str, Any] = {"fgsm": ("fgsm", sp.Linf(0.15)), "pgd": (sp.attacks.PGD(steps=10), sp.Linf(0.15))}


@pytest.fixture(scope="module")
def model() -> sp.Model:
    return sp.train(sp.zoo.build("digits-cnn"), DIGITS.train, epochs=8).model


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples.split(DIGITS.train.take(500), DIGITS.test, calibrate=120, most=60)


@pytest.fixture(scope="module")
def found(model: sp.Model, samples: Samples) -> Detection:
    regression = sp.detectors.Regression(parts=("max-probability", "tail-variance"))
    detectors = {"energy": sp.detectors.Energy(), "tail": sp.detectors.TailVariance(), "both": regression}
    return detect(model, samples, ATTACKS, detectors)


# ---- splits


def test_splits_share_nothing() -> None:
    parts = Samples.split(DIGITS.train, DIGITS.test)
    assert len(parts.calibrate[0]) + len(parts.test[0]) <= len(DIGITS.test)
    rows = [set(map(bytes, x.numpy().reshape(len(x), -1))) for x, _ in (parts.fit, parts.calibrate, parts.test)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_what_is_in_two_parts_is_refused_or_left_out() -> None:
    x, y = DIGITS.test.x[:30], DIGITS.test.y[:30]
    with pytest.raises(InputError, match="10 samples are in both the fit and the test part"):
        Samples((x[:15], y[:15]), (x[15:20], y[15:20]), (x[5:15], y[5:15]))
    again = sp.data.Split(torch.cat([x, x[:10], DIGITS.train.x[:5]]), torch.cat([y, y[:10], DIGITS.train.y[:5]]))
    parts = Samples.split(DIGITS.train, again, calibrate=10)
    assert len(parts.test[0]) == 20
    with pytest.raises(InputError, match="calibrate"):
        Samples.split(DIGITS.train, again, calibrate=40)


# ---- figures


def test_figures_by_hand(found: Detection, model: sp.Model, samples: Samples) -> None:
    x, y = samples.test
    right = model.predict(x) == y
    assert found.accuracy == float(right.double().mean())
    assert [one.name for one in found.examples] == ["fgsm", "pgd"]
    assert [one.seen for one in found.examples] == [True, False]
    pgd = sp.attack(model, x[right], y[right], ATTACKS["pgd"][0], sp.Linf(0.15))
    fooling = pgd.adversarial[pgd.having("fooled")]
    energy = sp.detectors.Energy().fit(model, samples.fit).calibrate(samples.calibrate[0])
    row = next(row for row in found.rows if row.name == "energy")
    on_pgd = row.detected[1]
    assert torch.equal(on_pgd.fooling, energy.score(fooling))
    assert on_pgd.auc == sp.detectors.roc_auc(energy.score(x), energy.score(fooling))
    assert on_pgd.rate(0.05) == float(energy.predict(fooling).double().mean())
    assert on_pgd.rate(0.01) == float((energy.score(fooling) > energy.threshold_at(0.01)).double().mean())
    assert row.false_positives["clean"][0.05] == float(energy.predict(x).double().mean())
    low, high = on_pgd.limits or (1.0, 0.0)
    assert low < (on_pgd.auc or 0) < high
    assert (on_pgd.auc_failed is None) == (not len(pgd.having("survived").nonzero()))


def test_who_learns_from_attacks_is_shown_those_that_were_seen(found: Detection) -> None:
    both = next(row for row in found.rows if row.name == "both")
    assert both.detector.learns_attacks
    assert (both.detected[0].auc or 0) > 0.8


def test_noise_tells_what_is_odd_from_what_is_adversarial(found: Detection) -> None:
    """Whatever is off the components of clean images, noise too, is far out for the tail's variance; the report says so."""
    tail = next(row for row in found.rows if row.name == "tail")
    assert tail.false_positives["noise"][0.05] > 0.5
    assert any("it sees what is odd" in note for note in tail.notes)
    assert set(tail.false_positives) == {"clean", "noise", "blur", "a shift", "less light"}


def test_summary_and_json_agree(found: Detection) -> None:
    text, told = found.summary(), json.loads(json.dumps(found.to_dict()))
    assert [row["name"] for row in told["detectors"]] == ["energy", "tail", "both"]
    for row in found.rows:
        assert row.name in text
        for one in row.detected:
            assert f"{one.auc:.3f}" in text
    assert found.ranking[0].evasion_rate == min(row.evasion_rate for row in found.rows)
    assert f"`{found.ranking[0].name}`" in found.verdict
    assert told["attacks"][1]["seen"] is False


# ---- who knows the detector


def test_evaded_samples_are_wrong_and_accepted(found: Detection, model: sp.Model, samples: Samples) -> None:
    energy = next(row for row in found.rows if row.name == "energy")
    (past,) = energy.bypasses
    naive = {one.attack: one for one in energy.detected}["pgd"]
    unnoticed = float((naive.fooling <= energy.detector.threshold).double().sum()) / len(past.evaded)
    assert past.rate >= unnoticed - 0.1  # who knows more does better, but for chance
    assert past.rate > 0.3
    assert past.auc is not None
    assert past.auc < (naive.auc or 0)


def test_a_detector_of_what_no_attack_can_change_is_not_evaded(model: sp.Model, samples: Samples) -> None:
    """The tail's variance with a threshold below what any example has: none gets through."""
    strict = sp.detectors.TailVariance(start=8).fit(model, samples.fit).calibrate(samples.calibrate[0], 0.5)
    x, y = samples.test
    past = bypass(strict, x, y, sp.Linf(0.002))
    assert past is None or past.rate < 0.2


def test_no_attack_fits_a_search_for_the_smallest_or_l0(model: sp.Model, samples: Samples) -> None:
    energy = sp.detectors.Energy().fit(model, samples.fit).calibrate(samples.calibrate[0])
    assert bypass(energy, *samples.test, sp.Minimize("l2")) is None
    assert bypass(energy, *samples.test, sp.L0(3)) is None


# ---- what can go wrong


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"attacks": {}}, InputError, "at least one"),
        ({"attacks": ATTACKS, "seen": ["bim"]}, InputError, "bim"),
        ({"attacks": {"x": ("pdg", sp.Linf(0.1))}}, UnknownNameError, "PGD"),
        ({"attacks": ATTACKS, "detectors": ["enrgy"]}, UnknownNameError, "energy"),
        ({"attacks": ATTACKS, "detectors": "energy"}, InputError, "list"),
        ({"attacks": ATTACKS, "detectors": ["energy", "energy"]}, InputError, "two detectors"),
    ],
)
def test_bad_input(model: sp.Model, samples: Samples, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        detect(model, samples, **{"detectors": ["energy"], "attacks": ATTACKS, **arguments})


def test_one_that_fails_does_not_stop_the_others(model: sp.Model, samples: Samples) -> None:
    rows: list[int] = []
    found = detect(
        model, samples, {"fgsm": ATTACKS["fgsm"]}, ["dropout-uncertainty", "energy"], adaptive=False,
        on_row=lambda so_far: rows.append(len(so_far.rows)),
    )  # fmt: skip
    assert [row.name for row in found.rows] == ["energy"]
    assert found.failed[0][0] == "dropout-uncertainty"
    assert "dropout" in found.summary()
    assert rows == [0, 1, 1]


def test_ctrl_c_keeps_what_was_finished(model: sp.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(so_far: Detection) -> None:
        if len(so_far.rows) == 1:
            raise KeyboardInterrupt

    found = detect(model, samples, {"fgsm": ATTACKS["fgsm"]}, ["energy", "tail-variance"], adaptive=False, on_row=stop)
    assert not found.complete
    assert len(found.rows) == 1
    assert "interrupted" in found.summary()


# ---- report and command


def test_the_report_has_every_figure(found: Detection, tmp_path: Path) -> None:
    from saddlepoint.report.detections import write_detection

    report = write_detection(found, tmp_path, title="Detectors", data_name="digits", config={})
    page = report.read_text()
    table = list(csv.DictReader((tmp_path / "detectors.csv").read_text().splitlines()))
    assert len(table) == 3 * 3  # two attacks, and the adaptive one
    for row in found.rows:
        assert row.name in page
        for one in row.detected:
            assert f"{one.auc:.3f}" in page
    assert (tmp_path / "figures" / "roc.png").exists()
    assert (tmp_path / "figures" / "scores.png").exists()
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["ranking"] == [row.name for row in found.ranking]


def test_nothing_to_report(found: Detection, tmp_path: Path) -> None:
    from dataclasses import replace

    from saddlepoint.report.detections import write_detection

    with pytest.raises(InputError, match="no detectors"):
        write_detection(replace(found, rows=()), tmp_path, title="t", data_name="d", config={})


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: sp.Model
) -> None:
    monkeypatch.chdir(tmp_path)
    sp.zoo.save_weights(model.net, tmp_path / "w.safetensors")
    words = [
        "detect",
        "--model",
        "zoo:digits-cnn+w.safetensors",
        "--detector",
        "energy,tail-variance:start=40",
        "--eps",
        "0.1,0.2",
    ]
    words += ["--attack", "fgsm", "--samples", "40", "--no-adaptive", "--out", "out", "--json", "figures.json"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "energy" in out
    assert "report:" in out
    told = json.loads((tmp_path / "figures.json").read_text())
    assert [one["name"] for one in told["attacks"]] == ["fgsm 0.1", "fgsm 0.2"]
    assert told["detectors"][1]["settings"]["start"] == 40
    loaded = sp.detectors.load(tmp_path / "out" / "detectors" / "energy.safetensors", _again(model, tmp_path))
    assert loaded.calibrated
    assert main([*words[:4], "enrgy", "--out", "out2"]) == 2
    assert "'energy'" in capsys.readouterr().err
    assert main(["list", "detectors"]) == 0
    assert "kernel-density" in capsys.readouterr().out


def _again(model: sp.Model, folder: Path) -> sp.Model:
    return sp.Model(sp.zoo.load_weights(sp.zoo.build("digits-cnn"), folder / "w.safetensors"))


def test_suggested_detectors_exist() -> None:
    assert all(name in sp.detectors.DETECTORS for name in detection.SUGGESTED)


# ---- what newcomers ran into


def test_targets_of_their_own_stay_with_their_samples(model: sp.Model, samples: Samples) -> None:
    """Rows that are wrong, flagged or evaded already are left out, and the others keep their targets."""
    energy = sp.detectors.Energy().fit(model, samples.fit).calibrate(samples.calibrate[0], 0.3)
    x, y = samples.test
    targets = (y + 5) % 10
    past = bypass(energy, x, y, sp.Linf(0.3), attacks=[sp.attacks.APGD(steps=20, loss="margin")], goal=sp.Targeted(targets))
    assert past is not None
    predicted = model.predict(past.adversarial)
    changed = (past.adversarial != x[past.index]).flatten(1).any(1)
    assert int(changed.sum()) == len(past.scores) > 0
    assert torch.equal(predicted[changed], targets[past.index][changed])
    assert 0 < past.rate < 1


def test_models_of_labels_are_bypassed_by_labels(samples: Samples, model: sp.Model) -> None:
    labels = sp.Model(model.net, access=sp.Access.LABELS)
    tail = sp.detectors.TailVariance().fit(labels, samples.fit).calibrate(samples.calibrate[0])
    x, y = (column[:6] for column in samples.test)
    past = bypass(tail, x, y, sp.Linf(0.5), budget=sp.Budget(queries=120))
    assert past is not None
    assert "RayS" in past.names


def test_without_success_there_is_nothing_to_notice(model: sp.Model, samples: Samples) -> None:
    found = detect(model, samples, {"fgsm": ("fgsm", sp.Linf(1e-5))}, ["energy"], adaptive=False)
    assert "nothing to notice" in found.verdict
    assert any("nobody who knows it" in note for note in found.rows[0].notes)


def test_a_score_without_gradients_is_not_attacked_blindly(model: sp.Model, samples: Samples) -> None:
    energy = sp.detectors.Energy().fit(model, samples.fit).calibrate(samples.calibrate[0])
    energy.forward = lambda x: -model.forward(x).logsumexp(1).detach()  # type: ignore[method-assign]
    with pytest.raises(InputError, match="differentiable = False"):
        bypass(energy, *samples.test, sp.Linf(0.1))
