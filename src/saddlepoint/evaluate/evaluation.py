"""`Evaluation`: robust accuracy with what was tried, what it cost, and how sure the figure is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saddlepoint.engine import AttackResult, Queries
from saddlepoint.errors import InputError, SoundnessError
from saddlepoint.taxonomy import Status
from saddlepoint.threats import Threat, size

if TYPE_CHECKING:
    from saddlepoint.evaluate.diagnose import Diagnosis
    from saddlepoint.verify.certify import Certification

STANDS, WRONG, FAILED = -1, -2, -3  # in `Evaluation.broken_by`, beside the numbers of stages
SIGNS = "signs of masking"  # with which a stage's reason begins
CONFIDENCE = 0.95
_SIZES = (0.25, 0.5, 0.75, 1, 1.5, 2)  # of the curve in the summary, as parts of the size that was evaluated


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
    """One attack on samples that stood when it came to them. name: short. why: the reason it was run, in words.

    rows: positions (K,) of the samples that it attacked; result: K rows, in that order. heavy: meant for samples that cheap
    attacks leave; unless the effort is thorough, it began with those that came closest to falling, and went on while some
    fell, in turns with other heavy ones.
    """

    name: str
    why: str
    rows: Tensor
    result: AttackResult
    heavy: bool = False

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
    gradient at the input was looked at for signs of masking, one forward and one backward pass each.
    notes: what to know about the figure. nearest (N,) float64: distance of the nearest adversarial input in the ball or beyond,
    where they were looked for (`curve=True`). probe: rows spent on looking at the model before. complete: False after Ctrl-C:
    later stages are missing. naive (N,) bool: of a model behind transformations, the samples that stand an attack on the model
    inside, which doesn't know of them; None where there is no such attack. proving: seconds spent on proofs, None where none
    were looked for.
    Errors: `SoundnessError` where a sample that has a proof was broken, or is wrong.
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
    nearest: Tensor | None = None
    probe: int = 0
    complete: bool = True
    naive: Tensor | None = None
    proving: float | None = None

    def __post_init__(self) -> None:
        if bool(self.certified.any()) and bool((both := self.certified & ~self.stands).any()):
            raise SoundnessError(
                f"samples {_short(both)} have a proof, and an attack or the model itself says otherwise: a defect of "
                "Saddlepoint, or a model that changes. Please report it"
            )

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Evaluation({len(self)} samples, robust accuracy {self.robust_accuracy:.2%}; print .summary() for more)"

    @property
    def stands(self) -> Tensor:
        """Samples that the model gets right and nothing broke, (N,) bool."""
        return self.broken_by == STANDS

    @property
    def broken(self) -> Tensor:
        """Samples that the model gets right and an attack broke, (N,) bool: those with an adversarial input."""
        return self.broken_by >= 0

    @property
    def right(self) -> Tensor:
        """Samples that the model gets right without an attack, (N,) bool; not those that ever gave NaN or infinite values."""
        return (self.broken_by != WRONG) & (self.broken_by != FAILED)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right; those that ever gave NaN or infinite values count as wrong."""
        return _mean(self.right)

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that the model gets right and nothing broke: an upper bound of what the model is worth."""
        return _mean(self.stands)

    @property
    def undecided(self) -> Tensor:
        """Samples that nothing broke and that have no proof, (N,) bool."""
        return self.stands & ~self.certified

    def with_proofs(self, certification: Certification) -> Evaluation:
        """The same with what `sp.verify.certify` proved of the same samples within the same threat.

        Counterexamples that no attack found are noted, not counted: `evaluate(..., certify=...)` lets the engine confirm them.
        Errors: `InputError` for other samples or another threat, `SoundnessError` where a sample is both proved and broken.
        """
        if certification.threat != self.threat:
            raise InputError(f"these are proofs within {certification.threat}; the evaluation is within {self.threat}")
        if not (torch.equal(certification.y, self.y) and torch.equal(certification.x, self.x)):
            raise InputError("these are proofs for other samples: certify the x and y of the evaluation, in the same order")
        fails = self.broken_by == FAILED  # what is proved holds for real numbers, and isn't counted where floating ones fail
        refuted = int((certification.falsified & self.stands).sum())
        told = (
            f"the verifier has counterexamples for {refuted} samples that stand: evaluate with certify=..., which counts them"
        )
        return replace(
            self,
            certified=self.certified | (certification.robust & ~fails),
            proving=(self.proving or 0.0) + float(certification.seconds.sum()),
            notes=(*self.notes, told) if refuted else self.notes,
        )

    @property
    def naive_accuracy(self) -> float | None:
        """Share of samples that are right, and stay so under an attack which doesn't know the transformations; None without."""
        return None if self.naive is None else _mean(self.naive & self.right)

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
        """(stage, share of samples left), counted down the list of stages from the clean accuracy to the robust one.

        Heavy stages take turns, so this is no course in time.
        """
        standing = int(self.right.sum())
        points = [("clean", self.clean_accuracy)]
        for stage, gone in zip(self.stages, self._fell, strict=True):
            standing -= gone
            points.append((stage.name, standing / max(len(self), 1)))
        return points

    @property
    def _fell(self) -> list[int]:
        """How many samples each stage was the first to break."""
        return [int((self.broken_by == number).sum()) for number in range(len(self.stages))]

    @property
    def _tried(self) -> list[int]:
        """How many of the samples that stand each heavy stage has attacked."""
        return [int(self.stands[stage.rows].sum()) for stage in self.stages if stage.heavy]

    @property
    def reached(self) -> str:
        """On how many of the samples that stand the heavy attacks were tried, in words; empty where there is none of either."""
        standing, tried = int(self.stands.sum()), self._tried
        if not standing or not tried:
            return ""
        least, most = min(tried), max(tried)
        if least == standing:
            return f"all {standing} that stand"
        return (f"{least} to {most}" if least < most else f"{most}") + f" of the {standing} that stand"

    @property
    def advice(self) -> str:
        """What follows from the notes and the diagnosis, and what to try; empty where there is neither."""
        looked, standing = self.diagnosis, int(self.stands.sum())
        if not self.notes and looked is None:
            return ""
        if not standing:
            return "Nothing stands, so the figure can't be too high."
        thorough = 'effort "thorough" and ' if min(self._tried, default=0) < standing else ""
        more = f"try {thorough}other models as sources"
        if looked is None:
            return f"No diagnosis was made. If a note doubts the gradients, the figure may be too high: {more}, or sp.diagnose."
        if looked.masked:
            return "The gradients mislead, and the figure may be far too high: do as the diagnosis advises, and evaluate again."
        added = [fell for stage, fell in zip(self.stages, self._fell, strict=True) if stage.why.startswith(SIGNS)]
        closer = (
            f"try {len(added)} more attack{'s' * (len(added) > 1)}, which broke {sum(added) or 'nothing'}"
            if added
            else "look closer"
        )
        return (
            f"Signs of masking made the run {closer}; the diagnosis of {looked.samples} samples found no masked gradients. "
            f"That is no proof, and the figure may still be too high: {more}."
        )

    @property
    def alone(self) -> dict[str, Tensor]:
        """By stage, positions of the samples that it broke after others had tried in vain, and no other one broke."""
        tried, broke = torch.zeros_like(self.broken_by), torch.zeros_like(self.broken_by)
        for stage in self.stages:
            tried[stage.rows] += 1
            broke[stage.broke] += 1
        only = self.broken & (tried > 1) & (broke == 1)
        return {stage.name: ((self.broken_by == number) & only).nonzero()[:, 0] for number, stage in enumerate(self.stages)}

    @property
    def distance(self) -> Tensor:
        """Of the nearest adversarial inputs that are known, in the threat's norm, (N,) float64: 0 where the model was wrong or
        gave NaN, inf where none is known."""
        away = self.threat.distance(self.adversarial, self.x)
        away = torch.where(self.stands, torch.full_like(away, torch.inf), away)
        if self.nearest is not None:
            away = torch.minimum(away, self.nearest)
        return torch.where(self.right, away, torch.zeros_like(away))

    def curve(self, eps: Sequence[float] | None = None) -> list[tuple[float, float]]:
        """(size, robust accuracy) for other sizes, without another attack: what broke at a distance breaks in larger balls.

        eps: sizes >= 0; default 11 steps from 0 to the one that was evaluated (with `curve=True` to twice that).
        Each figure is an upper bound. With `evaluate(..., curve=True)` it comes from the smallest perturbations; without,
        sizes below the one that was evaluated are answered loosely, since attacks stop anywhere in the ball.
        Errors: `InputError` for larger sizes without `curve=True`, or where each sample has its own.
        """
        largest = self.threat.largest_eps
        if isinstance(self.threat.eps, tuple):
            raise InputError("there is no curve over eps where each sample has its own")
        limit = largest if self.nearest is None else math.inf
        chosen = [largest * (1 + (self.nearest is not None)) * step / 10 for step in range(11)] if eps is None else eps
        if any(not 0 <= size <= limit for size in chosen):
            raise InputError(f"sizes must lie between 0 and {limit:g}, or evaluate with curve=True; got {list(chosen)}")
        away = self.distance
        return [(size, _mean(away > size)) for size in chosen]

    def per_class(self) -> dict[int, tuple[int, float, float]]:
        """For each class: number of samples, clean accuracy, robust accuracy."""
        return _per_class(self.y, self.right, self.stands)

    def closest(self, count: int = 10) -> Tensor:
        """Positions of the samples that stand by the least margin: the first to look at, and to attack further."""
        return _closest(self.stands, self.margin, count)

    def group(self, rows: Tensor) -> Evaluation:
        """The same for some of the samples, (K,) positions or (N,) bool: a subgroup of yours."""
        if rows.dtype == torch.bool and rows.shape == self.y.shape:
            rows = rows.nonzero()[:, 0]
        elif rows.dtype != torch.int64 or rows.dim() != 1 or len(set(rows.tolist())) < len(rows):
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
            stages.append(replace(stage, rows=place[stage.rows[kept]], result=stage.result.select(kept)))
        names = ("x", "y", "clean_predicted", "broken_by", "adversarial", "margin", "certified", "looked")
        own = {name: getattr(self, name)[rows] for name in names}
        own |= {name: value[rows] for name in ("nearest", "naive") if (value := getattr(self, name)) is not None}
        return replace(self, threat=self.threat.only(rows, self.x), stages=tuple(stages), **own)

    def groups(self, values: Tensor | Iterable[Hashable]) -> dict[Any, Evaluation]:  # Any: of the values' own type
        """The same for each subgroup that metadata make: a value for each of the N samples, as a Tensor (N,) or strings, say.

        Samples of one value are a group. The values come in ascending order if they have one, otherwise as they appear.
        Errors: `InputError` for another number of values, and for such that can't tell groups apart: lists, tensors, NaN.
        """
        return {value: self.group(rows) for value, rows in _rows_by_value(values, len(self)).items()}

    def summary(self) -> str:
        """The figure, how it came about, and what it cost, in plain text."""
        between, naive, each = self.interval, self.naive_accuracy, max(len(self), 1)
        proven = "nothing: no proof was looked for"
        if self.proving is not None or bool(self.certified.any()):
            sure = f"; {between.low:.2%} for all such inputs (97.5 % sure)" if bool(self.certified.any()) else ""
            proven = f"{between.certified:.2%} at least{sure}; {int(self.undecided.sum())} undecided, {self.proving or 0:.1f} s"
        lines = [
            f"Evaluation of {len(self)} samples within {self.threat}",
            f"  clean accuracy   {self.clean_accuracy:.2%}",
            f"  robust accuracy  {self.robust_accuracy:.2%} at most; {between.high:.2%} for all such inputs (97.5 % sure)",
            *([] if naive is None else [f"  naive attack     {naive:.2%}: by one that doesn't know the transformations"]),
            f"  proven           {proven}",
            f"  passes a sample  {float(self.queries.total.sum()) / each:.1f}, {self.seconds:.1f} s",
            *([f"  heavy attacks    each tried on {self.reached}"] if self.reached else []),
            "  stage                attacked  broke  passes each  left, counted down to here",
        ]
        for stage, fell, (_, after) in zip(self.stages, self._fell, self.cumulative[1:], strict=True):
            passes = float(stage.result.queries.total.double().mean()) if len(stage.rows) else 0.0
            lines.append(f"  {stage.name:<20} {len(stage.rows):>8}  {fell:>5}  {passes:>11.1f}  {after:.2%}")
        if bool(self.looked.any()):
            lines.append(f"  {'look at gradients':<20} {int(self.looked.sum()):>8}  {'-':>5}  {2.0:>11.1f}")
        if self.nearest is not None and any(stage.name == "nearest" for stage in self.stages):
            lines.append("  nearest: the smallest perturbations, for the curve, also of samples that others broke")
        if self.nearest is not None and not isinstance(self.threat.eps, tuple):
            points = self.curve([part * self.threat.largest_eps for part in _SIZES])
            lines.append("  curve: at most " + ", ".join(f"{share:.2%} at {size(eps)}" for eps, share in points))
        lines += [f"  ! {note}" for note in self.notes]
        lines += [] if self.complete else ["  ! interrupted: later attacks are missing"]
        lines += [self.diagnosis.summary()] if self.diagnosis is not None else []
        return "\n".join(lines + ([f"  What follows: {self.advice}"] if self.advice else []))

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON. Shares are between 0 and 1.

        samples, clean_accuracy, robust_accuracy, naive_accuracy (or None); per_class: {class: [samples, clean, robust
        accuracy]}; threat: its settings; interval: {certified, attacked, low, high}, see `Interval`; proofs: {certified,
        undecided, seconds} with numbers of samples, or None where none were looked for; passes: {forward, backward} of a
        sample, on average; seconds, complete, notes: as the attributes; curve: [[eps, robust accuracy], ...] or
        None; diagnosis: `Diagnosis.to_dict()` or None; stages: a list of {name, why, heavy, attacked, broke, fell, alone,
        after, passes, seconds}, where attacked and broke count samples, fell those that it was the first to break, alone such
        that others had tried in vain and no other broke; after is the share left, counted down the list (see `cumulative`),
        passes those of all samples.
        """
        between, queries, each = self.interval, self.queries, max(len(self), 1)
        one_size, alone = not isinstance(self.threat.eps, tuple), self.alone
        return {
            "samples": len(self), "threat": self.threat.settings(),
            "clean_accuracy": self.clean_accuracy, "robust_accuracy": self.robust_accuracy,
            "naive_accuracy": self.naive_accuracy, "interval": asdict(between),
            "proofs": None if self.proving is None else {
                "certified": int(self.certified.sum()), "undecided": int(self.undecided.sum()), "seconds": self.proving,
            },
            "passes": {"forward": float(queries.forward.sum()) / each, "backward": float(queries.backward.sum()) / each},
            "seconds": self.seconds, "complete": self.complete, "notes": list(self.notes),
            "stages": [
                {
                    "name": stage.name, "why": stage.why, "heavy": stage.heavy, "attacked": len(stage.rows),
                    "broke": len(stage.broke), "fell": fell, "alone": len(alone[stage.name]),
                    "after": after, "passes": float(stage.result.queries.total.sum()),
                    "seconds": stage.result.seconds,
                }
                for stage, fell, (_, after) in zip(self.stages, self._fell, self.cumulative[1:], strict=True)
            ],
            "curve": [list(point) for point in self.curve()] if self.nearest is not None and one_size else None,
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
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right, as `Evaluation.clean_accuracy`."""
        return _mean(self._right)

    @property
    def _right(self) -> Tensor:
        return torch.stack([part.right for part in self.parts]).all(0)

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that stand in the worst case over the threats."""
        return _mean(self.stands)

    def per_class(self) -> dict[int, tuple[int, float, float]]:
        """For each class: number of samples, clean accuracy, robust accuracy in the worst case."""
        return _per_class(self.parts[0].y, self._right, self.stands)

    def closest(self, count: int = 10) -> Tensor:
        """Positions of the samples that stand by the least margin within any of the threats."""
        return _closest(self.stands, torch.stack([part.margin for part in self.parts]).amax(0), count)

    def group(self, rows: Tensor) -> WorstCase:
        """The same for some of the samples, as `Evaluation.group`."""
        return WorstCase(tuple(part.group(rows) for part in self.parts))

    def groups(self, values: Tensor | Iterable[Hashable]) -> dict[Any, WorstCase]:  # Any: of the values' own type
        """The same for each subgroup, as `Evaluation.groups`."""
        return {value: self.group(rows) for value, rows in _rows_by_value(values, len(self.parts[0])).items()}

    @property
    def interval(self) -> Interval:
        """As `Evaluation.interval`; what has a proof within each threat counts as certified."""
        proven = torch.stack([part.certified for part in self.parts]).all(0)
        count, low, high = len(proven), int(proven.sum()), int(self.stands.sum())
        limits = binomial_limits(low, count)[0] if low else 0.0, binomial_limits(high, count)[1]
        return Interval(_mean(proven), self.robust_accuracy, *limits)

    def summary(self) -> str:
        """The worst case, then each threat."""
        names = ", ".join(str(part.threat) for part in self.parts)
        head = f"Worst case over {names}: robust accuracy {self.robust_accuracy:.2%} at most"
        return "\n\n".join([head, *(part.summary() for part in self.parts)])

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "clean_accuracy": self.clean_accuracy, "robust_accuracy": self.robust_accuracy, "complete": self.complete,
            "interval": asdict(self.interval), "parts": [part.to_dict() for part in self.parts],
        }  # fmt: skip


def binomial_limits(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper & Pearson's (1934) limits of a share, `hits` of `count`: each is passed with probability (1 - confidence) / 2."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


def _per_class(labels: Tensor, right: Tensor, stands: Tensor) -> dict[int, tuple[int, float, float]]:
    found = {}
    for label in sorted(set(labels.tolist())):
        mine = labels == label
        found[int(label)] = (int(mine.sum()), _mean(right[mine]), _mean(stands[mine]))
    return found


def _rows_by_value(values: Tensor | Iterable[Hashable], count: int) -> dict[Any, Tensor]:
    """Positions of the samples of each value."""
    given = values.flatten().tolist() if isinstance(values, Tensor) and values.dim() < 2 else list(values)
    if len(given) != count:
        raise InputError(f"values must have one entry for each of the {count} samples; got {len(given)}")
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(given):
        if not _names_a_group(value):
            raise InputError(f"values must tell groups apart, as strings or whole numbers do; got {value!r} for sample {row}")
        rows.setdefault(value, []).append(row)
    try:
        order = sorted(rows)
    except TypeError:
        order = list(rows)
    return {value: torch.tensor(rows[value]) for value in order}


def _names_a_group(value: object) -> bool:
    """Whether it can be looked up by its value: not what is mutable, nor a tensor, NaN or a missing value of pandas."""
    try:
        hash(value)
        return not isinstance(value, Tensor) and bool(value == value)  # NaN isn't
    except (TypeError, ValueError):
        return False


def _closest(stands: Tensor, margin: Tensor, count: int) -> Tensor:
    if count < 0:
        raise InputError(f"count must be at least 0; got {count}")
    rows = stands.nonzero()[:, 0]
    return rows[margin[rows].argsort(descending=True)][:count]


def _short(mask: Tensor) -> str:
    """Some positions of a mask."""
    rows = mask.nonzero()[:, 0].tolist()
    return ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else math.nan
