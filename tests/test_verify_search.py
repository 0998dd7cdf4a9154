"""Search on signs and on inputs, and tightening: against mixed-integer programmes, dense grids and samples."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.propagation.bounds import Ball, Bounded, Box, Linear
from saddlepoint.propagation.graph import Exported, export
from saddlepoint.propagation.nodes import Graph
from saddlepoint.verify import Cases, Programme, prove
from saddlepoint.verify.cases import margins
from saddlepoint.verify.inputs import InputSearch, clipped
from saddlepoint.verify.search import Search
from saddlepoint.verify.tighten import tighten

FLOAT = torch.float64


@functools.cache
def made(inputs: int, hidden: int, activation: type[nn.Module]) -> tuple[sp.Model, Exported]:
    net = nn.Sequential(
        nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, 3)
    ).double()
    model = sp.Model(net, bounds=None)
    return model, export(model, torch.zeros(1, inputs, dtype=FLOAT))


def drawn(seed: int, inputs: int = 3, hidden: int = 8, activation: type[nn.Module] = nn.ReLU) -> tuple[sp.Model, Graph]:
    """Other weights, in place, with outputs about 0 on average."""
    model, exported = made(inputs, hidden, activation)
    generator = torch.Generator().manual_seed(seed)
    net = model.net
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        net[-1].bias -= net(torch.rand(300, inputs, generator=generator).double()).mean(0)  # type: ignore[operator, union-attr]
    return model, exported.graph()


def spread(box: Box, count: int = 400, seed: int = 0) -> Tensor:
    """Points of the box (1, ...), half of them corners, (2 * count, ...)."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *box.lower.shape[1:], generator=generator, dtype=FLOAT)
    return box.lower + torch.cat([share, share.round()]) * (box.upper - box.lower)


def first_below(graph: Graph, cases: Cases) -> Callable[[Tensor, Tensor], Tensor | None]:
    """A check of `Search`: the first point that is unsafe by the graph itself, and in its set."""

    def check(points: Tensor, case: Tensor) -> Tensor | None:
        part = cases.take(case)
        inside = ((points >= part.sets.lower) & (points <= part.sets.upper)).flatten(1).all(1)
        unsafe = ((part.margin(graph.outputs(points)) <= 0) & inside).nonzero()[:, 0]
        return points[int(unsafe[0])] if len(unsafe) else None

    return check


def searched(graph: Graph, cases: Cases, seconds: float = 30.0, **settings: object) -> tuple[Search, str]:
    root = Bounded.of(graph, cases.inputs)
    with torch.no_grad():
        root.refine()
    search = Search(root, cases, first_below(graph, cases), deadline=time.perf_counter() + seconds, **settings)  # type: ignore[arg-type]
    return search, search.run().verdict


# ---- cases


def test_cases_of_classes_and_their_margin() -> None:
    x = torch.zeros(2, 4)
    cases = Cases.of_classes(Box(x, x + 1), torch.tensor([2, 0]), 3)
    assert len(cases) == 4
    assert cases.of.tolist() == [0, 0, 1, 1]
    outputs = torch.tensor([[1.0, 2.0, 5.0]]).expand(4, -1)
    assert cases.margin(outputs).tolist() == [4.0, 3.0, -1.0, -4.0]
    assert cases.sets.lower.shape == (4, 4)
    both = Cases(cases.inputs, torch.tensor([1]), torch.eye(3)[None, :2], torch.tensor([[0.0, -1.5]]))
    assert both.margin(outputs[:1]).tolist() == [1.0]  # the larger one of 1 and 0.5
    assert len(cases.take(torch.tensor([True, False, True, False]))) == 2
    for y, classes in (([0], 1), ([3], 3), ([-1], 3)):
        with pytest.raises(sp.InputError, match="class"):
            Cases.of_classes(Box(x[:1], x[:1]), torch.tensor(y), classes)


# ---- search on signs


