"""The frame for re-running papers' figures: entries, the context they run in, and what comes out.

An entry computes its figures from data alone; papers' figures and accepted ranges stand beside them and are used by nothing
but the verdict.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from saddlepoint import data as datasets
from saddlepoint import zoo
from saddlepoint.data import Dataset, Split
from saddlepoint.defenses import static_augmentation, train
from saddlepoint.defenses.objectives import Objective
from saddlepoint.defenses.training import OptimizerFactory
from saddlepoint.engine import Attack
from saddlepoint.errors import DataError, InputError, UnknownNameError
from saddlepoint.models import Model
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.models.torch_model import Labelled
from saddlepoint.threats import Threat

Range = tuple[float, float]
Build = Callable[[tuple[int, ...], int], nn.Module]
STAND_IN = "digits"
# Digits has 1,297 training images, MNIST 60,000: from it, a recipe's few epochs would teach nothing.
_STAND_IN_EPOCHS, _STAND_IN_EPOCHS_QUICK = 10, 3
_QUICK_TRAIN, _QUICK_TEST, _QUICK_RUBBISH, _QUICK_FEW = 6000, 500, 1000, 20


class UnavailableError(DataError):
    """Published weights that an entry judges aren't at hand, or the data that they were made for; nothing can stand in."""


@dataclass(frozen=True)
class Figure:
    """One number: ours, the paper's, and the range that ours must lie in.

    paper: None where the paper has none; paper_note: on what the paper measured it, where that differs.
    must: smallest and largest accepted value; None where the figure is shown but not judged.
    goal: what ours should be near, the project's own earlier measurement or the paper's figure.
    unit: "share" is shown in percent; "" is a plain number.
    """

    name: str
    ours: float
    must: Range | None = None
    paper: float | None = None
    paper_note: str = ""
    goal: float | None = None
    unit: Literal["share", ""] = "share"

    @property
    def inside(self) -> bool | None:
        """Whether ours lies in the range, ends included; None where there is no range. nan lies in none."""
        return None if self.must is None else self.must[0] <= self.ours <= self.must[1]

    @property
    def verdict(self) -> str:
        """`inside` in words."""
        return {True: "inside", False: "OUTSIDE", None: "not judged"}[self.inside]


@dataclass(frozen=True)
class Outcome:
    """What an entry gave: its figures, on which data, in how many seconds.

    stand_in: the data isn't that of the paper. quick: samples and training were cut. In both cases the accepted ranges are the
    entry's loose ones, and figures without one are not judged. missing: what wasn't at hand; then there are no figures.
    """

    id: str
    title: str
    reference: str
    setting: str
    data: str
    stand_in: bool
    quick: bool
    seed: int
    figures: tuple[Figure, ...]
    seconds: float
    missing: str = ""

    @property
    def passed(self) -> bool:
        """It ran, and no figure lies outside its range."""
        return not self.missing and all(figure.inside is not False for figure in self.figures)

    def document(self) -> dict[str, object]:
        """Ready for JSON; nan, such as the confidence on errors where there are none, becomes null."""
        figures = [
            asdict(f) | {"ours": f.ours if math.isfinite(f.ours) else None, "inside": f.inside, "verdict": f.verdict}
            for f in self.figures
        ]
        return asdict(self) | {"figures": figures, "passed": self.passed}


