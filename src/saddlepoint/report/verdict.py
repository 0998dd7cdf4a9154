"""The figures in words: what came out, and what is suspicious about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saddlepoint.evaluate import Cell, Comparison
from saddlepoint.report.words import attack_labels, is_noise, length, listed, percent
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import size

_SLIP = 0.02  # by this share must an attack lag behind a weaker one before it is remarked upon


def measured(comparison: Comparison) -> list[str]:
    """The models on which at least one attack has finished."""
    return [name for name in comparison.models if any(cell.model == name for cell in comparison.cells)]


def norms(comparison: Comparison) -> list[Norm]:
    """The norms in which there are figures, in the order in which they were run."""
    return list(dict.fromkeys(cell.norm for cell in comparison.cells))


def radii(comparison: Comparison, model: str, norm: Norm) -> list[float]:
    """The finite eps at which this model was attacked, upwards."""
    found = {cell.eps for cell in comparison.cells if cell.model == model and cell.norm == norm}
    return sorted(eps for eps in found if math.isfinite(eps))


def headline(comparison: Comparison, norm: Norm) -> float:
    """The eps to speak of: the smallest that takes at least half of the first model's accuracy, otherwise the largest.

    Only the first model decides, so that the choice doesn't favour those it is compared with. inf if the smallest
    perturbation was sought.
    """
    first = next(cell.model for cell in comparison.cells if cell.norm == norm)
    eps = radii(comparison, first, norm)
    half = comparison.clean_accuracy(first) / 2
    return next((e for e in eps if comparison.robust_accuracy(first, norm, e) <= half), eps[-1] if eps else math.inf)


def verdict(comparison: Comparison) -> str:
    """A paragraph; names of models are in backquotes."""
    models = measured(comparison)
    if not models:
        return "The run was stopped before the first attack had finished: there are no figures."
    first = comparison.cells[0]
    clean = [f"`{name}` gets {percent(comparison.clean_accuracy(name))}" for name in models]
    sentences = [
        f"Of {len(comparison.y)} clean inputs, {'the network ' if len(models) == 1 else ''}{listed(clean)} right.",
        *(
            f"`{name}` is hardly better than guessing, so that its figures under attack say little."
            for name in models
            if comparison.clean_accuracy(name) <= 1.5 / (comparison.models[name].num_classes or 2) and not _targeted(first)
        ),
        *(sentence for norm in norms(comparison) for sentence in _norm(comparison, norm)),
    ]
    if not comparison.complete:
        sentences.append("The run was interrupted: the figures are those of the attacks that had finished.")
    return " ".join(sentences)


def _norm(comparison: Comparison, norm: Norm) -> list[str]:
    eps = headline(comparison, norm)
    cells = [cell for cell in comparison.cells if cell.norm == norm and cell.eps == eps]
    first, *others = dict.fromkeys(cell.model for cell in cells)
    if math.isinf(eps):
        return [_smallest(cells, name) for name in (first, *others)]
    left = comparison.robust_accuracy(first, norm, eps)
    clean = comparison.clean_accuracy(first)
    targeted = _targeted(cells[0])
    where = f"{norm} eps {size(eps)}"
    if targeted:
        sentences = [f"Within {where} the attacks reach their target on {percent(1 - left)} of the inputs of `{first}`."]
    elif left <= clean / 2:
        sentences = [f"Within {where} the attacks leave `{first}` {percent(left)}."]
    else:
        sentences = [f"Even within {where}, the largest size tried, the attacks leave `{first}` {percent(left)}."]
    noise = [cell for cell in cells if cell.model == first and is_noise(cell.attack)]
    if noise and not targeted:
        kept = min(cell.result.robust_accuracy for cell in noise)
        if kept - left > 0.1:
            sentences.append(f"Random noise of that size leaves it {percent(kept)}: the direction does it, not the size.")
    sentences += [_beside(comparison, norm, eps, first, other) for other in others]
    largest = max(radii(comparison, first, norm))
    if largest > eps and not targeted:
        reached = [name for name in (first, *others) if largest in radii(comparison, name, norm)]
        left_over = (f"`{name}` is left with {percent(comparison.robust_accuracy(name, norm, largest))}" for name in reached)
        sentences.append(f"At the largest size tried, eps {size(largest)}, {listed(left_over)}.")
    return sentences


def _beside(comparison: Comparison, norm: Norm, eps: float, first: str, other: str) -> str:
    """How another model does where the first one was measured."""
    gained = int((_fooled(comparison, first, norm, eps) & ~_fooled(comparison, other, norm, eps)).sum())
    lost = int((~_fooled(comparison, first, norm, eps) & _fooled(comparison, other, norm, eps)).sum())
    kept = percent(comparison.robust_accuracy(other, norm, eps))
    # the sign test for paired samples (McNemar): is the difference more than chance would give?
    if abs(gained - lost) <= 1.96 * math.sqrt(gained + lost):
        return f"`{other}` is left with {kept}: no difference that this number of samples could show."
    if gained < lost:
        return f"`{other}` is left with {kept}: it is less robust than `{first}`."
    cost = comparison.clean_accuracy(first) - comparison.clean_accuracy(other)
    price = f", at the price of {100 * cost:.1f} points of clean accuracy" if cost >= 0.001 else ""
    return f"`{other}` keeps {kept}{price}."


def _smallest(cells: list[Cell], model: str) -> str:
    best = torch.stack([cell.result.distance for cell in cells if cell.model == model]).amin(0)
    found = best[torch.isfinite(best)]
    norm = cells[0].norm
    if not len(found):
        return f"No perturbation that fools `{model}` was found in {norm}."
    return (
        f"The smallest perturbation found for `{model}` has a median {norm} size of {length(float(found.quantile(0.5)))} "
        f"(found for {percent(len(found) / len(best))} of the inputs; those wrong from the start count as 0)."
    )


def _fooled(comparison: Comparison, model: str, norm: Norm, eps: float) -> Tensor:
    cells = [c for c in comparison.cells if c.model == model and c.norm == norm and c.eps <= eps]
    return torch.stack([cell.result.success for cell in cells]).any(0)


def _targeted(cell: Cell) -> bool:
    return bool(cell.result.config["goal"]["targeted"])


def observations(comparison: Comparison) -> list[str]:
    """Figures that contradict what attacks of growing strength should show, each with what it may mean."""
    labels = attack_labels(cell.attack for cell in comparison.cells)
    found = []
    for cell in comparison.cells:
        beside = [c for c in comparison.cells if c.model == cell.model and c.threat == cell.threat and c is not cell]
        accuracy, name = cell.result.robust_accuracy, f"{labels[cell.attack]} within {cell.threat!s}"
        slip = max(_SLIP, 2 / max(len(cell.result), 1))
        weaker = [c for c in beside if _rank(c) < _rank(cell) and c.result.robust_accuracy < accuracy - slip]
        for other in weaker:
            found.append(
                f"`{cell.model}`: {name} leaves {percent(accuracy)}, the weaker {labels[other.attack]} only "
                f"{percent(other.result.robust_accuracy)}. An attack that uses more should find more; such gradients may "
                "mislead, and the figures may be too good."
            )
        closer = [
            c
            for c in comparison.cells
            if (c.model, c.attack, c.norm) == (cell.model, cell.attack, cell.norm) and c.eps < cell.eps < math.inf
        ]
        if closer and not is_noise(cell.attack) and cell.attack.declaration.iterative:
            best = min(closer, key=lambda c: c.result.robust_accuracy)
            if best.result.robust_accuracy < accuracy - slip:
                found.append(
                    f"`{cell.model}`: {name} leaves {percent(accuracy)}, more than the {percent(best.result.robust_accuracy)} "
                    f"within {best.threat!s}. The larger set contains the smaller one, so the search stopped short."
                )
    return found


def _rank(cell: Cell) -> int:
    """How much an attack has to go by: 0 random draws, 1 one gradient or answers only, 2 many gradients."""
    declaration = cell.attack.declaration
    if is_noise(cell.attack):
        return 0
    return 2 if declaration.iterative and declaration.access >= Access.GRADIENTS else 1