@pytest.mark.parametrize("seed", range(1, 4))
def test_search_finds_the_least_of_several_rows(seed: int) -> None:
    """A conjunction is unsafe where all rows are <= 0 at one input: the least of their largest, here by a grid."""
    _, graph = drawn(seed, 2)
    x = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed)).double()
    box = Box(x - 0.4, x + 0.4)
    ticks = torch.linspace(-0.4, 0.4, 161, dtype=FLOAT)
    outputs = graph.outputs(x + torch.cartesian_prod(ticks, ticks))
    rows = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]], dtype=FLOAT)
    least = float((outputs @ rows[0].T).amax(1).min())
    for shift, wanted in ((0.05 + abs(least) * 0.1, "robust"), (-1e-3, "falsified")):
        cases = Cases(box, torch.tensor([0]), rows, torch.full((1, 2), shift - least, dtype=FLOAT))
        search, verdict = searched(graph, cases)
        if wanted == "robust":  # the grid is a little above the true minimum, by less than the shift
            assert verdict == "robust"
            assert search.counterexample is None
        else:
            assert verdict == "falsified"
            assert search.counterexample is not None
            assert float(cases.margin(graph.outputs(search.counterexample[None]))[0]) <= 0


@pytest.mark.parametrize("seed", range(1, 4))
def test_leaves_are_exact_for_one_row_and_several(seed: int) -> None:
    """Thresholds so near to the least value that only whole patterns of signs decide."""
    _, graph = drawn(20 + seed)
    x = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed)).double()
    box, row = Box(x - 0.5, x + 0.5), torch.tensor([1.0, -1.0, 0.0], dtype=FLOAT)
    least = Programme(graph, x).minimise(box, row, gap=0.0)
    for shift, wanted in ((1e-4, "robust"), (-1e-4, "falsified")):
        for rows in (row[None, None], torch.stack([row, row])[None]):
            constants = torch.full(rows.shape[:2], shift - least.value, dtype=FLOAT)
            assert searched(graph, Cases(box, torch.tensor([0]), rows, constants))[1] == wanted


def test_search_over_several_sets_at_once() -> None:
    """The bounds that are left are below the truth for every case, whatever its set; the verdict is that of the worst."""
    _, graph = drawn(3)
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)).double()
    inputs, y = Box(x - 0.2, x + 0.2), graph.outputs(x).argmax(1)
    rows = margins(y, 3, FLOAT).flatten(0, 1)[:, None]
    of = torch.arange(4).repeat_interleave(2)
    programme = Programme(graph, x)
    least = torch.tensor([programme.minimise(inputs.rows(of[k : k + 1]), rows[k, 0]).value for k in range(8)], dtype=FLOAT)
    for shift in (0.0, 0.3):
        cases = Cases(inputs, of, rows, torch.full((8, 1), shift, dtype=FLOAT))
        search, verdict = searched(graph, cases)
        assert verdict == ("robust" if float(least.min()) + shift > 0 else "falsified")
        assert bool((search.bounds <= least + shift + 1e-7).all())
    order = torch.tensor([5, 1, 7])
    cases = Cases(inputs, of, rows, -least[:, None] + 0.01).take(order)
    assert searched(graph, cases)[1] == "robust"


@pytest.mark.parametrize("fair", [False, True])
def test_search_of_an_inner_value(fair: bool) -> None:
    """`name`: rows speak of what goes into the second ReLU; what stays open has a bound below every sample."""
    _, graph = drawn(5)
    (_, second) = (node.inputs[0] for node in graph.nodes if node.op == "relu")
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    box = Box(x - 0.5, x + 0.5)
    values = torch.stack([graph.values(point[None])[second][0] for point in spread(box)])
    rows = torch.cat([torch.eye(8, dtype=FLOAT), -torch.eye(8, dtype=FLOAT)])[:, None]
    least = (values @ rows[:, 0].T).amin(0)
    cases = Cases(box, torch.zeros(16, dtype=torch.long), rows, torch.zeros(16, 1, dtype=FLOAT))
    root = Bounded.of(graph, box)
    nothing = lambda points, case: None  # noqa: E731
    bounds = []
    for most in (10, 600):
        search = Search(root, cases, nothing, deadline=math.inf, name=second, fair=fair)
        found = search.run(most)
        assert bool((search.bounds <= least.clamp(max=0) + 1e-9).all())  # above 0 a case is done
        assert found.domains >= 16
        bounds.append(search.bounds)
    assert bool((bounds[1] >= bounds[0] - 1e-9).all())
    assert float((bounds[1] - bounds[0]).max()) > 1e-3


