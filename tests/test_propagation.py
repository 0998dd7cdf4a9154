"""Bounds hold at sampled points of random networks, relaxations on dense grids, and margins equal those of auto_LiRPA."""

from __future__ import annotations

import csv
import os
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import InputError, ModelError, SoundnessError
from saddlepoint.propagation.affine import _ByPhases, _transposed, pulled
from saddlepoint.propagation.bounds import Bounded
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.methods import Method, bounds
from saddlepoint.propagation.nodes import Node
from saddlepoint.propagation.relax import _CURVES, Curve, Relu
from saddlepoint.propagation.sets import Box
from saddlepoint.verify.vnnlib import read_vnnlib

DATA = Path(os.environ.get("SADDLEPOINT_DATA", "nowhere")) / "verification"
METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown", "alpha-crown")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs SADDLEPOINT_DATA/verification")


class Residual(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.last, self.activation = nn.BatchNorm2d(3), nn.Linear(48, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm(self.first(x)))
        h = self.activation(self.second(h) + h)
        return self.last(nn.functional.pad(nn.functional.avg_pool2d(h, 2), (1, 1, 1, 1)).flatten(1))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def residual(seed: int, activation: nn.Module) -> sp.Model:
    torch.manual_seed(seed)
    net = Residual(activation).double().eval()
    assert net.norm.running_mean is not None
    net.norm.running_mean.uniform_(-1, 1)
    nn.init.uniform_(net.norm.weight, -1, 1)
    return sp.Model(net, bounds=None)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(0.1)], ids=str)
def test_every_bound_holds_at_every_point(activation: nn.Module) -> None:
    for seed in range(3):
        model = residual(seed, activation)
        x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
        lower, upper = x - 0.2, x + 0.2
        inside = lower + 0.4 * torch.rand(200, *x.shape, dtype=torch.float64)
        corners = torch.where(torch.rand(200, *x.shape) > 0.5, lower, upper)
        least = torch.stack([model.logits(point) for point in (*inside, *corners)]).amin(0)
        graph = read(model, x)
        found = {method: bounds(graph, lower, upper, method=method).lower for method in METHODS}
        for method, bound in found.items():
            assert (bound <= least + 1e-9).all(), method
        assert (found["crown"] >= found["ibp"] - 1e-9).all()
        assert (found["alpha-crown"] >= found["crown"] - 1e-9).all()


def test_a_point_has_its_own_outputs() -> None:
    model = residual(0, nn.ReLU())
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    for method in METHODS:
        torch.testing.assert_close(bounds(read(model, x), x, x, method=method).lower, model.logits(x))


def test_a_box_that_rounding_inverted_is_no_fault_of_the_next_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    point = torch.ones(1, 3)
    bounded = Bounded.of(read(sp.Model(net.eval(), bounds=None), point), Box(point, point))
    *_, relu, last = bounded.graph.nodes
    ends = bounded.boxes[relu.name]
    bounded.boxes[relu.name] = Box(ends.lower + 1e-6, ends.upper)
    assert bool((bounded.interval(last).radius < 0).any())
    bounded.boxes[relu.name] = ends
    monkeypatch.setattr("saddlepoint.propagation.bounds.spread", lambda node, radii: -torch.ones(1, 2))
    with pytest.raises(SoundnessError, match="linear"):
        bounded.interval(last)


