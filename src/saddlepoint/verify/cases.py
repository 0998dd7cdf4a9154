"""What is to be proved: boxes of inputs, none of which may lead to certain outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saddlepoint.errors import InputError


@dataclass(frozen=True)
class Cases:
    """D boxes of inputs. A case is safe if no input of its box makes all K values `rows` * outputs + `constants` <= 0.

    lower, upper: (D, ...). rows: (D, K, C). constants: (D, K).
    """

    lower: Tensor
    upper: Tensor
    rows: Tensor
    constants: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of_classes(lower: Tensor, upper: Tensor, y: Tensor, classes: int) -> Cases:
        """That the class stays y (N,) between lower and upper (N, ...): N * (classes - 1) cases, each other class one.

        Errors: `InputError` for fewer than two classes, or labels that are none.
        """
        if classes < 2:
            raise InputError(f"robustness needs at least two classes; the model has {classes}")
        if bool((y < 0).any()) or bool((y >= classes).any()):
            raise InputError(f"y must hold classes from 0 to {classes - 1}; got {int(y.min())} to {int(y.max())}")
        each = margins(y, classes, lower.dtype).to(lower.device)
        count = classes - 1
        return Cases(
            lower.repeat_interleave(count, 0), upper.repeat_interleave(count, 0), each.flatten(0, 1)[:, None],
            lower.new_zeros(len(y) * count, 1),
        )  # fmt: skip

    def take(self, index: Tensor) -> Cases:
        """Some of them, (K,) positions or a mask."""
        return Cases(self.lower[index], self.upper[index], self.rows[index], self.constants[index])

    def to(self, like: Tensor) -> Cases:
        """With the dtype and device of another tensor; boxes are rounded outwards."""
        lower, upper = self.lower.to(like), self.upper.to(like)
        lower = torch.where(lower.double() > self.lower.to(lower.device), lower.nextafter(lower - 1), lower)
        upper = torch.where(upper.double() < self.upper.to(upper.device), upper.nextafter(upper + 1), upper)
        return Cases(lower, upper, self.rows.to(like), self.constants.to(like))

    def within(self, lower: Tensor, upper: Tensor) -> Cases:
        """The same in other boxes."""
        return replace(self, lower=lower, upper=upper)

    def margin(self, outputs: Tensor) -> Tensor:
        """How far outputs (D, ..., C) are from unsafe, (D, ...): the largest of the K values; <= 0 where they are unsafe."""
        values = torch.einsum("d...c,dkc->d...k", outputs, self.rows.to(outputs))
        shape = (len(self), *([1] * (outputs.dim() - 2)), self.constants.shape[1])
        return (values + self.constants.to(outputs).view(shape)).amax(-1)


def margins(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows (N, classes - 1, classes) that take each other class's output from that of y (N,)."""
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    others = torch.arange(classes - 1, device=y.device)[None].expand(len(y), -1)
    others = others + (others >= y[:, None]).long()
    return eye[y][:, None] - eye[others]