def test_a_search_that_has_no_time_says_so_and_its_bound_is_sound() -> None:
    _, graph = drawn(7, hidden=12)
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    box, row = Box(x - 0.5, x + 0.5), torch.tensor([1.0, -1.0, 0.0], dtype=FLOAT)
    least = Programme(graph, x).minimise(box, row).value
    cases = Cases(box, torch.tensor([0]), row[None, None], torch.full((1, 1), 0.01 - least, dtype=FLOAT))
    root = Bounded.of(graph, box)
    for search in (
        Search(root, cases, lambda points, case: None, deadline=-math.inf),
        InputSearch(graph, cases, lambda points, case: None, deadline=-math.inf),
    ):
        found = search.run()
        assert found.verdict == "unknown"
        assert "time is up" in found.reason
        assert found.bound <= 0.01
    few = Search(root, cases, lambda points, case: None, deadline=math.inf).run(1)
    assert few.verdict == "unknown"
    assert "1 parts are bounded" in few.reason


def test_search_is_deterministic() -> None:
    _, graph = drawn(11)
    x = torch.full((1, 3), 0.4, dtype=FLOAT)
    cases = Cases.of_classes(Box(x - 0.3, x + 0.3), graph.outputs(x).argmax(1), 3)
    first, second = (searched(graph, cases)[0] for _ in range(2))
    assert first.count == second.count
    assert torch.equal(first.bounds, second.bounds)


def test_a_search_goes_on_where_its_time_ended() -> None:
    _, graph = drawn(11, hidden=12)
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    cases = Cases.of_classes(Box(x - 0.5, x + 0.5), graph.outputs(x).argmax(1), 3)
    least = torch.stack([(graph.outputs(spread(cases.inputs, 20000)) @ row[0]).amin() for row in cases.rows])
    cases = Cases(cases.inputs, cases.of, cases.rows, 0.05 - least[:, None])
    whole, _ = searched(graph, cases)
    root = Bounded.of(graph, cases.inputs)
    with torch.no_grad():
        root.refine()
    search = Search(root, cases, first_below(graph, cases), deadline=-math.inf)
    assert search.run().verdict == "unknown"
    assert bool((search.bounds <= 0).all())
    assert torch.equal(search.bounds, search.first)
    search.deadline = math.inf
    assert search.run().verdict == "robust"
    assert search.count == whole.count
    assert bool((search.bounds >= search.first).all())