def crown_alone(net: nn.Sequential, middle: Tensor, eps: float) -> Tensor:
    """CROWN of a network of linear layers and ReLUs, with nothing but CROWN inside: lower bounds of the outputs."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    ends: list[tuple[Tensor, Tensor]] = []

    def lowest(rows: Tensor, depth: int) -> Tensor:
        constant = torch.zeros(len(rows)).to(rows)
        for place in reversed(range(depth + 1)):
            constant = constant + rows @ layers[place].bias
            rows = rows @ layers[place].weight
            if place:
                low, high = ends[place - 1]
                slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
                flat = torch.where((low < 0) & (high > 0), (high > -low).to(rows), slope)
                constant = constant + rows.clamp(max=0) @ torch.where((low < 0) & (high > 0), -slope * low, 0)
                rows = rows.clamp(min=0) * flat + rows.clamp(max=0) * slope
        return constant + rows @ middle - eps * rows.abs().sum(1)

    for depth, layer in enumerate(layers):
        eye = torch.eye(layer.out_features).to(middle)
        ends.append((lowest(eye, depth), -lowest(-eye, depth)))
    return ends[-1][0]


def test_intervals_inside_make_crown_no_looser() -> None:
    """On these networks. Boxes cut with intervals would have other lower slopes than those of CROWN alone, often worse ones."""
    tighter = 0
    for seed in range(6):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.7)
        x, eps = torch.rand(64, 4, dtype=torch.float64), 0.05 + 0.1 * (torch.arange(64)[:, None] % 3)
        ours = bounds(read(sp.Model(net, bounds=None), x), x - eps, x + eps).lower
        with torch.no_grad():
            peer = torch.stack([crown_alone(net, one, float(radius)) for one, radius in zip(x, eps, strict=True)])
        assert bool((ours >= peer - 1e-9).all()), (ours - peer).min()
        tighter += int((ours > peer + 1e-3).sum())
    assert tighter > 50


RULES = {**_CURVES, "relu": Relu(), "leaky_relu": Relu(0.25)}


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_planes_hold_on_grids(name: str, dtype: torch.dtype) -> None:
    rule = RULES[name]
    generator = torch.Generator().manual_seed(0)
    lower = 4 * torch.randn(2000, generator=generator, dtype=torch.float64)
    upper = lower + 8 * torch.rand(2000, generator=generator, dtype=torch.float64) ** 3
    upper[:50], upper[50:100] = lower[:50], lower[50:100] + 1e-9
    lower[100:150], upper[100:150] = -1e4 * torch.rand(50, generator=generator), 1e4 * torch.rand(50, generator=generator)
    if isinstance(rule, Curve):
        lower, upper = (end.clamp(*rule.domain) for end in (lower, upper))
    lower, upper = lower.to(dtype), upper.to(dtype)
    x = lower.double()[:, None] + (upper.double() - lower.double())[:, None] * torch.linspace(0, 1, 401, dtype=torch.float64)
    y = rule.value(x) if isinstance(rule, Curve) else torch.where(x > 0, x, rule.floor * x)
    box = Box(lower[:, None], upper[:, None])
    slack = 1e-14 * (1 + y.abs().nan_to_num(0, 0, 0) + x.abs())
    for planes in (rule.planes(box), rule.parallel(box)):
        low_offset, high_offset = (0 if one is None else one.double() for one in (planes.low_offset, planes.high_offset))
        assert bool(((planes.low[0].double() * x + low_offset <= y + slack) | y.isnan()).all())
        assert bool(((planes.high[0].double() * x + high_offset >= y - slack) | y.isnan()).all())
    ends = rule.ends(box)
    assert bool(((ends.lower.double() <= y + slack) & (y - slack <= ends.upper.double()) | y.isnan()).all())


@needs_data
def test_margins_are_those_of_auto_lirpa() -> None:
    """On mnist_fc; alpha-CROWN is at least as tight."""
    text = (DATA / "peer_bounds.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(text) if row["onnx"] == "mnist-net_256x2.onnx"]
    model = sp.Model(str(DATA / "mnist_fc" / "onnx" / "mnist-net_256x2.onnx.gz"), bounds=None)
    graph, checked = None, 0
    for row in rows:
        method = {"ibp": "ibp", "crown_ibp": "crown-ibp", "crown": "crown", "alpha_crown_20": "alpha-crown"}.get(row["method"])
        if method is None or not row["vnnlib"].startswith(("prop_0_", "prop_3_", "prop_9_")):
            continue
        cases = read_vnnlib(DATA / "mnist_fc" / "vnnlib" / f"{row['vnnlib']}.gz").cases
        shape = (1, *model.net.shape)  # type: ignore[union-attr]  # an ONNX network has one
        lower, upper = cases[0].lower.float().view(shape), cases[0].upper.float().view(shape)
        graph = graph or read(model, lower)
        specification = torch.cat([case.rows for case in cases]).float()[None]
        margin = float(bounds(graph, lower, upper, specification, method).min())  # type: ignore[arg-type]
        peer = float(row["margin"])
        assert margin >= peer - 1e-4 * abs(peer)
        if method in ("ibp", "crown-ibp"):
            assert margin == pytest.approx(peer, rel=1e-4)
        checked += 1
    assert checked == 24


class Trunk(nn.Module):
    """Residual with the nonlinearity first: the trunk is affine and goes into it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.branch(h.relu())
        return self.last(h + self.branch(h.relu()))


