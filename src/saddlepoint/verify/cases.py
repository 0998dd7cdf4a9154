"""What is to be proved: sets of inputs, none of which may lead to certain outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.propagation.sets import Box


@dataclass(frozen=True)
class Cases:
    """D cases over B sets of inputs. A case is safe if no input of its set makes all K values rows * outputs + constants <= 0.

    inputs: (B, ...). of (D,): which of the sets belongs to each case. rows: (D, K, C). constants: (D, K).
    """

    inputs: Box
    of: Tensor
    rows: Tensor
    constants: Tensor

    def __len__(self) -> int:
        return len(self.of)

    @staticmethod
    def of_classes(inputs: Box, y: Tensor, classes: int) -> Cases:
        """That the class stays y (B,) in the sets: B * (classes - 1) cases, each with one row.

        Errors: `InputError` for fewer than two classes, or labels that are none.
        """
        if classes < 2:
            raise InputError(f"robustness needs at least two classes; the model has {classes}")
        if bool((y < 0).any()) or bool((y >= classes).any()):
            raise InputError(f"y must hold classes from 0 to {classes - 1}; got {int(y.min())} to {int(y.max())}")
        rows = margins(y, classes, inputs.lower.dtype).to(inputs.lower.device).flatten(0, 1)[:, None]
        of = torch.arange(len(y), device=rows.device).repeat_interleave(classes - 1)
        return Cases(inputs, of, rows, rows.new_zeros(len(of), 1))

    @property
    def sets(self) -> Box:
        """The set of each case, (D, ...)."""
        return self.inputs.rows(self.of)

    def take(self, index: Tensor) -> Cases:
        """Some of them, (K,) positions or a mask."""
        return Cases(self.inputs, self.of[index], self.rows[index], self.constants[index])

    def double(self) -> Cases:
        """In float64."""
        return Cases(self.inputs.to(torch.float64), self.of, self.rows.double(), self.constants.double())

    def margin(self, outputs: Tensor) -> Tensor:
        """How far outputs (D, C) are from unsafe, (D,): the largest of the K values; <= 0 where they are unsafe."""
        return self._values(outputs).amax(1)

    def excess(self, outputs: Tensor) -> Tensor:
        """The sum of what is above 0 among the K values, (D,): 0 where outputs (D, C) are unsafe, smoother than `margin`."""
        return self._values(outputs).clamp(min=0).sum(1)

    def _values(self, outputs: Tensor) -> Tensor:
        return torch.einsum("dc,dkc->dk", outputs, self.rows.to(outputs)) + self.constants.to(outputs)


def margins(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows (N, classes - 1, classes) that take each other class's output from that of y (N,)."""
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    others = torch.arange(classes - 1, device=y.device)[None].expand(len(y), -1)
    others = others + (others >= y[:, None]).long()
    return eye[y][:, None] - eye[others]
