"""Programmes of tiny networks equal the enumeration of activation patterns; nearest inputs equal grids and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import CapabilityError, InputError, ModelError
from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.graph import Exported, export, read
from saddlepoint.propagation.methods import Method, bounds
from saddlepoint.verify.exact import nearest, proved_radius
from saddlepoint.verify.milp import Programme, System

ROW = torch.tensor([1.0, -1.0, 0.0])
QUICK = {norm: sp.attacks.minimal(norm, passes=100) for norm in ("linf", "l1")}
METHODS: tuple[Method, ...] = ("ibp", "crown", "alpha-crown")


def small(*, inputs: int = 2, hidden: int = 4, activation: nn.Module | None = None) -> tuple[sp.Model, Exported]:
    """A network, read once: its graph follows its weights."""
    act = activation or nn.ReLU()
    net = nn.Sequential(nn.Linear(inputs, hidden), act, nn.Linear(hidden, hidden), act, nn.Linear(hidden, 3))
    model = sp.Model(net, bounds=(0, 1))
    return model, export(model, torch.zeros(1, inputs))


def drawn(model: sp.Model, seed: int) -> nn.Sequential:
    """Other weights, in place; the outputs are about 0 on average, so that all classes occur."""
    net = model.net
    assert isinstance(net, nn.Sequential)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        last = net[-1]
        assert isinstance(last, nn.Linear)
        last.bias -= net(torch.rand(200, next(net.parameters()).shape[1], generator=generator)).mean(0)
    return net


def enumerated(net: nn.Sequential, box: Box, row: Tensor, slope: float = 0.0) -> float:
    """The least value by a linear programme for each of all activation patterns: an independent second source."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    ends = list(zip(box.lower[0].double().numpy(), box.upper[0].double().numpy(), strict=True))
    least = math.inf
    for pattern in itertools.product([0, 1], repeat=sum(layer.out_features for layer in layers[:-1])):
        left, conditions, limits = list(pattern), [], []
        matrix, constant = np.eye(len(ends)), np.zeros(len(ends))
        for layer in layers:
            weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            matrix, constant = weight @ matrix, weight @ constant + bias
            if layer is not layers[-1]:
                on = np.array([left.pop(0) for _ in constant])
                conditions.append((1 - 2 * on)[:, None] * matrix)  # -z <= 0 where it is on, z <= 0 where it is off
                limits.append(-(1 - 2 * on) * constant)
                kept = np.where(on, 1.0, slope)
                matrix, constant = kept[:, None] * matrix, kept * constant
        cost = row.double().numpy()
        found = linprog(cost @ matrix, A_ub=np.concatenate(conditions), b_ub=np.concatenate(limits), bounds=ends)
        if found.status == 0:
            least = min(least, found.fun + cost @ constant)
    return least


@pytest.mark.parametrize("slope", [0.0, 0.2, 0.6])
def test_programmes_equal_the_enumeration_of_activation_patterns(slope: float) -> None:
    model, exported = small(hidden=3, activation=nn.LeakyReLU(slope) if slope else nn.ReLU())
    for seed in range(2):
        net = drawn(model, seed)
        x = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed))
        box = Box(x - 0.7, x + 0.7)
        programme = Programme(exported.graph(), x)
        found = programme.minimise(box, ROW)
        assert found.status == "optimal"
        assert found.x is not None
        assert found.value == pytest.approx(enumerated(net, box, ROW, slope), abs=1e-6)
        assert found.bound == pytest.approx(found.value, abs=1e-6)
        assert ((found.x >= box.lower[0]) & (found.x <= box.upper[0])).all()
        assert float(net(found.x[None])[0].detach() @ ROW) == pytest.approx(found.value, abs=1e-4)  # float32


