"""The orthonormal cosine transform (DCT-II) of the last two dimensions, for attacks that search among smooth changes."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def cosines(size: int) -> Tensor:
    """The basis (size, size), float64: row k holds frequency k, and rows are orthonormal."""
    k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (i + 0.5) * k / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def to_frequencies(x: Tensor) -> Tensor:
    """Coefficients (..., H, W) of images (..., H, W)."""
    height, width = (cosines(n).to(x) for n in x.shape[-2:])
    return height @ x @ width.T


def from_frequencies(coefficients: Tensor) -> Tensor:
    """Images (..., H, W) of coefficients (..., H, W); the inverse of `to_frequencies`."""
    height, width = (cosines(n).to(coefficients) for n in coefficients.shape[-2:])
    return height.T @ coefficients @ width


def low_pass(noise: Tensor, share: Tensor) -> Tensor:
    """Images whose coefficients are `noise` (B, ..., H, W), of the lowest `share` (B,) of the frequencies along each axis."""
    height, width = noise.shape[-2:]
    kept = [torch.arange(n, device=noise.device) < (share * n).clamp(min=1)[:, None] for n in (height, width)]
    mask = kept[0][:, :, None] & kept[1][:, None]
    return from_frequencies(noise * mask.view(len(noise), *([1] * (noise.dim() - 3)), height, width))
