"""From the words of a command line to models, data, attacks and threats. Every error is one clear line."""

from __future__ import annotations

import csv
import functools
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from saddlepoint import data, zoo
from saddlepoint.attacks import Restarts, get
from saddlepoint.attacks.minimal import MINIMAL, PASSES, minimal
from saddlepoint.cli.options import MODELS, console
from saddlepoint.engine import Attack
from saddlepoint.errors import DataError, InputError, SaddlepointError, UnknownNameError
from saddlepoint.goals import Goal, Targeted, Untargeted
from saddlepoint.models import Classifier, Model
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Threat, ball

EMPTY = "(empty)"  # the group of samples whose cell is empty
MOST_GROUPS = 30  # in a column; more are an identifier or a measurement


def number(text: str) -> float:
    """A number as people write eps: `0.03` or `8/255`."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{text!r} is no number; write 0.03 or 8/255") from None


def numbers(text: str) -> list[float]:
    """Comma-separated numbers: `0.49,0.48,0.45`."""
    return [number(part) for part in text.split(",") if part.strip()]


def threats(norm: str, eps: str) -> list[Threat]:
    """One threat for each of the comma-separated eps, in ascending order: `2/255,4/255`, or with norms `8/255,l2:0.5`."""
    radii: dict[str, set[float]] = {}
    for part in filter(str.strip, eps.split(",")):
        name, colon, size = part.rpartition(":")
        radii.setdefault(name.strip() if colon else norm, set()).add(number(size))
    if not radii:
        raise InputError("--eps needs at least one number, such as 8/255")
    return [ball(name, radius) for name, sizes in radii.items() for radius in sorted(sizes)]


def attack(text: str, norm: Norm | None = None, passes: int | None = None) -> Attack:
    """An attack by name, with settings and restarts: `pgd`, `pgd:steps=100,loss=margin`, `pgd:steps=20*5` (five restarts).

    `FILE.py:NAME` in place of the name takes a class from the user's own file. `minimal` is what is recommended for the
    smallest perturbation in `norm`, fitted to `passes`.
    """
    if re.split("[:*]", text)[0].lower() == MINIMAL:
        return _minimal(text, norm, passes)
    text, _, times = text.partition("*")
    file, own, rest = text.rpartition(".py:")
    name, _, rest = rest.partition(":")
    cls = _from_file(f"{file}.py", name, "attack") if own else get(name)
    if not (isinstance(cls, type) and issubclass(cls, Attack)):
        raise InputError(f"{name} in {file}.py is no attack class")
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    settings: dict[str, Any] = {}  # Any: the values of an arbitrary attack's fields
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known:
            raise UnknownNameError(f"setting of {cls.__name__}", key, known or ["(none)"])
        if not equals:
            raise InputError(f"write settings as {name}:{key}=VALUE")
        settings[key] = _convert(value, hints[key], f"{cls.__name__}.{key}")
    missing = [
        f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING and f.name not in settings
    ]
    if missing:
        raise InputError(f"{cls.__name__} needs {', '.join(missing)}: write {name}:{missing[0]}=VALUE")
    found = cls(**settings)
    if not times:
        return found
    if not times.isdigit():
        raise InputError(f"restarts are a whole number, as in {name}*5; got {times!r}")
    return Restarts(found, int(times))


def _minimal(text: str, norm: Norm | None, passes: int | None) -> Attack:
    if text.lower() != MINIMAL:
        raise InputError(f"{MINIMAL} takes neither settings nor restarts; how long it looks is said by --passes; got {text!r}")
    if norm is None:
        raise InputError(f"{MINIMAL} looks for the smallest perturbation; here an attack such as pgd is needed")
    return minimal(norm, passes or PASSES)


def _convert(text: str, hint: Any, name: str) -> Any:  # Any: both are of the field's type, whatever it is
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in choices and text.lower() in ("none", "null"):
        return None
    for choice in choices:
        if get_origin(choice) is Literal:
            if text in get_args(choice):
                return text
            raise UnknownNameError(f"value of {name}", text, [str(c) for c in get_args(choice)])
        try:
            if choice is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if choice is int:
                return int(text)
            if choice is float:
                return number(text)
            if choice is str:
                return text
        except ValueError:
            continue
    raise InputError(f"{name} cannot be {text!r}; it is {hint}")


def goal(targeted: str | None) -> Goal | None:
    """None for the attack's default goal; "untargeted", a class number, or a way to choose one ("random", "next", ...)."""
    if targeted is None:
        return None
    if targeted == "untargeted":
        return Untargeted()
    return Targeted(int(targeted) if targeted.isdigit() else targeted)  # type: ignore[arg-type]  # Targeted checks names


def dataset(name: str, root: Path | None = None, *, download: bool = False) -> data.Dataset:
    """`sp.data.load` for a name or a path."""
    return data.load(name, root=root, download=download)


def samples(found: data.Dataset, count: int | None) -> data.Split:
    """The first `count` test samples, or all."""
    return found.test if count is None else found.test.take(count)


