"""VNNLIB: the competition's files for properties. Boxes of inputs, and what outputs must not be."""

from __future__ import annotations

import gzip
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saddlepoint.errors import DataError
from saddlepoint.propagation.sets import Box
from saddlepoint.verify.cases import Cases

_TOKEN = re.compile(r"[()]|[^\s()]+")
_VARIABLE = re.compile(r"([XY])_(\d+)$")
Tree = Any  # a token, or a list of trees
Atom = tuple[dict[str, float], float]  # coefficients by variable, and a constant: their sum is <= 0


@dataclass(frozen=True)
class Case:
    """Inputs between lower and upper (D,) are unsafe where rows (K, C) times the outputs plus constants (K,) are all <= 0."""

    lower: Tensor
    upper: Tensor
    rows: Tensor
    constants: Tensor


@dataclass(frozen=True)
class Property:
    """A property of a network: none of its cases, each a box of inputs with a set of outputs, may occur."""

    cases: tuple[Case, ...]
    inputs: int
    outputs: int

    def to_cases(self, shape: Sequence[int], like: Tensor) -> Cases:
        """For a network with inputs of this shape; boxes are rounded outwards to the dtype of `like`.

        Errors: `DataError` where the shape has another number of inputs.
        """
        if math.prod(shape) != self.inputs:
            raise DataError(f"the property is about {self.inputs} inputs; the network takes {tuple(shape)}")
        ends = torch.stack([torch.cat([case.lower, case.upper]) for case in self.cases])
        boxes, of = torch.unique(ends, dim=0, return_inverse=True)
        lower, upper = (part.reshape(-1, *shape) for part in boxes.tensor_split(2, dim=1))
        most = max(len(case.rows) for case in self.cases)
        filled = [torch.arange(most).clamp(max=len(case.rows) - 1) for case in self.cases]  # the last row stands for more
        rows = torch.stack([case.rows[index] for case, index in zip(self.cases, filled, strict=True)])
        constants = torch.stack([case.constants[index] for case, index in zip(self.cases, filled, strict=True)])
        box = Box(_rounded(lower, like, -1), _rounded(upper, like, 1))
        return Cases(box, of.to(like.device), rows.to(like), constants.to(like))

    def __str__(self) -> str:
        most = max(len(case.rows) for case in self.cases)
        return f"{len(self.cases)} cases of {self.inputs} inputs and {self.outputs} outputs, at most {most} conditions each"


def _rounded(ends: Tensor, like: Tensor, side: int) -> Tensor:
    """Ends of boxes in another dtype, moved outwards where that rounds inwards."""
    moved = ends.to(like)
    short = (moved.to(ends) - ends) * side < 0
    return torch.where(short, moved.nextafter(torch.full_like(moved, side * torch.inf)), moved)


