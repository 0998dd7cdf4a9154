"""Counter-based random numbers: a pure function of a key and a position.

A key is made from (seed, sample id, restart, step, draw, stream), so a sample's numbers do not depend on its
neighbours, on the batch size or on what ran before, and no global random state is read or changed. The mixer is a
32-bit multiply-xorshift permutation on int32 tensors, at about the price of `torch.rand`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = -1640531527  # 2**32 / golden ratio, odd, as int32
_STARTS = (0x243F6A88, 0x85A308D3)  # digits of pi: from (0, 0), words of 0 would lead nowhere
_MULTIPLIERS = (569420461, -741133929)  # odd constants with good avalanche, as int32
_FEW = 2**14  # numbers at most that NumPy mixes: it begins several times faster than torch, which has more threads for many
_GOLDEN_FEW, *_MULTIPLIERS_FEW = (np.uint32(constant % 2**32) for constant in (_GOLDEN, *_MULTIPLIERS))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (torch's is arithmetic)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(x: Tensor, second: Tensor) -> Tensor:
    """A permutation of the 32-bit integers, keyed in the middle by `second`. In place: large copies cost more than the sums."""
    x.bitwise_xor_(_shift(x, 16)).mul_(_MULTIPLIERS[0])
    x.bitwise_xor_(_shift(x, 15)).bitwise_xor_(second).mul_(_MULTIPLIERS[1])
    return x.bitwise_xor_(_shift(x, 15))


def _mix_few(x: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`_mix` of a few numbers."""
    x ^= x >> 16
    x *= _MULTIPLIERS_FEW[0]
    x ^= x >> 15
    x ^= second
    x *= _MULTIPLIERS_FEW[1]
    x ^= x >> 15
    return x


def _array(x: Tensor) -> NDArray[np.uint32]:
    """The bits of an int32 tensor on the CPU, which are shared."""
    array: NDArray[np.uint32] = x.numpy().view(np.uint32)
    return array


def _tensor(x: NDArray[np.uint32]) -> Tensor:
    return torch.from_numpy(x.view(np.int32))


def _as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@dataclass(frozen=True)
class Keys:
    """Two 32-bit keys a row. `absorb` derives new ones; `uniform` and `normal` read numbers from them."""

    first: Tensor  # (Q,) int32
    second: Tensor  # (Q,) int32

    @staticmethod
    def of(seed: int, ids: Tensor) -> Keys:
        """Keys for samples named by `ids` (Q,) int64."""
        low = ids.to(torch.int32)
        high = (ids >> 32).to(torch.int32)
        first, second = (_as_int32(word ^ start) for word, start in zip((seed, seed >> 32), _STARTS, strict=True))
        start = Keys(torch.full_like(low, first), torch.full_like(low, second))
        return start.absorb(low).absorb(high)

    def absorb(self, value: Tensor | int) -> Keys:
        """Keys that depend on `value` ((Q,) integers, or one for all rows) too."""
        word = value.to(self.first.device, torch.int32) if isinstance(value, Tensor) else _as_int32(value)
        if self._few(len(self.first)):
            old = _array(self.second)
            added = _array(word) if isinstance(word, Tensor) else np.uint32(word % 2**32)
            low = _mix_few(_array(self.first) * _GOLDEN_FEW + added, old)
            return Keys(_tensor(low), _tensor(_mix_few(old + added, low)))
        first = _mix(self.first * _GOLDEN + word, self.second)
        return Keys(first, _mix(self.second + word, first))

    def _few(self, numbers: int) -> bool:
        return numbers <= _FEW and self.first.device.type == "cpu"

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        """23 random bits for each of (Q, *shape) positions: as many as leave float32 room for a half."""
        count = math.prod(shape)
        if self._few(len(self.first) * count):
            places = np.arange(count, dtype=np.uint32) * _GOLDEN_FEW
            few = _mix_few(places + _array(self.first)[:, None], _array(self.second)[:, None])
            few >>= 9
            return _tensor(few).view(len(self.first), *shape)
        position = torch.arange(count, dtype=torch.int32, device=self.first.device) * _GOLDEN
        bits = _mix(position + self.first[:, None], self.second[:, None])
        return _shift(bits, 9).view(len(self.first), *shape)

    def uniform(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(Q, *shape) numbers in (0, 1), ends excluded: odd multiples of 2^-24, rounded in half precision, never to 1."""
        numbers = self._bits(shape).to(torch.promote_types(dtype, torch.float32)).add_(0.5).mul_(2.0**-23)
        return numbers if numbers.dtype == dtype else numbers.clamp(max=1 - torch.finfo(dtype).eps / 2).to(dtype)

    def normal(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(Q, *shape) standard normal numbers."""
        uniform = self._bits(shape).to(torch.promote_types(dtype, torch.float32)).add_(0.5).mul_(2.0**-22).sub_(1.0)
        return uniform.erfinv_().mul_(math.sqrt(2.0)).to(dtype)

    def sign(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(Q, *shape) of -1 and +1 with equal chance."""
        return ((self._bits(shape) & 1) * 2 - 1).to(dtype)