@dataclass(frozen=True)
class Static:
    """Examples that are made once, on the network of another recipe, and added to the training data."""

    source: Recipe
    attack: Attack
    threat: Threat


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; equal recipes share one network within a `Context`.

    net: a name of the zoo, or a function of input shape and number of classes. epochs, samples (None: all) and batch_size:
    of the training. adversary: None trains on clean inputs.
    optimizer: None is Adam with learning rate 1e-3. bounds: of the inputs; None is the papers' FGSM without clipping.
    classes: keep these only, renumbered from 0. merged: another task on the same inputs, by the new number of each class:
    (0, 1) * 5 tells even digits from odd ones. static: what is added to the data, which then are twice as many.
    """

    net: str | Build
    epochs: int
    adversary: Objective | None = None
    optimizer: OptimizerFactory | None = None
    bounds: Range | None = None
    samples: int | None = None
    batch_size: int = 128
    classes: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None
    static: Static | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """What entries run in: the data, the seed, and the networks that they share.

    data: MNIST for the papers' ranges to apply; any other images are a stand-in. note: why it is a stand-in.
    threads: of torch; 1, as the ranges were calibrated. quick: fewer samples and epochs, to see that everything runs.
    """

    data: Dataset
    note: str = ""
    seed: int = 0
    threads: int = 1
    quick: bool = False
    trained: dict[Recipe, Model] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.data.train is None:
            raise DataError(f"{self.data.name} has no training part here ({self.data.source}); entries train their networks")

    @property
    def stand_in(self) -> bool:
        """Whether the data isn't the papers'."""
        return self.data.name != "mnist"

    @property
    def full(self) -> bool:
        """Whether the papers' ranges apply."""
        return not (self.stand_in or self.quick)

    @property
    def departures(self) -> tuple[str, ...]:
        """How this context's settings differ from those that the entries state."""
        found = []
        if self.stand_in:
            found.append(
                f"on {self.data.name}, epochs times {self._more_epochs}, {self.convolutional} as convolutional network"
            )
        if self.quick:
            found.append(
                f"at most {_QUICK_TRAIN} training and {_QUICK_TEST} test images, {_QUICK_RUBBISH} of noise, {_QUICK_FEW} where"
                " only some images are attacked"
            )
        return tuple(found)

    @property
    def test(self) -> Split:
        """The test samples."""
        return self.data.test.take(_QUICK_TEST) if self.quick else self.data.test

    def few(self, split: Split, count: int) -> Split:
        """The first `count` samples, for attacks that take long."""
        return split.take(_QUICK_FEW if self.quick else count)

    @property
    def rubbish(self) -> Tensor:
        """Inputs of independent standard normal noise, 10,000 as in Goodfellow et al. (2015)."""
        generator = torch.Generator().manual_seed(self.seed)
        count = _QUICK_RUBBISH if self.quick else 10_000
        return torch.randn(count, *self.data.test.x.shape[1:], generator=generator)

    @cached_property
    def convolutional(self) -> str:
        """The zoo's convolutional network for inputs of this size: cnn-s, or digits-cnn where its kernels don't fit."""
        return "cnn-s" if min(self.data.test.x.shape[2:]) >= 28 else "digits-cnn"

    def accept(self, paper: Range | None, loose: Range | None = None) -> Range | None:
        """The range that applies: `paper` in the paper's setting, `loose` in any other. None: the figure isn't judged."""
        return paper if self.full else loose

    def model(self, recipe: Recipe) -> Model:
        """The network of a recipe, trained at the first request.

        Errors: `KeyboardInterrupt` where Ctrl-C left the training unfinished, since such a network proves nothing.
        """
        if recipe not in self.trained:
            assert self.data.train is not None  # __post_init__ saw to it
            part = self.data.train if recipe.classes is None else only(self.data.train, recipe.classes)
            samples = self._at_most(recipe.samples or len(part), part)
            classes = self.data.num_classes if recipe.classes is None else len(recipe.classes)
            if recipe.merged is not None:
                part, classes = Split(part.x, torch.tensor(recipe.merged)[part.y]), max(recipe.merged) + 1
            chosen: Labelled = part.take(samples)
            if recipe.static is not None:
                given = recipe.static
                chosen = static_augmentation(self.model(given.source), chosen, given.attack, given.threat, seed=self.seed)
            training = train(
                Model(self.network(recipe.net, tuple(part.x.shape[1:]), classes), bounds=recipe.bounds),
                chosen,
                adversary=recipe.adversary,
                epochs=recipe.epochs * self._more_epochs,
                batch_size=recipe.batch_size,
                optimizer=recipe.optimizer,
                seed=self.seed,
            )
            if not training.complete:
                raise KeyboardInterrupt
            self.trained[recipe] = training.model
        return self.trained[recipe]

    def published(self, net: str, file: str, address: str) -> Model:
        """MNIST's network of the zoo with published weights, from `models/<file>` beside the data's folder or in it.

        Errors: `UnavailableError` on a stand-in, and where the file isn't there; address: where it is published.
        """
        if self.stand_in:
            raise UnavailableError(f"{file} holds a network for mnist; on {self.data.name} there is nothing to judge")
        folder = Path(self.data.source)
        places = [place / "models" / file for place in (folder.parent, folder)]
        for path in places:
            if path.is_file():
                built = self.network(net, tuple(self.data.test.x.shape[1:]), self.data.num_classes)
                return Model(zoo.load_weights(built, path), bounds=self.data.bounds)
        raise UnavailableError(f"no file {' or '.join(map(str, places))}; save there what is published as {address}")

    def training(self, count: int) -> Split:
        """The first `count` training samples, for what isn't trained by epochs."""
        assert self.data.train is not None  # __post_init__ saw to it
        return self.data.train.take(self._at_most(count, self.data.train))

    def _at_most(self, count: int, part: Split) -> int:
        return min(count, len(part), _QUICK_TRAIN if self.quick else len(part))

    @property
    def _more_epochs(self) -> int:
        if not self.stand_in:
            return 1
        return _STAND_IN_EPOCHS_QUICK if self.quick else _STAND_IN_EPOCHS

    def network(self, net: str | Build, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A network of the zoo, or a function's, untrained and by this context's seed."""
        if isinstance(net, str):
            return zoo.build(net, num_classes=classes, in_shape=shape, seed=self.seed)
        with global_random_state_kept():
            torch.manual_seed(self.seed)
            return net(shape, classes)


Figures = Callable[[Context], list[Figure]]


@dataclass(frozen=True)
class Entry:
    """A paper's experiment: what it is, where it stands, in which setting it is run here, and how."""

    id: str
    title: str
    reference: str
    setting: str
    run: Figures

    def __call__(self, context: Context) -> Outcome:
        """Run it. Goals were measured in the paper's setting, so in no other one are they shown."""
        started = time.monotonic()
        found, missing = [], ""
        with _threads(context.threads):
            try:
                found = self.run(context)
            except UnavailableError as error:
                missing = str(error)
        figures = tuple(f if context.full else replace(f, goal=None) for f in found)
        setting = "; but ".join((self.setting, *context.departures))
        return Outcome(
            self.id, self.title, self.reference, setting, context.data.name, context.stand_in, context.quick, context.seed,
            figures, time.monotonic() - started, missing,
        )  # fmt: skip


ENTRIES: dict[str, Entry] = {}


def entry(id: str, title: str, reference: str, setting: str) -> Callable[[Figures], Figures]:
    """Decorator that registers the function as an entry. id: a letter and a number."""

    def add(run: Figures) -> Figures:
        if id in ENTRIES:
            raise InputError(f"there is an entry {id} already: {ENTRIES[id].title}")
        ENTRIES[id] = Entry(id, title, reference, setting, run)
        return run

    return add


def find(names: Iterable[str] = ()) -> tuple[Entry, ...]:
    """The entries of these ids, in any case, each once; all of them without ids, R1 first. Errors: `UnknownNameError`."""
    chosen = list(dict.fromkeys(name.upper() for name in names))
    for name in chosen:
        if name not in ENTRIES:
            raise UnknownNameError("entry", name, ENTRIES)
    return tuple(ENTRIES[name] for name in chosen or sorted(ENTRIES, key=_order))


def _order(id: str) -> tuple[bool, str, int]:
    """R1, R2, ..., and then the other letters."""
    return not id.startswith("R"), id[0], int(id[1:])


def find_data(root: str | Path | None = None) -> tuple[Dataset, str]:
    """MNIST, or digits in its stead with the reason. Where a root is given, MNIST must be there: `DataError` otherwise."""
    try:
        found = datasets.load("mnist", root=root)
        if found.train is None:
            raise DataError(f"{found.source} holds MNIST's test part alone")
    except DataError as error:
        if root is not None:
            raise
        return datasets.load(STAND_IN), str(error)
    return found, ""


def run(names: Iterable[str], context: Context) -> Iterator[Outcome]:
    """Run entries by id (all of them without ids), one after another, sharing the context's networks."""
    return (found(context) for found in find(names))


def only(split: Split, classes: tuple[int, ...]) -> Split:
    """The samples of these classes, renumbered 0, 1, ... in their order."""
    number = split.y.new_full((int(split.y.max()) + 1,), -1)
    number[list(classes)] = torch.arange(len(classes))
    renumbered = number[split.y]
    kept = renumbered >= 0
    return Split(split.x[kept], renumbered[kept])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
