"""Bounds of hundreds of random networks hold at random points, corners and points found by gradient ascent."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.errors import InputError, ModelError
from saddlepoint.propagation.bounds import Ball, Bounded, Box
from saddlepoint.propagation.graph import Graph, read
from saddlepoint.propagation.methods import Method, OutputBounds, bounds
from saddlepoint.propagation.nodes import AFFINE

METHODS: tuple[Method, ...] = ("ibp", "forward", "deepz", "crown-ibp", "crown", "alpha-crown", "alpha-crown-joint", "best")
Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "relu": torch.relu, "leaky_relu": lambda x: functional.leaky_relu(x, 0.2), "prelu": nn.PReLU(), "relu6": nn.ReLU6(),
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(),
    "softplus": nn.Softplus(), "elu": nn.ELU(), "elu_steep": nn.ELU(1.5), "selu": nn.SELU(), "celu": nn.CELU(2.0),
    "mish": nn.Mish(), "hardswish": nn.Hardswish(), "softsign": nn.Softsign(), "erf": torch.erf, "abs": torch.abs,
    "exp": torch.exp, "log": lambda x: (x.exp() + 0.1).log(), "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "reciprocal": lambda x: 1 / (x.exp() + 0.1), "quotient": lambda x: x / (x.flip(1).exp() + 0.1), "square": lambda x: x**2,
    "cube": lambda x: x**3, "power": lambda x: (x.abs() + 0.1) ** 1.5, "itself": lambda x: x * x,
    "product": lambda x: x * x.flip(1),
    "clamp": lambda x: x.clamp(-0.2, 0.3), "clamp_min": lambda x: x.clamp(min=0.1), "clamp_max": lambda x: x.clamp(max=0.1),
    "maximum": lambda x: torch.maximum(x, x.flip(1)), "minimum": lambda x: torch.minimum(x, x.flip(1)),
    "largest": lambda x: x - x.amax(1, keepdim=True), "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "variance": lambda x: x - x.var(1, keepdim=True), "norm": lambda x: x / (x.norm(dim=1, keepdim=True) + 1),
    "outer": lambda x: (x.unsqueeze(2) @ x.unsqueeze(1)).sum(1), "split": lambda x: torch.cat(x.split(4, 1)[::-1], 1).relu(),
    "affine": lambda x: (2 * x.roll(1, 1) - 3 + x.cumsum(1) / 4 - x.mean(1, keepdim=True)).view(-1, 2, 4).mT.flatten(1),
    "layer_norm": lambda x: functional.layer_norm(x, (8,)), "group_norm": lambda x: functional.group_norm(x, 2),
}  # fmt: skip


class Dense(nn.Module):
    """Linear, the function, a residual block with the function again, linear."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second, self.last, self.function = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.function(self.first(x)))
        return self.last(h + self.function(self.second(h)))


