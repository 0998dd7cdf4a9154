"""Threats: exact membership in every dtype, projections against references, distributions of the random points."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import L0, L1, L2, Bounds, Linf, Minimize, Region, Threat, _level, ball, distance

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOUNDS: tuple[Bounds, ...] = ((0.0, 1.0), (-1.0, 1.0), (-0.4242, 2.8215), None)
SHAPES = ((1,), (7,), (3, 5), (3, 4, 2))
EPS = (0.0, 1e-9, 1e-3, 8 / 255, 0.3, 2.5)
GRID = 1 / 255


def keys(count: int, seed: int = 0) -> Keys:
    return Keys.of(seed, torch.arange(count))


def inputs(shape: tuple[int, ...], bounds: Bounds, dtype: torch.dtype, seed: int, count: int = 4) -> Tensor:
    """Random inputs with many features exactly at the bounds."""
    low, high = bounds or (-3.0, 3.0)
    u = keys(count, seed).uniform(shape, torch.float64) * 1.4 - 0.2
    return (low + (high - low) * u.clamp(0, 1)).to(dtype).clamp(low, high)


def noise(x: Tensor, size: float, seed: int) -> Tensor:
    return (x.double() + size * keys(len(x), seed + 1).normal(tuple(x.shape[1:]), torch.float64)).to(x.dtype)


def flat(values: Tensor) -> Tensor:
    return values.double().flatten(1)


@st.composite
def situations(draw: st.DrawFn, norms: tuple[type[Threat], ...] = (Linf, L2, L1, L0)) -> tuple[Threat, Tensor, Tensor, Bounds]:
    kind = draw(st.sampled_from(norms))
    shape, dtype, bounds = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(BOUNDS))
    seed = draw(st.integers(0, 10_000))
    x = inputs(shape, bounds, dtype, seed)
    choices = st.sampled_from(EPS) if kind is not L0 else st.sampled_from((0.0, 1.0, 2.0, 3.0, 50.0))
    eps = draw(choices | st.lists(choices, min_size=4, max_size=4))
    mask = draw(st.none() | st.integers(0, 1000))
    per = {"per": draw(st.sampled_from(("feature", "pixel")))} if kind is L0 and len(shape) == 3 else {}
    free = None if mask is None else keys(1, mask).uniform(shape)[0] < 0.6
    points = noise(x, draw(st.sampled_from((1e-4, 0.01, 0.3, 3.0, 1000.0))), seed)
    return kind(eps, mask=free, **per), x, points, bounds


def radius_of(threat: Threat, x: Tensor) -> Tensor:
    return threat.eps_for(torch.arange(len(x)))


class TestProjection:
    @given(situations())
    @settings(max_examples=400, deadline=None, derandomize=True)
    def test_exactly_inside(self, case: tuple[Threat, Tensor, Tensor, Bounds]) -> None:
        threat, x, points, bounds = case
        region = threat.around(x, bounds)
        inside, eps = region.project(points), radius_of(threat, x)
        assert inside.dtype == x.dtype
        assert inside.shape == x.shape
        assert region.contains(inside).all()
        assert region.contains(x).all()
        if bounds is not None:
            assert inside.min() >= bounds[0]
            assert inside.max() <= bounds[1]
        delta = flat(inside) - flat(x)
        match threat.norm:
            case Norm.LINF:
                assert (delta.abs().amax(1) <= eps).all()
                assert ((inside - x).abs().flatten(1).amax(1).double() <= eps).all()
            case Norm.L2:
                assert (delta.norm(dim=1) <= eps).all()
            case Norm.L1:
                assert (delta.abs().sum(1) <= eps).all()
            case Norm.L0:
                moved = inside != x
                units = moved.any(1) if threat.settings()["per"] == "pixel" else moved
                assert (units.flatten(1).sum(1) <= eps).all()
        if threat.mask is not None:
            held = ~threat.mask.expand_as(x)
            assert torch.equal(inside[held], x[held])

    @given(situations())
    @settings(max_examples=200, deadline=None, derandomize=True)
    def test_feasible_points_stay_bit_by_bit(self, case: tuple[Threat, Tensor, Tensor, Bounds]) -> None:
        threat, x, points, bounds = case
        region = threat.around(x, bounds)
        once = region.project(points)
        assert torch.equal(region.project(once), once)
        assert torch.equal(region.project(x), x)
        feasible = region.contains(points)
        assert torch.equal(once[feasible], points[feasible])

    @pytest.mark.parametrize("kind", [L2, L1])
    def test_feasible_points_stay_beside_infeasible_ones(self, kind: type[Threat]) -> None:
        x = inputs((50,), None, torch.float32, 0)
        points = noise(x, 0.1, 1)  # x + (points - x) is not points, where x is near 0
        points[0] += 50
        found = kind(10.0).project(points, x, None)
        assert torch.equal(found[1:], points[1:])
        assert not torch.equal(found[0], points[0])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bounds", BOUNDS)
    def test_linf_loses_next_to_nothing(self, dtype: torch.dtype, bounds: Bounds) -> None:
        """The ends are at most a few units in the last place short of eps or of the range."""
        x = inputs((500,), bounds, dtype, 1)
        low, high = bounds or (-INF, INF)
        for eps in (0.0, 1e-3, 8 / 255, 0.3):
            region = Linf(eps).around(x, bounds)
            ideal = ((x.double() - eps).clamp(min=low), (x.double() + eps).clamp(max=high))
            slack = 3 * torch.finfo(dtype).eps * torch.maximum(x.double().abs() + eps, torch.tensor(eps))
            assert ((region.lower.double() - ideal[0]).abs() <= slack).all()
            assert ((region.upper.double() - ideal[1]).abs() <= slack).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linf_with_huge_eps(self, dtype: torch.dtype) -> None:
        x = inputs((9,), (0.0, 1.0), dtype, 0)
        for eps in (1e6, 1e39, 1e300, INF):
            assert torch.equal(Linf(eps).project(x + 100, x), torch.ones_like(x))
            free = Linf(eps).around(x, None)
            assert free.contains(x + 1).all()
            assert not torch.isnan(free.lower).any()

    @pytest.mark.parametrize("kind", [L2, L1])
    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), None])
    def test_nearest_point(self, kind: type[Threat], bounds: Bounds) -> None:
        """Against a general solver, with the box active and inactive."""
        low, high = bounds or (-INF, INF)
        for seed, size in itertools.product(range(4), (0.05, 0.4, 2.0)):
            x = inputs((5,), bounds, torch.float64, seed, count=2)
            points = noise(x, size, seed)
            for eps in (0.05, 0.7):
                ours = kind(eps).project(points, x, bounds)
                for row in range(2):
                    reference = solve(kind, points[row].numpy(), x[row].numpy(), eps, low, high)
                    assert np.abs(ours[row].numpy() - reference).max() < 2e-5 * max(1, size)

    @given(situations((L2, L1)))
    @settings(max_examples=200, deadline=None, derandomize=True)
    def test_optimality_conditions(self, case: tuple[Threat, Tensor, Tensor, Bounds]) -> None:
        """No feasible point is nearer: tried along the ways to other feasible points (the sets are convex)."""
        threat, x, points, bounds = case
        region = threat.around(x, bounds)
        nearest = flat(region.project(points))
        scale = torch.finfo(x.dtype).eps + 2e-6
        for seed in range(3):
            other = flat(region.project(noise(x, 0.5 + seed, 77 + seed)))
            # <points - nearest, other - nearest> <= 0 for a projection on a convex set
            product = ((flat(points) - nearest) * (other - nearest)).sum(1)
            size = flat(x).abs().sum(1) + radius_of(threat, x)
            assert (product <= scale * 4 * size * (flat(points) - nearest).norm(dim=1) + 1e-12).all()

    def test_l1_with_ties_zeros_and_large_numbers(self) -> None:
        x = torch.zeros(5, 4, dtype=torch.float64)
        points = torch.tensor(
            [[1.0, 1, 1, 1], [0, 0, 0, 0], [3, 0, 0, 0], [-2, 2, -2, 0], [1e8, 1e8, 5, -1e8]], dtype=torch.float64
        )
        found = L1(1.0).project(points, x, None)
        third = 1 / 3
        wanted = [[0.25] * 4, [0.0] * 4, [1.0, 0, 0, 0], [-third, third, -third, 0], [third, third, 0, -third]]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=2e-6, rtol=0)
        boxed = L1(1.0).project(points, x, (-0.3, 0.3))
        wanted = [[0.25] * 4, [0.0] * 4, [0.3, 0, 0, 0], [-0.3, 0.3, -0.3, 0], [0.3, 0.3, 0.1, -0.3]]
        torch.testing.assert_close(boxed, torch.tensor(wanted, dtype=torch.float64), atol=2e-6, rtol=0)

    @pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 10.0])
    def test_l2_converges_for_adversarial_rooms(self, ratio: float) -> None:
        """Rooms and moves in geometric sequences, so that one feature after the other meets its bound."""
        d = 60 if ratio < 3 else 30
        power = torch.arange(d, dtype=torch.float64)
        for direction in (1, -1):
            moves = ratio ** (direction * power / 2)
            room = moves * torch.linspace(0.01, 0.9, d, dtype=torch.float64)
            for share in (0.05, 0.3, 0.7, 0.99):
                eps = share * float(room.norm())
                threat = L2(eps)
                low, high = -room[None], room[None]
                found = threat._shrink(moves[None], torch.tensor([eps], dtype=torch.float64), low, high)
                root = optimize.brentq(lambda s: float(torch.minimum(s * moves, room).norm()) - eps, 0, 1, xtol=1e-300)  # noqa: B023
                wanted = torch.minimum(root * moves, room)
                assert float((found[0] - wanted).norm()) <= 1e-6 * eps
                assert float(found.norm()) <= eps * (1 + 1e-12)

    @pytest.mark.parametrize("per", ["feature", "pixel"])
    def test_l0_by_brute_force(self, per: str) -> None:
        shape = (4,) if per == "feature" else (2, 2, 2)
        for seed in range(8):
            x = inputs(shape, (0.0, 1.0), torch.float64, seed, count=1)
            points = noise(x, 1.0, seed)
            for k in (0, 1, 2, 4):
                ours = L0(k, per=per).project(points, x)  # type: ignore[arg-type]
                best = min(
                    float((torch.where(chosen.expand_as(x), points.clamp(0, 1), x) - points).norm())
                    for chosen in supports(shape, k, per)
                )
                assert math.isclose(float((ours - points).norm()), best, rel_tol=1e-12)

    def test_l0_gains_neither_cancel_nor_underflow(self) -> None:
        x = torch.zeros(1, 3, dtype=torch.float32)
        assert L0(1).project(torch.tensor([[3e19, 2e19, 1.0]]), x).tolist() == [[1, 0, 0]]
        far = torch.tensor([[1e6, 1e6 + 1, 1e6]])
        assert L0(1).project(far, x).tolist() == [[0, 1, 0]]
        for dtype, tiny in ((torch.float16, 1e-4), (torch.float32, 1e-30)):
            point = torch.tensor([[0, tiny, 0]], dtype=dtype)
            assert torch.equal(L0(1).project(point, x.to(dtype)), point)

    def test_nan_stays_outside(self) -> None:
        x = torch.full((2, 3), 0.5)
        points = x.clone()
        points[0, 1] = NAN
        for threat in (Linf(0.1), L2(0.1), L1(0.1), L0(1)):
            region = threat.around(x)
            assert region.contains(points).tolist() == [False, True]
            assert not region.contains(region.project(points))[0] or not torch.isnan(region.project(points)).any()
            assert torch.equal(region.project(points)[1], x[1])

    def test_empty_batches_and_layouts(self) -> None:
        x = inputs((3, 4, 4), (0.0, 1.0), torch.float32, 0)
        last = x.to(memory_format=torch.channels_last)
        strided = torch.cat([x, x], -1)[..., ::2].transpose(2, 3)
        for threat in (Linf(0.1), L2(0.5), L1(1.0), L0(5), L0(3, per="pixel")):
            assert threat.project(x[:0], x[:0]).shape == (0, 3, 4, 4)
            assert threat.around(x[:0]).random(keys(0)).shape == (0, 3, 4, 4)
            gradient = noise(x, 1.0, 3)
            step = threat.around(x).steepest(gradient, torch.full((4,), 2.0, dtype=torch.float64), x)
            for same in (last, strided.transpose(2, 3)[..., :4]):
                if torch.equal(same, x):
                    assert torch.equal(threat.project(same + 0.3, same), threat.project(x + 0.3, x))
                    channels = gradient.to(memory_format=torch.channels_last)
                    moved = threat.around(same).steepest(channels, torch.full((4,), 2.0, dtype=torch.float64), same)
                    assert torch.equal(moved, step)


def supports(shape: tuple[int, ...], k: int, per: str) -> list[Tensor]:
    units = shape if per == "feature" else shape[1:]
    count = math.prod(units)
    found = []
    for size in range(min(k, count) + 1):
        for chosen in itertools.combinations(range(count), size):
            mask = torch.zeros(count, dtype=torch.bool)
            mask[list(chosen)] = True
            found.append(mask.view(units).expand(shape)[None])
    return found


def solve(kind: type[Threat], point: np.ndarray, x: np.ndarray, eps: float, low: float, high: float) -> np.ndarray:
    """The nearest point by SciPy: minimise |x + u - v - point|^2, u and v >= 0 (their sum is the l1 norm)."""
    d = len(x)

    def gap(w: np.ndarray) -> np.ndarray:
        return x + w[:d] - w[d:] - point

    limits = [(0, max(high - a, 0) if high < INF else None) for a in x] + [
        (0, max(a - low, 0) if low > -INF else None) for a in x
    ]
    if kind is L1:
        inside = {"type": "ineq", "fun": lambda w: eps - w.sum(), "jac": lambda w: -np.ones(2 * d)}
    else:

        def slope(w: np.ndarray) -> np.ndarray:
            return np.concatenate([-2 * (w[:d] - w[d:]), 2 * (w[:d] - w[d:])])

        inside = {"type": "ineq", "fun": lambda w: eps**2 - ((w[:d] - w[d:]) ** 2).sum(), "jac": slope}
    start = np.concatenate([np.maximum(point - x, 0), np.maximum(x - point, 0)])
    start *= eps / max(np.abs(start).sum(), eps)
    result = optimize.minimize(
        lambda w: (gap(w) ** 2).sum(),
        np.clip(start, 0, [b if b is not None else INF for _, b in limits]),
        jac=lambda w: np.concatenate([2 * gap(w), -2 * gap(w)]),
        bounds=limits,
        constraints=[inside],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    found: np.ndarray = x + result.x[:d] - result.x[d:]
    return found


class TestGrid:
    def levels(self, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        level = (keys(3, seed).uniform(shape, torch.float64) * 300 - 22).clamp(0, 255).round()
        return (level.to(torch.float32) / 255).to(dtype)

    def test_values_are_those_of_image_loaders(self) -> None:
        images = torch.arange(256, dtype=torch.uint8)[None]
        x = images.float() / 255
        region = Linf(0.0, grid=GRID).around(x)
        assert torch.equal(region.lower, x)
        assert torch.equal(Linf(1.0, grid=GRID).around(torch.zeros_like(x)).snap(x), x)
        assert torch.equal(L2(100.0, grid=GRID).around(torch.zeros_like(x)).snap(x), x)

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
    @pytest.mark.parametrize("eps", [0.0, 0.5 / 255, 1 / 255, 2.5 / 255, 8 / 255, 1.0])
    def test_linf_in_whole_levels(self, eps: float, bounds: Bounds) -> None:
        x = self.levels((40,))
        for size in (0.001, 0.05, 1.0):
            region = Linf(eps, grid=GRID).around(x, bounds)
            found = region.snap(region.project(noise(x, size, 1)))
            levels = found.double() * 255
            assert (levels - levels.round()).abs().max() < 1e-3
            assert (levels.round() - (x.double() * 255).round()).abs().max() <= math.floor(eps * 255 + 1e-6)
            assert region.contains(found).all()
            assert torch.equal(region.snap(found), found)
        far = region.snap(region.project(x + 9))
        reach = ((x.double() * 255).round() + math.floor(eps * 255 + 1e-6)).clamp(max=255 if bounds else INF)
        assert torch.equal((far.double() * 255).round(), reach)

    def test_linf_keeps_every_whole_level(self) -> None:
        x = torch.zeros(1, 3)
        for level in range(256):
            for eps in (level / 255, level * (1 / 255), float(torch.tensor(level / 255))):
                assert (Linf(eps, grid=GRID).around(x).upper * 255).round().tolist() == [[level] * 3]
        tenths = Linf(0.3, grid=0.1).around(x)  # 0.3 / 0.1 is below 3 in float64
        torch.testing.assert_close(tenths.upper, torch.full_like(x, 0.3))

    @pytest.mark.parametrize("threat", [L2(0.3, grid=GRID), L1(1.0, grid=GRID), L0(7, grid=GRID)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_other_norms(self, threat: Threat, dtype: torch.dtype) -> None:
        x = self.levels((40,), dtype=dtype)
        for size in (0.001, 0.05, 1.0):
            region = threat.around(x)
            found = region.snap(region.project(noise(x, size, 1)))
            assert region.contains(found).all()
            assert torch.equal(region.snap(found), found)
            levels = found.double() * 255
            assert (levels - levels.round()).abs().max() < 1e-3
            assert torch.equal(threat.project(noise(x, size, 1), x), found)
        assert threat.contains(found, x).all()
        assert not threat.contains(torch.where(x > 0.5, x - 1e-3, x + 1e-3), x).any()

    def test_snapping_keeps_what_is_on_the_grid(self) -> None:
        x, other = self.levels((200,)), self.levels((200,), seed=5)
        for threat in (L2(100.0, grid=GRID), L1(1000.0, grid=GRID), L0(200, grid=GRID), Linf(1.0, grid=GRID)):
            assert torch.equal(threat.around(x).snap(other), other)
            assert threat.around(x).contains(other).all()

    def test_inputs_an_ulp_off_the_grid_keep_their_bits(self) -> None:
        x = torch.arange(256, dtype=torch.float32)[None] * (1 / 255)  # not k / 255 for every k
        assert not torch.equal(x, torch.arange(256)[None] / 255)
        for threat in (L0(1, grid=GRID), L2(0.1, grid=GRID), L1(0.1, grid=GRID), Linf(0.0, grid=GRID)):
            region = threat.around(x)
            assert region.contains(x).all()
            assert torch.equal(region.snap(region.project(x)), x)
        moved = L0(1, grid=GRID).project(x + torch.eye(256)[7], x)
        assert int((moved != x).sum()) == 1

    def test_bounds_between_grid_values(self) -> None:
        bounds = (-0.4242, 2.8215)  # -108.2 and 719.5 levels
        x = torch.tensor([[-108.0, 0.0, 719.0]]) / 255
        for threat in (Linf(9.0, grid=GRID), L2(99.0, grid=GRID), L1(99.0, grid=GRID), L0(3, grid=GRID)):
            region = threat.around(x, bounds)
            for side, end in ((-50.0, -108), (50.0, 719)):
                found = region.snap(region.project(x + side))
                assert region.contains(found).all()
                assert (found * 255).round().tolist() == [[end] * 3]

    def test_other_spacings(self) -> None:
        for grid in (0.5, 0.3, 2.0, 1 / 16):
            x = torch.tensor([[0.0, 2.0, -4.0]]).mul(grid)
            region = Linf(1.01 * grid, grid=grid).around(x, None)
            found = region.snap(region.project(x + 7))
            torch.testing.assert_close(found, x + grid)
            assert region.contains(found).all()


class TestContains:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_one_ulp_outside(self, dtype: torch.dtype) -> None:
        x = inputs((6,), (0.0, 1.0), dtype, 3) * 0 + torch.tensor(0.25, dtype=dtype)
        away = torch.full_like(x, 9.0)
        for threat in (Linf(0.125), L2(0.125 * 6**0.5), L1(0.75)):
            edge = torch.full_like(x, 0.375)
            region = threat.around(x)
            if threat.norm is not Norm.L2:  # the square root rounds
                assert region.contains(edge).all()
            beyond = edge.clone()
            for _ in range(1 if dtype != torch.float64 or threat.norm is Norm.LINF else 8):  # sums round in float64 too
                beyond[:, 2] = torch.nextafter(beyond, away)[:, 2]
            assert not region.contains(beyond).any()
            assert not region.contains(torch.nextafter(torch.zeros_like(x), -away)).any()
        box = Linf(5.0).around(x)
        assert box.contains(torch.ones_like(x)).all()
        assert not box.contains(torch.nextafter(torch.ones_like(x), away)).any()
        assert not box.contains(torch.nextafter(torch.zeros_like(x), -away)).any()

    def test_masked_features_must_be_identical(self) -> None:
        x = torch.full((2, 3), 0.5)
        mask = torch.tensor([True, True, False])
        moved = x.clone()
        moved[0, 2] = 0.5 + 2**-26
        moved[1, 2] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
        for threat in (Linf(0.3, mask=mask), L2(0.3, mask=mask), L1(0.3, mask=mask), L0(2, mask=mask)):
            assert threat.contains(moved, x).tolist() == [True, False]  # 0.5 + 2^-26 rounds to 0.5

    def test_support(self) -> None:
        x = torch.zeros(1, 3, 2, 2)
        points = x.clone()
        points[0, :, 0, 0] = 0.5
        assert L0(3).contains(points, x).all()
        assert not L0(2).contains(points, x).any()
        assert L0(1, per="pixel").contains(points, x).all()


def test_distances_against_torch() -> None:
    x = inputs((3, 4, 5), None, torch.float32, 0)
    points = noise(x, 1.0, 0)
    points[:, :, 0] = x[:, :, 0]
    points[:, 0, 1] = x[:, 0, 1]
    delta = (points.double() - x.double()).flatten(1)
    torch.testing.assert_close(distance(points, x, "l2"), torch.norm(delta, dim=1))
    torch.testing.assert_close(distance(points, x, "l1"), torch.norm(delta, p=1, dim=1))
    assert torch.equal(distance(points, x, "linf"), torch.norm(delta, p=INF, dim=1))
    assert distance(points, x, "l0").tolist() == [(60 - 15) - 5] * 4
    assert distance(points, x, "l0", per="pixel").tolist() == [15.0] * 4
    for norm in Norm:
        assert distance(points, x, norm).dtype == torch.float64
        assert distance(x, x, norm).tolist() == [0.0] * 4
        assert distance(x[:0], x[:0], norm).shape == (0,)
        assert distance(torch.empty(2, 0), torch.empty(2, 0), norm).tolist() == [0, 0]
    with pytest.raises(InputError, match="images"):
        distance(points.flatten(1), x.flatten(1), "l0", per="pixel")
    half = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    assert distance(half, half * 2**-11, "l2").item() == pytest.approx(2**0.5 * (1 - 2**-11), rel=1e-12)


class TestRandom:
    N = 4000

    def points(
        self, threat: Threat, shape: tuple[int, ...], bounds: Bounds = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return threat.around(torch.zeros(self.N, *shape, dtype=dtype), bounds).random(keys(self.N))

    @given(situations())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_inside_and_reproducible(self, case: tuple[Threat, Tensor, Tensor, Bounds]) -> None:
        threat, x, _, bounds = case
        region = threat.around(x, bounds)
        if threat.norm is Norm.L0 and bounds is None:
            if threat.mask is not None and not threat.mask.any():
                return
            with pytest.raises(CapabilityError, match="bounds"):
                region.random(keys(4))
            return
        found = region.random(keys(4))
        assert found.dtype == x.dtype
        assert region.contains(found).all()
        assert torch.equal(found, region.random(keys(4)))
        alone = threat.around(x[2:3], bounds, torch.tensor([2])).random(Keys.of(0, torch.tensor([2])))
        assert torch.equal(alone, found[2:3])

    @pytest.mark.parametrize("d", [1, 2, 10])
    def test_l2_radius_and_direction(self, d: int) -> None:
        found = self.points(L2(0.5), (d,))
        radius = found.norm(dim=1) / 0.5
        assert stats.kstest((radius**d).numpy(), "uniform").pvalue > 1e-3
        assert float(found.mean(0).abs().max()) < 0.03
        if d == 2:
            angle = torch.atan2(found[:, 1], found[:, 0]) / (2 * math.pi) + 0.5
            assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("d", [1, 2, 10])
    def test_l1_radius_and_shares(self, d: int) -> None:
        found = self.points(L1(0.5), (d,))
        radius = found.abs().sum(1) / 0.5
        assert stats.kstest((radius**d).numpy(), "uniform").pvalue > 1e-3
        if d > 1:  # on the sphere each |coordinate| is Beta(1, d - 1)
            share = found[:, 0].abs() / found.abs().sum(1)
            assert stats.kstest(share.numpy(), stats.beta(1, d - 1).cdf).pvalue > 1e-3
        assert float((found > 0).double().mean(0).sub(0.5).abs().max()) < 0.04

    def test_linf_uniform(self) -> None:
        found = self.points(Linf(0.5), (3,))
        for column in found.T:
            assert stats.kstest((column + 0.5).numpy(), "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_unbiased(self, dtype: torch.dtype) -> None:
        for threat in (Linf(0.5), L2(0.5), L1(0.5)):
            found = self.points(threat, (4,), dtype=dtype).double()
            exact = self.points(threat, (4,))
            assert float((found - exact).abs().max()) < 0.01
        support = self.points(L0(3), (300,), (-1.0, 1.0), dtype) != 0
        counts = support.sum(0).double()
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_masked_features_leave_the_dimension(self) -> None:
        mask = torch.tensor([True, False, True, False])
        found = self.points(L2(0.5, mask=mask), (4,))
        assert (found[:, ~mask] == 0).all()
        assert stats.kstest(((found.norm(dim=1) / 0.5) ** 2).numpy(), "uniform").pvalue > 1e-3
        found = self.points(L1(0.5, mask=mask), (4,))
        assert stats.kstest(((found.abs().sum(1) / 0.5) ** 2).numpy(), "uniform").pvalue > 1e-3

    def test_l0_support(self) -> None:
        found = self.points(L0(2), (6,), (-1.0, 1.0))
        changed = found != 0
        assert (changed.sum(1) == 2).all()
        assert stats.chisquare(changed.sum(0).double().numpy()).pvalue > 1e-3
        assert stats.kstest(((found[changed] + 1) / 2).numpy(), "uniform").pvalue > 1e-3

    def test_l0_pixels_with_unequal_channels(self) -> None:
        mask = torch.ones(3, 1, 4, dtype=torch.bool)
        mask[1:, 0, 2] = False  # one pixel may change in one channel only: its chance is that of the others
        found = self.points(L0(1, per="pixel", mask=mask), (3, 1, 4), (-1.0, 1.0))
        changed = (found != 0).any(1)[:, 0]
        assert (changed.sum(1) == 1).all()
        assert stats.chisquare(changed.sum(0).double().numpy()).pvalue > 1e-3

    def test_no_point_in_a_ball_without_end(self) -> None:
        for norm in Norm:
            with pytest.raises(CapabilityError, match="finite"):
                Minimize(norm).around(torch.zeros(2, 3)).random(keys(2))


class TestSteepest:
    def sizes(self, value: float, count: int = 4) -> Tensor:
        return torch.full((count,), value, dtype=torch.float64)

    @pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0), L1(1.0)])
    def test_dual_norm_without_a_box(self, threat: Threat) -> None:
        g = keys(4).normal((3, 4), torch.float64)
        x = torch.zeros_like(g)
        d = threat.around(x, None).steepest(g, self.sizes(0.7), x)
        gain = (g * d).flatten(1).sum(1)
        dual = {Norm.LINF: 1.0, Norm.L2: 2.0, Norm.L1: INF}[threat.norm]
        torch.testing.assert_close(gain, 0.7 * g.flatten(1).norm(p=dual, dim=1))
        torch.testing.assert_close(threat.distance(d, x), self.sizes(0.7))
        for seed in range(20):
            other = L2(1.0).steepest_in(threat.around(x, None), keys(4, seed).normal((3, 4), torch.float64), self.sizes(1.0), x)
            other = other * (0.7 / threat.distance(other, x))[:, None, None]
            assert ((g * other).flatten(1).sum(1) <= gain + 1e-12).all()

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, INF), None])
    def test_l1_is_the_linear_programme(self, bounds: Bounds) -> None:
        low, high = bounds or (-INF, INF)
        for seed in range(6):
            x = inputs((6,), (0.0, 1.0), torch.float64, seed)
            g = keys(4, seed).normal((6,), torch.float64)
            for size in (0.3, 1.5, 20.0):
                d = L1(9.0).around(x, bounds).steepest(g, self.sizes(size), x)
                assert (d.abs().sum(1) <= size * (1 + 1e-9)).all()
                for row in range(4):
                    limits = [(0, None if high == INF else high - float(v)) for v in x[row]]
                    limits += [(0, None if low == -INF else float(v) - low) for v in x[row]]
                    cost = torch.cat([-g[row], g[row]]).numpy()
                    best = optimize.linprog(cost, A_ub=np.ones((1, 12)), b_ub=[size], bounds=limits)
                    assert math.isclose(float((g[row] * d[row]).sum()), -best.fun, rel_tol=1e-7, abs_tol=1e-9)

    @pytest.mark.parametrize("per", ["feature", "pixel"])
    def test_l0_by_brute_force(self, per: str) -> None:
        shape = (5,) if per == "feature" else (2, 2, 2)
        for seed in range(6):
            x = inputs(shape, (0.0, 1.0), torch.float64, seed)
            g = keys(4, seed).normal(shape, torch.float64)
            end = torch.where(g > 0, torch.ones_like(x), torch.zeros_like(x))
            for k in (0, 1, 3):
                d = L0(k, per=per).around(x).steepest(g, self.sizes(k), x)  # type: ignore[arg-type]
                gain = (g * d).flatten(1).sum(1)
                tried = [((g * (end - x)) * chosen).flatten(1).sum(1) for chosen in supports(shape, k, per)]
                torch.testing.assert_close(gain, torch.stack(tried).amax(0))
                assert L0(k, per=per).contains(x + d, x).all()  # type: ignore[arg-type]

    def test_l0_needs_bounds(self) -> None:
        x = torch.zeros(4, 3)
        with pytest.raises(CapabilityError, match="bounds"):
            L0(1).around(x, None).steepest(torch.ones_like(x), self.sizes(1), x)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0), L1(1.0), L0(3)])
    def test_zero_and_tiny_gradients(self, threat: Threat, dtype: torch.dtype) -> None:
        x = inputs((6,), (0.0, 1.0), dtype, 0)
        region = threat.around(x)
        zero = region.steepest(torch.zeros_like(x), self.sizes(2.0), x)
        assert zero.dtype == dtype
        assert (zero == 0).all()
        smallest = torch.finfo(dtype).smallest_normal / 16
        for scale in (smallest, min(torch.finfo(dtype).max / 8, 1e150)):
            g = torch.full_like(x, scale)
            d = region.steepest(g, self.sizes(2.0), x)
            assert torch.isfinite(d).all()
            assert (d >= 0).all()
        if threat.norm is Norm.L2:
            torch.testing.assert_close(d.double().norm(dim=1), self.sizes(2.0), rtol=1e-2, atol=0)

    def test_masked_features_get_nothing_of_l1_and_l0(self) -> None:
        x = torch.full((4, 3), 0.5)
        g = torch.tensor([5.0, 1.0, 2.0]).expand(4, 3)
        mask = torch.tensor([False, True, True])
        assert L1(1.0, mask=mask).around(x).steepest(g, self.sizes(0.3), x)[0].tolist() == pytest.approx([0, 0, 0.3])
        assert L0(1, mask=mask).around(x).steepest(g, self.sizes(1), x)[0].tolist() == pytest.approx([0, 0, 0.5])


EVERY: tuple[Threat, ...] = (
    Linf(0.1),
    Linf(0.2),
    L2(0.1),
    L1(0.1),
    L0(3),
    L0(3, per="pixel"),
    Linf([0.1, 0.2]),
    Linf(0.1, grid=GRID),
    Linf(0.1, mask=torch.tensor([True, False])),
    Linf(0.1, mask=torch.tensor([False, True])),
    Linf(0.1, mask=torch.tensor([[True, False]])),
    Minimize("linf"),
    Minimize("l2"),
    Minimize("l0"),
    Minimize("l0", per="pixel"),
    Minimize("l2", grid=GRID),
)


class TestLevel:
    """sum_i slope_i * min(t, cap_i) = gain, solved for t."""

    @pytest.mark.parametrize("seed", range(5))
    def test_the_level_gives_the_gain(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        slope, cap = (torch.rand(50, 30, generator=draw, dtype=torch.float64) ** 4 for _ in range(2))
        slope[slope < 1e-3], cap[:, ::7] = 0, torch.inf
        cap[::2, ::7] = 0.5
        most = torch.where(slope > 0, slope * cap, 0.0).sum(1)
        gain = torch.rand(50, generator=draw, dtype=torch.float64) * most.clamp(max=3)
        level = _level(slope, cap, gain)
        torch.testing.assert_close((slope * torch.minimum(level, cap)).sum(1), gain, rtol=1e-12, atol=0)
        lower = (slope * torch.minimum(level * (1 - 1e-9), cap)).sum(1)
        assert (lower < gain).all(), "the smallest such level"

    def test_what_cannot_be_reached_is_infinite(self) -> None:
        slope = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        cap = torch.tensor([[1.0, 1.0], [1.0, torch.inf], [1.0, torch.inf], [1.0, 1.0]], dtype=torch.float64)
        gain = torch.tensor([3.1, 3.1, 1.0, 0.0], dtype=torch.float64)
        assert _level(slope, cap, gain)[:, 0].tolist() == pytest.approx([math.inf, 1.05, math.inf, 0.0])
        assert _level(slope, cap, torch.full_like(gain, math.inf))[:, 0].tolist() == [math.inf] * 4

    def test_what_is_not_finite_stays_in_its_sample(self) -> None:
        slope, cap = torch.tensor([[1.0, 2.0]], dtype=torch.float64).repeat(4, 1), torch.full((4, 2), 0.5, dtype=torch.float64)
        slope[1, 0], cap[2, 1], gain = math.inf, math.nan, torch.tensor([math.nan, 1.0, 1.0, 1.2], dtype=torch.float64)
        together = _level(slope, cap, gain)
        alone = [_level(slope[[row]], cap[[row]], gain[[row]])[0] for row in range(4)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0, equal_nan=True)
        assert together[[0, 3], 0].tolist() == [math.inf, pytest.approx(0.4)]


class TestDescription:
    def test_equality_and_hash(self) -> None:
        for a, b in itertools.combinations(EVERY, 2):
            assert a != b
        assert len({*EVERY, *EVERY}) == len(EVERY)
        for a, b in (
            (L0(3), L0(3.0)),
            (Linf(torch.tensor(0.5)), Linf(0.5)),
            (Linf(np.float32(0.5)), Linf(0.5)),
            (Linf(torch.tensor([0.5, 1])), Linf((0.5, 1))),
            (Linf(np.array([0.5, 1])), Linf([0.5, 1.0])),
            (Linf(0.1, mask=torch.tensor([True])), Linf(0.1, mask=torch.tensor([True]))),
            (Minimize("l2"), L2(INF)),
            (ball("l1", 2), L1(2)),
            (Linf(0.1).at(0.2), Linf(0.2)),
            (L0(1, per="pixel").at(3), L0(3, per="pixel")),
        ):
            assert a == b
            assert hash(a) == hash(b)
        assert Linf(0.1) != 0.1

    def test_settings_are_json_and_repr_rebuilds(self) -> None:
        for threat in EVERY:
            assert json.loads(json.dumps(threat.settings(), allow_nan=False))["norm"] == threat.norm.value
        for threat in (Linf(0.1), L2([0.5, 1.0]), L0(3, per="pixel"), L1(2, grid=0.5)):
            assert eval(repr(threat)) == threat
        assert json.loads(json.dumps(Linf(np.float32(0.5)).settings()))["eps"] == 0.5

    def test_minimizes(self) -> None:
        assert Minimize("l2").minimizes
        assert not L2(1.0).minimizes
        assert not L2([INF, 1.0]).minimizes
        assert Minimize("l2").settings()["name"] == "Minimize"

    def test_eps_per_sample_follows_the_position(self) -> None:
        x = torch.full((2, 3), 0.5)
        threat = Linf([0.1, 0.2, 0.3])
        region = threat.around(x, index=torch.tensor([2, 0]))
        torch.testing.assert_close(region.upper[:, 0], torch.tensor([0.8, 0.6]))
        masks = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
        region = Linf(0.1, mask=masks).around(x, index=torch.tensor([2, 0]))
        assert (region.upper > region.lower).tolist() == [[True, False, False], [True, True, True]]
        with pytest.raises(InputError, match="position 3"):
            threat.around(x, index=torch.tensor([3, 0]))
        with pytest.raises(InputError, match="position 3"):
            Linf(0.1, mask=masks).around(x, index=torch.tensor([3, 0]))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "eps nan": (lambda: Linf(NAN), "eps must be >= 0; it is nan"),
    "eps negative": (lambda: L2(-0.1), "eps must be >= 0"),
    "eps negative in a list": (lambda: L2([0.1, -0.1]), r"eps\[1\]"),
    "eps a matrix": (lambda: L2(torch.ones(2, 2)), "shape"),
    "eps a word": (lambda: L2("0.1"), "eps must be a number"),
    "eps None": (lambda: L2(None), "eps must be a number"),  # type: ignore[arg-type]
    "mask of floats": (lambda: Linf(0.1, mask=torch.ones(3)), "bool"),
    "mask a list": (lambda: Linf(0.1, mask=[True]), "bool tensor"),  # type: ignore[arg-type]
    "mask of another shape": (
        lambda: Linf(0.1, mask=torch.ones(4, dtype=torch.bool)).around(torch.zeros(2, 3)),
        "does not fit",
    ),
    "grid 0": (lambda: Linf(0.1, grid=0.0), "grid"),
    "grid nan": (lambda: Linf(0.1, grid=NAN), "grid"),
    "per": (lambda: L0(1, per="channel"), "per must be"),  # type: ignore[arg-type]
    "norm": (lambda: Minimize("l3"), "l0, l1, l2, linf"),
    "ball": (lambda: ball("euclid", 1.0), "unknown norm 'euclid'"),
    "ball's eps": (lambda: ball("l2", -1.0), "eps must be >= 0"),
    "pixels of a table": (lambda: L0(1, per="pixel").project(torch.ones(2, 3), torch.zeros(2, 3)), "images"),
    "bytes": (lambda: Linf(0.1).around(torch.zeros(2, 3, dtype=torch.uint8)), "floating"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str) -> None:
    make, text = BAD[case]
    with pytest.raises(InputError, match=text):
        make()


def test_regions_are_trees() -> None:
    """The engine gathers, joins and selects regions: every tensor in them has the sample first."""
    from saddlepoint.trees import join, select, take

    x = inputs((3,), (0.0, 1.0), torch.float32, 0)
    region = Linf([0.1, 0.2, 0.3, 0.4]).around(x)
    part: Region = take(region, torch.tensor([3, 1]))
    assert part.eps.tolist() == [0.4, 0.2]
    both = join(part, take(region, torch.tensor([0])))
    assert torch.equal(both.origin, x[[3, 1, 0]])
    mixed = select(torch.tensor([True, False]), part, take(region, torch.tensor([0, 0])))
    assert mixed.eps.tolist() == [0.4, 0.1]
    assert mixed.threat is region.threat


def test_what_a_step_left_alone_is_not_copied_back() -> None:
    from saddlepoint.trees import put, take

    tree, index = (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)), torch.tensor([2, 0])
    taken = take(tree, index)
    changed = (taken[0], taken[1].add_(1), taken[2] + 1)  # the second one in place
    left, added, new = put(tree, index, changed, taken)
    assert left is tree[0]
    assert added.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert new.tolist() == [1, 0, 1]
    assert all(not tensor.any() for tensor in tree)


def test_state_of_other_kinds_is_an_error() -> None:
    from saddlepoint.trees import take

    with pytest.raises(InputError, match="dataclasses; found a dict"):
        take({"x": torch.zeros(3, 2)}, torch.tensor([0]))
