"""Inputs as planes: the last two dimensions are a plane (H, W), all leading ones its channels; of one dimension, a row of W."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def planes(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of inputs (B, ...)."""
    height, width = (1, *x.shape[1:])[-2:] if x.dim() > 1 else (1, 1)
    return max(x[:1].numel(), 1) // max(height * width, 1), height, width


def enlarged(values: Tensor, like: Tensor, mode: str) -> Tensor:
    """Planes (B, m, C, h, w) interpolated to the size of inputs like (B, ...): (B, m, ...)."""
    shape = (*values.shape[:2], *like.shape[1:])
    channels, height, width = planes(like)
    if values.shape[-2:] == (height, width):
        return values.reshape(shape)
    flat = values.reshape(-1, channels, *values.shape[-2:])
    return functional.interpolate(flat, (height, width), mode=mode).reshape(shape)