def test_a_search_with_no_open_sign_is_a_linear_programme() -> None:
    """One box in which every ReLU is fixed already: nothing to split, and the answer is exact all the same."""
    _, graph = drawn(12)
    x = torch.rand(1, 3, generator=torch.Generator().manual_seed(12)).double()
    box, rows = Box(x - 1e-6, x + 1e-6), torch.tensor([[[1.0, -1.0, 0.0]]], dtype=FLOAT)
    value = float(graph.outputs(x)[0] @ rows[0, 0])
    for shift, wanted in ((1e-3, "robust"), (-1e-3, "falsified")):
        cases = Cases(box, torch.tensor([0]), rows, torch.full((1, 1), shift - value, dtype=FLOAT))
        search, verdict = searched(graph, cases)
        assert sum(search.sizes) == 0
        assert verdict == wanted


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_line_under_a_cut_is_below_it_and_nearly_as_high_as_can_be(norm: str) -> None:
    generator = torch.Generator().manual_seed(4)
    centre = torch.zeros(1, 6, dtype=FLOAT)
    sets = Ball.of(centre, 1.0, norm)
    w, a = (torch.randn(1, count, 6, generator=generator).double() for count in (40, 1))
    line = Linear(w, w.new_zeros(1, 40), {})
    for share in (0.9, 0.5, 0.0, -1.1):  # the cut leaves little of the set, some, half, all
        cut = Linear(a, share * sets.least(a).abs(), {})
        points = sets.inside(2 * torch.rand(20000, 6, generator=generator).double() - 1)
        inside = points[(points @ a[0, 0] + cut.constant[0, 0]) <= 0]
        low, found = line.lowest(sets), line.under(cut, sets).lowest(sets)
        assert bool((found >= low - 1e-12).all())
        if len(inside):
            assert bool((found[0] <= (inside @ w[0].T).amin(0) + 1e-12).all())
        if norm == "linf":
            bound = -cut.constant[0].numpy()
            exact = torch.tensor([linprog(c, a[0].numpy(), bound, bounds=(-1, 1)).fun for c in w[0].numpy()], dtype=FLOAT)
            assert bool((found[0] <= exact + 1e-9).all())
            assert float((exact - found[0]).sum()) <= 0.1 * float((exact - low[0]).sum()) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_inner_bounds_of_domains_hold_at_every_counterexample_with_their_signs(seed: int) -> None:
    """Some inputs are unsafe, but nobody tells the search."""
    _, graph = drawn(80 + seed, hidden=12)
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    box, rows = Box(x - 0.4, x + 0.4), torch.tensor([[[1.0, -1.0, 0.0]]], dtype=FLOAT)
    points = spread(box, 3000, seed)
    margin = graph.outputs(points) @ rows[0, 0]
    cases = Cases(box, torch.tensor([0]), rows, -margin.quantile(0.02)[None, None])
    unsafe = points[margin + cases.constants[0, 0] <= 0]
    root = Bounded.of(graph, box)
    with torch.no_grad():
        root.refine()
    search = Search(root, cases, lambda points, case: None, deadline=math.inf)
    values = [graph.values(point[None]) for point in unsafe]
    names = [node.inputs[0] for node in search.relus]
    free = [search.free[node.name] for node in search.relus]
    inputs = torch.cat([torch.cat([one[name] for one in values])[:, at] for name, at in zip(names, free, strict=True)], 1)
    boxes = [root.boxes[name] for name in names]
    widths = torch.cat([(box.upper - box.lower)[:, at] for box, at in zip(boxes, free, strict=True)], 1)
    narrower = 0.0
    for most in (1, 8, 30):
        search.run(most)
        held = torch.zeros(len(unsafe), dtype=torch.bool)
        left = search.open.join([search.open, search.fixed])
        for place in range(len(left)):
            part = left.take(torch.tensor([place]))
            fits = (inputs * part.signs >= -1e-9).all(1)
            assert bool((inputs[fits] >= part.lower - 1e-9).all() and (inputs[fits] <= part.upper + 1e-9).all())
            held |= fits
            narrower = max(narrower, float(((widths - part.upper + part.lower) * (part.signs == 0)).max()))
        assert bool(held.all())  # in none of those that are proved
    assert narrower > 0.01


# ---- tightening


@pytest.mark.parametrize("seed", range(4))
def test_tightened_bounds_hold_and_are_never_looser(seed: int) -> None:
    _, graph = drawn(30 + seed)
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).double()
    inputs = Box(x - 0.4, x + 0.4)
    root = Bounded.of(graph, inputs)
    with torch.no_grad():
        root.refine()
    before = dict(root.boxes)
    tighten(root, 8, deadline=time.perf_counter() + 20)
    gained = 0.0
    for name, box in root.boxes.items():
        assert bool((box.lower >= before[name].lower - 1e-12).all() and (box.upper <= before[name].upper + 1e-12).all()), name
        gained += float((before[name].upper - before[name].lower - box.upper + box.lower).sum())
    assert gained > 0.01
    for sample in range(2):
        for point in spread(inputs.rows(torch.tensor([sample])), 100, seed):
            for name, value in graph.values(point[None]).items():
                box = root.boxes[name].rows(torch.tensor([sample]))
                assert bool((box.lower <= value + 1e-9).all() and (value - 1e-9 <= box.upper).all()), name


