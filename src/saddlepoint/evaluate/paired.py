"""Two campaigns on the same samples: which verdicts changed, and is it more than chance? And one sample, attack by attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saddlepoint.engine import AttackResult
from saddlepoint.engine.result import attack_name
from saddlepoint.engine.slots import NO_CLASS
from saddlepoint.errors import InputError
from saddlepoint.evaluate.campaign import Campaign, Difference, differences
from saddlepoint.taxonomy import Status

_RESAMPLES = 10_000
_LISTED = 10  # samples that a summary names


@dataclass(frozen=True)
class Verdict:
    """What a campaign found for one sample.

    status: `SURVIVED` if every stage that attacked it failed, otherwise what ended it. stage: the one that did, None if none.
    """

    sample: int
    label: int
    status: Status
    stage: str | None

    @property
    def robust(self) -> bool:
        """Whether it stands."""
        return self.status is Status.SURVIVED

    def __str__(self) -> str:
        match self.status:
            case Status.SURVIVED:
                return "stands"
            case Status.ALREADY_WRONG:
                return "wrong from the start"
            case Status.ERROR:
                return f"NaN in {self.stage}"
            case Status.FOOLED:
                return f"broken by {self.stage}"


@dataclass(frozen=True, repr=False)
class Paired:
    """Two campaigns a and b, sample by sample.

    a, b: verdicts on the same samples, in the order of the input. differences: of the manifests, from a to b. complete:
    whether each campaign came to its end. p_value: of McNemar's exact test. interval: for the difference of robust accuracy
    b - a, that between which `level` of the bootstrap's resamples lie.

    McNemar's test looks at the samples with another verdict only: if neither campaign were better, each of them would be as
    likely to fall on either side (Binomial(n, 1/2), two-sided; McNemar 1947, doi:10.1007/BF02295996). The bootstrap draws
    samples with replacement, each with both verdicts. Both treat the samples as drawn from all that could have been.
    """

    names: tuple[str, str]
    a: tuple[Verdict, ...]
    b: tuple[Verdict, ...]
    differences: tuple[Difference, ...]
    complete: tuple[bool, bool]
    p_value: float
    interval: tuple[float, float]
    level: float

    def __len__(self) -> int:
        return len(self.a)

    def __repr__(self) -> str:
        return (
            f"Paired({len(self)} samples, difference {self.difference:+.2%}, p = {self.p_value:.2g}; print .summary() for more)"
        )

    @property
    def table(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((stand in both, in a only), (in b only, in neither))."""
        pairs = [(one.robust, other.robust) for one, other in zip(self.a, self.b, strict=True)]
        both, a_only, b_only, neither = (pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False)))
        return (both, a_only), (b_only, neither)

    @property
    def robust_accuracy(self) -> tuple[float, float]:
        """Share of samples that stand in a and in b."""
        (both, a_only), (b_only, _) = self.table
        return (both + a_only) / len(self), (both + b_only) / len(self)

    @property
    def difference(self) -> float:
        """Robust accuracy of b minus that of a."""
        (_, a_only), (b_only, _) = self.table
        return (b_only - a_only) / len(self)

    @property
    def changed(self) -> tuple[tuple[Verdict, Verdict], ...]:
        """The samples that stand in one only, with the verdict of a and of b."""
        return tuple((one, other) for one, other in zip(self.a, self.b, strict=True) if one.robust != other.robust)

    def summary(self) -> str:
        """What differs, in words."""
        (both, a_only), (b_only, neither) = self.table
        before, after = self.robust_accuracy
        low, high = self.interval
        lines = [
            f"a = {self.names[0]}, b = {self.names[1]}: {len(self)} samples",
            *(f"  from a to b: {each}" for each in self.differences),
            f"  stand in both {both}, in a only {a_only}, in b only {b_only}, in neither {neither}",
            f"  robust accuracy {before:.2%} in a, {after:.2%} in b: {100 * self.difference:+.2f} points "
            f"({self.level:.0%} interval {100 * low:+.2f} to {100 * high:+.2f})",
            f"  {self._meaning()}",
        ]
        if unlike := sorted({each.key.split(".")[0] for each in self.differences} & {"threat", "configuration"}):
            lines.append(f"  ! the two were not run alike ({' and '.join(unlike)}), which alone can change verdicts")
        for one, other in self.changed[:_LISTED]:
            lines.append(f"  sample {one.sample} (class {one.label}): {one} in a, {other} in b")
        if len(self.changed) > _LISTED:
            lines.append(f"  and {len(self.changed) - _LISTED} more with another verdict")
        for name, complete in zip(self.names, self.complete, strict=True):
            if not complete:
                lines.append(f"  ! {name} has not come to its end: what stands there may still fall")
        return "\n".join(lines)

    def _meaning(self) -> str:
        (_, a_only), (b_only, _) = self.table
        if not a_only + b_only:
            return "no sample has another verdict"
        split = f"{max(a_only, b_only)} to {min(a_only, b_only)} among the samples with another verdict"
        chance = f"(McNemar's exact test, p = {self.p_value:.2g})"
        if self.p_value < 1 - self.level:
            return f"{split} is more than chance would explain {chance}"
        return f"{split} may be chance {chance}: more samples would tell"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "campaigns": list(self.names),
            "samples": len(self),
            "complete": list(self.complete),
            "differences": [{"key": each.key, "before": each.before, "now": each.now} for each in self.differences],
            "table": [list(row) for row in self.table],
            "robust_accuracy": list(self.robust_accuracy),
            "difference": self.difference,
            "interval": list(self.interval),
            "level": self.level,
            "p_value": self.p_value,
            "changed": [
                {"sample": one.sample, "label": one.label, "a": str(one), "b": str(other)} for one, other in self.changed
            ],
        }


