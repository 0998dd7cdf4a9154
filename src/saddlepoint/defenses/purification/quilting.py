"""Image quilting: an image sewn together from patches of clean ones."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.defenses.purification.purifier import Purifier, check_images
from saddlepoint.errors import InputError

_DISTANCES = 2**24  # between the images' patches and the clean ones, that are held at once


@final
class Quilting(Purifier):
    """Every patch of an image is replaced by one of the clean patches that are nearest to it, and what overlaps is sewn.

        p(u) = one of the `neighbours` nearest of `patches` to the image's patch at u, at random;    u on a grid, row by row
        seam = argmin over paths of sum (canvas - p)^2 across the overlap;    canvas = p behind the seam

    Of what was perturbed nothing remains but which patches are near. A seam moves by at most one pixel from row to row, and is
    found by dynamic programming (Efros & Freeman 2001); where a patch overlaps one above and one beside it, it lies behind both
    seams. Patches overlap by a third; the last ones of each row and column are moved inwards to end with the image.

    patches (M, C, size, size): in [0, 1], see `of`; 1,000,000 in the paper. neighbours: 10 in the paper. The draws are torch's
    global random numbers. Attacks pass straight through (BPDA with the identity), averaged over draws.

    Errors: `InputError` for images smaller than a patch, or of other channels.

    Source: Guo, Rana, Cisse & van der Maaten 2018, Countering adversarial images using input transformations, arXiv:1711.00117,
    section 4.4.

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import Quilting
    >>> digits = sp.data.load("digits")
    >>> quilting = Quilting.of(digits.train.x, size=4, count=2000)
    >>> sp.Defended(sp.Model(sp.zoo.build("digits-cnn")), [quilting.transform()]).draws
    10
    """

    backward: Literal["exact", "identity"] = "identity"
    random = True
    patches: Tensor

    def __init__(self, patches: Tensor, neighbours: int = 10) -> None:
        super().__init__()
        check_images(patches, "patches")
        if patches.shape[2] != patches.shape[3] or patches.shape[2] < 2:
            raise InputError(f"patches must be squares of at least 2 x 2 pixels; got {tuple(patches.shape)}")
        if not 1 <= neighbours <= len(patches):
            raise InputError(f"neighbours must lie between 1 and the {len(patches)} patches; got {neighbours}")
        self.register_buffer("patches", patches.detach().clone())
        self.neighbours, self.size = neighbours, patches.shape[2]
        self.overlap = max(1, self.size // 3)

    @staticmethod
    def of(x: Tensor, size: int = 5, count: int = 100_000, neighbours: int = 10, seed: int = 0) -> Quilting:
        """With `count` patches from random places of clean images x (N, C, H, W) in [0, 1]; all of them if there are fewer."""
        check_images(x)
        if not 2 <= size <= min(x.shape[2:]):
            raise InputError(f"size must lie between 2 and the images' {min(x.shape[2:])} pixels; got {size}")
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (length - size + 1 for length in x.shape[2:])
        places = torch.randperm(len(x) * rows * columns, generator=generator)[:count]
        image, row, column = places // (rows * columns), places // columns % rows, places % columns
        span = torch.arange(size)
        windows = x.movedim(1, 3)[image[:, None, None], (row[:, None] + span)[:, :, None], (column[:, None] + span)[:, None]]
        return Quilting(windows.movedim(3, 1), neighbours)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The quilts, others at every call unless neighbours is 1."""
        if x.shape[1] != self.patches.shape[1] or min(x.shape[2:]) < self.size:
            wanted = (self.patches.shape[1], f">={self.size}", f">={self.size}")
            raise InputError(f"images must be (N, {', '.join(map(str, wanted))}); got {tuple(x.shape)}")
        rows, columns = self._grid(x.shape[2]), self._grid(x.shape[3])
        canvas = torch.zeros_like(x)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                place = slice(row, row + self.size), slice(column, column + self.size)
                here = (..., *place)
                chosen = self._chosen(x[here])
                above = rows[i - 1] + self.size - row if i else 0
                beside = columns[j - 1] + self.size - column if j else 0
                keep = self._kept((canvas[here] - chosen).square().sum(1), above, beside)
                canvas[here] = torch.where(keep[:, None], canvas[here], chosen)
        return canvas

    def _grid(self, length: int) -> list[int]:
        """Where patches begin."""
        last = length - self.size
        return [*range(0, last, self.size - self.overlap), last]

    def _chosen(self, windows: Tensor) -> Tensor:
        """A clean patch near each of the windows (N, C, size, size)."""
        found = []
        for part in torch.split(windows.flatten(1), max(1, _DISTANCES // len(self.patches))):
            distances = torch.cdist(part, self.patches.flatten(1).to(part))
            nearest = distances.topk(self.neighbours, largest=False).indices
            draw = torch.randint(self.neighbours, (len(part), 1), device=part.device)
            found.append(nearest.gather(1, draw)[:, 0])
        return self.patches.to(windows)[torch.cat(found)]

    def _kept(self, errors: Tensor, above: int, beside: int) -> Tensor:
        """Where the canvas stays, (N, size, size): on the near side of either seam. above, beside: how many pixels overlap."""
        keep = torch.zeros_like(errors, dtype=torch.bool)
        if beside:
            keep[:, :, :beside] |= _near(errors[:, :, :beside])
        if above:
            keep[:, :above] |= _near(errors[:, :above].mT).mT
        return keep


def _near(errors: Tensor) -> Tensor:
    """Which pixels (N, L, W) lie before the cheapest path from the first row to the last, the path itself excluded."""
    return torch.arange(errors.shape[2], device=errors.device) < seam(errors)[:, :, None]


def seam(errors: Tensor) -> Tensor:
    """The column (N, L) in each row of the cheapest path through errors (N, L, W), which moves by at most one a row.

    E_r(c) = e_r(c) + min(E_(r-1)(c - 1), E_(r-1)(c), E_(r-1)(c + 1)), and back from the least of the last row.

    Source: Efros & Freeman 2001, Image quilting for texture synthesis and transfer, SIGGRAPH, section 2.1.

    >>> seam(torch.tensor([[[0.0, 5.0, 5.0], [5.0, 0.0, 5.0], [5.0, 5.0, 0.0]]])).tolist()
    [[0, 1, 2]]
    """
    total, came = errors[:, 0], []
    for row in errors.unbind(1)[1:]:
        three = functional.pad(total, (1, 1), value=torch.inf).unfold(1, 3, 1)  # (N, W, 3)
        least, step = three.min(2)
        total = row + least
        came.append(step - 1)
    path = [total.argmin(1)]
    for step in reversed(came):
        path.append(path[-1] + step.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)
