"""What a transformation in front of a model is worth: the naive figure, the adaptive one, and the model without it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.evaluate.cascade import Effort, evaluate
from saddlepoint.evaluate.evaluation import Evaluation
from saddlepoint.evaluate.naive import stands_naive, takes
from saddlepoint.models.base import Classifier
from saddlepoint.models.compose import Defended
from saddlepoint.threats import Threat

_TIMED = 3  # the fastest of so many forward passes counts
_SAMPLES = 64


@dataclass(frozen=True, repr=False)
class DefendedComparison:
    """Three figures for the same samples.

    undefended: the evaluation of the model without its transformations; None where no such model takes these inputs. adaptive:
    that of the defended one, attacked as its transformations declare and with the undefended one's gradients. naive (N,) bool:
    samples that the defended model gets right where the examples were made against the undefended one; None as before.
    attacked: how each transformation was attacked, by name. cost: seconds of a forward pass of the defended model by those of
    the model inside it, or of the source; None as before.
    """

    undefended: Evaluation | None
    adaptive: Evaluation
    naive: Tensor | None
    attacked: dict[str, str]
    cost: float | None

    def __repr__(self) -> str:
        naive = "" if self.naive_accuracy is None else f"naive {self.naive_accuracy:.2%}, "
        return f"DefendedComparison({naive}adaptive {self.robust_accuracy:.2%}; print .summary() for more)"

    @property
    def stands(self) -> Tensor:
        """Samples that stand the adaptive and the naive attack, (N,) bool: who knows more can do what who knows less does."""
        return self.adaptive.stands if self.naive is None else self.adaptive.stands & self.naive

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that stand: the figure to go by, at most."""
        return float(self.stands.double().mean())

    @property
    def naive_accuracy(self) -> float | None:
        """What the attack that doesn't know the defense leaves; None where there is none."""
        return None if self.naive is None else float((self.naive & self.adaptive.right).double().mean())

    def summary(self) -> str:
        """The figures side by side, and how the transformations were attacked, in plain text."""
        rows = [("defended", self.adaptive, self.robust_accuracy)]
        if self.undefended is not None:
            rows.insert(0, ("undefended", self.undefended, self.undefended.robust_accuracy))
        lines = [
            f"Defended model on {len(self.adaptive)} samples within {self.adaptive.threat}",
            "              clean     naive attack  adaptive attack  passes a sample",
        ]
        for name, found, adaptive in rows:
            unaware = self.naive_accuracy if found is self.adaptive else None
            shown = "-" if unaware is None else f"{unaware:.2%}"
            passes = float(found.queries.total.double().mean())
            lines.append(f"  {name:<11} {found.clean_accuracy:>7.2%}  {shown:>12}  {adaptive:>15.2%}  {passes:>15.1f}")
        lines += [] if self.cost is None else [f"  a prediction costs {self.cost:.1f} times as much"]
        lines += [f"  {name}: {how}" for name, how in self.attacked.items()]
        return "\n".join([*lines, *(f"  ! {note}" for note in self.adaptive.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON: naive_accuracy, robust_accuracy, cost, attacked; undefended and adaptive evaluations."""
        return {
            "naive_accuracy": self.naive_accuracy, "robust_accuracy": self.robust_accuracy, "cost": self.cost,
            "attacked": self.attacked, "adaptive": self.adaptive.to_dict(),
            "undefended": self.undefended.to_dict() if self.undefended is not None else None,
        }  # fmt: skip


def compare_defended(
    model: Defended,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    effort: Effort = "quick",
    *,
    source: Classifier | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> DefendedComparison:
    """Evaluate a defended model and the one inside, and show the examples made against the latter to the former.

    x (N, ...), y (N,): as in `sp.evaluate`. source: the undefended model, where the one inside can't take the inputs, since it
    was trained behind the transformation. Ctrl-C ends an evaluation early (`complete` False). Errors: those of `sp.evaluate`.

    >>> import torch, saddlepoint as sp
    >>> from saddlepoint.defenses.transforms import BitDepth
    >>> model = sp.Defended(sp.Model(torch.nn.Linear(4, 3)), [BitDepth(2)])
    >>> x = torch.rand(20, 4)
    >>> compare_defended(model, x, model.predict(x), sp.Linf(0.05)).attacked
    {'BitDepth(bits=2)': 'BPDA, identity'}
    """
    if not isinstance(model, Defended) or not model.transforms:
        raise InputError(f"compare_defended needs an sp.Defended with transformations; got {type(model).__name__}")
    adaptive = evaluate(model, x, y, threat, effort, seed=seed, batch_size=batch_size, progress=progress)
    naive, bare = adaptive.naive, model.model if source is None else source
    if source is not None:
        naive = stands_naive(model, x, y, threat, source=source, seed=seed, batch_size=batch_size)
    undefended = None
    if takes(bare, x):
        undefended = evaluate(bare, x, y, threat, effort, seed=seed, batch_size=batch_size, progress=progress)
    attacked = {transform.name: transform.attacked for transform in model.transforms}
    cost = prediction_seconds(model, x) / prediction_seconds(bare, x) if undefended is not None else None
    return DefendedComparison(undefended, adaptive, naive, attacked, cost)


def prediction_seconds(model: Classifier, x: Tensor) -> float:
    """Of a forward pass."""
    fastest = float("inf")
    for _ in range(_TIMED):
        started = time.perf_counter()
        model.predict(x[:_SAMPLES]).cpu()  # until an accelerator has finished
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
