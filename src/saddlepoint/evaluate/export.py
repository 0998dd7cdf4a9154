"""Adversarial sets as files: PNG or NPZ, and a torch Dataset that reads them back."""

from __future__ import annotations

import io
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from saddlepoint.data.formats import read_image, read_npz
from saddlepoint.errors import DataError, InputError, UnknownNameError
from saddlepoint.files import write_file

Kind = Literal["png", "npz"]

_FORMAT = 1
_LEVELS = 255
_MANIFEST, _ARRAYS = "manifest.json", "samples.npz"
_ADVERSARIAL, _ORIGINAL = "adversarial", "original"


@dataclass(frozen=True)
class Export:
    """What was written, and what it cost in precision.

    moved: the farthest that rounding to 8 bits moved a value, in the inputs' units (0 for NPZ). linf, linf_written: the largest
    l-infinity distance between an adversarial input and its original, before and in the files.
    """

    folder: Path
    kind: str
    count: int
    moved: float
    linf: float
    linf_written: float

    def summary(self) -> str:
        """In words."""
        text = f"{self.count} samples in {self.folder} ({self.kind})"
        if not self.moved:
            return f"{text}, exactly as they were"
        return (
            f"{text}; rounding to 8 bits moved values by up to {self.moved:.3g}, and the largest linf distance is "
            f"{self.linf_written:.6g} rather than {self.linf:.6g}. So some may have left the ball that they were made in, or "
            "not fool the model any more: look again (saddlepoint recheck), write npz, or attack with a threat of grid=1/255"
        )


def export(
    x: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    folder: str | Path,
    kind: Kind = "png",
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    samples: Tensor | None = None,
) -> Export:
    """Write adversarial inputs with their originals and true classes; `AdversarialSet` reads them.

    x, adversarial: (N, ...), for PNG images (N, C, H, W) with one or three channels. labels: (N,). bounds: what becomes black
    and white in PNG. samples: (N,) int64, where each stands in the data that it was taken from.
    "png": `adversarial/` and `original/` with a lossless 8-bit file each, which sort in the order of the input; values are
    rounded, not cut off. "npz": `samples.npz` with the arrays x (adversarial), y and original, exactly.
    Beside them stands manifest.json. The folder appears complete or not at all.

    Errors: `InputError` for what doesn't fit together, values outside the bounds, or a folder that exists; `DataError` where
    it can't be written.
    """
    folder = Path(folder)
    if kind not in get_args(Kind):
        raise UnknownNameError("kind", kind, get_args(Kind))
    if x.shape != adversarial.shape or x.dim() < 2 or labels.shape != (len(x),):
        raise InputError(
            f"x and adversarial must have the same shape (N, ...) and labels (N,); the shapes are {tuple(x.shape)}, "
            f"{tuple(adversarial.shape)} and {tuple(labels.shape)}"
        )
    if samples is not None and (samples.dtype != torch.int64 or samples.shape != labels.shape):
        raise InputError(f"samples must be int64 positions ({len(x)},); got {samples.dtype} of shape {tuple(samples.shape)}")
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it or choose another name")
    original, adversarial = x.detach().cpu(), adversarial.detach().cpu()
    images: dict[str, Tensor] = {}
    written = adversarial
    if kind == "png":
        images = {_ADVERSARIAL: _levels(adversarial, bounds), _ORIGINAL: _levels(original, bounds)}
        written = _values(images[_ADVERSARIAL], bounds)
    done = Export(folder, kind, len(x), _linf(written, adversarial), _linf(adversarial, original), _linf(written, original))
    document = {
        "format": _FORMAT, **asdict(done), "folder": folder.name, "shape": list(x.shape[1:]), "bounds": list(bounds),
        "labels": labels.tolist(), "samples": None if samples is None else samples.tolist(),
    }  # fmt: skip
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as outer:
            draft = Path(outer) / "set"
            draft.mkdir()
            if kind == "npz":
                write_file(draft / _ARRAYS, _npz(x=adversarial, y=labels.detach().cpu().long(), original=original))
            for name, pixels in images.items():
                (draft / name).mkdir()
                for index, image in enumerate(pixels):
                    (draft / name / _file(index, len(x))).write_bytes(_png(image))
            write_file(draft / _MANIFEST, json.dumps(document, indent=1).encode())
            os.replace(draft, folder)
    except OSError as error:
        raise DataError(f"cannot write the samples to {folder}: {error}") from error
    return done


