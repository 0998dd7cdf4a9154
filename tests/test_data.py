"""Datasets: every format from tiny files, every damage to them, and downloads from a server on this computer."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import pickle
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saddlepoint import data
from saddlepoint.data import catalog
from saddlepoint.data import download as download_module
from saddlepoint.data.download import RemoteFile, download
from saddlepoint.data.formats import make_split
from saddlepoint.errors import DataError, InputError, UnknownNameError

STEMS = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte"} | {
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide whatever data this computer has."""
    monkeypatch.delenv("SADDLEPOINT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    fashion = catalog.KNOWN["fashion-mnist"]
    monkeypatch.setitem(catalog.KNOWN, "fashion-mnist", replace(fashion, folders=()))


def idx(array: np.ndarray[Any, Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, train: int = 4, test: int = 3, zipped: bool = True) -> Path:
    """A tiny MNIST: image i is filled with i, label i is i."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        if count:
            x = np.broadcast_to(np.arange(count)[:, None, None], (count, 28, 28))
            for key, array in ((f"x_{part}", x), (f"y_{part}", np.arange(count))):
                content = idx(array)
                name = STEMS[key] + (".gz" if zipped else "")
                (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def cifar_records(count: int, label: int | None = None) -> bytes:
    """Records whose red, green and blue planes are 10, 20 and 30."""
    pixels = bytes([10]) * 1024 + bytes([20]) * 1024 + bytes([30]) * 1024
    return b"".join(bytes([i if label is None else label]) + pixels for i in range(count))


def cifar_files() -> dict[str, bytes]:
    return {f"data_batch_{i}.bin": cifar_records(2, label=i) for i in range(1, 6)} | {"test_batch.bin": cifar_records(3)}


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_image(path: Path, value: int | tuple[int, ...], size: tuple[int, int] = (5, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


# The values


def test_split_take_and_shuffle() -> None:
    split = data.Split(torch.arange(20.0).reshape(10, 2) / 20, torch.arange(10))
    assert len(split) == 10
    assert repr(split) == "Split(x: (10, 2), y: (10,))"
    assert split.take(3).y.tolist() == [0, 1, 2]
    shuffled = split.shuffle(seed=1)
    assert shuffled.y.tolist() != split.y.tolist()
    assert sorted(shuffled.y.tolist()) == split.y.tolist()
    assert torch.equal(shuffled.x, split.x[shuffled.y])
    assert shuffled.y.tolist() == split.shuffle(seed=1).y.tolist() != split.shuffle(seed=2).y.tolist()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_split_rejects(x: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(InputError, match="must be"):
        data.Split(x, y)


def test_take_rejects_nothing() -> None:
    with pytest.raises(InputError, match="at least 1"):
        data.Split(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)).take(0)


def test_shuffle_leaves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    data.load("digits").test.shuffle(seed=0)
    assert torch.equal(torch.get_rng_state(), state)


# Digits


def test_digits() -> None:
    digits = data.load("digits")
    assert digits.train is not None
    assert digits.train.x.shape == (1297, 1, 8, 8)
    assert digits.test.x.shape == (500, 1, 8, 8)
    assert digits.test.y.bincount().tolist() == [50] * 10
    assert (digits.num_classes, digits.class_names[7], digits.bounds) == (10, "7", (0.0, 1.0))
    for split in (digits.train, digits.test):
        assert (split.x.min().item(), split.x.max().item()) == (0, 1)
    both = torch.cat([digits.train.x, digits.test.x])
    assert both.sum().item() == pytest.approx(561718 / 16)  # the sum over scikit-learn's own 1,797 images
    assert len(set(digits.test.y[:20].tolist())) > 5, "the first n test images must be of mixed classes"


def test_digits_split_is_fixed() -> None:
    assert data.load("digits").fingerprint() == "6b7cba09aa560462"


def test_fingerprint_notices_each_change() -> None:
    digits = data.load("digits")
    x, y = digits.test.x.clone(), digits.test.y.clone()
    x[0, 0, 0, 0] += 0.5
    y[0] += 1
    changed = [data.Split(x, digits.test.y), data.Split(digits.test.x, y), digits.test.take(499)]
    changed.append(data.Split(digits.test.x.flatten(1), digits.test.y))
    prints = {replace(digits, test=split).fingerprint() for split in [digits.test, *changed]}
    assert len(prints) == 5


# Names, roots and paths


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownNameError, match="'mnist'"):
        data.load("mnits")
    with pytest.raises(UnknownNameError, match="'cifar10'"):
        data.fetch("cifar-10")
    with pytest.raises(UnknownNameError):
        data.load("")


def test_missing_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.load("mnist", root=tmp_path)
    text = str(caught.value)
    for part in (
        str(tmp_path / "mnist"),
        "download=True",
        "saddlepoint data fetch mnist",
        "11.6 MB",
        "https://storage",
    ):
        assert part in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == [], "nothing may be fetched unasked"


def test_root_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("SADDLEPOINT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="typo"):
        data.load("mnist", root=tmp_path / "typo")


def test_order_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_root, environment, cache = (tmp_path / name for name in ("given", "environment", "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    write_mnist(cache / "saddlepoint" / "mnist", test=1)
    assert len(data.load("mnist").test) == 1
    monkeypatch.setenv("SADDLEPOINT_DATA", str(environment))
    write_mnist(environment / "mnist", test=2)
    assert len(data.load("mnist").test) == 2
    write_mnist(given_root, test=3)  # <root>/file, without a folder of the dataset's name
    assert len(data.load("mnist", root=given_root).test) == 3
    write_mnist(given_root / "mnist", test=4)  # which comes first
    assert data.load("mnist", root=given_root).source == str(given_root / "mnist")


def test_relative_cache_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / ".cache" / "saddlepoint" / "mnist")
    assert len(data.load("mnist").test) == 3


def test_a_place_with_train_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "a" / "fashion-mnist", train=0)
    write_mnist(tmp_path / "debian")
    first = data.load("fashion-mnist", root=tmp_path / "a")
    assert first.train is None
    known = replace(catalog.KNOWN["fashion-mnist"], folders=(tmp_path / "debian",))
    monkeypatch.setitem(catalog.KNOWN, "fashion-mnist", known)
    second = data.load("fashion-mnist", root=tmp_path / "a")
    assert second.train is not None
    assert second.source == str(tmp_path / "debian")


@pytest.mark.parametrize("name", ["nowhere.npz", "./nowhere", "~/nowhere-at-all"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        data.load(name)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"expected a folder of images by class or a \.npz file"):
        data.load(tmp_path / "x.csv")


# idx


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path: Path, zipped: bool) -> None:
    mnist = data.load("mnist", root=write_mnist(tmp_path, zipped=zipped))
    assert mnist.train is not None
    assert mnist.train.x.shape == (4, 1, 28, 28)
    assert torch.equal(mnist.test.x[:, 0, 5, 7], torch.tensor([0, 1, 2]) / 255)
    assert mnist.test.y.tolist() == [0, 1, 2]


def test_idx_labels_without_train_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / f"{STEMS['x_train']}.gz").unlink()
    assert data.load("fashion-mnist", root=tmp_path).train is None


def test_the_other_familys_files(tmp_path: Path) -> None:
    labels = np.array(catalog.FIRST_TEST_LABELS["fashion-mnist"])
    (tmp_path / STEMS["x_test"]).write_bytes(idx(np.zeros((len(labels), 28, 28))))
    (tmp_path / STEMS["y_test"]).write_bytes(idx(labels))
    assert len(data.load("fashion-mnist", root=tmp_path).test) == len(labels)
    with pytest.raises(DataError, match="expected mnist, found fashion-mnist"):
        data.load("mnist", root=tmp_path)


IMAGES = idx(np.zeros((3, 28, 28)))
DAMAGES = {
    "cut gzip": ("x_test", gzip.compress(IMAGES)[:12], "corrupt or truncated gzip"),
    "cut gzip body": (
        "x_test",
        gzip.compress(idx(np.random.default_rng(0).integers(0, 255, (3, 28, 28))))[:-9],
        "gzip",
    ),
    "bad checksum": ("x_test", gzip.compress(IMAGES)[:-8] + bytes(8), "corrupt or truncated gzip"),
    "empty": ("x_test", b"", "expected an idx header of 16 bytes, found 0"),
    "bad magic": ("x_test", b"\x89PNG" + IMAGES[4:], r"expected the idx magic number 0x00000803 .* found 0x89504e47"),
    "labels for images": ("x_test", idx(np.zeros(99)), "expected the idx magic number 0x00000803 .* found 0x00000801"),
    "cut": ("x_test", IMAGES[:-1], r"expected 2352 bytes for the shape \(3, 28, 28\) .* found only 2351"),
    "surplus": ("x_test", IMAGES + b"x", "found more"),
    "boast": ("x_test", gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(99)), "more than the file can hold"),
    "size": ("x_test", idx(np.zeros((3, 8, 8))), "expected images of 28x28, found 8x8"),
    "none": ("x_test", idx(np.zeros((0, 28, 28))), "expected shape"),
    "count": ("y_test", idx(np.zeros(2)), "expected 3 labels, one per sample of .*t10k-images"),
    "range": ("y_test", idx(np.array([0, 1, 10])), "expected labels of 0 to 9, found 0 to 10"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_idx(tmp_path: Path, damage: str) -> None:
    key, content, message = DAMAGES[damage]
    path = write_mnist(tmp_path) / f"{STEMS[key]}.gz"  # the content decides whether it is unzipped, not the name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.load("mnist", root=tmp_path)
    assert path.name in str(caught.value)


# CIFAR-10


def check_cifar(cifar: data.Dataset) -> None:
    assert cifar.train is not None
    assert cifar.train.y.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert cifar.test.y.tolist() == [0, 1, 2]
    assert cifar.test.x.shape == (3, 3, 32, 32)
    assert torch.equal(cifar.test.x[1, :, 31, 0], torch.tensor([10, 20, 30]) / 255)
    assert cifar.class_names[9] == "truck"


def test_cifar_binary_folder_and_archive(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in cifar_files().items():
        (folder / name).write_bytes(content)
    check_cifar(data.load("cifar10", root=tmp_path / "a"))
    check_cifar(data.load("cifar10", root=folder))
    (tmp_path / "b").mkdir()
    evil = {"../escaped.bin": b"x", "cifar-10-batches-bin/readme.html": b"x"}
    write_tar(
        tmp_path / "b" / "cifar-10-binary.tar.gz",
        evil | {f"cifar-10-batches-bin/{name}": content for name, content in cifar_files().items()},
    )
    check_cifar(data.load("cifar10", root=tmp_path / "b"))
    assert not (tmp_path / "escaped.bin").exists()
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_cifar_npz(tmp_path: Path) -> None:
    pixels = np.broadcast_to(np.array([10, 20, 30], np.uint8), (3, 32, 32, 3))
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels, y_test=np.arange(3, dtype=np.uint8))
    assert data.load("cifar10", root=tmp_path).train is None
    labels = np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], np.uint8)
    np.savez(tmp_path / "cifar10_train.npz", x_train=np.repeat(pixels[:1], 10, 0), y_train=labels)
    check_cifar(data.load("cifar10", root=tmp_path))
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels[:, :16], y_test=np.arange(3))
    with pytest.raises(DataError, match=r"cifar10_test.npz: expected images of shape \(3, 32, 32\), found \(3, 16, 32\)"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", cifar_records(3)[:-1], "test_batch.bin: expected a multiple of 3073 bytes .* found 9218"),
        ("data_batch_3.bin", b"", "data_batch_3.bin: expected a multiple of 3073"),
        ("data_batch_3.bin", None, "incomplete CIFAR-10, data_batch_3.bin not found"),
        ("test_batch.bin", None, "incomplete CIFAR-10, test_batch.bin not found"),
        ("data_batch_5.bin", cifar_records(1, label=10), "expected labels of 0 to 9, found 1 to 10"),
        ("test_batch.bin", bytes(3073 * 10_001), "expected at most 30730000 bytes in test_batch.bin"),
    ],
)
def test_damaged_cifar(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    files = cifar_files() | ({} if content is None else {name: content})
    if content is None:
        del files[name]
    write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(DataError, match=message):
        data.load("cifar10", root=tmp_path)


def test_truncated_cifar_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(path, cifar_files())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz: corrupt, truncated"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("pickled", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_pickled_cifar_is_refused(tmp_path: Path, pickled: str) -> None:
    (tmp_path / pickled).mkdir()
    with pytest.raises(DataError, match=f"{pickled} is CIFAR-10's pickled Python version.*use the binary version"):
        data.load("cifar10", root=tmp_path)


# npz


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_of_images_and_of_tables(tmp_path: Path) -> None:
    x = np.arange(2 * 6 * 5 * 3, dtype=np.uint8).reshape(2, 6, 5, 3)
    images = data.load(save(tmp_path / "signs.npz", x_train=x, y_train=[0, 1], x_test=x, y_test=[[0], [3]]))
    assert images.train is not None
    assert (images.name, images.num_classes, images.test.y.tolist()) == ("signs", 4, [0, 3])
    assert images.test.x.is_contiguous()
    assert torch.equal(images.test.x, torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
    table = data.load(str(save(tmp_path / "table.npz", x=np.array([[0.0, 0.25, 1.0]]), y=np.array([1]))))
    assert table.train is None
    assert table.test.x.tolist() == [[0, 0.25, 1]]
    assert table.test.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 6, 7), (2, 1, 6, 7)),
        ((2, 6, 7, 1), (2, 1, 6, 7)),
        ((2, 6, 7, 4), (2, 4, 6, 7)),
        ((2, 3, 7, 6), (2, 3, 7, 6)),
        ((2, 3, 6, 3), (2, 3, 6, 3)),
        ((2, 6), (2, 6)),
    ],
)
def test_axes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    split = make_split(np.zeros(shape, np.uint8), np.zeros(2, int), x_from="x", y_from="y")
    assert split.x.shape == expected


@given(st.integers(0, 255))
def test_bytes_become_the_nearest_float(value: int) -> None:
    split = make_split(np.full((1, 1), value, np.uint8), np.zeros(1, int), x_from="x", y_from="y")
    assert split.x.item() == np.float32(value) / np.float32(255)
    assert round(split.x.item() * 255) == value


def test_loading_does_not_write_into_the_arrays() -> None:
    x = np.ones((1, 2), np.float32)
    make_split(x, np.zeros(1, int), x_from="x", y_from="y").x.zero_()
    assert x.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(1)}, r"no array 'x'; expected .* found a"),
        ({"x_test": np.zeros((1, 1))}, "no array 'y_test'"),
        ({"x_train": np.zeros((1, 1)), "y_train": np.zeros(1, int)}, "no array 'x'"),
        ({"x": np.zeros((1, 1)), "y": np.zeros(2, int)}, r"t.npz\[y\]: expected 1 labels"),
        ({"x": np.zeros((1, 1)), "y": np.zeros(1)}, "labels must be integers, found float64"),
        ({"x": np.zeros((1, 1)), "y": np.array([-1])}, "expected labels of 0 or more, found -1"),
        ({"x": np.full((1, 1), 1.5), "y": np.zeros(1, int)}, r"must lie in \[0, 1\], found 1.5 to 1.5"),
        ({"x": np.full((1, 1), -0.5), "y": np.zeros(1, int)}, r"must lie in \[0, 1\], found -0.5"),
        ({"x": np.full((1, 1), np.nan), "y": np.zeros(1, int)}, "found nan"),
        ({"x": np.zeros((1, 1), np.int64), "y": np.zeros(1, int)}, "expected uint8 .* found int64"),
        ({"x": np.zeros(1), "y": np.zeros(1, int)}, "expected shape"),
        (
            {
                "x_train": np.zeros((1, 2)),
                "y_train": np.zeros(1, int),
                "x_test": np.zeros((1, 3)),
                "y_test": np.zeros(1, int),
            },
            r"x_train has samples of shape \(2,\), x_test of shape \(3,\)",
        ),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data.load(save(tmp_path / "t.npz", **arrays))
    assert "t.npz" in str(caught.value)


class Trap:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_npz_with_pickles_never_runs_them(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    np.savez(tmp_path / "a.npz", x=np.array([Trap(trace)], dtype=object), y=np.zeros(1, int), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap(trace)))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DataError, match="pickled objects are never loaded"):
            data.load(tmp_path / name)
    assert not trace.exists()


def test_damaged_npz(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", x=np.zeros((9, 9)), y=np.zeros(9, int))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"t\.npz: .*corrupt or truncated"):
        data.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="found a single array"):
        data.load(path)


# Folders of images


def test_folder_by_class(tmp_path: Path) -> None:
    write_image(tmp_path / "b" / "1.png", 51)
    write_image(tmp_path / "a" / "2.jpg", 255)
    write_image(tmp_path / "a" / "1.PNG", 102)
    (tmp_path / "a" / "notes.txt").write_text("ignored")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".hidden.png").write_text("ignored")
    dataset = data.load(tmp_path)
    assert (dataset.name, dataset.train, dataset.class_names) == (tmp_path.name, None, ("a", "b"))
    assert dataset.test.x.shape == (3, 1, 4, 5)
    assert dataset.test.y.tolist() == [0, 0, 1]
    assert torch.allclose(dataset.test.x[:, 0, 3, 4], torch.tensor([0.4, 1.0, 0.2]))


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for value in (3, 9, 0, 7, 1, 8, 2, 6, 4, 5):
        write_image(tmp_path / "a" / f"{value}.png", value)
    assert (data.load(tmp_path).test.x[:, 0, 0, 0] * 255).round().tolist() == list(range(10))


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "cat" / "1.png", 255)
    write_image(tmp_path / "train" / "dog" / "1.png", (255, 0, 51), mode="RGB")
    write_image(tmp_path / "test" / "dog" / "1.png", 0)
    dataset = data.load(str(tmp_path))
    assert dataset.train is not None
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.x[:, :, 0, 0].tolist() == [[1, 1, 1], pytest.approx([1, 0, 0.2])]
    assert (dataset.test.y.tolist(), dataset.test.x.shape) == ([1], (1, 3, 4, 5))


def test_folder_with_test_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "dog" / "1.png", 0)
    dataset = data.load(tmp_path)
    assert (dataset.train, dataset.class_names) == (None, ("dog",))


def test_folder_without_test(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "cat" / "1.png", 255)
    with pytest.raises(DataError, match="no folder 'test'"):
        data.load(tmp_path)


def test_folder_of_two_sizes(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png", 0, size=(5, 4))
    write_image(tmp_path / "b" / "2.png", 0, size=(4, 5))
    with pytest.raises(DataError, match=r"a/1.png has 5x4 \(width x height\), .*b/2.png has 4x5"):
        data.load(tmp_path)


@pytest.mark.parametrize(("mode", "value"), [("RGBA", (1, 2, 3, 4)), ("I;16", 700), ("LA", (1, 2))])
def test_images_that_would_lose_something(tmp_path: Path, mode: str, value: Any) -> None:
    write_image(tmp_path / "a" / "1.png", value, mode=mode)
    with pytest.raises(DataError, match=r"1.png: expected an 8-bit grey or RGB image without transparency, found"):
        data.load(tmp_path)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png", 0, mode="P")
    assert data.load(tmp_path).test.x.shape[1] == 3
    Image.new("P", (5, 4)).save(tmp_path / "a" / "1.png", transparency=0)
    with pytest.raises(DataError, match="without transparency"):
        data.load(tmp_path)


def test_damaged_images_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no folders"):
        data.load(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no PNG or JPEG files"):
        data.load(tmp_path)
    write_image(tmp_path / "a" / "1.png", 0, size=(50, 50))
    content = (tmp_path / "a" / "1.png").read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2]):
        (tmp_path / "a" / "1.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"1\.png: not a readable"):
            data.load(tmp_path)


# Downloads


class Server(ThreadingHTTPServer):
    """Serves one content for every path; remembers requests; may cut the line, ignore ranges, or fail."""

    content = np.random.default_rng(0).bytes(700_000)
    cut_after: int | None = None
    ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    def remote(self, **changes: Any) -> RemoteFile:
        sha256 = hashlib.sha256(self.content).hexdigest()
        url = f"http://127.0.0.1:{self.server_port}/file.gz"
        return replace(RemoteFile(url, len(self.content), sha256), **changes)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut_after])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download(server: Server, tmp_path: Path) -> None:
    target = download(server.remote(), tmp_path / "new", progress=False)
    assert target.read_bytes() == server.content
    assert os.listdir(tmp_path / "new") == ["file.gz"]
    download(server.remote(), tmp_path / "new", progress=False)
    assert server.asked == [None], "an intact file must not be fetched again"
    target.write_bytes(b"damaged")
    assert download(server.remote(), tmp_path / "new", progress=False).read_bytes() == server.content


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cut_after = 300_000
    with pytest.raises(DataError, match=r"after 300000 of 700000 bytes; 300000 bytes are kept in .*file.gz.part"):
        download(server.remote(), tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["file.gz.part"]
    server.cut_after, server.ranges = None, ranges
    assert download(server.remote(), tmp_path, progress=False).read_bytes() == server.content
    assert server.asked == [None, "bytes=300000-"]
    assert os.listdir(tmp_path) == ["file.gz"]


def test_complete_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.gz.part").write_bytes(server.content)
    assert download(server.remote(), tmp_path, progress=False).read_bytes() == server.content
    assert server.asked == []


def test_surplus_part_is_started_afresh(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.gz.part").write_bytes(server.content + b"x")
    assert download(server.remote(), tmp_path, progress=False).read_bytes() == server.content
    assert server.asked == [None]


def test_wrong_checksum(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"expected the SHA-256 {'0' * 64}, received .* discarded"):
        download(server.remote(sha256="0" * 64), tmp_path, progress=False)
    assert os.listdir(tmp_path) == []


def test_another_file_is_offered(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 1000000 bytes, the server offers 700000: not the published file"):
        download(server.remote(size=1_000_000), tmp_path, progress=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("status", "kept"), [(404, True), (503, True), (416, False)])
def test_server_errors(server: Server, tmp_path: Path, status: int, kept: bool) -> None:
    server.status = status
    (tmp_path / "file.gz.part").write_bytes(b"begun")
    with pytest.raises(DataError, match=f"file.gz: download failed .*{status}"):
        download(server.remote(), tmp_path, progress=False)
    assert (tmp_path / "file.gz.part").exists() == kept


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"download failed .*check the network"):
        download(RemoteFile("http://127.0.0.1:9/file.gz", 10, "0" * 64), tmp_path, progress=False)


def test_silent_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    with pytest.raises(DataError, match=r"download failed \(timed out\)"):
        download(server.remote(), tmp_path, progress=False)


def test_disk_too_small(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match=r"cannot write file.gz \(the disk is full\); name another folder"):
        download(server.remote(), tmp_path, progress=False)
    assert server.asked == []


def test_disk_fills_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download_module, "_copy", full)
    with pytest.raises(DataError, match="the disk is full"):
        download(server.remote(), tmp_path, progress=False)


def test_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        download(server.remote(), tmp_path / "file" / "folder", progress=False)


def test_load_with_download(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar.gz", cifar_files())
    server.content = (tmp_path / "a.tar.gz").read_bytes()
    url = server.remote().url.replace("file.gz", "cifar-10-binary.tar.gz")
    known = replace(catalog.KNOWN["cifar10"], remote=(server.remote(url=url),))
    monkeypatch.setitem(catalog.KNOWN, "cifar10", known)
    root = tmp_path / "new"
    check_cifar(data.load("cifar10", root=root, download=True))
    check_cifar(data.load("cifar10", root=root, download=True))
    assert len(server.asked) == 1
    assert (root / "cifar10" / "cifar-10-binary.tar.gz").is_file()
    monkeypatch.setenv("SADDLEPOINT_DATA", str(tmp_path / "other"))
    assert data.fetch("cifar10", progress=False) == tmp_path / "other" / "cifar10"


def test_download_completes_a_test_part(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar.gz", cifar_files())
    server.content = (tmp_path / "a.tar.gz").read_bytes()
    remote = server.remote(url=server.remote().url.replace("file.gz", "cifar-10-binary.tar.gz"))
    monkeypatch.setitem(catalog.KNOWN, "cifar10", replace(catalog.KNOWN["cifar10"], remote=(remote,)))
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(3))
    assert data.load("cifar10", root=tmp_path).train is None
    check_cifar(data.load("cifar10", root=tmp_path, download=True))


def test_nothing_to_fetch() -> None:
    with pytest.raises(DataError, match="comes with scikit-learn"):
        data.fetch("digits")


def test_published_files_are_described() -> None:
    for name, known in catalog.KNOWN.items():
        assert len(known.class_names) == 10
        for remote in known.remote:
            assert len(bytes.fromhex(remote.sha256)) == 32, name
            assert remote.name.endswith(".gz"), name


# The real data, where the user has it

REAL = os.environ.get("SADDLEPOINT_DATA")


@pytest.mark.skipif(REAL is None, reason="SADDLEPOINT_DATA is not set")
@pytest.mark.parametrize(
    ("name", "shape", "labels", "balanced"),
    [
        ("mnist", (1, 28, 28), [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], False),
        ("fashion-mnist", (1, 28, 28), [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], True),
        ("cifar10", (3, 32, 32), [3, 8, 8, 0, 6, 6, 1, 6, 3, 1], True),
    ],
)
def test_real_data(name: str, shape: tuple[int, ...], labels: list[int], balanced: bool) -> None:
    try:
        dataset = data.load(name, root=REAL)
    except DataError as error:
        if "not found" not in str(error):
            raise
        pytest.skip(str(error))
    assert dataset.test.x.shape == (10_000, *shape)
    assert dataset.test.y[:10].tolist() == labels
    counts = dataset.test.y.bincount().tolist()
    assert counts == ([1000] * 10 if balanced else [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert 0.1 < dataset.test.x.mean() < 0.6
    if dataset.train is not None:
        assert dataset.train.x.shape[1:] == shape
        assert len(dataset.train) >= 10_000
