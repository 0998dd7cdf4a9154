"""A small U-Net, for what predicts an image's noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.errors import InputError


class _Block(nn.Module):
    """`depth` times convolution 3x3, normalisation, ReLU; an embedding of the time is added after the first normalisation."""

    def __init__(
        self, before: int, width: int, depth: int, stride: int, norm: Callable[[int], nn.Module], embedding: int
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width if i else before, width, 3, stride=1 if i else stride, padding=1, bias=False) for i in range(depth)
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(depth))
        self.time = nn.Linear(embedding, width) if embedding else None

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            if i == 0 and self.time is not None and embedding is not None:
                x = x + self.time(embedding)[:, :, None, None]
            x = functional.relu(x)
        return x


class UNet(nn.Module):
    """Down through `widths`, halving the image before each but the first, and up again, with what was passed on the way joined.

    (N, channels, H, W) -> (N, channels, H, W), for images of any size. depth: convolutions of each block. norm: a layer for a
    width, default batch normalisation. embedding: the size of a vector (N, embedding) that every block is given too.

    Source: Ronneberger, Fischer & Brox 2015, arXiv:1505.04597; with bilinear upsampling, as in Liao et al. 2018,
    arXiv:1712.02976, figure 3.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        depth: int = 2,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or depth < 1:
            raise InputError(f"widths and depth must be at least 1, and one width at least; got {tuple(widths)} and {depth}")
        pairs = list(zip((channels, *widths), widths, strict=False))
        self.down = nn.ModuleList(
            _Block(before, width, depth, 2 if i else 1, norm, embedding) for i, (before, width) in enumerate(pairs)
        )
        self.up = nn.ModuleList(
            _Block(below + width, width, depth, 1, norm, embedding) for width, below in pairs[:0:-1]
        )  # fmt: skip
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        passed: list[Tensor] = []
        for block in self.down:
            x = block(x, embedding)
            passed.append(x)
        passed.pop()
        for block in self.up:
            beside = passed.pop()
            larger = functional.interpolate(x, size=beside.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([larger, beside], 1), embedding)
        out: Tensor = self.last(x)
        return out
