"""`Evaluation`: robust accuracy with what was tried, what it cost, and how sure the figure is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saddlepoint.engine import AttackResult, Queries
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Status
from saddlepoint.threats import Threat

if TYPE_CHECKING:
    from saddlepoint.evaluate.diagnose import Diagnosis

STANDS, WRONG, FAILED = -1, -2, -3  # in `Evaluation.broken_by`, beside the numbers of stages
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Robust accuracy lies between `certified` and `attacked` on these samples; `low` and `high` also allow for their number.

    certified: share of the samples with a proof (0 without one). attacked: share that nothing broke. low: lower confidence
    limit of the certified share, high: upper one of the attacked share, for all inputs of the same kind (Clopper-Pearson,
    each 97.5 %).
    """

    certified: float
    attacked: float
    low: float
    high: float


@dataclass(frozen=True)
class Stage:
    """One attack on the samples that stood until then. name: short. why: the reason it was run, in words.

    rows: positions (K,) of the samples that it attacked; result: K rows, in that order.
    """

    name: str
    why: str
    rows: Tensor
    result: AttackResult

    @property
    def broke(self) -> Tensor:
        """Positions of the samples that it broke, without those that were wrong before."""
        return self.rows[self.result.having(Status.FOOLED).to(self.rows.device)]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What became of N samples under a cascade of attacks, in the order of the input.

    broken_by (N,) int64: number of the stage that broke the sample, -1 where it stands, -2 where the model was wrong anyway,
    -3 where it gave NaN or infinite values, which counts as not robust.
    adversarial (N, ...): the adversarial input, or the best attempt. margin (N,): of the goal there, negative where the sample
    stands: the nearer to 0, the closer the call. certified (N,) bool: samples with a proof. looked (N,) bool: those whose
    gradient at the input was looked at for signs of masking, one forward and one backward pass each. probe: rows spent on
    looking at the model before. notes: what to know about the figure. complete: False after Ctrl-C: later stages are missing.
    """

    x: Tensor
    y: Tensor
    threat: Threat
    clean_predicted: Tensor
    stages: tuple[Stage, ...]
    broken_by: Tensor
    adversarial: Tensor
    margin: Tensor
    certified: Tensor
    looked: Tensor
    diagnosis: Diagnosis | None
    notes: tuple[str, ...]
    probe: int = 0
    complete: bool = True

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Evaluation({len(self)} samples, robust accuracy {self.robust_accuracy:.2%}; print .summary() for more)"

    @property
    def stands(self) -> Tensor:
        """Samples that the model gets right and nothing broke, (N,) bool."""
        return self.broken_by == STANDS

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right; those that ever gave NaN or infinite values are left out."""
        return _mean((self.broken_by != WRONG) & (self.broken_by != FAILED))

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that the model gets right and nothing broke: an upper bound of what the model is worth."""
        return _mean(self.stands)

    @property
    def interval(self) -> Interval:
        """Robust accuracy from below and above, with confidence limits for the number of samples."""
        count, proven, standing = len(self), int(self.certified.sum()), int(self.stands.sum())
        low, high = binomial_limits(proven, count)[0] if proven else 0.0, binomial_limits(standing, count)[1]
        return Interval(proven / count if count else math.nan, self.robust_accuracy, low, high)

    @cached_property
    def queries(self) -> Queries:
        """Passes of each sample over all stages, (N,) each; the diagnosis is apart."""
        forward, backward, verify = self.looked.long(), self.looked.long(), torch.zeros_like(self.broken_by)
        probe = self.probe
        for stage in self.stages:
            spent = stage.result.queries
            forward[stage.rows] += spent.forward
            backward[stage.rows] += spent.backward
            verify[stage.rows] += spent.verify
            probe += spent.probe
        return Queries(forward, backward, verify, probe)

    @property
    def seconds(self) -> float:
        """Of all stages; the diagnosis is apart."""
        return sum(stage.result.seconds for stage in self.stages)

    @property
    def cumulative(self) -> list[tuple[str, float]]:
        """Robust accuracy after each stage, by its name, from the clean accuracy on."""
        lost = [int((self.broken_by == number).sum()) for number in range(len(self.stages))]
        standing = len(self) - int(((self.broken_by == WRONG) | (self.broken_by == FAILED)).sum())
        points = [("clean", self.clean_accuracy)]
        for stage, gone in zip(self.stages, lost, strict=True):
            standing -= gone
            points.append((stage.name, standing / max(len(self), 1)))
        return points

    @property
    def distance(self) -> Tensor:
        """Of the adversarial inputs, in the threat's norm, (N,) float64: 0 where the model was wrong, inf where it stands."""
        away = self.threat.distance(self.adversarial, self.x)
        away = torch.where(self.broken_by == WRONG, torch.zeros_like(away), away)
        return torch.where(self.stands, torch.full_like(away, torch.inf), away)

    def curve(self, eps: list[float] | None = None) -> list[tuple[float, float]]:
        """(size, robust accuracy) for smaller sizes as well: what broke at a distance breaks in every larger ball.

        Upper bounds, and loose ones: the attacks looked for points in the whole ball and found most of them at its surface. For
        a curve that means something below the largest size, evaluate at several, or take `sp.distance`. eps: default 11
        steps from 0.
        """
        largest = self.threat.largest_eps
        chosen = [largest * step / 10 for step in range(11)] if eps is None else eps
        if any(size > largest for size in chosen):
            raise InputError(f"nothing is known beyond eps = {largest:g}, which was evaluated")
        away = self.distance
        return [(size, _mean(away > size)) for size in chosen]

    def per_class(self) -> dict[int, tuple[int, float, float]]:
        """For each class: number of samples, clean accuracy, robust accuracy."""
        found = {}
        for label in sorted(set(self.y.tolist())):
            mine = self.y == label
            found[int(label)] = (int(mine.sum()), _mean(self.broken_by[mine] != WRONG), _mean(self.stands[mine]))
        return found

    def closest(self, count: int = 10) -> Tensor:
        """Positions of the samples that stand by the least margin: the first to look at, and to attack further."""
        rows = self.stands.nonzero()[:, 0]
        return rows[self.margin[rows].argsort(descending=True)][:count]

    def group(self, rows: Tensor) -> Evaluation:
        """The same for some of the samples, (K,) positions or (N,) bool: a subgroup of yours."""
        if rows.dtype == torch.bool and rows.shape == self.y.shape:
            rows = rows.nonzero()[:, 0]
        elif rows.dtype != torch.int64 or rows.dim() != 1 or len(rows.unique()) < len(rows):  # type: ignore[no-untyped-call]
            raise InputError(
                f"rows must be a bool mask ({len(self)},) or different int64 positions; got {rows.dtype}, {rows.shape}"
            )
        elif len(rows) and not (0 <= int(rows.min()) <= int(rows.max()) < len(self)):
            raise InputError(f"rows must lie in 0 to {len(self) - 1}; got {int(rows.min())} to {int(rows.max())}")
        place = torch.full_like(self.broken_by, -1)
        place[rows] = torch.arange(len(rows), device=place.device)
        stages = []
        for stage in self.stages:
            kept = (place[stage.rows] >= 0).nonzero()[:, 0]
            stages.append(Stage(stage.name, stage.why, place[stage.rows[kept]], stage.result.select(kept)))
        names = ("x", "y", "clean_predicted", "broken_by", "adversarial", "margin", "certified", "looked")
        return replace(self, stages=tuple(stages), **{name: getattr(self, name)[rows] for name in names})

    def summary(self) -> str:
        """The figure, how it came about, and what it cost, in plain text."""
        between, each = self.interval, max(len(self), 1)
        lines = [
            f"Evaluation of {len(self)} samples within {type(self.threat).__name__}({self.threat.largest_eps:g})",
            f"  clean accuracy   {self.clean_accuracy:.2%}",
            f"  robust accuracy  {self.robust_accuracy:.2%} at most; {between.high:.2%} for all such inputs (97.5 % sure)",
            f"  proven           {between.certified:.2%}",
            f"  passes a sample  {float(self.queries.total.sum()) / each:.1f}, {self.seconds:.1f} s",
            "  stage                attacked  broke  passes each  robust accuracy after it",
        ]
        for stage, (_, after) in zip(self.stages, self.cumulative[1:], strict=True):
            passes = float(stage.result.queries.total.double().mean()) if len(stage.rows) else 0.0
            lines.append(f"  {stage.name:<20} {len(stage.rows):>8}  {len(stage.broke):>5}  {passes:>11.1f}  {after:.2%}")
        lines += [f"  ! {note}" for note in self.notes]
        return "\n".join(lines) + ("\n" + self.diagnosis.summary() if self.diagnosis is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        between, queries, each = self.interval, self.queries, max(len(self), 1)
        return {
            "samples": len(self), "threat": type(self.threat).__name__, "eps": self.threat.largest_eps,
            "clean_accuracy": self.clean_accuracy, "robust_accuracy": self.robust_accuracy,
            "interval": asdict(between),
            "passes": {"forward": float(queries.forward.sum()) / each, "backward": float(queries.backward.sum()) / each},
            "seconds": self.seconds, "complete": self.complete, "notes": list(self.notes),
            "stages": [
                {"name": stage.name, "why": stage.why, "attacked": len(stage.rows), "broke": len(stage.broke), "after": after}
                for stage, (_, after) in zip(self.stages, self.cumulative[1:], strict=True)
            ],
            "per_class": {str(label): list(figures) for label, figures in self.per_class().items()},
            "diagnosis": self.diagnosis.to_dict() if self.diagnosis is not None else None,
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class WorstCase:
    """The same samples within several threats: a sample stands if it stands in all of them."""

    parts: tuple[Evaluation, ...]

    def __repr__(self) -> str:
        return f"WorstCase({len(self.parts)} threats, robust accuracy {self.robust_accuracy:.2%}; print .summary() for more)"

    @property
    def complete(self) -> bool:
        """False after Ctrl-C: then later threats may be missing altogether."""
        return all(part.complete for part in self.parts)

    @property
    def stands(self) -> Tensor:
        """Samples that nothing broke within any of the threats, (N,) bool."""
        return torch.stack([part.stands for part in self.parts]).all(0)

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that stand in the worst case over the threats."""
        return _mean(self.stands)

    @property
    def interval(self) -> Interval:
        """As `Evaluation.interval`; what has a proof within each threat counts as certified."""
        proven = torch.stack([part.certified for part in self.parts]).all(0)
        count, low, high = len(proven), int(proven.sum()), int(self.stands.sum())
        limits = binomial_limits(low, count)[0] if low else 0.0, binomial_limits(high, count)[1]
        return Interval(_mean(proven), self.robust_accuracy, *limits)

    def summary(self) -> str:
        """The worst case, then each threat."""
        names = ", ".join(f"{type(part.threat).__name__}({part.threat.largest_eps:g})" for part in self.parts)
        head = f"Worst case over {names}: robust accuracy {self.robust_accuracy:.2%} at most"
        return "\n\n".join([head, *(part.summary() for part in self.parts)])

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {"robust_accuracy": self.robust_accuracy, "parts": [part.to_dict() for part in self.parts]}


def binomial_limits(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper & Pearson's (1934) limits of a share, `hits` of `count`: each is passed with probability (1 - confidence) / 2."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else math.nan