def test_tightening_without_time_changes_nothing_for_the_worse() -> None:
    _, graph = drawn(40)
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    root = Bounded.of(graph, Box(x - 0.4, x + 0.4))
    before = dict(root.boxes)
    tighten(root, 8, deadline=time.perf_counter() - 1)
    for name, box in root.boxes.items():
        assert bool((box.lower >= before[name].lower).all() and (box.upper <= before[name].upper).all()), name


# ---- search on inputs


@pytest.mark.parametrize("seed", range(3))
def test_input_search_of_tanh_networks_equals_a_dense_grid(seed: int) -> None:
    _, graph = drawn(50 + seed, 2, 8, nn.Tanh)
    x = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed)).double()
    box, row = Box(x - 0.5, x + 0.5), torch.tensor([[[1.0, -1.0, 0.0]]], dtype=FLOAT)
    ticks = torch.linspace(-0.5, 0.5, 301, dtype=FLOAT)
    least = float((graph.outputs(x + torch.cartesian_prod(ticks, ticks)) @ row[0, 0]).min())
    for shift, wanted in ((0.03, "robust"), (-0.001, "falsified")):
        cases = Cases(box, torch.tensor([0]), row, torch.full((1, 1), shift - least, dtype=FLOAT))
        search = InputSearch(graph, cases, first_below(graph, cases), deadline=time.perf_counter() + 20)
        assert search.run().verdict == wanted


def test_input_search_of_several_rows_and_sets() -> None:
    _, graph = drawn(60, 2, 8, nn.Tanh)
    x = torch.tensor([[0.2, 0.3], [0.7, 0.6]], dtype=FLOAT)
    inputs = Box(x - 0.3, x + 0.3)
    rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=FLOAT)
    ticks = torch.linspace(-0.3, 0.3, 121, dtype=FLOAT)
    least = [float((graph.outputs(one + torch.cartesian_prod(ticks, ticks)) @ rows.T).amax(1).min()) for one in x]
    constants = 0.03 - torch.tensor(least, dtype=FLOAT)[:, None].expand(2, 2)
    cases = Cases(inputs, torch.tensor([0, 1]), rows.expand(2, 2, 3), constants)
    assert InputSearch(graph, cases, first_below(graph, cases), deadline=math.inf).run().verdict == "robust"
    worse = Cases(inputs, cases.of, cases.rows, constants - torch.tensor([[0.0], [0.032]]))
    search = InputSearch(graph, worse, first_below(graph, worse), deadline=math.inf)
    assert search.run().verdict == "falsified"
    assert search.counterexample is not None
    assert bool((search.counterexample >= inputs.lower[1]).all() and (search.counterexample <= inputs.upper[1]).all())