def groups(path: Path, found: data.Dataset, count: int | None) -> dict[str, list[str]]:
    """Metadata of the first `count` test samples, or all, by column of a CSV with a header and a row for each test sample.

    Columns of more than `MOST_GROUPS` different values are left out, with a note.
    """
    header, *rows = _table(path)
    for place, name in enumerate(header.cells, 1):
        if not name:
            raise DataError(f"{header}: the header has no name for column {place}")
        if name in header.cells[: place - 1]:
            raise DataError(f"{header}: the header has {name!r} twice")
    for row in rows:
        if len(row.cells) != len(header.cells):
            raise DataError(f"{row}: the row has {len(row.cells)} cells, the header {len(header.cells)}")
    if len(rows) != len(found.test):
        raise DataError(
            f"--groups: {path} has {len(rows)} rows below its header, but {found.name} has {len(found.test)} test samples: "
            "it needs one for each, in their order, also for those that --samples leaves out"
        )
    columns = {name: [row.cells[place] or EMPTY for row in rows] for place, name in enumerate(header.cells)}
    many = {name: len(set(values)) for name, values in columns.items() if len(set(values)) > MOST_GROUPS}
    said = [
        f"{name!r} has {number} different values: put them into {MOST_GROUPS} bins at most" for name, number in many.items()
    ]
    if len(many) == len(columns):
        raise InputError(f"--groups: {path} has no column of subgroups: {'; '.join(said)}")
    for text in said:
        console.print(f"note: --groups leaves a column out, since {text}", markup=False, soft_wrap=True)
    return {name: values[:count] for name, values in columns.items() if name not in many}


@dataclass(frozen=True)
class _Row:
    """Of a CSV. line: where it begins, from 1."""

    path: Path
    line: int
    cells: list[str]

    def __str__(self) -> str:
        return f"--groups: {self.path}, line {self.line}"


def _table(path: Path) -> list[_Row]:
    """The rows of a CSV, at least one, without empty lines at its end."""
    rows, line = [], 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for cells in reader:
                rows.append(_Row(path, line, [cell.strip() for cell in cells]))
                line = reader.line_num + 1
    except OSError as error:
        raise DataError(f"--groups: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"--groups: {path} is not UTF-8 text: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{_Row(path, line, [])}: {error}") from None
    while rows and not rows[-1].cells:
        rows.pop()
    if not rows or not rows[0].cells:
        raise DataError(f"{_Row(path, 1, [])}: a header is needed, with a name for each column")
    return rows


def network(text: str, found: data.Dataset, *, seed: int = 0) -> tuple[str, nn.Module | Classifier]:
    """Name and network for `FILE.py:NAME` or `zoo:NAME[+WEIGHTS]`. The file is the user's own code and is run."""
    name, net = _classifier(text, found, seed)
    if not isinstance(net, nn.Module | Classifier):
        raise InputError(f"{text}: {name} is a {type(net).__name__}, neither an nn.Module nor an sp.Model")
    return name, net


def _classifier(text: str, found: data.Dataset, seed: int = 0) -> tuple[str, object]:
    """The same for whatever `sp.Model` takes, and for `FILE.onnx`."""
    if text.startswith("zoo:"):
        name, _, weights = text.removeprefix("zoo:").partition("+")
        net = zoo.build(name, num_classes=found.num_classes, in_shape=tuple(found.test.x.shape[1:]), seed=seed)
        return (Path(weights).stem if weights else name), zoo.load_weights(net, weights) if weights else net
    if text.endswith(".onnx"):
        return Path(text).stem, Path(text)
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise InputError(f"--model is {MODELS}; got {text!r}")
    return name, _from_file(file, name, "--model")


def _from_file(file: str, name: str, what: str) -> Any:  # Any: whatever the user's file defines
    """What the user's own Python file calls `name`; a class, or a function without arguments, is called to make the network."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{what}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours can be imported, as when it is run
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, name):
            public = [k for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, types.ModuleType)]
            raise UnknownNameError(f"name in {file}", name, public or ["(nothing)"])
        found = getattr(module, name)
        return found() if _makes_one(found) else found
    except SaddlepointError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{what}: {name} of {file} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


def _makes_one(found: object) -> bool:
    """Whether this makes a network rather than being one: a function that wants an argument wants inputs to classify."""
    if isinstance(found, type):
        return not issubclass(found, Attack)
    if not isinstance(found, types.FunctionType | functools.partial):
        return False
    wanted = [p for p in inspect.signature(found).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return all(parameter.default is not parameter.empty for parameter in wanted)


def model(
    text: str,
    found: data.Dataset,
    *,
    mean: str | None = None,
    std: str | None = None,
    device: str | None = None,
    access: str | None = None,
) -> tuple[str, Classifier]:
    """Name and model for the words of `--model`; an `sp.Model` in the user's file keeps what it says of itself."""
    name, net = _classifier(text, found)
    if isinstance(net, Classifier):
        if mean or std or access:
            raise InputError(f"{name} is an sp.Model, which says so itself: leave out --mean, --std and --access")
        return name, net
    place = None
    if device is not None:
        try:
            place = torch.device(device)
            net = net.to(place) if isinstance(net, nn.Module) else net
        except (RuntimeError, AssertionError) as error:  # torch has no one type for a device that isn't there
            raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    average, deviation = (numbers(text) if text else None for text in (mean, std))
    granted = None if access is None else Access[access.upper()]
    try:
        return name, Model(net, found.bounds, average, deviation, access=granted, device=place)
    except InputError as error:
        raise InputError(f"--model {text}: {error}") from None


def models(texts: Sequence[str], found: data.Dataset, **settings: Any) -> dict[str, Classifier]:
    """All models by name; equal names are numbered. settings: of `model`."""
    named: dict[str, Classifier] = {}
    for text in texts:
        name, made = model(text, found, **settings)
        unique, count = name, 2
        while unique in named:
            unique, count = f"{name}-{count}", count + 1
        named[unique] = made
    return named