@final
class AdversarialSet(Dataset[tuple[Tensor, int]]):
    """What `export` wrote, as (image, label) pairs for a DataLoader: to train with, or to try on another model.

    original: the inputs before the attack in place of the adversarial ones. Images are float32 in `bounds` (of NPZ in the type
    in which they were written); label is the true class. PNG files are read when they are asked for.
    `labels`: all classes. `samples`: where each stood in the data that it was taken from, None if that wasn't said.

    Errors: `DataError` where the folder isn't such a set, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, original: bool = False) -> None:
        self.folder = Path(folder)
        self._which = _ORIGINAL if original else _ADVERSARIAL
        path = self.folder / _MANIFEST
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
            if found["format"] != _FORMAT or found["kind"] not in get_args(Kind):
                raise ValueError(f"format {found['format']!r}, kind {found['kind']!r}")
            self.labels = tuple(int(label) for label in found["labels"])
            places = found.get("samples")
            self.samples = None if places is None else tuple(int(place) for place in places)
            self.shape = tuple(int(size) for size in found["shape"])
            low, high = found["bounds"]
            self.bounds = (float(low), float(high))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is missing or damaged ({error!r}): is {self.folder} a set that export() wrote?") from error
        self._arrays: Tensor | None = None
        if found["kind"] == "npz":
            arrays = read_npz(self.folder / _ARRAYS)
            name = "original" if original else "x"
            if name not in arrays or arrays[name].shape != (len(self.labels), *self.shape):
                raise DataError(f"{self.folder / _ARRAYS}: no array {name!r} of the shape that {path} states: export it again")
            self._arrays = torch.from_numpy(arrays[name])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        index %= len(self)
        if self._arrays is not None:
            return self._arrays[index], self.labels[index]
        path = self.folder / self._which / _file(index, len(self))
        pixels = torch.from_numpy(read_image(path).copy())
        if tuple(pixels.shape) != self.shape:
            raise DataError(f"{path}: has the shape {tuple(pixels.shape)}, the set's is {self.shape}: export it again")
        return _values(pixels, self.bounds), self.labels[index]


def _file(index: int, count: int) -> str:
    """Names that sort."""
    return f"{index:0{len(str(max(count - 1, 0)))}d}.png"


def _linf(points: Tensor, origin: Tensor) -> float:
    return float((points.double() - origin.double()).abs().max()) if points.numel() else 0.0


def _levels(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The nearest 8-bit levels."""
    low, high = bounds
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise InputError(f'PNG needs images (N, C, H, W) with 1 or 3 channels; the shape is {tuple(x.shape)}: take kind="npz"')
    if x.numel() and not (float(x.min()) >= low and float(x.max()) <= high):  # NaN fails this too
        raise InputError(
            f"values must lie in bounds={bounds}; they lie in [{float(x.min()):g}, {float(x.max()):g}]: give the model's bounds"
        )
    return torch.round((x.double() - low) / (high - low) * _LEVELS).to(torch.uint8)


def _values(pixels: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return pixels.float().div_(_LEVELS).mul_(high - low).add_(low).clamp_(low, high)  # rounding could lead out


def _png(image: Tensor) -> bytes:
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def _npz(x: Tensor, y: Tensor, original: Tensor) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=_array(x), y=_array(y), original=_array(original))
    return stream.getvalue()


def _array(values: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy lacks bfloat16
    return array
