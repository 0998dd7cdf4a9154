"""Query curves: how far an attack has come after so many questions to the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from saddlepoint.engine import AttackResult, Record
from saddlepoint.engine.result import attack_name
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate.distances import Quantile, quantile_of
from saddlepoint.evaluate.evaluation import binomial_limits
from saddlepoint.files import write_file
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import size

LEVELS = (0.25, 0.5, 0.75)
_FIRST = 100  # queries at the first checkpoint
_ROUNDING = 1e-9


class Trace:
    """A callback for `sp.attack` that remembers how the best point of each sample came nearer, for `query_curve`.

    For runs that keep the smallest perturbation, as with `Minimize`. A resumed run goes on with the trace of the first part.

    >>> import torch, saddlepoint as sp
    >>> model, trace = sp.Model(torch.nn.Linear(4, 3), bounds=(-9, 9)), sp.Trace()
    >>> x = torch.rand(8, 4)
    >>> result = sp.attack(model, x, model.predict(x), sp.attacks.DDN(steps=20), sp.Minimize("l2"), callback=trace)
    >>> curve = sp.query_curve(result, trace, at=(5, 20))
    >>> curve.quantile(20).value <= curve.quantile(5).value
    True
    """

    def __init__(self) -> None:
        nothing = torch.zeros(0, dtype=torch.int64)
        self._finds = [{"ids": nothing, "queries": nothing, "distance": nothing.double()}]
        self._last = nothing, nothing.double()

    def __call__(self, record: Record) -> None:
        """Take in a step: which of its samples have another best distance than after the step before."""
        ids, queries, distance = record.ids.cpu(), record.queries.cpu(), record.distance.cpu()
        new = torch.isfinite(distance)
        if torch.equal(ids, self._last[0]):
            new &= distance != self._last[1]
        self._last = ids, distance
        if bool(new.any()):
            self._finds.append({"ids": ids[new], "queries": queries[new], "distance": distance[new]})

    def finds(self, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Each find's sample, how many queries it had made, and its distance: ids, queries, distance, (E,) each.

        ids: of the samples that are wanted, default all.
        """
        found = {name: torch.cat([part[name] for part in self._finds]) for name in self._finds[0]}
        wanted = torch.ones_like(found["ids"], dtype=torch.bool) if ids is None else torch.isin(found["ids"], ids.cpu())
        return {name: column[wanted] for name, column in found.items()}

    def save(self, path: str | Path, result: AttackResult) -> Path:
        """Write the finds of the result's samples to a file. Errors: `DataError`."""
        path = Path(path)
        try:
            write_file(path, save({name: column.contiguous() for name, column in self.finds(result.ids).items()}))
        except OSError as error:
            raise DataError(f"cannot write the trace to {path}: {error}") from error
        return path

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read what `save` wrote. Errors: `DataError`."""
        trace = Trace()
        try:
            found = load_file(path)
            trace._finds = [{name: found[name] for name in trace._finds[0]}]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path} is no trace saved by Saddlepoint, or it is damaged: {error!r}") from error
        return trace


@dataclass(frozen=True, repr=False, eq=False)
class QueryCurve:
    """What an attack had found after q queries of each sample. A query is one sample once forward through the model.

    result: of the run. at: the numbers of queries at which the curve is told. row, queries, distance (E,): the finds, that is
    which of the N attacked samples had a point at which distance after how many queries; the best of them counts.

    Attacked are all samples but those that were wrong from the start. A sample on which the model failed (NaN) counts as
    attacked and not fooled. The confirmation of a success and the model's probe are not among the queries.
    """

    result: AttackResult
    at: tuple[int, ...]
    row: Tensor
    queries: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return int(self.attacked.sum())

    def __repr__(self) -> str:
        return f"QueryCurve({self.attack} {self.aim}, {len(self)} samples attacked; print .summary() for more)"

    @property
    def attack(self) -> str:
        """The attack's class, with those that it is made of."""
        return attack_name(self.result.config["attack"])

    @property
    def aim(self) -> str:
        """What was sought: "within Linf(8/255)", or "for the smallest l2 change"."""
        threat = self.result.config["threat"]
        if threat["eps"] is None:
            return f"for the smallest {self.norm} change"
        return f"within {threat['name']}({size(threat['eps']) if isinstance(threat['eps'], float | int) else 'one eps each'})"

    @property
    def norm(self) -> Norm:
        """In which distances are measured."""
        return Norm(self.result.config["threat"]["norm"])

    @property
    def smallest(self) -> bool:
        """Whether the run went on after the first success, for the smallest perturbation: then distances are what counts."""
        return bool(self.result.config["keep"] == "smallest")

    @property
    def attacked(self) -> Tensor:
        """Which rows of the result were attacked, (M,) bool: N of them."""
        return ~self.result.having(Status.ALREADY_WRONG).cpu()

    @property
    def spent(self) -> Tensor:
        """Queries of each attacked sample, (N,) int64."""
        return self.result.queries.forward.cpu()[self.attacked]

    @property
    def reach(self) -> int:
        """Where the curve ends: at the budget's queries, or without such a limit at the most that a sample took."""
        limit = self.result.config["budget"]["queries"]
        return int(self.spent.max()) if limit is None and len(self) else int(limit or 1)

    def found(self, queries: int) -> Tensor:
        """Distance of the best point after so many queries, (N,) float64: inf where there was none."""
        done = self.queries <= queries
        nothing = torch.full((len(self),), torch.inf, dtype=torch.float64)
        return nothing.scatter_reduce(0, self.row[done], self.distance[done], "amin")

    @property
    def first(self) -> Tensor:
        """After how many queries each sample was fooled first, (N,) float64: inf where it never was."""
        never = torch.full((len(self),), torch.inf, dtype=torch.float64)
        return never.scatter_reduce(0, self.row, self.queries.double(), "amin")

    def fooled(self, queries: int) -> int:
        """How many samples were fooled within so many queries."""
        return int((self.first <= queries).sum())

    def share(self, queries: int) -> float:
        """The part of the attacked samples that were fooled within so many queries; nan if none was attacked."""
        return self.fooled(queries) / len(self) if len(self) else math.nan

    def limits(self, queries: int) -> tuple[float, float]:
        """Between which the share lies for all samples of the same kind (Clopper-Pearson, 95 %)."""
        return binomial_limits(self.fooled(queries), len(self)) if len(self) else (0.0, 1.0)

    def quantile(self, queries: int, level: float = 0.5) -> Quantile:
        """Within which distance a part `level` of the attacked samples had a point after so many queries; inf: had none."""
        return quantile_of(self.found(queries), level)

    def needed(self, level: float = 0.5) -> Quantile:
        """Within how many queries a part `level` of the attacked samples was fooled; inf where fewer were."""
        return quantile_of(self.first, level)

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON but for nan and inf.

        attack, aim, norm, smallest: as the attributes. counts: samples {attacked, wrong (from the start), fooled, failed
        (NaN)}. reach: where the curve ends. points: a list of {queries, fooled, share, low, high, distance}, where low and high
        limit the share for all such samples (95 %), and distance is a list of {level, value, low, high} (see `Quantile`), or
        None unless the smallest perturbation was sought. needed: the same of the queries until a sample was fooled first.
        spent: queries of a sample {mean, median, most}; passes: {forward, backward, verify, probe} in all.
        """
        queries, spent = self.result.queries, self.spent.double()
        passes = {kind: int(getattr(queries, kind).sum()) for kind in ("forward", "backward", "verify")}
        return {
            "attack": self.attack, "aim": self.aim, "norm": self.norm.value, "smallest": self.smallest,
            "counts": {
                "attacked": len(self),
                "wrong": int((~self.attacked).sum()),
                "fooled": int(self.result.having(Status.FOOLED).sum()),
                "failed": int(self.result.having(Status.ERROR).sum()),
            },
            "reach": self.reach,
            "points": [self._point(queries) for queries in self.at],
            "needed": [asdict(self.needed(level)) for level in LEVELS],
            "spent": {
                "mean": float(spent.mean()),
                "median": float(spent.quantile(0.5)) if len(self) else math.nan,
                "most": int(self.spent.max()) if len(self) else 0,
            },
            "passes": passes | {"probe": queries.probe},
        }  # fmt: skip

    def _point(self, queries: int) -> dict[str, Any]:
        low, high = self.limits(queries)
        away = [asdict(self.quantile(queries, level)) for level in LEVELS] if self.smallest else None
        share = self.share(queries)
        return {
            "queries": queries, "fooled": self.fooled(queries), "share": share, "low": low, "high": high, "distance": away,
        }  # fmt: skip

    def summary(self) -> str:
        """The curve as a table in plain text."""
        told = self.to_dict()
        quantiles = [f"{_part(level)} within" for level in LEVELS if self.smallest]
        head = ["queries", "fooled", "share", "95% limits", *quantiles]
        rows = [
            [
                f"{point['queries']:,}",
                f"{point['fooled']}",
                _share(point["share"]),
                f"{_share(point['low'])} to {_share(point['high'])}",
                *(_short(each["value"]) for each in point["distance"] or []),
            ]
            for point in told["points"]
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        wrong, failed = (told["counts"][name] for name in ("wrong", "failed"))
        apart = f"; {wrong} were wrong from the start" * bool(wrong) + f"; the model failed on {failed}" * bool(failed)
        until = ", ".join(f"{_part(each['level'])} {_short(each['value'])}" for each in told["needed"])
        spent = ", ".join(f"{name} {value:,.0f}" for name, value in told["spent"].items())
        return "\n".join(
            [
                f"{self.attack} {self.aim}: {len(self)} samples attacked{apart}",
                *lines,
                f"  queries until fooled: {until}",
                f"  queries of a sample: {spent}",
            ]
        )


def query_curve(result: AttackResult, trace: Trace | None = None, at: Sequence[int] | None = None) -> QueryCurve:
    """How many samples were fooled, or how near they came, within q queries each.

    result: of `sp.attack`. A run in a ball ends for each sample at its first success, so its counts say when that was. trace:
    what a run that looks for the smallest perturbation was given as its callback. at: numbers of queries to tell, ascending;
    default 100, 200, 500, 1000, ... up to the budget, or without one to the most that a sample took.

    Errors: `InputError` for a run that keeps something else than the first success or the smallest perturbation, for one that
    looked for the smallest without a trace or towards several targets a sample, and for numbers of queries that don't ascend.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
    >>> result = sp.attack(model, x, y, "square", sp.Linf(0.1), budget=sp.Budget(queries=500))
    >>> [point["queries"] for point in sp.query_curve(result).to_dict()["points"]]
    [50, 100, 200, 500]
    """
    keep = result.config["keep"]
    if keep not in ("first", "smallest"):
        raise InputError(f'a query curve is of the first success or of the smallest perturbation; this run has keep="{keep}"')
    attacked = ~result.having(Status.ALREADY_WRONG).cpu()
    fooled = result.having(Status.FOOLED).cpu()[attacked]
    row = fooled.nonzero()[:, 0]
    # whatever came last, such as a last look after the last step, is known from the result itself
    queries, distance = (column.cpu()[attacked] for column in (result.queries.forward, result.distance.double()))
    finds = [(row, queries[row], distance[row])]
    if keep == "smallest":
        if trace is None:
            raise InputError(
                "a search for the smallest perturbation leaves its course in a Trace: sp.attack(..., callback=trace)"
            )
        finds.append(_of_samples(trace, result.ids.cpu()[attacked], torch.where(fooled, distance, torch.inf)))
    curve = QueryCurve(result, (), *(torch.cat(columns) for columns in zip(*finds, strict=True)))
    chosen = checkpoints(curve.reach) if at is None else tuple(at)
    ascending = all(a < b for a, b in zip((0, *chosen), chosen, strict=False))
    if not chosen or not ascending or any(not isinstance(each, int) for each in chosen):
        raise InputError(f"at must be whole numbers of queries, ascending from 1 at least; got {at}")
    return QueryCurve(result, chosen, curve.row, curve.queries, curve.distance)


def checkpoints(reach: int) -> tuple[int, ...]:
    """100, 200, 500, 1000, ... and `reach` itself; from a tenth of it on where that is less than 100."""
    steps = (digit * 10**power for power in range(len(str(reach))) for digit in (1, 2, 5))
    return (*(step for step in steps if min(_FIRST, math.ceil(reach / 10)) <= step < reach), reach)


def _of_samples(trace: Trace, ids: Tensor, final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The trace's finds of the samples with these ids (N,): their rows in it, queries and distances.

    final (N,): the distances in the result. What was nearer was refuted when it was predicted again.
    """
    if len(torch.unique(ids)) < len(ids):
        raise InputError("a trace tells samples by their ids, which must differ: one target a sample, and no id twice")
    found = trace.finds(ids)
    ordered, order = ids.sort()
    row = order[torch.searchsorted(ordered, found["ids"])]
    valid = found["distance"] >= final[row] * (1 - _ROUNDING)
    return row[valid], found["queries"][valid], found["distance"][valid]


def _part(level: float) -> str:
    return "half" if level == 0.5 else f"{level:.0%}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"
