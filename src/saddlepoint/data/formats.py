"""Readers of file formats: bytes on disk in, `Split` out, and a `DataError` that names the file otherwise.

Nothing here unpickles, and no archive is unpacked to disk.
"""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from saddlepoint.data.dataset import Split
from saddlepoint.errors import DataError

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

IDX_UINT8_MAGIC = 0x0800  # the low byte holds the number of dimensions
DEFLATE_LIMIT = 1032  # bytes that one compressed byte can stand for at most (RFC 1951)
CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_BATCH_LIMIT = 10_000 * CIFAR_RECORD
CIFAR_TRAIN_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST_BATCH = "test_batch.bin"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CHANNELS = (1, 3, 4)


def read_idx(path: Path, dims: int) -> Bytes:
    """An idx file of unsigned bytes with `dims` dimensions, plain or gzipped (LeCun et al., the MNIST page)."""
    header_size = 4 + 4 * dims
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            header = file.read(header_size)
            if len(header) < header_size:
                raise DataError(f"{path}: expected an idx header of {header_size} bytes, found {len(header)}: truncated")
            magic, *shape = (int.from_bytes(header[i : i + 4], "big") for i in range(0, header_size, 4))
            if magic != IDX_UINT8_MAGIC + dims:
                raise DataError(
                    f"{path}: expected the idx magic number 0x{IDX_UINT8_MAGIC + dims:08x} "
                    f"(unsigned bytes, {dims} dimensions), found 0x{magic:08x}"
                )
            size = math.prod(shape)
            if size > DEFLATE_LIMIT * path.stat().st_size:  # checked first: reading that much could fill the memory
                raise DataError(f"{path}: its header states the shape {tuple(shape)}, more than the file can hold")
            body = file.read(size + 1)  # one more, to notice surplus bytes and to make gzip check its own checksum
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: corrupt or truncated gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(body) != size:
        found = f"only {len(body)}" if len(body) < size else "more"
        raise DataError(f"{path}: expected {size} bytes for the shape {tuple(shape)} that its header states, found {found}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_idx_pair(images: Path, labels: Path, num_classes: int) -> Split:
    """Images (N, 28, 28) and labels (N,) from two idx files, as MNIST and its successors have them."""
    x = read_idx(images, 3)
    if x.shape[1:] != (28, 28):
        raise DataError(f"{images}: expected images of 28x28, found {x.shape[1]}x{x.shape[2]}")
    return make_split(x, read_idx(labels, 1), x_from=images, y_from=labels, num_classes=num_classes)


def read_npz(path: Path) -> dict[str, Array]:
    """All plain arrays of a `.npz` file; arrays of Python objects (pickles) are refused."""
    try:
        with path.open("rb") as file:  # numpy leaves a file that it opened itself open when the archive is corrupt
            archive = np.load(file, allow_pickle=False)
            is_npz = isinstance(archive, np.lib.npyio.NpzFile)
            arrays = {key: archive[key] for key in archive.files} if is_npz else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # on corrupt bytes numpy and zipfile raise a dozen kinds
        raise DataError(
            f"{path}: not a .npz file of plain arrays, or corrupt or truncated ({error}); pickled objects are never "
            "loaded, because that can run code: save numeric arrays with numpy.savez"
        ) from error
    if arrays is None:
        raise DataError(f"{path}: expected a .npz archive, found a single array: save it with numpy.savez")
    return arrays


def read_npz_splits(path: Path) -> tuple[Split | None, Split]:
    """Train (None without x_train) and test part of a `.npz` with x_train, y_train, x_test, y_test, or x, y."""
    arrays = read_npz(path)
    x_key, y_key = ("x_test", "y_test") if "x_test" in arrays else ("x", "y")
    test = npz_split(path, arrays, x_key, y_key)
    train = npz_split(path, arrays, "x_train", "y_train") if "x_train" in arrays else None
    if train is not None and train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(
            f"{path}: x_train has samples of shape {tuple(train.x.shape[1:])}, "
            f"{x_key} of shape {tuple(test.x.shape[1:])}: they must agree"
        )
    return train, test


def npz_split(path: Path, arrays: Mapping[str, Array], x_key: str, y_key: str, num_classes: int | None = None) -> Split:
    """One split from the arrays of a `.npz`."""
    for key in (x_key, y_key):
        if key not in arrays:
            raise DataError(
                f"{path}: no array {key!r}; expected x_train, y_train, x_test, y_test, or x, y; "
                f"found {', '.join(arrays) or 'nothing'}"
            )
    return make_split(
        arrays[x_key], arrays[y_key], x_from=f"{path}[{x_key}]", y_from=f"{path}[{y_key}]", num_classes=num_classes
    )


def read_cifar_folder(folder: Path) -> tuple[Split | None, Split]:
    """Train and test part of CIFAR-10's binary version, unpacked (train is None when all its batches are missing)."""

    def read(name: str) -> bytes | None:
        try:
            return (folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error})") from error

    return _cifar_splits(folder, read)


