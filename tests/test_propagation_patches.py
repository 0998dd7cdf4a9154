"""First layers of small windows: bounds hold at sampled points, and are nearly exact minima, by grids and by MILP."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.propagation.bounds import Ball, Bounded, Box
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.patches import Patches
from saddlepoint.verify import Cases, Programme, prove

FLOAT = torch.float64


class Windows(nn.Module):
    """Convolution, normalisation, nonlinearity, and what the input adds by itself; another layer if deep."""

    def __init__(self, activation: nn.Module, kernel: int, stride: int, deep: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, kernel, stride=stride, padding=1), nn.BatchNorm2d(3)
        size = 3 * ((6 + 2 - kernel) // stride + 1) ** 2
        self.second = nn.Sequential(nn.Linear(size, 9), activation) if deep else nn.Identity()
        self.activation, self.last, self.direct = activation, nn.Linear(9 if deep else size, 3), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm(self.first(x)))
        return self.last(self.second(h.flatten(1))) + 0.3 * self.direct(x.flatten(1))


def windows(seed: int, activation: nn.Module, kernel: int = 2, stride: int = 1, deep: bool = False) -> sp.Model:
    torch.manual_seed(seed)
    net = Windows(activation, kernel, stride, deep).double().eval()
    assert net.norm.running_mean is not None
    net.norm.running_mean.uniform_(-1, 1)
    nn.init.uniform_(net.norm.weight, -1, 1)
    nn.init.normal_(net.first.weight)
    return sp.Model(net, bounds=None)


def over(model: sp.Model, eps: float = 0.3, dtype: torch.dtype = FLOAT, outward: bool = False) -> Bounded:
    """CROWN's bounds of everything over one box."""
    x = torch.rand(1, 1, 6, 6, dtype=FLOAT, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        bounded = Bounded.of(read(model, x), x - eps, x + eps, outward=outward)
        bounded.refine()
    return bounded


def lowest(bounded: Bounded, rows: Tensor, steps: int = 100) -> Tensor:
    patches = Patches.of(bounded)
    assert patches is not None
    with torch.no_grad():
        return patches.lowest(bounded, rows, steps, rows.new_full((rows.shape[1],), torch.inf))


ROWS = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, -1.0]]], dtype=FLOAT)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Tanh(), nn.Sigmoid(), nn.GELU()], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "deep"), [(2, 1, False), (2, 2, True), (3, 2, True)])
@torch.no_grad()
def test_they_hold_at_every_point_and_are_above_crown(activation: nn.Module, kernel: int, stride: int, deep: bool) -> None:
    model = windows(1, activation, kernel, stride, deep)
    bounded = over(model)
    box = bounded.boxes[bounded.graph.input]
    share = torch.rand(500, 1, 6, 6, dtype=FLOAT, generator=torch.Generator().manual_seed(1))
    points = box.lower + torch.cat([share, share.round()]) * (box.upper - box.lower)
    seen = (bounded.graph.outputs(points) @ ROWS[0].T).amin(0)
    found, crown = lowest(bounded, ROWS, 20), bounded.lowest(bounded.graph.output, ROWS, 0)[0]
    assert (found <= seen + 1e-9).all()
    assert (found > crown + 1e-4).all()
    strict = over(model, outward=True)
    careful = lowest(strict, ROWS, 20)
    torch.testing.assert_close(careful, found, rtol=1e-3, atol=1e-3)
    assert (careful <= seen).all()


@torch.no_grad()
def test_patches_that_share_nothing_have_exact_minima() -> None:
    """Windows of one pixel: each neuron's function is of one number, and its least value is that on a fine grid."""
    torch.manual_seed(2)
    conv, last = nn.Conv2d(1, 8, 1).double(), nn.Linear(8 * 9, 3).double()
    x = torch.rand(1, 1, 3, 3, dtype=FLOAT)
    graph = read(sp.Model(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), last), bounds=None), x)
    bounded = Bounded.of(graph, x - 1, x + 1)
    ticks = torch.linspace(-1, 1, 4001, dtype=FLOAT)
    hidden = conv((x.flatten() + ticks[:, None]).view(-1, 1, 3, 3)).relu()  # (4001, 8, 3, 3)
    weights = (ROWS[0] @ last.weight).view(3, 8, 9)
    exact = torch.einsum("tcp,rcp->rpt", hidden.flatten(2), weights).amin(2).sum(1) + ROWS[0] @ last.bias
    found, crown = lowest(bounded, ROWS), bounded.lowest(graph.output, ROWS, 0)[0]
    assert (found <= exact + 1e-9).all()
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3)
    assert (exact - crown > 0.1).any()


