"""What `estimate` foretells: a real evaluation costs no less and no more, and nothing is attacked to find out."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict

import pytest
import torch
from contract_support import Counting
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.evaluate import Effort, cascade
from saddlepoint.threats import Threat

Samples = tuple[Tensor, Tensor]
THREATS = [sp.Linf(0.05), sp.L2(0.4), sp.L1(1.5), sp.L0(2)]


def name(threat: Threat) -> str:
    return threat.norm.value


def check(expected: sp.Estimate, found: sp.Evaluation) -> None:
    spent = found.queries.total
    assert expected.least <= int(spent.min())
    assert int(spent.max()) <= expected.most
    assert expected.samples == len(found)
    assert 0 < expected.seconds[0] < expected.seconds[1]


@pytest.fixture(scope="module")
def few(samples: Samples) -> Samples:
    """Some of them wrong from the start."""
    return samples[0][:12], samples[1][:12]


@pytest.mark.parametrize("threat", THREATS, ids=name)
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_real_costs_lie_between(threat: Threat, effort: Effort, mlp: nn.Module, samples: Samples) -> None:
    expected = sp.estimate(sp.Model(mlp), samples[0], threat, effort)
    found = sp.evaluate(sp.Model(mlp), *samples, threat, effort)
    check(expected, found)
    if threat.norm is not sp.Norm.L0:  # whose first look comes with gradients
        assert expected.least == int(found.queries.total.min())  # four are wrong from the start


@pytest.mark.parametrize("threat", THREATS, ids=name)
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_the_most_is_paid_where_nothing_falls(
    threat: Threat, effort: Effort, mlp: nn.Module, few: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where all looks suspicious. Forks, in l0 above all, cost less: their first attack or a branch, not both."""
    monkeypatch.setattr(cascade._Cascade, "signs", lambda run: run._misled() is not None and ["suspicious"])
    monkeypatch.setattr(cascade._Cascade, "diagnose", lambda run, sources: None)
    x, none = few[0][:4], threat.at(0.0)  # so few that each rung holds them all
    y = sp.Model(mlp).predict(x)
    source = sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    settings = {"curve": True, "sources": [source]}
    expected = sp.estimate(sp.Model(mlp), x, none, effort, **settings)  # type: ignore[arg-type]  # as they are called
    found = sp.evaluate(sp.Model(mlp), x, y, none, effort, **settings)  # type: ignore[call-overload]
    assert bool(found.stands.all())
    check(expected, found)
    assert int(found.queries.total.max()) >= (0.4 if threat.norm is sp.Norm.L0 else 0.6) * expected.most


@pytest.mark.parametrize("threat", THREATS, ids=name)
def test_models_without_gradients(threat: Threat, mlp: nn.Module, few: Samples) -> None:
    class Detached(nn.Module):
        """No path to the input."""

        def forward(self, x: Tensor) -> Tensor:
            return mlp(x.detach())

    for model in (sp.Model(mlp, access=sp.Access.SCORES), sp.Model(Detached())):
        try:
            found = sp.evaluate(model, *few, threat, "quick")
        except CapabilityError as error:  # not in every norm is there a search for such models
            with pytest.raises(CapabilityError, match=re.escape(str(error))):
                sp.estimate(model, few[0], threat, "quick")
            continue
        expected = sp.estimate(model, few[0], threat, "quick")
        check(expected, found)
        assert expected.most < 400
        assert expected.memory is None
        assert "not known" in expected.summary()


