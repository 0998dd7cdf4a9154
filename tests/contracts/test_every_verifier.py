"""Every verdict on hundreds of random networks agrees with mixed-integer programmes, attacks and dense samples."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.graph import Exported, export
from saddlepoint.propagation.methods import Method, bounds
from saddlepoint.verify import Cases, Programme, Proof
from saddlepoint.verify import prove as prove_
from saddlepoint.verify.cases import margins

prove_module = sys.modules["saddlepoint.verify.prove"]  # the package has a function of this name

SIZES = (0.02, 0.1, 0.3)
CLASSES = 3


class Residual(nn.Module):
    """Two blocks whose inputs are added to their outputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(*size) for size in ((inputs, 6), (6, 6), (6, 6), (6, CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.a(h.relu())
        return self.last((h + self.b(h.relu())).relu())


def dense(sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    layers = [layer for ends in itertools.pairwise(sizes) for layer in (nn.Linear(*ends), activation())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


class Pooled(nn.Module):
    """Convolution, max pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.view(-1, 1, 3, 3))
        return self.last(functional.max_pool2d(functional.pad(h, (0, 1, 0, 1)), 2, 1).relu().flatten(1))


def convolutional() -> nn.Module:
    first, second = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 3, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 3, 3)), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(3, CLASSES))


# by name: the network, its inputs, and whether both searches always end soon
KINDS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "dense": (lambda: dense((2, 8, 8), nn.ReLU), 2, True),
    "deep": (lambda: dense((5, 10, 10, 10), nn.ReLU), 5, True),
    "residual": (lambda: Residual(4), 4, True),
    "convolutional": (convolutional, 9, True),
    "leaky": (lambda: dense((3, 8, 8), lambda: nn.LeakyReLU(0.1)), 3, False),
    "pooled": (Pooled, 9, False),
    "sigmoid": (lambda: dense((2, 8, 8), nn.Sigmoid), 2, False),
}
LINEAR = [name for name in KINDS if name != "sigmoid"]


@functools.cache
def made(kind: str, dtype: torch.dtype) -> tuple[sp.Model, Exported]:
    """A network, read once: its graph follows its weights."""
    model = sp.Model(KINDS[kind][0]().to(dtype), bounds=None)
    return model, export(model, torch.zeros(1, KINDS[kind][1], dtype=dtype))


def drawn(model: sp.Model, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Other weights in place, and an input with the class that the network gives it, not far from another class."""
    net, generator = model.net, torch.Generator().manual_seed(seed)
    assert isinstance(net, nn.Module)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        points = torch.rand(64, inputs, generator=generator).to(next(net.parameters()))
        bias = list(net.parameters())[-1]
        bias -= net(points).mean(0)
        best = net(points).topk(2, 1)
        gap = best.values[:, 0] - best.values[:, 1]
        place = int(gap.argsort()[24])
    return points[place : place + 1], best.indices[place : place + 1, 0]


def proved(model: sp.Model, exported: Exported, box: Box, y: Tensor, seconds: float = 30.0) -> Proof:
    cases = Cases.of_classes(box, y, CLASSES)
    replay = lambda point, case: bool(cases.take(torch.tensor([case])).margin(model.forward(point[None]))[0] <= 0)  # noqa: E731
    with model.frozen():
        return prove_(exported.graph(), cases, replay, seconds=seconds)


def points_of(box: Box, generator: torch.Generator, count: int = 200) -> Tensor:
    share = torch.rand(count, *box.lower.shape[1:], generator=generator).to(box.lower)
    corner = (torch.rand(count, *box.lower.shape[1:], generator=generator) < 0.5).to(box.lower)
    return box.lower + torch.cat([share, corner]) * (box.upper - box.lower)


@pytest.mark.parametrize("search", ["inputs", "search"])
@pytest.mark.parametrize("kind", LINEAR)
def test_verdicts_agree_with_mixed_integer_programmes(kind: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both complete searches. Networks whose least margin is nearer to 0 than rounding are left out."""
    monkeypatch.setattr(prove_module, "FEW_INPUTS", 16 if search == "inputs" else 0)
    _, inputs, complete = KINDS[kind]
    verdicts: Counter[str] = Counter()
    for dtype, slack in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        model, exported = made(kind, dtype)
        for seed in range(7):
            x, y = drawn(model, inputs, seed)
            eps = SIZES[seed % len(SIZES)] * (0.5 if inputs > 4 else 1.0)
            box, rows = Box(x - eps, x + eps), margins(y, CLASSES, dtype)
            proof = proved(model, exported, box, y, 30.0 if complete else 0.2)
            programme = Programme(exported.graph(), x)
            least = min(programme.minimise(box, row).value for row in rows[0])
            verdicts[proof.verdict] += 1
            assert proof.bound <= least + slack, (kind, seed)
            if proof.verdict == "robust":
                assert least > -slack, (kind, seed)
                assert proof.bound > 0
            elif proof.verdict == "falsified":
                assert least <= slack, (kind, seed)
                assert proof.counterexample is not None
                point = proof.counterexample[None]
                assert bool((box.lower <= point).all() and (point <= box.upper).all())
                assert int(model.predict(point)) != int(y) or float((rows[0] @ model.logits(point)[0]).min()) <= 0
            else:
                assert proof.reason
                assert not complete or abs(least) <= slack, (kind, seed, least, proof)
    assert verdicts["robust"] >= 3
    assert verdicts["falsified"] >= 3


@pytest.mark.parametrize("kind", LINEAR)
def test_bounds_of_every_method_lie_below_the_least_margin(kind: str) -> None:
    _, inputs, _ = KINDS[kind]
    model, exported = made(kind, torch.float64)
    for seed in range(6):
        x, y = drawn(model, inputs, 100 + seed)
        eps = SIZES[seed % len(SIZES)]
        box, rows, graph = Box(x - eps, x + eps), margins(y, CLASSES, torch.float64), exported.graph()
        programme = Programme(graph, x)
        least = torch.tensor([programme.minimise(box, row).value for row in rows[0]], dtype=torch.float64)
        for method in get_args(Method):
            found = bounds(graph, box.lower, box.upper, rows, method, steps=5)
            assert bool((found[0] <= least + 1e-6).all()), (method, seed)
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("search", ["inputs", "search"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_sample_of_a_robust_box_is_wrong(kind: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_module, "FEW_INPUTS", 16 if search == "inputs" else 0)
    _, inputs, _ = KINDS[kind]
    model, exported = made(kind, torch.float32)
    robust = 0
    for seed in range(8):
        x, y = drawn(model, inputs, 200 + seed)
        eps = (0.02, 0.05, 0.1)[seed % 3]
        box = Box(x - eps, x + eps)
        proof = proved(model, exported, box, y, 0.3)
        points = points_of(box, torch.Generator().manual_seed(seed))
        outputs = model.logits(points)
        margin = outputs.gather(1, y.expand(len(points))[:, None]) - outputs
        worst = float(margin.masked_fill(margin == 0, torch.inf).min())
        assert proof.bound <= worst + 1e-4
        if proof.verdict == "robust":
            robust += 1
            assert bool((model.predict(points) == y).all()), (kind, seed)
            strong = sp.attack(model, x, y, sp.attacks.PGD(steps=10), sp.Linf(eps * (1 - 1e-6)))
            assert not bool(strong.success.any())
    assert robust >= 2


@pytest.fixture
def several() -> tuple[sp.Model, Tensor, Tensor]:
    """A network, and twelve samples that it gets right but for two."""
    model, _ = made("deep", torch.float32)
    drawn(model, 5, 3)
    x = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    y = model.predict(x)
    y[::6] = (y[::6] + 1) % CLASSES
    return model, x, y


def settled(proofs: tuple[Proof, ...]) -> list[Proof]:
    """Without what a clock says."""
    return [replace(proof, seconds=0.0, counterexample=None) for proof in proofs]


@pytest.mark.parametrize("search", ["inputs", "search"])
def test_certify_twice_is_the_same_but_for_the_clock(
    several: tuple[sp.Model, Tensor, Tensor], search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove_module, "FEW_INPUTS", 16 if search == "inputs" else 0)
    model, x, y = several
    first, second = (sp.verify.certify(model, x, y, sp.Linf(0.08), sp.Budget(seconds=30)) for _ in range(2))
    assert settled(first.proofs) == settled(second.proofs)
    assert torch.equal(first.counterexamples, second.counterexamples)
    assert not bool(first.unknown.any())
    assert 0 < int(first.robust.sum()) < len(x) - 2


def test_verdicts_do_not_depend_on_order_or_on_mates(several: tuple[sp.Model, Tensor, Tensor]) -> None:
    model, x, y = several
    budget = sp.Budget(seconds=30)
    together = sp.verify.certify(model, x, y, sp.Linf(0.08), budget)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = sp.verify.certify(model, x[order], y[order], sp.Linf(0.08), budget, seed=5)
    verdicts = [proof.verdict for proof in together.proofs]
    assert [mixed.proofs[place].verdict for place in order.argsort().tolist()] == verdicts
    sizes = sp.Linf([0.08] * 4 + [0.01] * 8)
    other = sp.verify.certify(model, x, y, sizes, budget)
    assert [proof.verdict for proof in other.proofs[:4]] == verdicts[:4]
    alone = [sp.verify.certify(model, x[k : k + 1], y[k : k + 1], sp.Linf(0.08), budget) for k in range(4)]
    assert [one.proofs[0].verdict for one in alone] == verdicts[:4]
    robust = together.robust & other.robust
    assert bool(robust.any())
    assert bool((other.bound[robust] > 0).all())


def test_batch_mates_do_not_change_a_bound() -> None:
    """All samples' cases at once, against each sample's own."""
    model, exported = made("residual", torch.float64)
    _, _ = drawn(model, 4, 2)
    x = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, graph = model.predict(x), exported.graph()
    rows = margins(y, CLASSES, torch.float64)
    for method in get_args(Method):
        together = bounds(graph, x - 0.1, x + 0.1, rows, method, steps=3)
        alone = torch.cat(
            [bounds(graph, x[k : k + 1] - 0.1, x[k : k + 1] + 0.1, rows[k : k + 1], method, steps=3) for k in range(5)]
        )
        assert torch.allclose(together, alone, rtol=0, atol=1e-9), method
    boxes = Bounded.of(graph, x - 0.1, x + 0.1).boxes
    assert bool((boxes[graph.output].lower <= graph.outputs(x)).all())