class Images(nn.Module):
    """Convolutions of several kinds with pooling and a branch."""

    def __init__(self, pool: nn.Module, stride: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, stride=stride, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.side, self.norm, self.pool = nn.Conv2d(2, 4, 1, stride=stride, bias=False), nn.BatchNorm2d(4), pool
        self.up, self.last = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(self.second(h) + self.side(x))
        return self.last(functional.hardtanh(self.up(self.pool(h))).flatten(1))


class Attention(nn.Module):
    """One block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm, self.mix = nn.Linear(4, 6), nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.dense, self.last = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        y = self.norm(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return self.last((x + self.dense(self.norm(x))).mean(1))


class Applied(nn.Module):
    """The function, and the ReLU of it, which sees its intervals."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(x)
        return torch.cat([h, h.relu()], 1)


def made(net: nn.Module, x: Tensor) -> sp.Model:
    net = net.to(x.dtype).eval()
    net(x)
    return sp.Model(net, bounds=None)


def within(net: nn.Module, lower: Tensor, upper: Tensor) -> Tensor:
    """Outputs (P, N, C) at random points, corners and where gradient steps lead."""
    share = torch.rand(40, *lower.shape, dtype=lower.dtype)
    points = torch.cat([lower + share * (upper - lower), torch.where(share > 0.5, lower, upper)])
    with torch.no_grad():
        found = [net(point) for point in points]
    for column in range(found[0].shape[1]):
        for sign in (1, -1):
            x = (lower + upper) / 2
            for _ in range(4):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(sign * net(x)[:, column].sum(), x)
                x = torch.where(gradient > 0, upper, lower) * 0.5 + 0.5 * x
            found += [net(x).detach(), net(torch.where(gradient > 0, upper, lower)).detach()]
    return torch.stack(found)


def holds(found: OutputBounds, outputs: Tensor, slack: float) -> bool:
    return bool((found.lower <= outputs + slack).all() and (outputs - slack <= found.upper).all())


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bounds_hold_for_every_function(name: str) -> None:
    """Large boxes in float64, small ones in float32, tiny ones not only soundly."""
    torch.manual_seed(len(name) + ord(name[0]))
    x = torch.randn(2, 5, dtype=torch.float64)
    model = made(Dense(FUNCTIONS[name]), x)
    graph = read(model, x)
    eps = 0.5
    outputs = within(model.net, x - eps, x + eps)  # type: ignore[arg-type]  # it is a module
    for method in ("ibp", "forward", "deepz", "crown"):
        found = bounds(graph, x - eps, x + eps, method=method)
        assert holds(found, outputs, 1e-9 * float(1 + outputs.abs().max())), (method, eps)
    tight = bounds(graph, x - 1e-6, x + 1e-6)
    assert float((tight.upper - tight.lower).max()) < 1e-2  # not merely sound
    single, near = model.net.float(), x.float()  # type: ignore[union-attr]
    found = bounds(sp.Model(single, bounds=None), near - 0.05, near + 0.05)
    outputs = within(single, near - 0.05, near + 0.05)
    assert found.lower.dtype == torch.float32
    assert holds(found, outputs, 1e-4 * float(1 + outputs.abs().max()))


POOLS = [(nn.MaxPool2d(2), 1, 1), (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 2, 2), (nn.AvgPool2d(2), 1, 4),
         (nn.Upsample(scale_factor=2), 3, 1)]  # fmt: skip


@pytest.mark.parametrize(("pool", "stride", "groups"), POOLS, ids=str)
def test_bounds_hold_for_images(pool: nn.Module, stride: int, groups: int) -> None:
    torch.manual_seed(stride)
    x = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    model = made(Images(pool, stride, groups), x)
    graph = read(model, x)
    outputs = within(model.net, x - 0.1, x + 0.1)  # type: ignore[arg-type]
    for method in METHODS:
        assert holds(bounds(graph, x - 0.1, x + 0.1, method=method, steps=2), outputs, 1e-9), method


def test_bounds_hold_for_attention() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    model = made(Attention(), x)
    graph = read(model, x)
    for eps in (0.02,):
        outputs = within(model.net, x - eps, x + eps)  # type: ignore[arg-type]
        for method in METHODS:
            assert holds(bounds(graph, x - eps, x + eps, method=method, steps=2), outputs, 1e-9), method
    tight = bounds(graph, x - 0.001, x + 0.001)
    assert float((tight.upper - tight.lower).max()) < 0.05


def relus(seed: int, inputs: int = 6) -> tuple[Graph, sp.Model, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x = torch.randn(4, inputs, dtype=torch.float64)
    model = sp.Model(net, bounds=None)
    return read(model, x), model, x


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples_and_memory_changes_nothing(method: Method) -> None:
    graph, _, x = relus(0)
    rows = torch.randn(4, 5, 3, dtype=torch.float64)
    whole = bounds(graph, x - 0.2, x + 0.2, rows, method, steps=3)
    parts = [
        bounds(graph, one - 0.2, one + 0.2, row, method, steps=3) for one, row in zip(x.split(1), rows.split(1), strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(parts))
    if method not in ("forward", "deepz"):
        torch.testing.assert_close(bounds(graph, x - 0.2, x + 0.2, rows, method, steps=3, memory=1), whole)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_balls(norm: str) -> None:
    """Exact for linear networks, tighter than boxes, and sound."""
    graph, model, x = relus(1)
    eps, order = 0.5, {"l2": 2, "l1": 1}[norm]
    ball = Ball.of(x, eps, norm)
    delta = torch.randn(500, *x.shape, dtype=torch.float64)
    delta[:250] = delta[:250] * (torch.rand_like(delta[:250]) > 0.7)
    points = x + eps * delta / delta.norm(order, dim=2, keepdim=True).clamp(min=1e-9)
    outputs = torch.stack([model.logits(point) for point in points])
    for method in METHODS:
        found, box = bounds(graph, ball, method=method, steps=3), bounds(graph, x - eps, x + eps, method=method, steps=3)
        assert holds(found, outputs, 1e-9), method
        assert bool((found.lower >= box.lower - 1e-9).all())
    crown, box = bounds(graph, ball).lower, bounds(graph, x - eps, x + eps).lower
    assert float((crown - box).mean()) > 0.1
    a = torch.randn(4, 2, 6, dtype=torch.float64)
    dual = a.norm({"l2": 2, "l1": torch.inf}[norm], dim=2)
    torch.testing.assert_close(ball.least(a), (a * x[:, None]).sum(2) - eps * dual)
    at = ball.least_at(a)
    torch.testing.assert_close((a * at).sum(2), ball.least(a))
    assert bool(((at - x[:, None]).norm(order, dim=2) <= eps + 1e-9).all())
    cut = Ball.of(x.clamp(0, 1), eps, norm, (0.0, 1.0)).least_at(a)
    assert bool(((cut >= 0) & (cut <= 1)).all())


def test_rigorous_bounds_lie_below_and_hardly() -> None:
    graph, _, x = relus(2)
    for method in ("ibp", "crown-ibp", "crown", "alpha-crown", "alpha-crown-joint"):
        plain, careful = (bounds(graph, x - 0.3, x + 0.3, method=method, steps=3, rigorous=on) for on in (False, True))
        gap = plain.lower - careful.lower
        assert bool((gap > 0).all())
        assert float(gap.max()) < 1e-10
    single = sp.Model(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), bounds=None)
    low, high = x.float() - 0.3, x.float() + 0.3
    assert bounds(single, low, high, rigorous=True).lower.dtype == torch.float64
    bounded, slopes = Bounded.of(read(single, low), low, high, outward=True), {}
    bounded.refine()
    rows = torch.randn(4, 3, 2)
    found = bounded.linear(bounded.graph.output, rows, slopes).lowest(bounded.boxes[bounded.graph.input])
    torch.testing.assert_close(bounded.recheck(rows, slopes), found.double(), atol=1e-4, rtol=1e-4)


def test_the_best_is_at_least_as_good_as_each() -> None:
    graph, _, x = relus(3)
    best = bounds(graph, x - 0.3, x + 0.3, method="best").lower
    for method in ("ibp", "forward", "crown", "alpha-crown"):
        assert bool((best >= bounds(graph, x - 0.3, x + 0.3, method=method).lower - 1e-9).all()), method


def test_joint_slopes_are_tighter_and_sound_under_few_steps() -> None:
    gains = []
    for seed in range(4):
        graph, model, x = relus(seed)
        apart, together = (
            bounds(graph, x - 0.4, x + 0.4, method=method, steps=5).lower for method in ("alpha-crown", "alpha-crown-joint")
        )
        points = x + 0.8 * (torch.rand(2000, *x.shape, dtype=torch.float64) - 0.5)
        least = model.logits(points.flatten(0, 1)).view(2000, len(x), -1).amin(0)
        assert bool((together <= least + 1e-9).all())
        assert bool((together >= apart).all())
        gains.append(float((together - apart).mean()))
    assert max(gains) > 1e-5


def test_reciprocals_of_what_may_be_zero_are_unknown() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    model = sp.Model(nn.Sequential(nn.Identity(), Reciprocal()), bounds=None)
    for method in METHODS:
        found = bounds(model, x - 1, x + 1, method=method)
        assert bool((found.lower == -torch.inf).all() and (found.upper == torch.inf).all()), method
    found = bounds(model, x + 1, x + 2)
    assert bool((found.lower <= 0.5).all() and (found.upper >= 1).all())


class Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


class Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


def test_bad_input() -> None:
    graph, _, x = relus(0)
    with pytest.raises(InputError, match="unknown method 'cronw'; did you mean 'crown'"):
        bounds(graph, x, x, method="cronw")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="lower without upper"):
        bounds(graph, x)
    with pytest.raises(InputError, match="finite"):
        bounds(graph, x, x + torch.inf)
    with pytest.raises(InputError, match=r"specification must have shape \(4, R, 3\); got \(4, 3\)"):
        bounds(graph, x, x, torch.zeros(4, 3))
    with pytest.raises(InputError, match="forward bounds of 6 inputs take"):
        bounds(graph, x, x, method="forward", memory=10)
    with pytest.raises(InputError, match="no rigorous form"):
        bounds(graph, x, x, method="deepz", rigorous=True)
    with pytest.raises(InputError, match="norm must be"):
        Ball.of(x, 1.0, "l0")
    with pytest.raises(ModelError, match=r"depends on the network's input and is of dtype torch.bool"):
        read(sp.Model(Steps(), bounds=None), x)
    with pytest.raises(InputError, match=r"one for each of the 4 sets; got shape \(3,\)"):
        Ball.of(x, torch.ones(3), "l2")
    assert type(Ball.of(x, 1.0, "linf")) is Box


WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VECTOR = torch.tensor([-1.0, 2, 0, -3], dtype=torch.float64)
MASK, KERNEL = torch.tensor([True, False, True, False]), WEIGHT.view(2, 2, 2, 2)
OPERATORS: dict[str, list[Function]] = {
    "mul": [lambda x: x * -2, lambda x: x * 2.5, lambda x: x * VECTOR, lambda x: torch.tensor(-2) * x,
            lambda x: x[:, :1] * VECTOR],
    "div": [lambda x: x / -3, lambda x: x / 3, lambda x: x / (VECTOR + 0.5), lambda x: -2 / (x + 4),
            lambda x: VECTOR / (x + 4)],
    "add": [lambda x: torch.add(x, x.flip(1), alpha=-2), lambda x: x + x.mean(0), lambda x: x + x.mean(), lambda x: x - 3],
    "sub": [lambda x: torch.sub(x, x.flip(1), alpha=-2), lambda x: x.sum(1, keepdim=True) - x, lambda x: 3 - x],
    "rsub": [lambda x: torch.rsub(x, x.flip(1), alpha=3), lambda x: torch.rsub(x, 2.0, alpha=-3)],
    "addmm": [lambda x: torch.addmm(VECTOR, x, WEIGHT, alpha=-2), lambda x: torch.addmm(VECTOR, x, WEIGHT, beta=-2, alpha=0.5),
              lambda x: torch.addmm(x, x, WEIGHT, beta=-2), lambda x: torch.addmm(x, x, WEIGHT)],
    "baddbmm": [lambda x: torch.baddbmm(x[:, None], x[:, None], WEIGHT[None], beta=-1, alpha=-2).flatten(1)],
    "linear": [lambda x: functional.linear(x, WEIGHT, VECTOR), lambda x: functional.linear(WEIGHT[:1], x) + x,
               lambda x: functional.linear(WEIGHT, x).T],
    "mm": [lambda x: x.mm(WEIGHT), lambda x: WEIGHT.mm(x.T).T],
    "bmm": [lambda x: x.view(-1, 2, 2).bmm(WEIGHT[None, :2, :2].expand(len(x), 2, 2)).flatten(1)],
    "matmul": [lambda x: (x.view(-1, 2, 2) @ -WEIGHT[:2, :2]).flatten(1), lambda x: (WEIGHT @ x[..., None]).flatten(1),
               lambda x: (x.view(-1, 1, 2, 2).expand(-1, 2, -1, -1) @ x.view(-1, 2, 2)).flatten(1)],
    "convolution": [lambda x: functional.conv2d(x.view(-1, 2, 2, 1), KERNEL, VECTOR[:2], padding=1).flatten(1),
                    lambda x: functional.conv_transpose2d(x.view(-1, 2, 2, 1), -KERNEL, stride=2).flatten(1)],
    "view": [lambda x: -x.view(-1, 2, 2).flatten(1)], "reshape": [lambda x: -x.reshape(4).reshape(1, 4)],
    "_unsafe_view": [lambda x: torch.ops.aten._unsafe_view(x, [1, 4])], "flatten": [lambda x: x.view(-1, 2, 2).flatten(1)],
    "unsqueeze": [lambda x: x.unsqueeze(2).sum(2)], "squeeze": [lambda x: -x.squeeze(0)[None]],
    "clone": [lambda x: -x.clone()], "alias": [lambda x: torch.ops.aten.alias(x)], "detach": [lambda x: -x.detach()],
    "_to_copy": [lambda x: -x.double(), lambda x: x.sum(1, keepdim=True, dtype=torch.float64)],
    "permute": [lambda x: x.view(-1, 2, 2).permute(0, 2, 1).flatten(1)], "t": [lambda x: -x.t().t()],
    "transpose": [lambda x: x.view(-1, 2, 2).transpose(1, 2).flatten(1)], "neg": [torch.neg],
    "mean": [lambda x: x.mean(1, keepdim=True), lambda x: -x.mean()[None, None]],
    "sum": [lambda x: -x.sum(1, keepdim=True), lambda x: x * x.sum(1)[:, None], lambda x: x * x.mean(),
            lambda x: x / (x.norm() + 1), lambda x: torch.stack([one * one.mean() for one in x])],
    "cat": [lambda x: torch.cat([x, -x], 1)], "stack": [lambda x: torch.stack([x, -2 * x], 1).flatten(1)],
    "slice": [lambda x: x[:, 1:3] * -1], "select": [lambda x: -x[:, 2:3], lambda x: x - x[:, 1, None]],
    "expand": [lambda x: -x[:, :1].expand(-1, 3)], "repeat": [lambda x: -x.repeat(1, 2)],
    "constant_pad_nd": [lambda x: -functional.pad(x, (-1, 2), value=-3.0)],
    "avg_pool1d": [lambda x: -functional.avg_pool1d(x[:, None], 2).flatten(1)],
    "avg_pool2d": [lambda x: -functional.avg_pool2d(x.view(-1, 1, 2, 2), 2, 1, 1).flatten(1),
                   lambda x: functional.avg_pool2d(x.view(-1, 1, 2, 2), 2, divisor_override=-3).flatten(1)],
    "avg_pool3d": [lambda x: -functional.avg_pool3d(x.view(-1, 1, 1, 2, 2), (1, 2, 1)).flatten(1)],
    "_adaptive_avg_pool2d": [lambda x: functional.adaptive_avg_pool2d(-x.view(-1, 1, 2, 2), (1, 2)).flatten(1)],
    "flip": [lambda x: -x.flip(1)], "roll": [lambda x: -x.roll(1, 1)], "cumsum": [lambda x: -x.cumsum(1)],
    "upsample_nearest2d": [lambda x: functional.interpolate(-x.view(-1, 1, 2, 2), scale_factor=2).flatten(1)],
    "pixel_shuffle": [lambda x: functional.pixel_shuffle(-x.view(-1, 4, 1, 1), 2).flatten(1)],
    "_native_batch_norm_legit_no_training": [
        lambda x: functional.batch_norm(x, VECTOR, VECTOR.abs() + 1, VECTOR, WEIGHT[0]),
        lambda x: functional.batch_norm(x.expand(4, 4), VECTOR, VECTOR.abs() + 1, VECTOR)[None].flatten(1)],
    "split": [lambda x: -x.split(2, 1)[1]], "split_with_sizes": [lambda x: -x.split([1, 3], 1)[1]],
    "chunk": [lambda x: -x.chunk(2, 1)[0]], "unbind": [lambda x: -x.unbind(1)[1][:, None]],
    "index": [lambda x: x[:, [0, 0, -1]] - x[:, :3]], "index_select": [lambda x: -x.index_select(1, torch.tensor([2, 2]))],
    "where": [lambda x: torch.where(MASK, x, -x), lambda x: torch.where(MASK, -1.0, x)],
    "sqrt": [lambda x: (x + 1).sqrt(), lambda x: x.relu() ** 1.5], "log": [lambda x: (x + 1).log()],
    "softplus": [lambda x: functional.softplus(10 * x + 20) - 10 * x],
}  # fmt: skip


def test_every_affine_operator_is_among_those_below() -> None:
    assert not AFFINE - OPERATORS.keys()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_bounds_hold_for_every_operator(name: str) -> None:
    """With numbers of both signs, and as many samples as a dimension has elements; NaN lies in no bounds but infinite ones."""
    for place, function in enumerate(OPERATORS[name]):
        net, x = Applied(function), torch.randn(4, 4, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        graph = read(sp.Model(net, bounds=None), x)
        corners = torch.rand(40, *x.shape, dtype=torch.float64).round()
        points = x - 0.5 + torch.cat([corners, torch.rand_like(corners)])
        every = torch.stack([torch.cat([net(one[None]) for one in point]) for point in points])
        for count in (4, 3):
            x, outputs = x[:count], every[:, :count]
            unknown = outputs.isnan().any(0)
            for method in ("ibp", "crown", "forward", "deepz"):
                found = bounds(graph, x - 0.5, x + 0.5, method=method)
                assert not bool((unknown & (found.lower.isfinite() | found.upper.isfinite())).any()), (place, count, method)
                assert holds(found, outputs.nan_to_num(0), 1e-9), (place, count, method)
            assert holds(bounds(graph, x - 0.5, x + 0.5, method="ibp", rigorous=True), outputs.nan_to_num(0), 0), (place, count)


REFUSED: dict[str, Function] = {
    "div": lambda x: x // 0.25, "softplus": lambda x: functional.softplus(x, 1.0, 0.2), "softmax": lambda x: x.softmax(0),
    "clamp": lambda x: x.clamp(min=x * x), "_to_copy": lambda x: x.float(), "item": lambda x: x * x.sum().item(),
    "convolution": lambda x: functional.conv2d(KERNEL, x.view(1, 2, 2, 1)).view(1, -1), "gt": lambda x: (x > 0).to(x),
}  # fmt: skip


def test_a_network_that_branches_is_an_error_of_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"depends on values of the input, as by `if x.sum\(\) > 0`$"):
        read(sp.Model(Applied(lambda x: x if x.sum() > 0 else -x), bounds=None), torch.randn(1, 4))
    assert capfd.readouterr() == ("", "")

    def talking(x: Tensor) -> Tensor:
        print("here", file=sys.stderr)
        return 2 * x

    read(sp.Model(Applied(talking), bounds=None), torch.randn(1, 4))
    assert capfd.readouterr().err.count("here") > 1  # once for a look at the outputs, and in the export


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_bounds_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=r"(at networks\.0|item|data-dependent)"):
        read(sp.Model(Applied(REFUSED[name]), bounds=None), torch.randn(1, 4, dtype=torch.float64))