@pytest.mark.parametrize("seed", range(3))
def test_they_close_most_of_the_gap_to_the_exact_minimum(seed: int) -> None:
    """The exact one by a mixed-integer programme; patches of 2 x 2 that overlap."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    nn.init.normal_(net[3].weight)  # type: ignore[arg-type]
    model, x = sp.Model(net, bounds=None), torch.rand(1, 1, 3, 3, dtype=FLOAT)
    bounded = Bounded.of(read(model, x), x - 1, x + 1)
    row = ROWS[:, :1]
    with torch.no_grad():
        crown = float(bounded.lowest(bounded.graph.output, row, 0))
    found = float(lowest(bounded, row, 300))
    exact = Programme(bounded.graph, x).minimise(Box(x - 1, x + 1), row[0, 0], gap=0.0).value
    assert exact is not None
    assert crown < found <= exact + 1e-6
    assert exact - found < 0.4 * (exact - crown)


@torch.no_grad()
def test_rounding_is_taken_off_in_float32() -> None:
    model = windows(4, nn.ReLU())
    exact = lowest(over(model), ROWS)
    single = windows(4, nn.ReLU())
    single.net.float()
    found = lowest(over(single, dtype=torch.float32, outward=True), ROWS.float())
    assert found.dtype == torch.float32
    assert (found.double() < exact).all()
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.5)


@torch.no_grad()
def test_neurons_that_see_nothing() -> None:
    """Pruned channels are constants."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).double()
    x = torch.rand(1, 1, 6, 6, dtype=FLOAT)
    net[0].weight[1:3] = 0  # type: ignore[index, union-attr]
    net[0].bias[1:3] = torch.tensor([0.7, -0.2])  # type: ignore[index, union-attr]
    bounded = Bounded.of(read(sp.Model(net, bounds=None), x), x - 0.3, x + 0.3)
    patches = Patches.of(bounded)
    assert patches is not None
    assert patches.neurons.shape == (25, 2)
    small = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(50, 3)).double()
    channels = net[3].weight.view(3, 4, 25)  # type: ignore[union-attr, operator]
    small[0].weight.copy_(net[0].weight[[0, 3]])  # type: ignore[union-attr, operator, index]
    small[0].bias.copy_(net[0].bias[[0, 3]])  # type: ignore[union-attr, operator, index]
    small[3].weight.copy_(channels[:, [0, 3]].flatten(1))  # type: ignore[union-attr, operator]
    small[3].bias.copy_(net[3].bias + 0.7 * channels[:, 1].sum(1))  # type: ignore[union-attr, operator]
    alone = Bounded.of(read(sp.Model(small, bounds=None), x), x - 0.3, x + 0.3)
    torch.testing.assert_close(lowest(bounded, ROWS), lowest(alone, ROWS))


class Mixed(nn.Module):
    """Windows, and one unit that sees everything, before one nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 2), nn.Linear(51, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x).flatten(1), x.flatten(1).sum(1, keepdim=True)], 1).relu())


@pytest.mark.parametrize("outward", [False, True])
@torch.no_grad()
def test_small_weights_beside_a_large_bias_count(outward: bool) -> None:
    """In float32 (w + b) - b is 0 for eight of nine weights, and inputs are large."""
    conv, last = nn.Conv2d(1, 1, (1, 9)), nn.Linear(3, 2)
    conv.weight.fill_(-2.9e-8)
    conv.weight[..., 0] = -1e-4
    conv.bias.fill_(1.0)  # type: ignore[union-attr]
    last.weight.fill_(1.0)
    last.bias.zero_()
    x = torch.zeros(1, 1, 3, 9)
    model = sp.Model(nn.Sequential(conv, nn.LeakyReLU(0.5), nn.Flatten(), last), bounds=None)
    bounded = Bounded.of(read(model, x), x, x + 1e4, outward=outward)
    patches = Patches.of(bounded)
    assert patches is not None
    assert (patches.weights.sum((1, 2)) < -1.002e-4).all()
    found = patches.lowest(bounded, torch.tensor([[[1.0, 0.0]]]), 20, torch.tensor([torch.inf]))
    exact = bounded.graph.double.outputs((x + 1e4).double())[0, 0]
    assert float(found) <= float(exact) + (0 if outward else 1e-6)


@torch.no_grad()
def test_slots_without_a_neuron_do_no_harm() -> None:
    """Patches of two neurons and of one, and a nonlinearity with a pole where nothing would go in."""
    torch.manual_seed(0)
    linear, last = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
    linear.weight.copy_(torch.tensor([[1.0, 0.5, 0, 0], [-0.3, 1, 0, 0], [0, 0, 1, -1]]))

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.last = linear, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.linear(x) + 9).log())

    x = torch.zeros(1, 4, dtype=FLOAT)
    bounded = Bounded.of(read(sp.Model(Logs(), bounds=None), x), x - 1, x + 1)
    patches = Patches.of(bounded)
    assert patches is not None
    assert patches.neurons.tolist() == [[0, 1], [2, -1]] or patches.neurons.tolist() == [[2, -1], [0, 1]]
    found = lowest(bounded, ROWS)
    points = 2 * torch.rand(2000, 4, dtype=FLOAT) - 1
    seen = (bounded.graph.outputs(points) @ ROWS[0].T).amin(0)
    assert (found <= seen).all()
    assert (found > seen - 0.5).all()


class Forgotten(nn.Module):
    """A nonlinearity whose values go nowhere, and one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 2, 5, 5, dtype=FLOAT))
        self.first, self.last = nn.Conv2d(1, 2, 2), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.copy_(self.first(x).relu())  # type: ignore[operator]
        return self.last(x.flatten(1))