def compare_campaigns(a: Campaign | str | Path, b: Campaign | str | Path, *, level: float = 0.95, seed: int = 0) -> Paired:
    """Set two campaigns on the same samples side by side.

    level: of the confidence interval; 1 - level is the p-value below which `summary` speaks of more than chance. seed: of
    the bootstrap.

    Errors: `InputError` unless both have the same data and have looked at the same samples of it; `DataError` for what is no
    campaign, or damaged.
    """
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1; got {level}")
    first, second = (one if isinstance(one, Campaign) else Campaign(one) for one in (a, b))
    before, now = first.manifest, second.manifest
    if differing := differences({"data": before.get("data")}, {"data": now.get("data")}):
        raise InputError(
            f"{first.path} and {second.path} are on different data ({'; '.join(map(str, differing))}): they can't be compared "
            "sample by sample"
        )
    one, other = _verdicts(first), _verdicts(second)
    if missing := one.keys() ^ other.keys():
        raise InputError(
            f"{len(missing)} samples are in only one of {first.path} ({len(one)} samples) and {second.path} ({len(other)}), "
            f"the first with id {min(missing)[1]}: run both to their end, on the same samples with the same ids"
        )
    if not one:
        raise InputError(f"{first.path} and {second.path} have no finished samples yet")
    verdicts_a, verdicts_b = tuple(one.values()), tuple(other[key] for key in one)
    gained = sum(y.robust and not x.robust for x, y in zip(verdicts_a, verdicts_b, strict=True))
    lost = sum(x.robust and not y.robust for x, y in zip(verdicts_a, verdicts_b, strict=True))
    return Paired(
        (str(first.path), str(second.path)),
        verdicts_a,
        verdicts_b,
        differences(before, now),
        (first.complete, second.complete),
        mcnemar(gained, lost),
        _bootstrap(gained, lost, len(verdicts_a), level, seed),
        level,
    )


def _verdicts(campaign: Campaign) -> dict[tuple[int, int], Verdict]:
    """By position and id, in the order of the input."""
    table = campaign.table().select(["row", "sample", "label", "status", "predicted", "stage", "distance"])
    one_of_each = {part.stage: part for part in campaign.parts()}
    unlimited = {stage for stage, part in one_of_each.items() if _is_unlimited(campaign.restore(part))}
    threat = campaign.manifest["threat"]
    found: dict[tuple[int, int], Verdict] = {}
    for row, sample, label, name, predicted, stage, distance in zip(
        *(column.to_pylist() for column in table.columns), strict=True
    ):
        status = _outcome(name, predicted)
        if stage in unlimited and distance > _eps(threat, row):
            status = Status.SURVIVED
        if (row, sample) not in found or found[row, sample].robust:
            found[row, sample] = Verdict(sample, label, status, None if status is Status.SURVIVED else stage)
    return dict(sorted(found.items()))