@pytest.mark.parametrize(("centre", "limits"), [(torch.zeros(1, 2, dtype=torch.int64), None), (torch.zeros(1, 2), (1.0, 0.0))])
def test_balls_of_nothing(centre: Tensor, limits: tuple[float, float] | None) -> None:
    with pytest.raises(InputError, match=r"floating dtype|low <= high"):
        Ball.of(centre, 0.5, "l2", limits)


class Writing(nn.Module):
    """Counts its calls and keeps a hidden layer, as exported networks with buffers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1, 4))
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(x)
        self.last.copy_(hidden)
        result: Tensor = self.second(hidden.relu()) + 100
        return result


def test_bounds_are_of_the_output_and_not_of_a_buffer_that_is_written() -> None:
    torch.manual_seed(0)
    model, x = sp.Model(Writing().double(), bounds=None), torch.rand(1, 3, dtype=torch.float64)
    found = bounds(read(model, x), x - 0.5, x + 0.5)
    points = x + torch.rand(500, 3, dtype=torch.float64) - 0.5
    values = torch.cat([model.logits(point[None]) for point in points])
    assert found.lower.shape == (1, 2)
    assert bool((found.lower <= values + 1e-9).all() and (values <= found.upper + 1e-9).all())
    assert float(found.lower.min()) > 50


@pytest.mark.parametrize("slopes", [[0.25], [0.1, 0.0, 0.9]])
def test_bounds_of_an_onnx_files_prelu(slopes: list[float]) -> None:
    pytest.importorskip("onnx")
    from saddlepoint.models.onnx_graph import OnnxNetwork
    from saddlepoint.models.onnx_operators import Node

    nodes = [Node("PRelu", "prelu", ["x", "slope"], ["y"], {}, opset=20)]
    net = OnnxNetwork(nodes, {"slope": torch.tensor(slopes, dtype=torch.float64)}, input="x", output="y", shape=(3,))
    model, x = sp.Model(net, bounds=None), torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.logits(x)
    found = bounds(read(model, x), x - 1, x + 1)
    values = model.logits(x + 2 * torch.rand(500, 3, dtype=torch.float64) - 1)
    assert bool((found.lower <= values + 1e-9).all() and (values <= found.upper + 1e-9).all())
    ends = torch.cat([model.logits(x - 1), model.logits(x + 1)])  # the operator is monotone, so intervals are exact
    torch.testing.assert_close(bounds(read(model, x), x - 1, x + 1, method="ibp").lower, ends[:1])