def test_bounds_are_never_above_the_least_value_and_save_binaries() -> None:
    model, exported = small()
    for seed in range(40):
        drawn(model, seed)
        x = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed))
        box = Box(x - 0.4, x + 0.4)
        graph = exported.graph()
        bounded = Bounded.of(graph, box.lower, box.upper)
        with torch.no_grad():
            bounded.refine()
        programme = Programme(graph, x)
        found = programme.minimise(box, ROW, bounded.boxes)
        for method in METHODS if seed < 4 else METHODS[:2]:
            assert float(bounds(graph, box.lower, box.upper, ROW[None, None], method)) <= found.bound + 1e-4  # float32
        assert programme.leaf(bounded.boxes, {}, ROW)[0] <= found.bound + 1e-6
        assert len(programme.system(bounded.boxes).whole) <= len(programme.system({graph.input: box}).whole)
        if seed < 6:
            assert programme.minimise(box, ROW).value == pytest.approx(found.value, abs=1e-6)


def test_leaves_are_exact_where_all_signs_are_fixed_and_cover_the_box() -> None:
    model, exported = small(hidden=3)
    for seed in range(2):
        net = drawn(model, seed)
        x = torch.full((1, 2), 0.5)
        box = Box(x - 0.7, x + 0.7)
        graph = exported.graph()
        programme = Programme(graph, x)
        first, second = (node.name for node in graph.nodes if not node.affine)
        values = []
        for pattern in itertools.product([-1, 1], repeat=6):
            signs = torch.tensor(pattern, dtype=torch.int8)
            value, point = programme.leaf({graph.input: box}, {first: signs[:3], second: signs[3:]}, ROW, 2.0)
            values.append(value)
            if point is None:
                assert value == math.inf
                continue
            inner = graph.values(point[None])
            z = torch.cat([inner[node.inputs[0]][0] for node in graph.nodes if not node.affine])
            assert (z.detach() * signs >= -1e-5).all()
            assert float(inner[graph.output][0].detach() @ ROW) + 2 == pytest.approx(value, abs=1e-4)
        assert min(values) == pytest.approx(enumerated(net, box, ROW) + 2, abs=1e-6)
        assert math.inf in values  # two inputs don't see all patterns