def _outcome(status: str, predicted: int) -> Status:
    """What a stage's status says of a sample: where gradients alone are NaN, that the attack failed."""
    return Status.SURVIVED if status == Status.ERROR and predicted != NO_CLASS else Status(status)


def _is_unlimited(result: AttackResult) -> bool:
    """Whether it comes from a search for the smallest perturbation (`evaluate(curve=True)`), which may lie beyond the ball."""
    return result.config["threat"].get("eps") is None


def _eps(threat: dict[str, Any], row: int) -> float:
    """Of the ball around the sample at this position."""
    eps = threat["eps"]
    return float(eps[row] if isinstance(eps, list) else eps)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value."""
    from scipy.stats import binomtest  # takes half a second to import

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _bootstrap(gained: int, lost: int, count: int, level: float, seed: int) -> tuple[float, float]:
    """Percentile interval of (gained - lost) / count. Samples drawn with replacement are a draw from a multinomial."""
    shares = np.array([gained, lost, count - gained - lost]) / count
    draws = np.random.default_rng(seed).multinomial(count, shares, size=_RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / count, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Attempt:
    """What one stage got out of a sample: an `AttackResult` of one row.

    beyond: it was a search for the smallest perturbation, and found one outside of the ball, which breaks nothing.
    """

    stage: str
    result: AttackResult
    beyond: bool = False

    @property
    def status(self) -> Status:
        """What became of the sample in this stage."""
        return Status.SURVIVED if self.beyond else Status(self.result.status[0])


@dataclass(frozen=True, repr=False)
class Case:
    """One sample of a campaign, with what each stage got out of it, in their order. row: its position in the input."""

    sample: int
    row: int
    label: int
    clean_predicted: int
    attempts: tuple[Attempt, ...]

    def __repr__(self) -> str:
        return f"Case(sample {self.sample}, {len(self.attempts)} attempts; print .summary() for more)"

    @property
    def verdict(self) -> Verdict:
        """How it ended."""
        for attempt in self.attempts:
            status = _outcome(attempt.status, int(attempt.result.predicted[0]))
            if status is not Status.SURVIVED:
                return Verdict(self.sample, self.label, status, attempt.stage)
        return Verdict(self.sample, self.label, Status.SURVIVED, None)

    def summary(self) -> str:
        """A line for each attempt, in plain text: its outcome at the best point that it found, and what it cost."""
        table = [("stage", "attack", "outcome", "class", "margin", "distance", "passes")]
        for attempt in self.attempts:
            result = attempt.result
            away = f"{float(result.distance[0]):.4g} {result.config['threat']['norm']}"
            found = (str(int(result.predicted[0])), f"{float(result.margin[0]):.4g}", away, str(int(result.queries.total[0])))
            outcome = "only beyond the ball" if attempt.beyond else attempt.status.value.replace("_", " ")
            table.append((attempt.stage, attack_name(result.config["attack"]), outcome, *found))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]
        title = f"sample {self.sample}: class {self.label}, predicted {self.clean_predicted} before any attack; {self.verdict}"
        return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def replay(campaign: Campaign | str | Path, case_id: int) -> Case:
    """One sample again: what each stage of a campaign got out of it, without running anything.

    case_id: the sample's id, which is its position in the input unless ids were given.

    Errors: `InputError` for an id that the campaign has no results for; `DataError` for what is no campaign, or damaged.
    """
    store = campaign if isinstance(campaign, Campaign) else Campaign(campaign)
    threat = store.manifest["threat"]
    attempts = []
    for part in store.parts():
        ids = store.read(part)["sample"].to_pylist()
        if case_id in ids:
            result = store.restore(part).select(torch.tensor([ids.index(case_id)]))
            beyond = _is_unlimited(result) and float(result.distance[0]) > _eps(threat, int(result.index[0]))
            attempts.append(Attempt(part.stage, result, beyond))
    if not attempts:
        known = store.table()["sample"].to_pylist()
        have = f"{len(set(known))} samples with ids from {min(known)} to {max(known)}" if known else "no finished samples yet"
        raise InputError(f"{store.path} has no results for a sample with the id {case_id}; it has {have}")
    first = attempts[0].result
    row, label, predicted = (int(column[0]) for column in (first.index, first.labels, first.clean_predicted))
    return Case(case_id, row, label, predicted, tuple(attempts))
