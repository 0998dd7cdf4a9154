"""Datasets by name or path: where they are looked for, and where they can be fetched from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from saddlepoint.data import formats
from saddlepoint.data.dataset import Dataset, Split
from saddlepoint.data.download import RemoteFile, download
from saddlepoint.errors import DataError, UnknownNameError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs
DIGITS_TEST_PER_CLASS = 50

Reader = Callable[[], tuple[Split | None, Split]]


@dataclass(frozen=True)
class Found:
    """A place that holds a dataset: where, whether its train part is there too, and how to read it."""

    place: Path
    has_train: bool
    read: Reader


@dataclass(frozen=True)
class Known:
    """A dataset with a name: its classes, files to look for, how to find them in a folder, where they are published."""

    class_names: tuple[str, ...]
    files: str
    find: Callable[[Path], Found | None]
    remote: tuple[RemoteFile, ...]
    folders: tuple[Path, ...] = ()


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return ("digits", *KNOWN)


def load(name_or_path: str | Path, *, root: str | Path | None = None, download: bool = False) -> Dataset:
    """A dataset by name (see `names`), or from a folder of images by class, or from a `.npz` file.

    Named ones are looked for, each as `<root>/<name>/` and `<root>/`, in: `root`; the environment's SADDLEPOINT_DATA;
    `saddlepoint` in the user's cache; for fashion-mnist where Debian's package puts it. The first place with train and
    test part is taken, else the first with a test part. `digits` is scikit-learn's, needs no file, and is split into
    1,297 train and 500 test images (50 per class) by a fixed permutation.
    With `download=True`, what is missing is fetched from its publisher (see `fetch`) first.

    Raises `UnknownNameError` for an unknown name and `DataError` for files that are missing, corrupt or wrong-shaped.
    """
    if isinstance(name_or_path, Path) or (name_or_path not in names() and _looks_like_path(name_or_path)):
        return _load_path(Path(name_or_path).expanduser())
    if name_or_path == "digits":
        return _digits()
    known = _known(name_or_path)
    if root is not None and not download and not Path(root).expanduser().is_dir():
        raise DataError(f"root {str(root)!r} is not a folder; name one that exists, or pass download=True to make it")
    roots = _roots(root)
    found = _find(name_or_path, known, roots)
    if download and (found is None or not found.has_train):
        found = _find(name_or_path, known, [fetch(name_or_path, root=root)])
    if found is None:
        raise _missing(name_or_path, known, roots)
    train, test = found.read()
    return Dataset(name_or_path, train, test, known.class_names, source=str(found.place))


def fetch(name: str, *, root: str | Path | None = None, progress: bool = True) -> Path:
    """Download the published files of a named dataset into `<root>/<name>/`, and return that folder.

    `root` is by default SADDLEPOINT_DATA, else the user's cache. Intact files are kept, interrupted downloads are
    continued, and checksums are verified. Raises `DataError` on network errors, a full disk or altered files.
    """
    if name == "digits":
        raise DataError("'digits' comes with scikit-learn: there is nothing to fetch")
    folder = _roots(root)[0] / name
    for remote in _known(name).remote:
        download(remote, folder, progress=progress)
    return folder


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise UnknownNameError("dataset", name, names())
    return KNOWN[name]


def _looks_like_path(text: str) -> bool:
    if not text:
        return False
    return os.sep in text or text.startswith(("~", ".")) or bool(Path(text).suffix) or Path(text).exists()


def _load_path(path: Path) -> Dataset:
    if path.is_dir():
        train, test, class_names = formats.read_image_folder(path)
    elif path.suffix == ".npz" and path.is_file():
        train, test = formats.read_npz_splits(path)
        highest = max(int(split.y.max()) for split in (train, test) if split is not None)
        class_names = tuple(str(label) for label in range(highest + 1))
    elif path.exists():
        raise DataError(f"{path}: expected a folder of images by class or a .npz file")
    else:
        raise DataError(f"{path}: no such file or folder; known names are {', '.join(names())}")
    return Dataset(path.stem, train, test, class_names, source=str(path))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # imported late: scikit-learn takes a second

    raw = load_digits()
    x, y = raw.images / 16, raw.target
    # RandomState's streams are frozen by numpy, so that the split is the same everywhere and forever.
    order = np.random.RandomState(0).permutation(len(y))
    rank_in_class = np.empty(len(y), int)
    for label in range(10):
        members = order[y[order] == label]
        rank_in_class[members] = np.arange(len(members))
    in_test = rank_in_class[order] < DIGITS_TEST_PER_CLASS
    train, test = (
        formats.make_split(x[part], y[part], x_from="digits", y_from="digits", num_classes=10)
        for part in (order[~in_test], order[in_test])
    )
    return Dataset("digits", train, test, tuple("0123456789"), source="scikit-learn")


def _roots(root: str | Path | None) -> list[Path]:
    # The XDG specification says to ignore relative paths.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"
    candidates = (root, os.environ.get("SADDLEPOINT_DATA"), cache / "saddlepoint")
    return [Path(candidate).expanduser() for candidate in candidates if candidate]


def _places(name: str, known: Known, roots: list[Path]) -> list[Path]:
    return [place for root in roots for place in (root / name, root)] + list(known.folders)


def _find(name: str, known: Known, roots: list[Path]) -> Found | None:
    found = [hit for place in _places(name, known, roots) if (hit := known.find(place)) is not None]
    return next((hit for hit in found if hit.has_train), found[0] if found else None)


def _missing(name: str, known: Known, roots: list[Path]) -> DataError:
    places = _places(name, known, roots)
    megabytes = sum(remote.size for remote in known.remote) / 1e6
    host = known.remote[0].url.rpartition("/")[0]
    pickled = [place / entry for place in places for entry in CIFAR_PICKLED if name == "cifar10" and (place / entry).exists()]
    reason = (
        f"{pickled[0]} is CIFAR-10's pickled Python version, which is never loaded because that can run code: "
        "use the binary version"
        if pickled
        else f"not found; looked for {known.files} in {', '.join(map(str, places))}"
    )
    return DataError(
        f"dataset {name!r}: {reason}. To fetch {megabytes:.1f} MB from {host} into {roots[0] / name}, "
        f"pass download=True or run 'saddlepoint data fetch {name}'; to use files of your own, set SADDLEPOINT_DATA"
    )


def _find_mnist(name: str) -> Callable[[Path], Found | None]:
    """How to find the four idx files, each with or without `.gz`, in a folder."""

    def find(place: Path) -> Found | None:
        def file(stem: str) -> Path | None:
            return next((path for path in (place / stem, place / f"{stem}.gz") if path.is_file()), None)

        train_x, train_y, test_x, test_y = (file(stem) for stem in MNIST_FILES)
        if test_x is None or test_y is None:
            return None

        def read() -> tuple[Split | None, Split]:
            test = formats.read_idx_pair(test_x, test_y, 10)
            for other, labels in FIRST_TEST_LABELS.items():
                if other != name and tuple(test.y[: len(labels)].tolist()) == labels:
                    raise DataError(f"{test_y}: expected {name}, found {other}, whose files have the same names")
            if train_x is None or train_y is None:
                return None, test
            return formats.read_idx_pair(train_x, train_y, 10), test

        return Found(place, train_x is not None and train_y is not None, read)

    return find


def _find_cifar10(place: Path) -> Found | None:
    """CIFAR-10 in a folder: as two .npz files, as the unpacked binary version, or as its archive."""
    test, train = place / "cifar10_test.npz", place / "cifar10_train.npz"
    folder, archive = place / "cifar-10-batches-bin", place / "cifar-10-binary.tar.gz"
    if archive.is_file():
        return Found(archive, True, partial(formats.read_cifar_tar, archive))
    for batches in (folder, place):
        if (batches / formats.CIFAR_TEST_BATCH).is_file():
            has_train = (batches / formats.CIFAR_TRAIN_BATCHES[0]).is_file()
            return Found(batches, has_train, partial(formats.read_cifar_folder, batches))
    if not test.is_file():
        return None

    def read() -> tuple[Split | None, Split]:
        return (_cifar_npz(train, "train") if train.is_file() else None), _cifar_npz(test, "test")

    return Found(place, train.is_file(), read)


def _cifar_npz(path: Path, part: str) -> Split:
    split = formats.npz_split(path, formats.read_npz(path), f"x_{part}", f"y_{part}", num_classes=10)
    if split.x.shape[1:] != (3, 32, 32):
        raise DataError(f"{path}: expected images of shape (3, 32, 32), found {tuple(split.x.shape[1:])}")
    return split


def _published(address: str, files: dict[str, tuple[int, str]]) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(f"{address}/{name}", size, sha256) for name, (size, sha256) in files.items())


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_WANTED = "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte and their train-* counterparts (with or without .gz)"
FIRST_TEST_LABELS = {
    "mnist": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5, 9, 7, 3, 4),
    "fashion-mnist": (9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1, 2, 4, 8, 0),
}
CIFAR_PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")

KNOWN: dict[str, Known] = {
    "mnist": Known(
        class_names=tuple("0123456789"),
        files=MNIST_WANTED,
        find=_find_mnist("mnist"),
        remote=_published(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            {
                "train-images-idx3-ubyte.gz": (
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "train-labels-idx1-ubyte.gz": (
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            },
        ),
    ),
    "fashion-mnist": Known(
        class_names=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        files=MNIST_WANTED,
        find=_find_mnist("fashion-mnist"),
        remote=_published(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # this host has no https
            {
                "train-images-idx3-ubyte.gz": (
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "train-labels-idx1-ubyte.gz": (
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            },
        ),
        folders=(DEBIAN_FASHION_MNIST,),
    ),
    "cifar10": Known(
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        files="cifar-10-binary.tar.gz, cifar-10-batches-bin/ or cifar10_test.npz and cifar10_train.npz",
        find=_find_cifar10,
        remote=_published(
            "https://www.cs.toronto.edu/~kriz",
            {
                "cifar-10-binary.tar.gz": (
                    170_052_171,
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                )
            },
        ),
    ),
}