def test_a_linear_programmes_value_needs_no_trust_in_the_solver() -> None:
    """Weak duality bounds the objective from below for any multipliers; for the solver's it equals the least value."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        matrix = generator.normal(size=(4, 5))
        inside = generator.uniform(-1, 1, 5)
        low, high = matrix @ inside - generator.uniform(0, 1, 4), matrix @ inside + generator.uniform(0, 1, 4)
        low[0] = high[0] = matrix[0] @ inside
        low[1], high[2] = -math.inf, math.inf
        cost = generator.normal(size=5)
        system = System(sparse.csr_array(matrix), low, high, np.full(5, -1.0), np.ones(5), np.zeros(5, dtype=bool))
        bound, v = system.lowest(cost)
        assert v is not None
        assert bound == pytest.approx(cost @ v, abs=1e-9)
        assert bound <= cost @ inside + 1e-12


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(nn.functional.max_pool2d(self.conv(x), 3, 2, 1)).flatten(1))


def test_max_pooling() -> None:
    torch.manual_seed(0)
    model, x = sp.Model(Pooled(), bounds=None), torch.rand(1, 1, 4, 4)
    programme = Programme(read(model, x), x)
    v = programme.variables(x)
    torch.testing.assert_close(torch.from_numpy(programme.outputs(v)).float(), model.logits(x)[0])
    # inputs between two ends only: 2^5 corners of a small box, and points inside, are no less
    free = torch.zeros_like(x)
    free.view(-1)[[0, 5, 6, 9, 15]] = 1
    box = Box(x - free, x + free)
    found = programme.minimise(box, ROW)
    points = torch.cat(
        [x + free * (2 * torch.rand(4000, 1, 4, 4) - 1), x + free * (2.0 * torch.randint(2, (500, 1, 4, 4)) - 1)]
    )
    sampled = float((model.logits(points) @ ROW).min())
    assert found.x is not None
    assert found.value <= sampled + 1e-5
    assert float(model.logits(found.x[None])[0] @ ROW) == pytest.approx(found.value, abs=1e-5)
    assert found.bound == pytest.approx(found.value, abs=1e-5)
    assert found.value > sampled - 0.5
    with pytest.raises(ModelError, match="ceil_mode"):
        Programme(
            read(sp.Model(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), bounds=None), x[..., :3]), x[..., :3]
        )


def on_grid(model: sp.Model, x: Tensor, y: Tensor, norm: str, count: int = 201) -> Tensor:
    """Each input's distance to the nearest point of a grid with another class."""
    axis = torch.linspace(0, 1, count)
    grid = torch.cartesian_prod(axis, axis)
    other = model.predict(grid, batch_size=len(grid))
    size = {"linf": lambda d: d.abs().amax(1), "l1": lambda d: d.abs().sum(1)}[norm]
    return torch.stack([size(grid[other != c] - one).min() for one, c in zip(x, y, strict=True)]).double()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_nearest_inputs_equal_dense_grids_and_no_attack_comes_nearer(norm: str) -> None:
    model, _ = small()
    for seed in (0,):
        drawn(model, seed)
        x = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
        y = model.predict(x)
        found = nearest(model, x, y, norm, attack=QUICK[norm])
        assert found.proved.all()
        assert (model.predict(found.points) != y).all()
        assert ((found.points >= 0) & (found.points <= 1)).all()
        grid = on_grid(model, x, y, norm)
        assert (found.distance <= grid + 1e-6).all()
        assert (found.lower >= grid - (1 if norm == "linf" else 2) / 200 - 1e-3 * grid).all()  # a step from any point
        for method in (sp.attacks.Bisect(sp.attacks.PGD(steps=8)), QUICK[norm]):
            if norm == "l1" and isinstance(method, sp.attacks.Bisect):
                continue
            tried = sp.attack(model, x, y, method, sp.Minimize(norm))
            assert (tried.distance >= found.lower).all()
        graph = read(model, x[:1])
        for i in range(2):
            assert proved_radius(graph, x[i], int(y[i]), (0, 1), 1.0) <= float(found.distance[i])


def test_a_weak_first_attack_leads_to_the_same_distance() -> None:
    model, _ = small()
    drawn(model, 1)
    x = torch.rand(2, 2, generator=torch.Generator().manual_seed(1))
    y = model.predict(x)
    strong, weak = nearest(model, x, y, attack=QUICK["linf"]), nearest(model, x, y, attack=sp.attacks.Bisect(sp.attacks.FGSM()))
    torch.testing.assert_close(strong.distance, weak.distance, rtol=2e-3, atol=1e-6)
    assert weak.proved.all()