def read_vnnlib(path: str | Path) -> Property:
    """Read a .vnnlib file, or .vnnlib.gz. Errors: `DataError` for files that are missing, damaged or ask for something else."""
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read as VNNLIB ({error})") from error
    try:
        return parse_vnnlib(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_vnnlib(text: str) -> Property:
    """The property that a VNNLIB text states. Errors: `DataError`."""
    declared: dict[str, int] = {"X": 0, "Y": 0}
    choices: list[list[list[Atom]]] = []
    for tree in _trees(text):
        match tree:
            case ["declare-const", str(name), _] | ["declare-fun", str(name), [], _] if found := _VARIABLE.match(name):
                declared[found[1]] = max(declared[found[1]], int(found[2]) + 1)
            case ["assert", condition]:
                choices.append(_alternatives(condition))
            case ["set-logic", _] | ["check-sat"]:
                pass
            case _:
                raise DataError(f"expected a declaration or an assertion, found {str(tree)[:80]}")
    if not declared["X"] or not declared["Y"]:
        raise DataError("no inputs X_0, ... or outputs Y_0, ... are declared")
    certain = [atom for choice in choices if len(choice) == 1 for atom in choice[0]]
    open_ = [choice for choice in choices if len(choice) > 1]
    cases, impossible = [], DataError("there is no case")
    for chosen in itertools.product(*open_):
        try:
            cases.append(_case([*certain, *itertools.chain(*chosen)], declared))
        except _ImpossibleError as error:  # such as X_0 <= 1 of one choice and X_0 >= 2 of another
            impossible = error
    if not cases:
        raise impossible
    return Property(tuple(cases), declared["X"], declared["Y"])


class _ImpossibleError(DataError):
    """Nothing satisfies a case's conditions on inputs and numbers."""


def _trees(text: str) -> Iterator[Tree]:
    """The S-expressions of the text, without comments."""
    stack: list[list[Tree]] = [[]]
    for token in _TOKEN.findall(re.sub(r";[^\n]*", "", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) < 2:
                raise DataError("a bracket is closed that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise DataError("a bracket is not closed: is the file truncated?")
    yield from stack[0]


def _alternatives(tree: Tree) -> list[list[Atom]]:
    """A condition as alternatives, each a list of atoms that hold together."""
    match tree:
        case ["or", *parts] if parts:
            return [alternative for part in parts for alternative in _alternatives(part)]
        case ["and", *parts] if parts:
            return [list(itertools.chain(*chosen)) for chosen in itertools.product(*map(_alternatives, parts))]
        case ["<=" | "<", left, right]:
            return [[_less(left, right)]]
        case [">=" | ">", left, right]:
            return [[_less(right, left)]]
    raise DataError(f"expected or, and, <= or >=, found {str(tree)[:80]}")


def _less(left: Tree, right: Tree) -> Atom:
    coefficients: dict[str, float] = {}
    constant = 0.0
    for side, sign in ((left, 1.0), (right, -1.0)):
        if not isinstance(side, str):
            raise DataError(f"only variables and numbers can be compared, not {str(side)[:60]}")
        if _VARIABLE.match(side):
            coefficients[side] = coefficients.get(side, 0.0) + sign
        else:
            try:
                value = float(side)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise DataError(f"{side!r} is neither a variable nor a finite number")
            constant += sign * value
    return {name: weight for name, weight in coefficients.items() if weight}, constant


def _case(atoms: list[Atom], declared: dict[str, int]) -> Case:
    lower = torch.full((declared["X"],), -torch.inf, dtype=torch.float64)
    upper = torch.full((declared["X"],), torch.inf, dtype=torch.float64)
    rows, constants = [], []
    for coefficients, constant in atoms:
        kinds = {name[0] for name in coefficients}
        if not kinds:
            if constant > 0:
                raise _ImpossibleError("a condition on numbers alone is false")
        elif kinds == {"X"} and len(coefficients) == 1:
            ((name, sign),) = coefficients.items()
            place, end = int(name[2:]), -constant / sign
            if place >= len(lower):
                raise DataError(f"{name} is not declared")
            if sign > 0:
                upper[place] = min(float(upper[place]), end)
            else:
                lower[place] = max(float(lower[place]), end)
        elif kinds == {"Y"}:
            row = torch.zeros(declared["Y"], dtype=torch.float64)
            for name, sign in coefficients.items():
                if int(name[2:]) >= len(row):
                    raise DataError(f"{name} is not declared")
                row[int(name[2:])] += sign
            rows.append(row)
            constants.append(constant)
        else:
            raise DataError(f"a condition on {', '.join(sorted(coefficients))} is neither a box nor one of outputs")
    if bool((lower > upper).any()):
        raise _ImpossibleError(f"X_{int((lower > upper).nonzero()[0])} has a lower end above its upper one")
    open_ = (~(lower.isfinite() & upper.isfinite())).nonzero()[:, 0].tolist()
    if open_:
        raise DataError(f"X_{open_[0]} has no lower or no upper end")
    if not rows:
        raise DataError("there is no condition on outputs")
    return Case(lower, upper, torch.stack(rows), torch.tensor(constants, dtype=torch.float64))
