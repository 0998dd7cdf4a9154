"""Examples to look at: the same samples for every model, with what the attack did to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.evaluate import Cell, Comparison
from saddlepoint.models.base import Classifier
from saddlepoint.report.verdict import headline, norms
from saddlepoint.report.words import attack_labels, is_noise
from saddlepoint.taxonomy import Access, Status

MAX_BARS = 128  # more features than this make no bar chart that one can read


@dataclass(frozen=True)
class Shot:
    """One sample under attack on one model. Confidences are None where the model gives labels only.

    smallest: the smallest measured eps within which any attack fooled it; None if none did, or if it was wrong from the start.
    """

    model: str
    status: Status
    clean_predicted: int
    clean_confidence: float | None
    predicted: int
    confidence: float | None
    adversarial: Tensor
    delta: Tensor  # in units of the input range
    distance: float
    smallest: float | None


@dataclass(frozen=True)
class Example:
    """One sample, with a shot for each model."""

    index: int
    label: int
    original: Tensor
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Gallery:
    """What is shown, and how: perturbations are magnified by `factor`. Empty of examples if there is nothing to show."""

    kind: Literal["images", "features", "none"]
    attack: str
    threat: str
    low: float
    high: float
    factor: float
    models: tuple[str, ...]
    examples: tuple[Example, ...]


def gallery(comparison: Comparison, count: int, seed: int = 0) -> Gallery:
    """Choose `count` samples under the strongest attack at the first norm's headline eps, the same for every model.

    Samples that every model gets right and on which the first model is fooled come first, then other fooled ones, then
    survivors; within each kind the classes take turns, in the order of the data. So it is a choice, and no statistic.
    """
    kind = kind_of(comparison.x)
    cells = _cells(comparison) if kind != "none" and count else []
    if not cells:
        return Gallery(kind, "", "", 0.0, 1.0, 1.0, (), ())
    low, high = comparison.models[cells[0].model].bounds or (float(comparison.x.min()), float(comparison.x.max()))
    span = (high - low) or 1.0
    rows = _rows(cells, count)
    sources = cells[0].result.index[rows].cpu()
    originals = comparison.x[sources.to(comparison.x.device)].cpu()
    columns = [_shots(comparison, cell, rows, originals, span, seed) for cell in cells]
    examples = tuple(
        Example(int(source), int(cells[0].result.labels[row]), original, shots)
        for row, source, original, *shots_ in zip(rows.tolist(), sources, originals, *columns, strict=True)
        for shots in (tuple(shots_),)
    )
    largest = max((float(shot.delta.abs().max()) for example in examples for shot in example.shots), default=0.0)
    label = attack_labels(cell.attack for cell in comparison.cells)[cells[0].attack]
    models = tuple(cell.model for cell in cells)
    return Gallery(kind, label, str(cells[0].threat), low, high, magnification(largest), models, examples)


def album(
    name: str,
    model: Classifier,
    x: Tensor,
    adversarial: Tensor,
    rows: Tensor,
    *,
    numbers: Tensor,
    labels: Tensor,
    clean_predicted: Tensor,
    predicted: Tensor,
    distance: Tensor,
    status: Status,
    attack: str,
    threat: str,
    seed: int,
) -> Gallery:
    """Samples of one model at the positions rows (K,), all of one status, with what an attack did to them.

    x, adversarial (N, ...); numbers, labels, clean_predicted, predicted, distance (N,): `numbers` are what they are called.
    """
    kind = kind_of(x)
    low, high = model.bounds or ((float(x.min()), float(x.max())) if len(x) else (0.0, 1.0))
    rows = rows.cpu() if kind != "none" else rows[:0].cpu()
    originals, points = (inputs[rows.to(inputs.device)].cpu() for inputs in (x, adversarial))
    deltas = (points - originals) / ((high - low) or 1.0)
    before, after = (column.cpu()[rows] for column in (clean_predicted, predicted))
    sure = [confidences(model, inputs, answers, seed) for inputs, answers in ((originals, before), (points, after))]
    examples = tuple(
        Example(
            index=int(numbers[row]),
            label=int(labels[row]),
            original=originals[i],
            shots=(
                Shot(
                    model=name, status=status, clean_predicted=int(before[i]), clean_confidence=sure[0][i],
                    predicted=int(after[i]), confidence=sure[1][i], adversarial=points[i], delta=deltas[i],
                    distance=float(distance[row]), smallest=None,
                ),
            ),
        )
        for i, row in enumerate(rows.tolist())
    )  # fmt: skip
    largest = float(deltas.abs().max()) if len(deltas) else 0.0
    return Gallery(kind, attack, threat, low, high, magnification(largest), (name,), examples)


def kind_of(x: Tensor) -> Literal["images", "features", "none"]:
    """How inputs like these can be drawn."""
    if x.dim() == 4 and x.shape[1] in (1, 3):
        return "images"
    return "features" if x.dim() == 2 and x.shape[1] <= MAX_BARS else "none"


def magnification(largest: float) -> float:
    """What brings the largest change to about half of the range, so that it can be seen: two digits, rounded down."""
    if not largest > 0 or not math.isfinite(largest):
        return 1.0
    factor = 0.5 / largest
    step = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return math.floor(factor / step + 1e-6) * step


def _cells(comparison: Comparison) -> list[Cell]:
    """The cells of one attack within one threat, one per model: the strongest attack at the headline eps."""
    for norm in norms(comparison):
        eps = headline(comparison, norm)
        here = [cell for cell in comparison.cells if cell.norm == norm and cell.eps == eps]
        sets = {
            (cell.attack, cell.threat): [c for c in here if (c.attack, c.threat) == (cell.attack, cell.threat)] for cell in here
        }
        # an interrupted run may lack an attack on the later models
        most = max(len(cells) for cells in sets.values())
        complete = [cells for cells in sets.values() if len(cells) == most]
        return min(complete, key=lambda cells: (is_noise(cells[0].attack), sum(c.result.robust_accuracy for c in cells)))
    return []


def _rows(cells: list[Cell], count: int) -> Tensor:
    results = [cell.result for cell in cells]
    usable = ~torch.stack([result.having(Status.ERROR) for result in results]).any(0)
    right = torch.stack([result.clean_predicted == result.labels for result in results]).all(0)
    fooled = torch.stack([result.having(Status.FOOLED) for result in results])
    kinds = (right & fooled[0], right & fooled.any(0), fooled.any(0), right, torch.ones_like(right))
    chosen: list[int] = []
    for kind in kinds:
        rows = [row for row in (kind & usable).nonzero()[:, 0].tolist() if row not in chosen]
        chosen += in_turns(rows, results[0].labels)
        if len(chosen) >= count:
            break
    return torch.tensor(chosen[:count], dtype=torch.int64)


def in_turns(rows: list[int], labels: Tensor) -> Iterator[int]:
    """The rows, one of each class after the other."""
    classes: dict[int, list[int]] = {}
    for row in rows:
        classes.setdefault(int(labels[row]), []).append(row)
    for turn in zip_longest(*(classes[label] for label in sorted(classes))):
        yield from (row for row in turn if row is not None)


def _shots(comparison: Comparison, cell: Cell, rows: Tensor, originals: Tensor, span: float, seed: int) -> list[Shot]:
    result, model = cell.result, comparison.models[cell.model]
    points = result.adversarial[rows.to(result.adversarial.device)].cpu()
    before = confidences(model, originals, result.clean_predicted[rows].cpu(), seed)
    after = confidences(model, points, result.predicted[rows].cpu(), seed)
    others = [c for c in comparison.cells if (c.model, c.norm) == (cell.model, cell.norm) and math.isfinite(c.eps)]
    return [
        Shot(
            model=cell.model,
            status=Status(str(result.status[row])),
            clean_predicted=int(result.clean_predicted[row]),
            clean_confidence=before[i],
            predicted=int(result.predicted[row]),
            confidence=after[i],
            adversarial=points[i],
            delta=(points[i] - originals[i]) / span,
            distance=float(result.distance[row]),
            smallest=min((c.eps for c in others if bool(c.result.having(Status.FOOLED)[row])), default=None),
        )
        for i, row in enumerate(rows.tolist())
    ]


def confidences(model: Classifier, x: Tensor, predicted: Tensor, seed: int) -> list[float | None]:
    """The probability of the predicted class, None for models that grant labels only."""
    if model.access < Access.SCORES:
        return [None] * len(x)
    with torch.random.fork_rng(devices=[]):  # a random model draws, and must not change the caller's own run
        torch.default_generator.manual_seed(seed)
        probabilities = model.logits(x).double().softmax(1).cpu()
    return [float(p) for p in probabilities.gather(1, predicted[:, None])[:, 0]]
