"""`AttackResult`: what became of every sample, at what cost, and with which configuration."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saddlepoint.errors import DataError, InputError, MissingExtraError
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import distance

if TYPE_CHECKING:
    import pandas as pd

STATUSES = tuple(Status)
_TENSORS, _DOCUMENT = "tensors.safetensors", "result.json"


@dataclass(frozen=True)
class Queries:
    """Passes of each sample, (N,) int64: one sample once through the network, forward or backward.

    verify: the forward passes that confirmed successes. probe: rows spent on looking at the model before the run.
    A step's backward pass is made for its whole batch unless all of it is decided, so `backward` of a sample that is wrong
    already or is fooled in that step can depend on the batch size by one.
    """

    forward: Tensor
    backward: Tensor
    verify: Tensor
    probe: int = 0

    @property
    def total(self) -> Tensor:
        """Forward and backward passes together, (N,)."""
        return self.forward + self.backward


@dataclass(frozen=True, repr=False)
class AttackResult:
    """The outcome for N samples, in the order of the input.

    adversarial (N, ...): the best point found; of survivors the best attempt; of samples already wrong the input itself.
    success (N,) bool: the goal holds at that point, which counts inputs that were wrong before (`status` tells them apart).
    clean_predicted, predicted (N,): the model's classes for the input and for that point.
    margin (N,): by how much the goal is reached there (negative: missed). targets (N,): -1 where there is none.
    distances: l0, l1, l2, linf of adversarial - input, (N,) float64 each. `distance`: in the threat's norm, inf where a
    search for the smallest perturbation failed.
    iterations (N,), zero_gradients (N,): steps made, and how many gradients vanished. index (N,): position in the input.
    """

    adversarial: Tensor
    codes: Tensor  # (N,) int8, positions in STATUSES
    labels: Tensor
    targets: Tensor
    clean_predicted: Tensor
    predicted: Tensor
    margin: Tensor
    distances: dict[str, Tensor]
    distance: Tensor
    queries: Queries
    iterations: Tensor
    zero_gradients: Tensor
    ids: Tensor
    index: Tensor
    order: Tensor  # (N,) position in the output of an uninterrupted run
    seconds: float
    tau: float
    notes: tuple[str, ...]
    config: dict[str, Any]

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"AttackResult({len(self)} samples, robust accuracy {self.robust_accuracy:.2%}; print .summary() for more)"

    @property
    def status(self) -> npt.NDArray[np.str_]:
        """One of `Status` per sample, as strings: `result.status == "fooled"`."""
        names = np.array([s.value for s in STATUSES])
        found: npt.NDArray[np.str_] = names[self.codes.cpu().numpy()]
        return found

    def having(self, *statuses: Status | str) -> Tensor:
        """Which samples have one of these statuses, (N,) bool."""
        wanted = torch.tensor([STATUSES.index(Status(s)) for s in statuses], dtype=self.codes.dtype)
        return torch.isin(self.codes, wanted.to(self.codes.device))

    @property
    def success(self) -> Tensor:
        """Which returned points reach the goal, (N,) bool."""
        return self.having(Status.FOOLED, Status.ALREADY_WRONG)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right; nan without labels or samples."""
        return _mean((self.clean_predicted == self.labels)[self.labels >= 0])

    @property
    def robust(self) -> Tensor:
        """Which samples the model gets right and no attempt fooled, (N,) bool; without labels, which were not fooled.

        A sample that was attacked towards several targets is robust if it survived all of them.
        """
        survived = self.having(Status.SURVIVED)
        # untargeted goals know samples that are wrong already by their status, but for those that a model rejects
        if self.config["goal"]["targeted"] or self.config["model"].get("rejects"):
            survived &= (self.clean_predicted == self.labels) | (self.labels < 0)
        _, group = torch.unique(self.index, return_inverse=True)
        worst = torch.ones_like(self.index).scatter_reduce(0, group, survived.long(), "amin")
        return worst[group].bool()

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that are `robust`; those that were wrong before, or gave NaN, are not."""
        first = torch.ones_like(self.index, dtype=torch.bool)
        if len(self):  # one row for each sample, however many targets it was attacked towards
            first[1:] = self.index[1:] != self.index[:-1]
        return _mean(self.robust[first])

    @property
    def success_rate(self) -> float:
        """Share of the samples that could be attacked (not already wrong) and were fooled."""
        return _mean(self.having(Status.FOOLED)[~self.having(Status.ALREADY_WRONG)])

    def at(self, positions: Tensor) -> AttackResult:
        """The same as a part of something larger, where its samples have these positions (N,)."""
        return replace(self, index=positions.to(self.index.device), order=positions.to(self.order.device))

    def select(self, rows: Tensor) -> AttackResult:
        """The same for some rows, (K,) positions in this result, with their share of the time."""
        columns = {name: values[rows.to(values.device)] for name, values in self.columns().items()}
        seconds = self.seconds * len(rows) / max(len(self), 1)
        return AttackResult.from_columns(
            columns, probe=self.queries.probe, seconds=seconds, tau=self.tau, notes=self.notes, config=self.config
        )

    def summary(self) -> str:
        """The main figures as a table in plain text."""
        away = self.distance[self.having(Status.FOOLED)]
        norm, smallest = str(self.config["threat"]["norm"]), self.config["threat"]["eps"] is None
        count = max(len(self), 1)
        inputs = len(torch.unique(self.index))

        def share(value: float) -> str:
            return "-" if value != value else f"{value:.2%}"

        lines = [
            ("samples", f"{inputs}" + (f" towards {len(self) / max(inputs, 1):g} targets" if inputs < len(self) else "")),
            *((status.value.replace("_", " "), f"{int(self.having(status).sum())}") for status in STATUSES),
            ("clean accuracy", share(self.clean_accuracy)),
            *([] if smallest else [("robust accuracy (all samples)", share(self.robust_accuracy))]),
            ("success rate (of those attacked)", share(self.success_rate)),
            (f"median {norm} distance of fooled", f"{away.quantile(0.5):.4g}" if len(away) else "-"),
            *([(f"mean {norm} distance of fooled", f"{away.mean():.4g}" if len(away) else "-")] if smallest else []),
            ("forward passes per sample", f"{float(self.queries.forward.sum()) / count:.1f}"),
            ("backward passes per sample", f"{float(self.queries.backward.sum()) / count:.1f}"),
            ("seconds", f"{self.seconds:.2f}"),
        ]
        width = max(len(name) for name, _ in lines)
        threat = self.config["threat"]
        size = (
            norm
            if threat["eps"] is None
            else f"{threat['eps']:g}"
            if isinstance(threat["eps"], float | int)
            else "one eps each"
        )
        title = f"{attack_name(self.config['attack'])} within {threat['name']}({size})"
        return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines), *(f"  ! {n}" for n in self.notes)])

    def to_pandas(self) -> pd.DataFrame:
        """One row per sample (without the inputs). Needs pandas."""
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("to_pandas()", "pandas", "pandas") from None
        columns: dict[str, Any] = {"id": self.ids, "status": self.status, "label": self.labels, "target": self.targets}
        columns |= {"clean_predicted": self.clean_predicted, "predicted": self.predicted, "margin": self.margin}
        columns |= dict(self.distances) | {"distance": self.distance}
        columns |= {f"{name}_passes": getattr(self.queries, name) for name in ("forward", "backward", "verify")}
        columns |= {"iterations": self.iterations, "zero_gradients": self.zero_gradients}
        return pandas.DataFrame({k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})

    def columns(self) -> dict[str, Tensor]:
        """All that there is for each sample, (N, ...) by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "Tensor"}
        named |= {f"distances.{name}": value for name, value in self.distances.items()}
        return named | {f"queries.{name}": getattr(self.queries, name) for name in ("forward", "backward", "verify")}

    @staticmethod
    def from_columns(
        columns: dict[str, Tensor], *, probe: int, seconds: float, tau: float, notes: tuple[str, ...], config: dict[str, Any]
    ) -> AttackResult:
        """The inverse of `columns`, with what else a result has. Errors: `KeyError` for a missing column."""
        return AttackResult(
            **{f.name: columns[f.name] for f in fields(AttackResult) if f.type == "Tensor"},
            distances={norm.value: columns[f"distances.{norm.value}"] for norm in Norm},
            queries=Queries(columns["queries.forward"], columns["queries.backward"], columns["queries.verify"], probe),
            seconds=seconds,
            tau=tau,
            notes=notes,
            config=config,
        )

    def save(self, path: str | Path) -> Path:
        """Write a folder with tensors.safetensors and result.json; it appears complete or not at all."""
        path = Path(path)
        if path.exists():
            raise InputError(f"{path} exists already; remove it or choose another name")
        document = {
            "format": 1, "seconds": self.seconds, "tau": self.tau, "notes": self.notes, "probe": self.queries.probe,
            "config": self.config,
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as draft:
                folder = Path(draft) / "result"
                folder.mkdir()
                save_file({k: v.cpu().contiguous() for k, v in self.columns().items()}, folder / _TENSORS)
                (folder / _DOCUMENT).write_text(json.dumps(document, indent=1))
                os.replace(folder, path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write the result to {path}: {error}") from error
        return path

    @staticmethod
    def load(path: str | Path) -> AttackResult:
        """Read what `save` wrote. Errors: `DataError` for missing, truncated or foreign files."""
        path = Path(path)
        try:
            document = json.loads((path / _DOCUMENT).read_text())
            tensors = load_file(path / _TENSORS)
            names = ("probe", "seconds", "tau", "config")
            return AttackResult.from_columns(
                tensors, notes=tuple(document["notes"]), **{name: document[name] for name in names}
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result saved by Saddlepoint, or it is damaged: {error!r}") from error


def attack_name(settings: dict[str, Any]) -> str:
    """From an attack's settings: `PGD`, `Restarts(PGD, 5)`, `Bisect(PGD)`, `Sequence(DDN, FMN)`."""
    inner = [settings["attack"]] if "attack" in settings else settings.get("attacks", [])
    parts = [attack_name(part) for part in inner if isinstance(part, dict)]
    parts += [str(settings["times"])] if "times" in settings else []
    return f"{settings['name']}({', '.join(parts)})" if parts else str(settings["name"])


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else float("nan")


def measure(points: Tensor, origin: Tensor) -> dict[str, Tensor]:
    """l0, l1, l2 and linf of points - origin, (N,) float64 each."""
    return {norm.value: distance(points, origin, norm) for norm in Norm}


def merge(parts: list[AttackResult]) -> AttackResult:
    """Results of disjoint samples of one run as one, in the order of the input."""
    filled = [part.columns() for part in parts if len(part)] or [parts[0].columns()]
    order = torch.cat([part["order"] for part in filled]).argsort()
    columns = {name: torch.cat([part[name] for part in filled])[order] for name in filled[0]}
    return AttackResult.from_columns(
        columns,
        probe=sum(part.queries.probe for part in parts),
        seconds=sum(part.seconds for part in parts),
        tau=parts[0].tau,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        config=parts[0].config,
    )