def read_cifar_tar(path: Path) -> tuple[Split | None, Split]:
    """Train and test part of CIFAR-10's binary version, read in memory from the original archive."""
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isfile() or name not in (*CIFAR_TRAIN_BATCHES, CIFAR_TEST_BATCH):
                    continue
                if member.size > CIFAR_BATCH_LIMIT:
                    raise DataError(
                        f"{path}: expected at most {CIFAR_BATCH_LIMIT} bytes in {name}, its entry states {member.size}"
                    )
                if (file := archive.extractfile(member)) is not None:
                    batches[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: corrupt, truncated or unreadable archive ({error}): fetch it again") from error
    return _cifar_splits(path, batches.get)


def _cifar_splits(place: Path, read: Callable[[str], bytes | None]) -> tuple[Split | None, Split]:
    def batch(name: str, content: bytes) -> Bytes:
        if not content or len(content) % CIFAR_RECORD:
            raise DataError(
                f"{place}/{name}: expected a multiple of {CIFAR_RECORD} bytes (a label and 3x32x32 pixels per record), "
                f"found {len(content)}"
            )
        return np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)

    def split(records: Bytes, origin: str) -> Split:
        x = records[:, 1:].reshape(-1, 3, 32, 32)
        return make_split(x, records[:, 0], x_from=origin, y_from=origin, num_classes=10)

    found = {name: content for name in (*CIFAR_TRAIN_BATCHES, CIFAR_TEST_BATCH) if (content := read(name)) is not None}
    missing = [name for name in (*CIFAR_TRAIN_BATCHES, CIFAR_TEST_BATCH) if name not in found]
    if CIFAR_TEST_BATCH in missing or 0 < len(missing) < len(CIFAR_TRAIN_BATCHES):
        raise DataError(f"{place}: incomplete CIFAR-10, {', '.join(missing)} not found: fetch it again")
    test = split(batch(CIFAR_TEST_BATCH, found[CIFAR_TEST_BATCH]), f"{place}/{CIFAR_TEST_BATCH}")
    if missing:
        return None, test
    records = np.concatenate([batch(name, found[name]) for name in CIFAR_TRAIN_BATCHES])
    return split(records, f"{place}/{CIFAR_TRAIN_BATCHES[0]} and following"), test


def read_image_folder(root: Path) -> tuple[Split | None, Split, tuple[str, ...]]:
    """Train part, test part and class names of `root/{train,test}/<class>/*` or of `root/<class>/*` (test only).

    PNG and JPEG files of one size, 8-bit grey or RGB; grey ones become RGB where both occur. Other files are ignored.
    """
    parts = {"train": root / "train", "test": root / "test"}
    if not parts["train"].is_dir() and not (parts["test"].is_dir() and _subfolders(parts["test"])):
        parts = {"test": root}
    elif not parts["train"].is_dir():
        del parts["train"]
    elif not parts["test"].is_dir():
        raise DataError(f"{root}: has a folder 'train' but no folder 'test' beside it; an evaluation needs one")

    class_names = tuple(sorted({folder.name for part in parts.values() for folder in _subfolders(part)}))
    if not class_names:
        raise DataError(f"{root}: expected one folder of images per class, found no folders")
    files: dict[str, list[tuple[Path, int]]] = {}
    for part, folder in parts.items():
        files[part] = [
            (path, label)
            for label, class_name in enumerate(class_names)
            if (folder / class_name).is_dir()
            for path in sorted((folder / class_name).iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
        if not files[part]:
            raise DataError(f"{folder}: no PNG or JPEG files in its class folders")
    images = {path: read_image(path) for entries in files.values() for path, _ in entries}

    first, first_image = next(iter(images.items()))
    channels = max(image.shape[0] for image in images.values())
    for path, image in images.items():
        if image.shape[1:] != first_image.shape[1:]:
            raise DataError(
                f"all images must have one size: {first} has {_size(first_image)} (width x height), "
                f"{path} has {_size(image)}: resize them"
            )
    splits = {
        part: make_split(
            np.stack([np.broadcast_to(images[path], (channels, *first_image.shape[1:])) for path, _ in entries]),
            np.array([label for _, label in entries]),
            x_from=parts[part],
            y_from=parts[part],
        )
        for part, entries in files.items()
    }
    return splits.get("train"), splits["test"], class_names


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _size(image: Array) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def read_image(path: Path) -> Bytes:
    """One 8-bit image as (C, H, W), C = 1 or 3."""
    from PIL import Image  # imported late: few users have folders of images

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable PNG or JPEG image ({error})") from error
    if image.mode not in ("1", "L", "P", "RGB") or image.has_transparency_data:
        raise DataError(
            f"{path}: expected an 8-bit grey or RGB image without transparency, found Pillow's mode {image.mode!r}: convert it"
        )
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def make_split(x: Array, y: Array, *, x_from: object, y_from: object, num_classes: int | None = None) -> Split:
    """Checked tensors from arrays; uint8 is divided by 255, and channels-last images become channels-first.

    x: uint8, or floating point in [0, 1]; (N, D), (N, H, W) for grey images, (N, C, H, W), or (N, H, W, C) with C in
    1, 3, 4. y: integers, (N,) or (N, 1), from 0 to num_classes - 1 (where that is given).
    """
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise DataError(f"{x_from}: expected shape (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C), found {x.shape}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (len(x),):
        raise DataError(f"{y_from}: expected {len(x)} labels, one per sample of {x_from}, found shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{y_from}: labels must be integers, found {y.dtype}")
    if y.min() < 0 or (num_classes is not None and y.max() >= num_classes):
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataError(f"{y_from}: expected labels of {allowed}, found {y.min()} to {y.max()}")

    if x.dtype == np.uint8:
        values = torch.from_numpy(x.astype(np.float32, order="C")).div_(255)
    elif np.issubdtype(x.dtype, np.floating):
        if not (x.min() >= 0 and x.max() <= 1):  # NaN fails this too
            raise DataError(f"{x_from}: floating-point values must lie in [0, 1], found {x.min()} to {x.max()}: rescale")
        values = torch.from_numpy(x.astype(np.float32, order="C"))
    else:
        raise DataError(f"{x_from}: expected uint8 (0 to 255) or floating point in [0, 1], found {x.dtype}")
    return Split(values, torch.from_numpy(y.astype(np.int64)))
