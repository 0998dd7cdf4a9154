"""What a report says, as plain data: the content of results.json."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import torch
from torch import Tensor

from saddlepoint.evaluate import Cell, Comparison
from saddlepoint.report.verdict import observations, verdict
from saddlepoint.report.words import attack_labels, distinct, file_name
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import size

SCHEMA = 1


class Epoch(Protocol):
    """One epoch of a training. Accuracies are of the validation samples, None where they were not measured."""

    @property
    def epoch(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def clean_accuracy(self) -> float | None: ...
    @property
    def robust_accuracy(self) -> float | None: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class History(Protocol):
    """The course of a training."""

    @property
    def epochs(self) -> Sequence[Epoch]: ...


def results(
    comparison: Comparison,
    *,
    title: str,
    data_name: str,
    data_fingerprint: str,
    class_names: Sequence[str],
    config: Mapping[str, object],
    histories: Mapping[str, History],
    command: str,
    seed: int,
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    | key | content |
    | --- | --- |
    | schema | 1; it changes when a key is renamed, removed or changes its meaning |
    | title, command, seed | as given to `write` |
    | created | UTC time, ISO 8601 |
    | complete | false if the run was interrupted; then only the finished cells are there |
    | data | name, fingerprint, samples (how many), shape (of one input), class_names |
    | versions | saddlepoint, torch, python, platform |
    | config | what the caller says the run was |
    | verdict | the report's summary in words |
    | observations | what is suspicious about the figures, in words |
    | models | a list, in the order of the comparison |

    Each of `models`:

    | key | content |
    | --- | --- |
    | name, settings | its name, and what `Classifier.describe` says |
    | clean_accuracy | null if no attack on it has finished |
    | curves | {norm: [[eps, accuracy], ...]} from eps 0, worst over all attacks; eps null: of any size |
    | cells | a list, one for each attack within each threat |
    | history | null, or a list of {epoch, loss, clean_accuracy, robust_accuracy, learning_rate, seconds} |

    Each of `cells`:

    | key | content |
    | --- | --- |
    | attack, threat | short names, as in the report |
    | norm, eps | eps is the largest if every sample has its own, and null where the smallest perturbation was sought |
    | settings | {attack, threat, goal, keep, seed, budget}: everything that defines the run |
    | counts | samples per status: already_wrong, fooled, survived, error |
    | clean_accuracy, robust_accuracy | of all samples; samples that are wrong from the start are not robust |
    | success_rate | fooled of those that could be attacked |
    | median_distance | of the fooled, in the threat's norm |
    | median_distances | of the fooled: {l0, l1, l2, linf} |
    | passes | summed over the samples: {forward, backward, verify, probe}; verify confirmed successes |
    | passes_per_sample | {forward, backward} |
    | seconds | of wall time |
    | notes | what the engine noticed |
    | folder | where the adversarial inputs are, relative to this file; `AttackResult.load` reads them |
    """
    labels = attack_labels(cell.attack for cell in comparison.cells)
    folders = cell_folders(comparison)
    models = []
    for name, model in comparison.models.items():
        cells = [cell for cell in comparison.cells if cell.model == name]
        norms = dict.fromkeys(cell.norm for cell in cells)
        models.append({
            "name": name,
            "settings": model.describe(),
            "clean_accuracy": comparison.clean_accuracy(name) if cells else None,
            "curves": {norm.value: comparison.curve(name, norm) for norm in norms},
            "cells": [_cell(cell, labels[cell.attack], folder) for cell, folder in folders if cell.model == name],
            "history": _epochs(histories[name]) if name in histories else None,
        })  # fmt: skip
    document: dict[str, Any] = plain({
        **frame(
            comparison.x, title=title, complete=comparison.complete, command=command, seed=seed, data_name=data_name,
            data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "verdict": verdict(comparison),
        "observations": observations(comparison),
        "models": models,
    })  # fmt: skip
    return document


def frame(
    x: Tensor,
    *,
    title: str,
    complete: bool,
    command: str,
    seed: int,
    data_name: str,
    data_fingerprint: str,
    class_names: Sequence[str],
) -> dict[str, object]:
    """What every report's document says of when, where and on what samples x (N, ...) it was made."""
    from saddlepoint import __version__

    return {
        "schema": SCHEMA,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "command": command,
        "seed": seed,
        "data": {
            "name": data_name,
            "fingerprint": data_fingerprint,
            "samples": len(x),
            "shape": list(x.shape[1:]),
            "class_names": list(class_names),
        },
        "versions": {
            "saddlepoint": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    }


def cell_folders(comparison: Comparison) -> list[tuple[Cell, str]]:
    """Every cell with the folder of its adversarial inputs; names that would coincide are numbered."""
    labels = attack_labels(cell.attack for cell in comparison.cells)
    names = [
        "adversarial/"
        + file_name(cell.model, labels[cell.attack], cell.norm, "smallest" if cell.threat.minimizes else size(cell.eps))
        for cell in comparison.cells
    ]
    return list(zip(comparison.cells, distinct(names), strict=True))


def _cell(cell: Cell, label: str, folder: str) -> dict[str, Any]:
    result = cell.result
    samples = max(len(result), 1)
    fooled = result.having(Status.FOOLED)
    forward, backward, verify = (
        int(passes.sum()) for passes in (result.queries.forward, result.queries.backward, result.queries.verify)
    )
    return {
        "attack": label,
        "threat": str(cell.threat),
        "norm": cell.norm.value,
        "eps": cell.eps,
        "settings": {key: result.config[key] for key in ("attack", "threat", "goal", "keep", "seed", "budget")},
        "counts": {status.value: int(result.having(status).sum()) for status in Status},
        "clean_accuracy": result.clean_accuracy,
        "robust_accuracy": result.robust_accuracy,
        "success_rate": result.success_rate,
        "median_distance": _median(result.distance[fooled]),
        "median_distances": {norm.value: _median(result.distances[norm.value][fooled]) for norm in Norm},
        "passes": {"forward": forward, "backward": backward, "verify": verify, "probe": result.queries.probe},
        "passes_per_sample": {"forward": forward / samples, "backward": backward / samples},
        "seconds": result.seconds,
        "notes": list(result.notes),
        "folder": folder,
    }


def _median(values: Tensor) -> float | None:
    return float(values.double().quantile(0.5)) if len(values) else None


def _epochs(history: History) -> list[dict[str, object]]:
    names = ("epoch", "loss", "clean_accuracy", "robust_accuracy", "learning_rate", "seconds")
    return [{name: getattr(epoch, name) for name in names} for epoch in history.epochs]


def plain(value: Any) -> Any:
    """The value as JSON knows it: tuples are lists, nan and infinity are None, anything else is its text."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case _:
            return json.loads(json.dumps(value, default=str))
