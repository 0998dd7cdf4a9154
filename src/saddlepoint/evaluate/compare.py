"""Models x attacks x threats on the same samples: the table and the security curve (accuracy over eps)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.facade import check_combination
from saddlepoint.attacks.minimal import resolved
from saddlepoint.engine import Attack, AttackResult, Budget, Interrupted
from saddlepoint.errors import InputError
from saddlepoint.goals import Goal
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat


@dataclass(frozen=True)
class Cell:
    """One attack within one threat on one model. `result` has a row for each of the comparison's samples."""

    model: str
    attack: Attack
    threat: Threat
    result: AttackResult

    @property
    def norm(self) -> Norm:
        """The threat's norm."""
        return self.threat.norm

    @property
    def eps(self) -> float:
        """The threat's radius, the largest where every sample has its own."""
        return self.threat.largest_eps


@dataclass(frozen=True, repr=False)
class Comparison:
    """What came out for the samples x (N, ...), y (N,): one `Cell` per model, attack and threat, in the order they ran.

    complete: False after Ctrl-C; then only the finished cells are there.
    """

    x: Tensor
    y: Tensor
    models: Mapping[str, Classifier]
    cells: tuple[Cell, ...]
    complete: bool = True

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.models)}: {len(self.cells)} attacks on {len(self.x)} samples)"

    def clean_accuracy(self, model: str) -> float:
        """Accuracy on the unperturbed samples. Errors: `InputError` if no attack on the model has finished."""
        for cell in self.cells:
            if cell.model == model:
                return cell.result.clean_accuracy
        raise InputError(f"no attack on {model!r} has finished")

    def robust_accuracy(self, model: str, norm: Norm | str, eps: float) -> float:
        """Share of samples that survived every attack within eps: a success in a smaller ball counts too."""
        lost = [
            ~cell.result.robust for cell in self.cells if cell.model == model and cell.norm == Norm(norm) and cell.eps <= eps
        ]
        if not lost:
            raise InputError(f"no attack on {model!r} was run within {norm} {eps:g}")
        return float(1 - torch.stack(lost).any(0).double().mean())

    def curve(self, model: str, norm: Norm | str) -> list[tuple[float, float]]:
        """The security curve: (eps, robust accuracy) from (0, clean accuracy) upwards."""
        radii = sorted({cell.eps for cell in self.cells if cell.model == model and cell.norm == Norm(norm)})
        return [(0.0, self.clean_accuracy(model)), *((eps, self.robust_accuracy(model, norm, eps)) for eps in radii)]


def compare(
    models: Mapping[str, Classifier],
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack | str],
    threats: Sequence[Threat],
    *,
    goal: Goal | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget | None = None,
    progress: bool = False,
) -> Comparison:
    """Run every attack within every threat on every model, on the same samples with the same random numbers.

    Combinations that an attack does not support are errors before the first query. Ctrl-C returns what is finished.
    Errors: those of `sp.attack`, and `InputError` where there is nothing to run.
    """
    if not models or not attacks or not threats:
        raise InputError("compare needs at least one model, one attack and one threat")
    if not isinstance(models, Mapping):
        raise InputError(f'models must be a mapping from names to models, {{"mine": model}}; got {type(models).__name__}')
    if not isinstance(x, Tensor):
        raise InputError(f"compare needs the samples as tensors, since each attack sees all of them; got {type(x).__name__}")
    if len({threat.norm for threat in threats}) > 1 and "minimal" in attacks:
        raise InputError('"minimal" is another attack in each norm: compare in one norm, or give sp.attacks.minimal(norm)')
    chosen = [resolved(attack, threats[0].norm, budget) for attack in attacks]
    for attack in chosen:
        for threat in threats:
            check_combination(attack, threat, goal or attack.default_goal())
    cells: list[Cell] = []
    try:
        for name, model in models.items():
            for threat in threats:
                for attack in chosen:
                    result = run_attack(
                        model, x, y, attack, threat, goal, seed=seed, batch_size=batch_size, budget=budget, progress=progress
                    )
                    cells.append(Cell(name, attack, threat, result))
    except Interrupted:
        return Comparison(x, y, models, tuple(cells), complete=False)
    return Comparison(x, y, models, tuple(cells))
