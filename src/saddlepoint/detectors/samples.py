"""Samples to fit on, to choose thresholds on, and to judge on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.detectors.base import Given, inputs_and_labels, row_fingerprints
from saddlepoint.errors import InputError


@dataclass(frozen=True)
class Samples:
    """Three sets of samples without one in common: to fit on, to choose thresholds on, and to judge on.

    Errors: `InputError` where two of them share a sample.
    """

    fit: tuple[Tensor, Tensor]
    calibrate: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        prints = {name: row_fingerprints(getattr(self, name)[0]) for name in ("fit", "calibrate", "test")}
        for first, second in (("fit", "calibrate"), ("fit", "test"), ("calibrate", "test")):
            shared = int(torch.isin(prints[first], prints[second]).sum())
            if shared:
                raise InputError(
                    f"{shared} samples are in both the {first} and the {second} part: split them, or Samples.split"
                )

    @staticmethod
    def split(train: Given, test: Given, calibrate: int | None = None, most: int | None = None) -> Samples:
        """Fit on training samples; the first `calibrate` test samples set thresholds (default a third), the next `most` judge.

        Test samples that equal an earlier one, or a training sample, are left out.
        """
        x, y = _labelled(test, "test")
        fit = _labelled(train, "train")
        prints, known = row_fingerprints(x), row_fingerprints(fit[0])
        first: dict[int, int] = {}
        for place, value in enumerate(prints.tolist()):
            first.setdefault(value, place)
        own = torch.tensor(sorted(first.values()), dtype=torch.int64)
        own = own[~torch.isin(prints[own], known)]
        count = len(own) // 3 if calibrate is None else calibrate
        if not 0 < count < len(own):
            raise InputError(f"calibrate must leave some of the {len(own)} test samples to judge on; got {count}")
        if most is not None and most < 1:
            raise InputError(f"most must leave a sample to judge on; got {most}")
        a, b = own[:count], own[count : None if most is None else count + most]
        return Samples(fit, (x[a], y[a]), (x[b], y[b]))


def _labelled(given: Given, name: str) -> tuple[Tensor, Tensor]:
    x, y = inputs_and_labels(given, name)
    if y is None:
        raise InputError(f"{name} must have labels: a pair of inputs and labels, or .x and .y")
    return x, y
