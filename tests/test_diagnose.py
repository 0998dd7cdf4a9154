"""The diagnosis finds each planted fault, and nothing where there is none."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import masked_models as masked
import pytest
import torch
from contract_support import Counting, random_states, snapshot
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.defenses.transforms import GaussianNoise
from saddlepoint.evaluate import evidence
from saddlepoint.evaluate.diagnose import Diagnosis, diagnose

Samples = tuple[Tensor, Tensor]
Make = Callable[[nn.Module], nn.Module]
THREAT = sp.Linf(0.1)


def around(before: masked.Change | None = None, after: masked.Change | None = None) -> Make:
    return lambda net: masked.Around(net, before, after).eval()


# what must be found; other findings may come along, since one fault often shows in several ways
PLANTED: dict[str, tuple[Make, set[str]]] = {
    "temperature": (around(after=lambda logits: 100 * logits), {"saturated-softmax"}),
    "bit_depth": (
        around(masked.quantised),
        {"vanished-gradients", "piecewise-constant", "loss-not-rising", "random-search", "black-box", "unbounded"},
    ),
    "straight_through": (around(masked.straight_through), {"piecewise-constant", "wrong-gradients"}),
    "jpeg": (around(masked.compressed), {"vanished-gradients", "piecewise-constant", "black-box", "unbounded"}),
    "threshold": (around(masked.thresholded), {"no-gradient", "piecewise-constant"}),
    "noise": (around(masked.noisy), {"randomness"}),
    "resize": (around(masked.resized), {"randomness"}),
    "chaos": (around(masked.chaotic), {"wrong-gradients", "loss-not-rising", "black-box"}),
    "root": (around(masked.rooted), {"exploding-gradients", "black-box"}),
    "ripple": (around(masked.rippled), {"one-step", "black-box"}),
    "batch_mean": (around(masked.averaged), {"batch-dependence"}),
    "detached": (around(after=torch.Tensor.detach), {"no-gradient", "black-box"}),
    "numpy": (masked.Foreign, {"no-gradient", "black-box"}),
    "steep": (masked.Steep, {"vanished-gradients", "black-box"}),
    "purified": (masked.Purified, {"test-time-optimisation"}),
    "insistent": (masked.Insistent, {"test-time-optimisation"}),
}


@pytest.fixture(scope="session")
def clean() -> Samples:
    split = sp.data.load("digits").test.take(16)
    return split.x, split.y


def found(diagnosis: Diagnosis) -> set[str]:
    return {finding.name for finding in diagnosis.suspicious}


def of(diagnosis: Diagnosis, name: str) -> dict[str, float]:
    (finding,) = (finding for finding in diagnosis.findings if finding.name == name)
    return finding.measured


def examined(
    net: nn.Module | Callable[[Tensor], Tensor],
    samples: Samples,
    threat: sp.Linf | sp.L2 = THREAT,
    sources: Sequence[nn.Module] = (),
) -> Diagnosis:
    return diagnose(sp.Model(net), *samples, threat, sources=[sp.Model(source) for source in sources])


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_finds_what_was_planted(name: str, mlp: nn.Module, clean: Samples) -> None:
    make, expected = PLANTED[name]
    diagnosis = examined(make(mlp).eval(), clean)
    assert expected <= found(diagnosis)
    assert diagnosis.masked
    assert diagnosis.forward + diagnosis.backward <= 1500
    assert all(finding.next and finding.says for finding in diagnosis.suspicious)
    assert not any(finding.next for finding in diagnosis.findings if not finding.found)
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["masked"]


def test_finds_defensive_distillation(mlp: nn.Module, digits: Samples, clean: Samples) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    diagnosis = examined(masked.distilled(mlp, student, digits[0]), clean)
    assert found(diagnosis) == {"saturated-softmax"}
    measured = of(diagnosis, "saturated-softmax")
    assert measured["zero_cross_entropy_float32"] > measured["zero_cross_entropy_float64"]
    assert measured["fooled_by_pgd_on_margin"] > measured["fooled_by_pgd_on_cross_entropy"]


@pytest.fixture(scope="session")
def hardened(digits: Samples) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = sp.zoo.build("digits-cnn")
    adversary = sp.Adversarial(attack=sp.attacks.PGD(steps=4), threat=THREAT)
    sp.train(net, (digits[0][:800], digits[1][:800]), adversary=adversary, epochs=4, learning_rate=3e-3)
    return net


@pytest.fixture(scope="session")
def linear(digits: Samples) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = sp.zoo.build("softmax", in_shape=(1, 8, 8))
    sp.train(net, digits, epochs=10, learning_rate=1e-2)
    return net


@pytest.mark.parametrize(
    ("name", "source"),
    [("mlp", "cnn"), ("cnn", "mlp"), ("hardened", "mlp"), ("linear", "mlp")],  # each trained apart from the other
    ids=["mlp", "cnn", "hardened", "linear"],
)
def test_says_nothing_about_honest_networks(name: str, source: str, request: pytest.FixtureRequest, clean: Samples) -> None:
    diagnosis = examined(request.getfixturevalue(name), clean, sources=[request.getfixturevalue(source)])
    assert not diagnosis.suspicious
    assert not diagnosis.masked
    assert all(finding.measured for finding in diagnosis.findings)
    assert "no sign of masked gradients" in diagnosis.summary()


@pytest.mark.parametrize(
    ("name", "source"),
    [("bit_depth", "mlp"), ("detached", "mlp"), ("numpy", "mlp"), ("ripple", "mlp"), ("chaos", "cnn"), ("root", "cnn")],
)
def test_finds_what_the_gradients_of_another_model_find(
    name: str, source: str, mlp: nn.Module, request: pytest.FixtureRequest, clean: Samples
) -> None:
    net = PLANTED[name][0](mlp).eval()
    diagnosis = examined(net, clean, sources=[request.getfixturevalue(source)])
    (finding,) = (finding for finding in diagnosis.suspicious if finding.name == "transfer")
    assert "sources=" in finding.next
    assert finding.measured["fooled_by_transfer_only"] > finding.measured["fooled_by_pgd"]
    alone = examined(net, clean)
    assert [f for f in diagnosis.findings if f.name != "transfer"] == [f for f in alone.findings if f.name != "transfer"]


@pytest.mark.parametrize("threat", [THREAT, sp.L2(0.8), sp.L1(4.0), sp.L0(5)], ids=["linf", "l2", "l1", "l0"])
def test_borrowed_gradients_find_what_the_models_own_would(threat: sp.Linf, mlp: nn.Module, clean: Samples) -> None:
    """Cut off from its gradients, the network gets the very same ones back."""
    own = of(examined(mlp, clean, threat), "black-box")["fooled_by_pgd"]
    cut_off = around(after=torch.Tensor.detach)(mlp)
    measured = of(examined(cut_off, clean, threat, [mlp]), "transfer")
    assert measured["fooled_by_transfer"] == measured["fooled_by_transfer_only"] == own > 0
    assert measured["fooled_by_pgd"] == 0


def test_each_source_counts(mlp: nn.Module, clean: Samples) -> None:
    masked_too = around(masked.quantised)(mlp)  # leads nowhere
    cut_off = around(after=torch.Tensor.detach)(mlp)
    none, one, both = (
        of(examined(cut_off, clean, sources=sources), "transfer")["fooled_by_transfer"]
        for sources in ([masked_too], [mlp], [masked_too, mlp])
    )
    assert none < one == both


def test_without_other_models_transfer_is_not_measured(mlp: nn.Module, clean: Samples) -> None:
    diagnosis = examined(mlp, clean)
    (finding,) = (finding for finding in diagnosis.findings if not finding.measured)
    assert (finding.name, finding.found) == ("transfer", False)
    assert "no other models were given" in finding.says
    assert sum("transfer" in line for line in diagnosis.summary().splitlines()) == 1


@pytest.mark.parametrize(
    "threat",
    [sp.L2(0.8), sp.L1(4.0), sp.L0(5), sp.Linf([0.1] * 15 + [0.2], mask=torch.ones(1, 8, 8) > 0, grid=1 / 16)],
    ids=["l2", "l1", "l0", "each_its_own"],
)
def test_in_every_norm(threat: sp.Linf, linear: nn.Module, clean: Samples) -> None:
    diagnosis = examined(linear, clean, threat)
    assert not diagnosis.suspicious
    assert of(diagnosis, "black-box")["fooled_by_pgd"] > 0


def test_one_class_everywhere_is_no_masking(clean: Samples) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        net[1].bias[2] += 100  # no input reaches the other classes
    x = clean[0]
    diagnosis = examined(net, (x, torch.full((len(x),), 2)))
    assert of(diagnosis, "unbounded")["standing"] == 1
    assert not diagnosis.suspicious


def test_training_mode_is_told_and_is_no_masking(cnn: nn.Module, clean: Samples) -> None:
    cnn.train()
    try:
        diagnosis = examined(cnn, clean)
        assert all(module.training for module in cnn.modules())
    finally:
        cnn.eval()
    assert found(diagnosis) == {"train-mode"}
    assert not diagnosis.masked
    assert "train-mode" in diagnosis.summary()


def test_training_mode_without_consequences_is_nothing(mlp: nn.Module, clean: Samples) -> None:
    mlp.train()
    try:
        diagnosis = examined(mlp, clean)
    finally:
        mlp.eval()
    assert of(diagnosis, "train-mode")["modules_in_training"] == 5
    assert not diagnosis.suspicious


def test_a_plain_function_will_do(mlp: nn.Module, clean: Samples) -> None:
    diagnosis = examined(lambda x: mlp(masked.quantised(x)), clean)
    assert "piecewise-constant" in found(diagnosis)
    assert "zero_margin_float64" not in of(diagnosis, "vanished-gradients")  # it cannot be had in float64


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_leaves_nothing_behind_and_counts_what_it_does(mlp: nn.Module, cnn: nn.Module, clean: Samples) -> None:
    x, y = clean[0][:6], clean[1][:6]
    counting, source = Counting(mlp), Counting(cnn).train()
    model, before, states = (
        sp.Model(masked.Around(counting, masked.noisy).eval()),
        [snapshot(mlp), snapshot(cnn)],
        random_states(),
    )
    try:
        diagnosis = diagnose(model, x, y, THREAT, sources=[sp.Model(source)])
        assert [snapshot(mlp), snapshot(cnn)] == before
    finally:
        cnn.eval()
    assert random_states() == states
    assert source.backward_rows > len(x)
    copied = diagnosis.attacked  # the copy in float64 counts for itself: one forward pass, backward from two losses
    assert model.queries.forward == counting.forward_rows + copied == pytest.approx(6 * diagnosis.forward)
    assert (
        model.queries.backward
        == counting.backward_rows + source.backward_rows + 2 * copied
        == pytest.approx(6 * diagnosis.backward)
    )


def test_a_declared_random_defense_needs_no_more_averaging(mlp: nn.Module, clean: Samples) -> None:
    defended = sp.Defended(sp.Model(mlp), [GaussianNoise(0.2)], draws=4)
    (first, *_) = diagnose(defended, clean[0][:6], clean[1][:6], THREAT).suspicious
    assert first.name == "randomness"
    assert "averaged over 4 draws" in first.next


def test_looks_at_the_first_samples_that_are_right(mlp: nn.Module, clean: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "SAMPLES", 8)
    x, y = clean
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % 10
    diagnosis = examined(mlp, (x, wrong))
    assert (diagnosis.samples, diagnosis.attacked) == (8, 4)
    with_others = examined(mlp, (x[:8], wrong[:8]))
    assert replace(with_others, seconds=0.0) == replace(diagnosis, seconds=0.0)


@pytest.mark.parametrize("count", [0, 4])
def test_without_samples_nothing_is_measured(count: int, mlp: nn.Module, clean: Samples) -> None:
    x, y = clean[0][:count], (clean[1][:count] + 1) % 10
    diagnosis = examined(mlp, (x, y), sources=[mlp])
    assert not diagnosis.suspicious
    assert all(finding.says.startswith("not measured") for finding in diagnosis.findings)


@pytest.mark.parametrize(
    ("threat", "complaint"),
    [(sp.Minimize("l2"), "positive size"), (sp.Linf(0.0), "positive size")],
    ids=["minimize", "zero"],
)
def test_refuses_threats_without_a_size(threat: sp.Linf, complaint: str, mlp: nn.Module, clean: Samples) -> None:
    with pytest.raises(sp.InputError, match=complaint):
        diagnose(sp.Model(mlp), *clean, threat)


def test_refuses_what_it_cannot_examine(mlp: nn.Module, clean: Samples) -> None:
    x, y = clean
    with pytest.raises(sp.CapabilityError, match="gradients"):
        diagnose(sp.Model(mlp, access=sp.Access.SCORES), x, y, THREAT)
    with pytest.raises(sp.InputError, match="Saddlepoint model"):
        diagnose(mlp, x, y, THREAT)  # type: ignore[arg-type]
    with pytest.raises(sp.InputError, match="one class per input"):
        diagnose(sp.Model(mlp), x, y[:5], THREAT)
    with pytest.raises(sp.ModelError, match="fails on inputs of shape"):
        diagnose(sp.Model(mlp), x[:, :, :4], y, THREAT)


def test_refuses_sources_that_do_not_fit(mlp: nn.Module, clean: Samples) -> None:
    model, fits = sp.Model(mlp), sp.Model(mlp)

    def refused(error: type[Exception], complaint: str, *sources: object) -> None:
        with pytest.raises(error, match=complaint):
            diagnose(model, *clean, THREAT, sources=sources)  # type: ignore[arg-type]

    for access in (sp.Access.LABELS, sp.Access.SCORES):
        refused(sp.CapabilityError, r"sources\[1\] .*gradients", fits, sp.Model(mlp, access=access))
    refused(sp.InputError, r"sources\[1\] must be a Saddlepoint model", fits, mlp)
    refused(sp.InputError, "bounds of model and source differ", sp.Model(mlp, bounds=(-1, 1)))
    refused(sp.InputError, r"outputs: \(8, 10\) and \(8, 7\)", sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 7))))
    refused(sp.ModelError, r"sources\[0\] fails on inputs of shape", sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(63, 10))))
    refused(sp.ModelError, r"sources\[0\] gives no gradients", sp.Model(around(after=torch.Tensor.detach)(mlp)))
    with pytest.raises(sp.InputError, match="list of models"):
        diagnose(model, *clean, THREAT, sources=fits)  # type: ignore[arg-type]


REAL = os.environ.get("SADDLEPOINT_DATA")
PUBLISHED = {
    "mnist_lenet_standard": 0.1,
    "cifar10_cnnA_adv": 2 / 255,
    "cifar10_convsmall_pgd": 2 / 255,
    "cifar10_resnet20_standard": 2 / 255,
}


@pytest.mark.skipif(REAL is None, reason="SADDLEPOINT_DATA is not set")
@pytest.mark.parametrize("name", PUBLISHED)
def test_says_nothing_about_published_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    published, root = importlib.import_module("zoo"), Path(str(REAL))
    net, mean, std, _ = published.reference(name, root)
    split = published.test_split(published.REFERENCES[name].dataset, root).take(12)
    assert not diagnose(sp.Model(net, mean=mean, std=std), split.x, split.y, sp.Linf(PUBLISHED[name])).suspicious