def test_both_ends_share_the_last_affine_operators_and_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, dtype=torch.float64)
    bounded = Bounded.of(read(sp.Model(Trunk().double().eval(), bounds=None), x), x - 0.3, x + 0.3, outward=True)
    start, output = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), bounded.graph.output
    wanted = bounded.backward(output, start), -bounded.backward(output, -start)
    swept: Counter[str] = Counter()

    def counted(node: Node, a: Tensor) -> list[Tensor]:
        swept[node.name] += node.op != "magnitude"
        return pulled(node, a)

    monkeypatch.setattr("saddlepoint.propagation.bounds.pulled", counted)
    bounded.outward = False
    found = bounded.ends(output, start)
    assert swept[output] == 1
    assert max(swept.values()) == 2
    assert bool((found.lower >= wanted[0]).all() and (found.upper <= wanted[1]).all())
    bounded.outward = True
    found = bounded.ends(output, start)
    torch.testing.assert_close((found.lower, found.upper), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_planes_hold_where_their_offsets_underflow(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    generator = torch.Generator().manual_seed(0)
    lower, upper = (tiny * 2.0**-20 * torch.randint(1, 2**20, (500,), generator=generator).to(dtype) for _ in range(2))
    box = Box(-lower, upper)
    planes = Relu(0.1).planes(box)
    assert planes.high_offset is not None
    for low, high, slope, offset in zip(
        *(one.tolist() for one in (-lower, upper, planes.high[0], planes.high_offset)), strict=True
    ):
        at_low, at_high = (Fraction(slope) * Fraction(end) + Fraction(offset) for end in (low, high))
        assert at_low >= Fraction(torch.tensor(0.1, dtype=dtype).item()) * Fraction(low)
        assert at_high >= Fraction(high)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_coefficients_go_back_through_strided_convolutions(stride: int) -> None:
    """As by the convolution's own derivative, and so do the gradients; every kernel, padding and place that is left over."""
    torch.manual_seed(0)
    for size, kernel, padding in product(((5, 5), (7, 4), (9, 11)), ((1, 1), (2, 3), (5, 4)), ((0, 0), (1, 0), (1, 3))):
        x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
        if any(length + 2 * more < taps for length, more, taps in zip(size, padding, kernel, strict=True)):
            continue
        weight = torch.randn(3, 2, *kernel, dtype=torch.float64, requires_grad=True)
        out = nn.functional.conv2d(x, weight, None, stride, padding)
        a = torch.randn_like(out, requires_grad=True)
        (wanted,) = torch.autograd.grad(out, x, a, create_graph=True)
        found = _ByPhases.apply(a, weight, stride, padding, size)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(_transposed(a, weight, [stride] * 2, padding, (1, 1), size, 1), wanted)  # as on a GPU
        along = torch.randn_like(found)
        ours, theirs = (torch.autograd.grad((one * along).sum(), (a, weight)) for one in (found, wanted))
        torch.testing.assert_close(ours, theirs)


def test_bad_input() -> None:
    model = residual(0, nn.ReLU())
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    graph = read(model, x)
    with pytest.raises(InputError, match="lower is above upper in 32 places"):
        bounds(graph, x + 1, x)
    with pytest.raises(InputError, match="shape"):
        bounds(graph, x.flatten(1), x.flatten(1))
    with pytest.raises(ModelError, match=r"no bounds are known for the operator (sin|cos) \(at"):
        read(residual(0, Sine()), x)


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.3])
def test_planes_of_leaky_relus_have_their_slope_in_float64(slope: float) -> None:
    """Where a unit is off both planes are the function itself, to the last digit: a slope in float32 would not be."""
    planes = Relu(slope).planes(Box(torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)))
    assert planes.low[0].dtype == torch.float64
    assert planes.low[0].item() == planes.high[0].item() == slope