def test_boxes_without_width_and_boxes_that_cannot_be_halved() -> None:
    _, graph = drawn(61, 2, 8, nn.Tanh)
    x = torch.tensor([[0.2, 0.3]], dtype=FLOAT)
    row = torch.tensor([[[1.0, -1.0, 0.0]]], dtype=FLOAT)
    value = float(graph.outputs(x)[0] @ row[0, 0])
    for shift, wanted in ((1e-9, "robust"), (-1e-9, "falsified")):
        cases = Cases(Box(x, x), torch.tensor([0]), row, torch.full((1, 1), shift - value, dtype=FLOAT))
        assert InputSearch(graph, cases, first_below(graph, cases), deadline=math.inf).run().verdict == wanted
    cases = Cases(Box(x, x), torch.tensor([0]), row, torch.full((1, 1), -1e-9 - value, dtype=FLOAT))
    found = InputSearch(graph, cases, lambda points, case: None, deadline=math.inf).run()
    assert found.verdict == "unknown"
    assert "halved" in found.reason


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
def test_clipped_boxes_hold_all_that_lines_do_not_prove(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(200, 3, generator=generator).to(dtype)
    boxes = Box(lower, lower + torch.rand(200, 3, generator=generator).to(dtype))
    a = torch.randn(200, 3, generator=generator).to(dtype)
    a[:20, 1], a[20:30] = 0, 0
    slack = torch.rand(200, generator=generator).to(dtype) * (boxes.upper - boxes.lower).mean(1)
    slack[30:40] = 0
    cut = clipped(boxes, a, slack)
    assert bool((cut.lower >= boxes.lower).all() and (cut.upper <= boxes.upper).all() and (cut.lower <= cut.upper).all())
    assert float((cut.upper - cut.lower).prod(1).mean()) < 0.5 * float((boxes.upper - boxes.lower).prod(1).mean())
    assert torch.equal(cut.lower[20:30], boxes.lower[20:30])  # nothing is known without a slope
    shares = torch.cartesian_prod(*[torch.linspace(0, 1, 9, dtype=FLOAT)] * 3)
    points = boxes.lower.double()[:, None] + shares * (boxes.upper.double() - boxes.lower.double())[:, None]
    above = ((points - points[:, :1].where(a[:, None] > 0, points[:, -1:])) * a.double()[:, None]).sum(2)
    inside = ((points >= cut.lower[:, None]) & (points <= cut.upper[:, None])).all(2)
    assert bool(inside[above <= slack.double()[:, None]].all())
    assert not bool(inside[40:].all())
    reach = (slack / a[:, 0].abs()).where(a[:, 0] != 0, math.inf)  # and no more than that, but for rounding
    assert bool((cut.upper - cut.lower)[:, 0].le(reach + 1e-5).all())


@pytest.mark.parametrize(("activation", "outward"), [(nn.ReLU, False), (nn.ReLU, True), (nn.Tanh, False), (nn.Tanh, True)])
def test_input_search_loses_no_counterexample(activation: type[nn.Module], outward: bool) -> None:
    """What is unsafe is in an open box after any number of rounds, where no counterexample is looked for."""
    ticks = torch.linspace(0, 1, 15, dtype=FLOAT)
    share = torch.cartesian_prod(ticks, ticks, ticks)
    rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=FLOAT)
    for seed in range(2):
        _, graph = drawn(80 + seed, 3, 8, activation)
        x = torch.tensor([[0.3, 0.4, 0.5], [0.7, 0.6, 0.2]], dtype=FLOAT)
        inputs = Box(x - 0.4, x + 0.4)
        points = inputs.lower[:, None] + 0.8 * share
        margins_ = (graph.outputs(points.flatten(0, 1)) @ rows.T).amax(1).view(2, -1)
        constants = -margins_.kthvalue(40, 1).values[:, None].expand(2, 2)  # 40 of 3375 points are unsafe
        cases = Cases(inputs, torch.tensor([0, 1]), rows.expand(2, 2, 3), constants)
        for rounds in (1, 3, 8):
            count = itertools.count()
            search = InputSearch(
                graph, cases, lambda points, case: None, deadline=rounds + 0.5, clock=lambda count=count: float(next(count)),
                outward=outward,
            )  # fmt: skip
            found = search.run()
            assert found.verdict == "unknown"
            assert found.bound <= 0
            held = torch.zeros_like(margins_, dtype=torch.bool)
            for part in search.stack:
                for lower, upper, case in zip(part.boxes.lower, part.boxes.upper, part.case, strict=True):
                    held[case] |= ((points[case] >= lower) & (points[case] <= upper)).all(1)
            assert bool(held[margins_ <= -constants[:, :1]].all())
        assert float(held.double().mean()) < 0.2