def test_that_there_is_no_other_class_is_proved_too_and_wrong_inputs_are_their_own() -> None:
    model, _ = small()
    net = drawn(model, 0)
    last = net[-1]
    assert isinstance(last, nn.Linear)
    last.bias.data[2] += 1000
    x = torch.rand(2, 2)
    found = nearest(model, x, torch.tensor([2, 0]), attack=QUICK["linf"])
    assert found.distance.tolist() == [math.inf, 0]
    assert found.lower.tolist() == [math.inf, 0]
    assert found.proved.all()
    assert torch.equal(found.points, x)
    assert "2 proved" in str(found)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_linear_models_have_the_distance_of_the_dual_norm(norm: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
        gaps = net(x).gather(1, y[:, None]) - net(x)
        slopes = net.weight[y][:, None] - net.weight
        dual = {"linf": slopes.abs().sum(2), "l2": slopes.norm(dim=2), "l1": slopes.abs().amax(2)}
        wanted = torch.where(gaps > 0, gaps / dual[norm], math.inf).amin(1) if norm != "l0" else torch.ones(5).double()
    found = nearest(sp.Model(net, bounds=None), x, y, norm)
    torch.testing.assert_close(found.distance, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.lower, wanted, rtol=1e-9, atol=0)
    assert found.proved.all()
    assert (net(found.points).argmax(1) != y).all()


def test_linear_models_inside_the_input_range_equal_linear_programmes() -> None:
    torch.manual_seed(2)
    net = nn.Linear(4, 3).double()
    model, x = sp.Model(net, bounds=(0, 1)), torch.rand(6, 4, dtype=torch.float64)
    y = model.predict(x)
    weight, bias = (t.detach().numpy() for t in (net.weight, net.bias))
    for norm in ("linf", "l1"):
        wanted = []
        for one, c in zip(x.numpy(), y.tolist(), strict=True):
            spread = np.ones((4, 1)) if norm == "linf" else np.eye(4)
            least = math.inf
            for t in range(3):
                wins = np.concatenate([weight[c] - weight[t], np.zeros(spread.shape[1])])
                rows = np.concatenate([np.hstack([np.eye(4), -spread]), np.hstack([-np.eye(4), -spread]), wins[None]])
                limits = np.concatenate([one, -one, [bias[t] - bias[c]]])
                cost = np.concatenate([np.zeros(4), np.ones(spread.shape[1])])
                ends = [(0, 1)] * 4 + [(0, None)] * spread.shape[1]
                solved = linprog(cost, A_ub=rows, b_ub=limits, bounds=ends)
                if t != c and solved.status == 0:
                    least = min(least, solved.fun)
            wanted.append(least)
        found = nearest(model, x, y, norm)
        np.testing.assert_allclose(found.lower, wanted, rtol=1e-7)
        assert found.proved.all()


def test_too_little_time_is_said() -> None:
    model, exported = small(inputs=6, hidden=40)
    drawn(model, 0)
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    y = model.predict(x)
    found = Programme(exported.graph(), x).minimise(Box(x * 0, x * 0 + 1), ROW, seconds=1e-3)
    assert found.status == "time"
    assert found.bound <= found.value
    near = nearest(model, x, y, seconds=1e-6, attack=sp.attacks.Bisect(sp.attacks.FGSM()))
    assert not near.proved.any()
    assert 0 < float(near.lower) < float(near.distance)


def test_what_is_wrong_is_said() -> None:
    model, exported = small()
    drawn(model, 0)
    x, y = torch.rand(2, 2), torch.tensor([0, 1])
    programme = Programme(exported.graph(), x)
    with pytest.raises(CapabilityError, match="l2 is known for linear models"):
        nearest(model, x, y, "l2")
    with pytest.raises(InputError, match="unknown norm"):
        nearest(model, x, y, "l3")
    with pytest.raises(InputError, match="one class per input"):
        nearest(model, x, y[:1])
    with pytest.raises(InputError, match="classes 0 to 2"):
        nearest(model, x, y + 2)
    with pytest.raises(InputError, match="seconds must be above 0"):
        nearest(model, x, y, seconds=0)
    with pytest.raises(InputError, match="bounds"):
        nearest(model, x + 2, y)
    with pytest.raises(ModelError, match="tanh"):
        nearest(small(activation=nn.Tanh())[0], x, y)
    with pytest.raises(InputError, match="one number for each of 3 outputs"):
        programme.minimise(Box(x[:1], x[:1]), ROW[:2])
    with pytest.raises(InputError, match="one input of shape"):
        programme.minimise(Box(x, x), ROW)
    with pytest.raises(InputError, match="empty"):
        programme.minimise(Box(x[:1] + 1, x[:1]), ROW)
    with pytest.raises(InputError, match="seconds"):
        programme.minimise(Box(x[:1], x[:1]), ROW, seconds=-1)


def test_no_inputs_and_hidden_weights() -> None:
    model = sp.Model(nn.Linear(2, 2))
    none = sp.verify.nearest(model, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert (len(none), none.points.shape) == (0, (0, 2))
    assert "none found" in str(none)
    with pytest.raises(CapabilityError, match="parameters"):
        sp.verify.nearest(sp.Model(nn.Linear(2, 2), access=sp.Access.LABELS), torch.zeros(1, 2), torch.zeros(1).long())
