"""The attack that begins where bounds are least."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract_support import Counting, random_states, snapshot
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks import PGD, BoundGuided, Restarts
from saddlepoint.errors import CapabilityError, InputError, ModelError
from saddlepoint.propagation.regions import inputs_of
from saddlepoint.threats import ball
from saddlepoint.verify.vnnlib import read_vnnlib

MNIST = Path(os.environ.get("SADDLEPOINT_DATA", "nowhere")) / "verification" / "mnist_fc"
FEATURES = 12
EPS = {"linf": 0.2, "l2": 0.6, "l1": 1.5}

each_norm = pytest.mark.parametrize("norm", EPS)


@pytest.fixture(scope="module")
def relus(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A network of ReLUs on digits."""
    from contract_support import train

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return train(nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), *digits, epochs=40)


class Walled(nn.Module):
    """Class 0 but for a corner of the box, where a ReLU wakes up: no gradient leads there."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.Linear(FEATURES, 1)
        self.out = nn.Linear(1, 2)
        with torch.no_grad():
            self.sum.weight.copy_(torch.tensor([1.0, -1.0]).repeat(FEATURES // 2)[None])
            self.sum.bias.fill_(-0.9 * 0.2 * FEATURES)
            self.out.weight.copy_(torch.tensor([[0.0], [20.0]]))
            self.out.bias.copy_(torch.tensor([2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.sum(x)))


def test_it_sees_what_gradients_do_not() -> None:
    model, x, y = sp.Model(Walled()), torch.full((3, FEATURES), 0.5), torch.zeros(3, dtype=torch.int64)
    blind = sp.attack(model, x, y, Restarts(PGD(), 10), sp.Linf(0.2))
    assert not blind.success.any()
    assert (blind.zero_gradients > 0).all()
    found = sp.attack(model, x, y, BoundGuided(model, steps=3), sp.Linf(0.2))
    assert found.success.all()
    assert (model.predict(found.adversarial) == 1).all()


@pytest.mark.skipif(not MNIST.exists(), reason="needs SADDLEPOINT_DATA")
def test_it_breaks_instances_of_mnist_fc_that_pgd_does_not() -> None:
    model = sp.Model(str(MNIST / "onnx" / "mnist-net_256x2.onnx.gz"))
    for name, eps in (("prop_2_0.03", 0.03), ("prop_0_0.05", 0.05)):
        lower, upper = (
            getattr(read_vnnlib(MNIST / "vnnlib" / f"{name}.vnnlib.gz").cases[0], end) for end in ("lower", "upper")
        )
        x = torch.where(lower > 0, lower + eps, upper - eps)
        x = (torch.round(x * 255) / 255).clamp(0, 1).float().view(1, *model.net.shape)  # type: ignore[union-attr]
        y = model.predict(x)
        assert not sp.attack(model, x, y, Restarts(PGD(loss="margin"), 5), sp.Linf(eps)).success.any()
        found = sp.attack(model, x, y, BoundGuided(model), sp.Linf(eps))
        assert found.success.all()
        assert model.predict(found.adversarial) != y


@each_norm
@pytest.mark.parametrize("goal", [None, sp.Targeted("next")], ids=["untargeted", "targeted"])
def test_output_and_cost(norm: str, goal: sp.Targeted | None, relus: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    counting = Counting(relus)
    model, attack = sp.Model(counting), BoundGuided(sp.Model(relus), steps=5, classes=2)
    for eps in (EPS[norm], 1e-3):
        threat = ball(norm, eps)
        counting.calls.clear()
        counting.backward_rows = 0
        result = sp.attack(model, x, y, attack, threat, goal, keep="margin")
        queries = result.queries
        assert sum(counting.calls) == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
        assert counting.backward_rows == int(queries.backward.sum())
        survived = result.having("survived")
        assert (queries.forward[survived] == 1 + 5 * 8).all()
        assert (queries.backward[survived] == 5 * 8).all()
        assert threat.contains(result.adversarial, x, model.bounds).all()
        predicted = model.predict(result.adversarial)
        reached = predicted == result.targets if goal else predicted != y
        assert reached[result.success].all()
    assert survived.any()
    some = sp.attack(model, x, y, attack, ball(norm, EPS[norm]), goal)
    assert some.having("fooled").any()


@each_norm
def test_starts_are_optimal_on_linear_models(norm: str) -> None:
    """There bounds are exact: the first look finds the best point of the ball."""
    net = nn.Linear(6, 4).double()
    model = sp.Model(net, bounds=None)
    x = torch.rand(10, 6, dtype=torch.float64)
    y, threat = model.predict(x), ball(norm, 0.1)
    result = sp.attack(model, x, y, BoundGuided(model, steps=1), threat, keep="margin")
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    with torch.no_grad():
        difference = net.weight[None] - net.weight[y][:, None]
        margins = net(x) - net(x).gather(1, y[:, None]) + 0.1 * torch.linalg.vector_norm(difference, dual, dim=2)
    best = margins.scatter(1, y[:, None], -torch.inf)
    # of three classes the one of the least bound is the best one, whichever the starts
    torch.testing.assert_close(result.margin, best.amax(1), rtol=1e-5, atol=1e-7)


def test_it_is_at_least_as_strong_as_pgd_on_digits(relus: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model, x, y = sp.Model(relus), digits[0][:60], digits[1][:60]
    guided = sp.attack(model, x, y, BoundGuided(model), sp.Linf(0.08))
    pgd = sp.attack(model, x, y, PGD(loss="margin"), sp.Linf(0.08))
    assert 0 < int(pgd.success.sum()) <= int(guided.success.sum()) < 60


def test_batches_order_and_seed_do_not_matter(
    relus: nn.Module, samples: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sp.Model(relus)
    attack = BoundGuided(model, steps=6)
    whole = sp.attack(model, *samples, attack, sp.Linf(0.1), keep="margin")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("saddlepoint.attacks.guided._ELEMENTS", 1)  # one sample's bounds at a time
    other = sp.attack(model, samples[0][order], samples[1][order], attack, sp.Linf(0.1), keep="margin", batch_size=5, seed=9)
    assert (other.status == whole.status[order.numpy()]).all()
    torch.testing.assert_close(other.margin, whole.margin[order], rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind(cnn: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    net = cnn
    before, states = snapshot(net), random_states()
    sp.attack(sp.Model(net), *samples, BoundGuided(sp.Model(net), steps=2), sp.Linf(0.05))
    assert snapshot(net) == before
    assert random_states() == states


def test_mask_grid_size_zero_and_no_samples(relus: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = sp.Model(relus), samples
    attack, x = BoundGuided(model, steps=3), torch.round(x * 255) / 255
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:6] = True
    for norm in EPS:
        threat = type(ball(norm, 1.0))(EPS[norm], mask=mask, grid=1 / 255)
        result = sp.attack(model, x, y, attack, threat)
        assert threat.contains(result.adversarial, x, (0, 1)).all()
        assert torch.equal(result.adversarial[:, ~mask], x[:, ~mask])
        assert torch.equal(sp.attack(model, x, y, attack, ball(norm, 0.0)).adversarial, x)
    assert len(sp.attack(model, x[:0], y[:0], attack, sp.Linf(0.1))) == 0


def test_the_budget_holds(relus: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    model = sp.Model(relus)
    for passes in (1, 20, 60):
        result = sp.attack(
            model, *samples, BoundGuided(model, classes=2), sp.Linf(1e-3), budget=sp.Budget(passes=passes), keep="margin"
        )
        assert (result.queries.total <= passes).all()
        assert torch.isfinite(result.margin).all()


def test_it_reads_weights_anew_and_transfers(relus: nn.Module, mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = sp.Model(mlp), samples
    other = sp.attack(model, x, y, BoundGuided(sp.Model(relus), steps=1), sp.Linf(0.1), keep="margin")
    own = sp.attack(model, x, y, BoundGuided(model, steps=1), sp.Linf(0.1), keep="margin")
    right = own.clean_predicted == y
    assert float(own.margin[right].mean()) > float(other.margin[right].mean())
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    changing = sp.Model(net)
    attack = BoundGuided(changing, steps=1)
    first = sp.attack(changing, x, changing.predict(x), attack, sp.Linf(0.01), keep="margin")
    with torch.no_grad():
        net[1].weight.neg_()
    again = sp.attack(changing, x, changing.predict(x), attack, sp.Linf(0.01), keep="margin")
    fresh = sp.attack(changing, x, changing.predict(x), BoundGuided(changing, steps=1), sp.Linf(0.01), keep="margin")
    assert torch.equal(again.adversarial, fresh.adversarial)
    assert not torch.equal(again.adversarial, first.adversarial)


def test_how_it_is_made_and_written_down(relus: nn.Module) -> None:
    model = sp.Model(relus)
    attack = BoundGuided(model)
    assert attack == BoundGuided(model) == replace(replace(attack, steps=7), steps=40)
    assert hash(attack) == hash(BoundGuided(model))
    assert attack != BoundGuided(sp.Model(relus), steps=41)
    settings = json.loads(json.dumps(attack.settings()))
    assert settings["steps"] == 40
    assert settings == BoundGuided(sp.Model(relus)).settings()
    assert len(repr(attack)) < 80
    for bad in ({"steps": 0}, {"classes": 1.5}):
        with pytest.raises(InputError, match="a whole number"):
            BoundGuided(model, **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sp\.Model"):
        BoundGuided(relus)  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="parameters"):
        BoundGuided(sp.Model(relus, access=sp.Access.GRADIENTS))
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(CapabilityError, match="parameters"):
        sp.attack(sp.Model(relus, access=sp.Access.GRADIENTS), x, y, attack, sp.Linf(0.1))
    with pytest.raises(CapabilityError, match="l0"):
        sp.attack(model, x, y, attack, sp.L0(3))
    with pytest.raises(InputError, match="2 classes"):
        sp.attack(sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 2))), x, y, attack, sp.Linf(0.1))

    class Sorting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(1).values[:, :10]

    with pytest.raises(ModelError, match="sort"):
        sp.attack(sp.Model(Sorting()), x, y, BoundGuided(sp.Model(Sorting())), sp.Linf(0.1))
    with pytest.raises(CapabilityError, match="l-infinity, l2 and l1"):
        inputs_of(sp.L0(3).around(x))