def test_input_search_halves_what_bounds_are_loose_along() -> None:
    """x_0 goes through a nonlinearity and x_1 doesn't; x_1 moves the output more."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.2], [0.0, 0.0, 0.0]]))
        net[2].bias.fill_(-12.0)  # |4 x_0| + 1.2 x_1
    graph = export(sp.Model(net, bounds=None), torch.zeros(1, 2, dtype=FLOAT)).graph()
    box = Box(torch.full((1, 2), -1.0, dtype=FLOAT), torch.full((1, 2), 1.0, dtype=FLOAT))
    cases = Cases(box, torch.tensor([0]), torch.eye(2, dtype=FLOAT)[None, :1], torch.full((1, 1), 1.1, dtype=FLOAT))
    ticks = itertools.count()
    search = InputSearch(graph, cases, lambda points, case: None, deadline=1.5, clock=lambda: float(next(ticks)))
    search.run()
    assert [part.place.tolist() for part in search.stack] == [[0]]


# ---- balls


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_balls_against_samples(norm: str) -> None:
    verdicts = []
    for seed in range(8):
        model, graph = drawn(70 + seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, 3, generator=generator).double()
        eps = (0.03, 0.1, 0.4)[seed % 3]
        ball, y = Ball.of(x, eps, norm), graph.outputs(x).argmax(1)
        cases = Cases.of_classes(ball, y, 3)

        def replay(point: Tensor, case: int, cases: Cases = cases, x: Tensor = x, eps: float = eps) -> bool:
            near = float((point - x[0]).norm(p=1 if norm == "l1" else 2)) <= eps * (1 + 1e-9)
            return near and bool(cases.take(torch.tensor([case])).margin(model.forward(point[None]))[0] <= 0)  # noqa: B023

        proof = prove(graph, cases, replay, seconds=3)
        delta = torch.randn(600, 3, generator=generator).double()
        size = delta.norm(p=1 if norm == "l1" else 2, dim=1, keepdim=True)
        points = x + eps * delta / size * torch.rand(600, 1, generator=generator).double() ** 0.2
        outputs = graph.outputs(points)
        gap = (outputs[:, y] - outputs).masked_fill(torch.eye(3, dtype=torch.bool)[y], torch.inf)
        assert proof.bound <= float(gap.min()) + 1e-9
        assert not (proof.verdict == "robust" and float(gap.min()) <= 0)
        if proof.verdict == "falsified":
            assert proof.counterexample is not None
            assert float((proof.counterexample - x[0]).norm(p=1 if norm == "l1" else 2)) <= eps * (1 + 1e-9)
        verdicts.append(proof.verdict)
    assert {"robust", "falsified"} <= set(verdicts)


# ---- the cascade


def test_stages_of_prove_and_a_clock_that_ends_between_them() -> None:
    _, graph = drawn(3)
    x = torch.full((1, 3), 0.5, dtype=FLOAT)
    cases = Cases.of_classes(Box(x - 0.5, x + 0.5), graph.outputs(x).argmax(1), 3)
    easy = prove(graph, Cases(cases.inputs, cases.of, cases.rows, cases.constants + 1e3), lambda point, case: False, seconds=5)
    assert (easy.verdict, easy.stage) == ("robust", "crown-ibp")
    assert easy.bound > 0
    stages = set()
    for ends in range(1, 8):
        ticks = itertools.count()
        clock = lambda ticks=ticks, ends=ends: 0.0 if next(ticks) < ends else 100.0  # noqa: E731
        proof = prove(graph, cases, lambda point, case: False, seconds=5, clock=clock)
        assert proof.verdict == "unknown"
        assert proof.reason
        assert proof.seconds in (0.0, 100.0)
        stages.add(proof.stage)
    assert {"none", "crown-ibp", "corners"} <= stages
    assert prove(graph, cases, lambda point, case: False, seconds=0).stage == "none"


class Pole(nn.Module):
    """Wrong in a sliver behind a pole at 0.45."""

    def forward(self, x: Tensor) -> Tensor:
        spike = 2 * (1 / (1000 * (x[:, :1] - 0.45)) - 10).relu()
        return torch.cat([20 + 0 * x[:, 1:2], spike + x[:, 1:2]], 1)


@pytest.mark.parametrize("inputs", [2, 20])
@pytest.mark.parametrize("rigorous", [False, True])
def test_where_nothing_is_known_nothing_is_proved(inputs: int, rigorous: bool) -> None:
    model, x = sp.Model(Pole(), bounds=None), torch.zeros(1, inputs)
    wrong = x.index_fill(1, torch.tensor([0]), 0.45 + 1e-5)
    assert int(model.predict(wrong)) != int(model.predict(x))
    found = sp.verify.certify(model, x, model.predict(x), sp.Linf(0.5), sp.Budget(seconds=1), rigorous=rigorous)
    assert not bool(found.robust.any())
    assert not bool(found.bound.isnan().any())
