"""Random numbers: a pure function of the key, with the right distribution, and no trace in any global state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from saddlepoint import rng
from saddlepoint.rng import Keys

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DRAWS = ("uniform", "normal", "sign")


def keys(count: int, seed: int = 0, first: int = 0) -> Keys:
    return Keys.of(seed, torch.arange(first, first + count))


def extreme(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    """Make every draw read the same bits: the ends of their range come up once in millions of draws."""
    monkeypatch.setattr(Keys, "_bits", lambda self, shape: torch.full((len(self.first), *shape), value, dtype=torch.int32))


@pytest.mark.parametrize("draw", DRAWS)
def test_batch_order_and_size_do_not_matter(draw: str) -> None:
    ids = torch.tensor([7, 0, 2**40, 3, 12, 2**31])
    whole = getattr(Keys.of(5, ids), draw)((3, 4))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(getattr(Keys.of(5, ids[order]), draw)((3, 4)), whole[order])
    for row, name in enumerate(ids):
        assert torch.equal(getattr(Keys.of(5, name[None]), draw)((3, 4))[0], whole[row])


def test_absorbing_a_tensor_or_a_number_is_the_same() -> None:
    per_row = keys(4).absorb(torch.tensor([9, 9, 9, 9]))
    assert torch.equal(keys(4).absorb(9).uniform((5,)), per_row.uniform((5,)))
    mixed = keys(4).absorb(torch.tensor([9, 8, 9, 7]))
    assert torch.equal(mixed.uniform((5,))[[0, 2]], per_row.uniform((5,))[[0, 2]])
    assert not torch.equal(mixed.uniform((5,))[1], per_row.uniform((5,))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_distribution(dtype: torch.dtype) -> None:
    numbers = keys(50).uniform((4000,), dtype).double().flatten()
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    assert abs(float(numbers.mean()) - 1 / 2) < 3e-3
    assert abs(float(numbers.var()) - 1 / 12) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_distribution(dtype: torch.dtype) -> None:
    numbers = keys(50).normal((4000,), dtype).double().flatten()
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    assert abs(float(numbers.mean())) < 1e-2
    assert abs(float(numbers.std()) - 1) < 1e-2
    assert abs(float((numbers**3).mean())) < 4e-2
    assert abs(float((numbers**4).mean()) - 3) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_draw_rounded(dtype: torch.dtype) -> None:
    precision = torch.finfo(dtype).eps
    assert (keys(9).uniform((400,), dtype).float() - keys(9).uniform((400,))).abs().max() <= precision / 2
    normal = keys(9).normal((400,))
    assert torch.equal(keys(9).normal((400,), dtype), normal.to(dtype))


def test_one_number_a_row_is_as_good_as_many() -> None:
    """Attacks draw one number per sample (a radius, a class): the numbers over ids must be random too."""
    for derived in (keys(40_000), keys(40_000).absorb(1), keys(40_000).absorb(torch.arange(40_000) % 7)):
        assert stats.kstest(derived.uniform((), torch.float64).numpy(), "uniform").pvalue > 1e-3


def test_signs() -> None:
    signs = keys(50).sign((4000,))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.01
    assert signs.mean(1).abs().max() < 0.08
    assert signs.mean(0).abs().max() < 0.75
    runs = (signs[:, 1:] * signs[:, :-1]).mean()
    assert abs(float(runs)) < 0.01


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]))


def test_different_keys_are_uncorrelated() -> None:
    shape = (20_000,)
    base = Keys.of(0, torch.tensor([0]))
    chosen = {
        "id 0": base,
        "seed 1": Keys.of(1, torch.tensor([0])),
        "seed 2^32": Keys.of(2**32, torch.tensor([0])),
        "seed -1": Keys.of(-1, torch.tensor([0])),
        "id 1": Keys.of(0, torch.tensor([1])),
        "id 2^31": Keys.of(0, torch.tensor([2**31])),
        "id 2^32": Keys.of(0, torch.tensor([2**32])),
        "id 2^32 + 1": Keys.of(0, torch.tensor([2**32 + 1])),
        "restart 0": base.absorb(0),
        "restart 1": base.absorb(1),
        "restart 0, step 0": base.absorb(0).absorb(0),
        "restart 0, step 1": base.absorb(0).absorb(1),
        "restart 1, step 0": base.absorb(1).absorb(0),
        "restart 2, step 1": base.absorb(2).absorb(1),
        "restart 1, step 2": base.absorb(1).absorb(2),
        "stream -1": base.absorb(-1),
    }
    drawn = torch.cat([k.uniform(shape, torch.float64) for k in chosen.values()])
    found = torch.corrcoef(drawn) - torch.eye(len(chosen), dtype=torch.float64)
    assert float(found.abs().max()) < 0.035, (found.abs() > 0.035).nonzero().tolist()
    # not shifted copies of each other either: consecutive ids, and positions within a row
    many = keys(8).uniform(shape, torch.float64)
    for lag in (1, 2, 32, 1024):
        assert correlation(many[:, lag:], many[:, :-lag]) < 0.02
        assert correlation(many[1:, lag:], many[:-1, :-lag]) < 0.02


def test_no_number_comes_up_too_often() -> None:
    """Whole rows never repeat, among many samples, restarts and steps."""
    rows = torch.cat([keys(2000).absorb(r).absorb(s).uniform((3,)) for r in range(5) for s in range(5)])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("bits", [0, 2**23 - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_are_excluded(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extreme(monkeypatch, bits)
    uniform = keys(1).uniform((1,), dtype)
    assert uniform.dtype == dtype
    assert 0 < float(uniform) < 1
    normal = keys(1).normal((1,), dtype)
    assert torch.isfinite(normal).all()
    assert 4 < abs(float(normal)) < 6


def test_bits_are_those_that_uniform_expects() -> None:
    bits = keys(64)._bits((2000,))
    assert int(bits.min()) >= 0
    assert 0.99 * 2**23 < int(bits.max()) < 2**23


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes(count: int, shape: tuple[int, ...]) -> None:
    for draw in DRAWS:
        assert getattr(keys(count), draw)(shape).shape == (count, *shape)


def test_global_random_states_are_untouched() -> None:
    torch.manual_seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    first = keys(3).absorb(2).normal((4,))
    keys(3).uniform((4,))
    keys(3).sign((4,))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    torch.manual_seed(4)
    assert torch.equal(first, keys(3).absorb(2).normal((4,)))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_numbers_are_those_of_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy mixes few of them, torch many."""
    ids, step = torch.arange(count) * 2**31 + 7, torch.arange(2 * count).flip(0)[::2]

    def drawn() -> list[Tensor]:
        derived = Keys.of(-3, ids).absorb(step).absorb(-1).absorb(2**33 + 5)
        return [derived.first, derived.second, *(derived._bits(shape) for shape in ((), (0,), (3, 4)))]

    found = []
    for few in (-1, 2**14):
        monkeypatch.setattr(rng, "_FEW", few)
        found.append(drawn())
    for many, few in zip(*found, strict=True):
        assert many.dtype == few.dtype
        assert torch.equal(many, few)


def test_numbers_stay_the_same_between_versions() -> None:
    """Published seeds must go on giving the same runs; change these figures only with a note in the changelog."""
    found = Keys.of(1, torch.tensor([0, 2**33])).absorb(2).uniform((2,), torch.float64)
    assert (found * 2**24).tolist() == [[13689421, 11235053], [10076215, 6467229]]