@torch.no_grad()
def test_nonlinearities_that_go_nowhere_do_not_count() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=FLOAT)
    graph = read(sp.Model(Forgotten().double(), bounds=None), x)
    assert Patches.of(Bounded.of(graph, x - 0.1, x + 0.1)) is None
    assert all(node.rule is None for node in graph.nodes)
    safe = Cases(Box(x - 0.1, x + 0.1), torch.tensor([0]), ROWS[:, :1], torch.full((1, 1), 1e3, dtype=FLOAT))
    assert prove(graph, safe, lambda point, case: True, seconds=5).verdict == "robust"


@torch.no_grad()
def test_ascent_ends_early_and_never_below_where_it_began() -> None:
    bounded = over(windows(5, nn.ReLU()))
    patches = Patches.of(bounded)
    assert patches is not None
    nothing = torch.tensor([torch.inf], dtype=FLOAT)
    row, calls = ROWS[:, :1], []
    first = patches.lowest(bounded, row, 0, nothing)
    most = patches.lowest(bounded, row, 50, nothing)
    assert most > first
    between = (first + most) / 2
    assert between < patches.lowest(bounded, row, 50, between) < most

    def late() -> bool:
        calls.append(0)
        return len(calls) > 2  # once before the planes

    assert first <= patches.lowest(bounded, row, 50, nothing, late) <= most
    assert len(calls) == 3
    assert patches.lowest(bounded, row, 50, nothing, lambda: True).tolist() == [-torch.inf]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0, :2].relu() + x[:, 0, 2:4].tanh()).flatten(1)


@torch.no_grad()
def test_networks_without_patches() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=FLOAT)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    large = nn.Sequential(nn.Conv2d(1, 2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 3)).double()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    dead = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(50, 3)).double()
    dead[0].weight.zero_()  # type: ignore[union-attr, operator]
    for net in (dense, large, pooled, linear, dead, Branches(), Mixed().double()):
        assert Patches.of(Bounded.of(read(sp.Model(net, bounds=None), x), x - 0.1, x + 0.1)) is None
    bounded = over(windows(6, nn.ReLU()))
    assert Patches.of(bounded) is not None
    assert Patches.of(Bounded.of(bounded.graph, x - 0.1, x + 0.1, memory=10_000)) is None
    assert Patches.of(Bounded.of(bounded.graph, Ball.of(x, 0.1, "l2"))) is None


@pytest.mark.parametrize("rigorous", [False, True])
def test_prove_uses_them(rigorous: bool) -> None:
    """Where CROWN's bound isn't enough and theirs is."""
    bounded = over(windows(7, nn.ReLU()))
    row = ROWS[:, :1]
    with torch.no_grad():
        crown = float(bounded.lowest(bounded.graph.output, row, 0))
        constant = -(crown + float(lowest(bounded, row))) / 2
    box = bounded.boxes[bounded.graph.input]
    shift = torch.tensor([[constant]], dtype=FLOAT)
    cases = Cases(Box(box.lower, box.upper), torch.tensor([0]), row, shift)
    proof = prove(bounded.graph, cases, lambda point, case: True, seconds=20, rigorous=rigorous)
    assert (proof.verdict, proof.stage) == ("robust", "patches")
    assert proof.bound > 0
    stopped = prove(bounded.graph, cases, lambda point, case: True, seconds=1e-9, clock=time.perf_counter)
    assert stopped.verdict == "unknown"


def test_certify_counts_them_as_a_stage() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)).double()
    nn.init.normal_(net[0].weight)  # type: ignore[arg-type]
    model, x = sp.Model(net, bounds=None), torch.rand(20, 1, 6, 6, dtype=FLOAT)
    found = sp.verify.certify(model, x, model.predict(x), sp.Linf(0.08), sp.Budget(seconds=5))
    assert sum(sum(counts.values()) for counts in found.stages().values()) == 20
    assert found.stages()["patches"]["robust"] > 0
    assert "  patches" in found.summary()