def test_random_models(mlp: nn.Module, few: Samples) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mlp(x + 0.1 * torch.randn_like(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.SaddlepointWarning)
        for model in (sp.Model(Noisy()), sp.Defended(sp.Model(Noisy()), [], draws=3)):
            expected = sp.estimate(model, few[0], sp.Linf(0.1), "quick")
            check(expected, sp.evaluate(model, *few, sp.Linf(0.1), "quick"))
            assert expected.least == model.draws


def test_passes_are_few_and_counted(mlp: nn.Module, samples: Samples) -> None:
    counting = Counting(mlp)
    model = sp.Model(counting)
    before = [tensor.clone() for tensor in (samples[0], *mlp.parameters())]
    state = torch.random.get_rng_state()
    sp.estimate(model, samples[0], sp.Linf(0.1), "thorough")
    assert (model.queries.forward, model.queries.backward) == (counting.forward_rows, counting.backward_rows)
    assert model.queries.forward < 20 * len(samples[0])
    assert torch.equal(state, torch.random.get_rng_state())
    for old, tensor in zip(before, (samples[0], *mlp.parameters()), strict=True):
        assert torch.equal(old, tensor)
        assert tensor.grad is None
    assert not samples[0].requires_grad


def test_memory_is_what_autograd_keeps(few: Samples) -> None:
    """A layer that keeps its input, another that keeps its output, and the margin, which keeps a few numbers."""

    def memory(width: int, batch_size: int) -> int:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
        found = sp.estimate(sp.Model(net), few[0], sp.Linf(0.1), batch_size=batch_size)
        assert found.batch == batch_size
        assert found.memory is not None
        return found.memory

    assert memory(5000, 8) - memory(1000, 8) == 4 * 8 * 4000
    assert memory(1000, 8) == 2 * memory(1000, 4)
    assert memory(1000, 8) < 4 * 8 * (1000 + 64 + 200)


def test_samples_keep_their_own_sizes(mlp: nn.Module, few: Samples) -> None:
    eps = torch.linspace(0, 0.1, len(few[0]))
    check(sp.estimate(sp.Model(mlp), few[0], sp.Linf(eps), "quick"), sp.evaluate(sp.Model(mlp), *few, sp.Linf(eps), "quick"))


def test_words_and_figures(mlp: nn.Module, samples: Samples) -> None:
    expected = sp.estimate(sp.Model(mlp), samples[0], sp.Linf(0.1), batch_size=7)
    assert expected.batch == 7
    assert expected.kept >= 2 * samples[0].nbytes  # the evaluation's own, and the first stage's
    text = expected.summary()
    assert text.startswith("Estimate for 24 samples\n")
    assert f"1 to {expected.most:,} (forward and backward" in text
    assert "KiB at its peak, for a batch of 7" in text
    assert expected.to_dict() == asdict(expected) | {"seconds": list(expected.seconds)}
    much = sp.Estimate(10**6, 1, 5000, (30.0, 3 * 86400.0), 3 * 2**30, 5 * 2**40, 1024).summary()
    assert "30 s to 3.0 days" in much
    assert "3.0 GiB" in much
    assert "kept: 5120.0 GiB" in much


def test_no_samples(mlp: nn.Module) -> None:
    assert sp.estimate(sp.Model(mlp), torch.zeros(0, 1, 8, 8), sp.Linf(0.1)).most == 0


def test_what_cannot_be_evaluated_cannot_be_estimated(mlp: nn.Module, few: Samples) -> None:
    model, x = sp.Model(mlp), few[0]
    with pytest.raises(UnknownNameError, match="standard"):
        sp.estimate(model, x, sp.Linf(0.1), "standart")  # type: ignore[arg-type]  # the mistake in question
    with pytest.raises(InputError, match="one threat"):
        sp.estimate(model, x, [sp.Linf(0.1)])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tensor"):
        sp.estimate(model, x.numpy(), sp.Linf(0.1))
    with pytest.raises(InputError, match=r"sp\.distance"):
        sp.estimate(model, x, sp.Minimize("l2"))
    with pytest.raises(InputError, match="bounds"):
        sp.estimate(model, x + 1, sp.Linf(0.1))


def test_a_model_of_labels(mlp: nn.Module, few: Samples) -> None:
    oracle = sp.Model(mlp, access=sp.Access.LABELS)
    for threat in (sp.Linf(0.05), sp.L2(0.3)):
        for curve in (False, True):
            expected = sp.estimate(oracle, few[0], threat, "quick", curve=curve)
            check(expected, sp.evaluate(oracle, *few, threat, "quick", curve=curve))
