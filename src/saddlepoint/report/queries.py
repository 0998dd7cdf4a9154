"""The report of query curves: how far attacks come with how many questions to a model, and what that cost."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError
from saddlepoint.evaluate.queries import LEVELS, QueryCurve
from saddlepoint.models.base import Classifier
from saddlepoint.models.http_model import HttpModel
from saddlepoint.models.torch_model import Model
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish
from saddlepoint.report.gallery import Gallery, album
from saddlepoint.report.words import count, length, listed, percent
from saddlepoint.taxonomy import Access, Status

if TYPE_CHECKING:
    pass


def write_queries(
    curves: Mapping[str, QueryCurve],
    model: Classifier,
    x: Tensor,
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    model_name: str = "the model",
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
    examples: int = 6,
) -> Path:
    """Write the report of attacks on the same samples x (N, ...) of one model, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `query_results`), `queries.csv` (a row for
    each attack and sample) and `figures/`. Every file appears complete or not at all, report.html last; what an earlier report
    left under the same names is replaced. The adversarial inputs are not in it: `AttackResult.save` keeps them.

    curves: by names for the attacks. model: is not asked anything, since queries are what counts; of an `HttpModel` the traffic
    is told. examples: how many of the easiest and of the hardest samples to show. The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` for no curves, or such of different aims or samples.
    """
    if examples < 0:
        raise InputError(f"examples must be at least 0; got {examples}")
    document = query_results(
        curves, model, x, title=title, data_name=data_name, config=config, seed=seed, model_name=model_name,
        data_fingerprint=data_fingerprint, class_names=class_names, command=command,
    )  # fmt: skip
    page, pictures = _page(curves, model, x, document, class_names, examples, seed)
    return publish(Path(folder), page, document, pictures, tables={"queries.csv": _rows(curves)})


def query_results(
    curves: Mapping[str, QueryCurve],
    model: Classifier,
    x: Tensor,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    model_name: str = "the model",
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config, verdict: as in `saddlepoint.report.results`.
    models: a list of one {name, settings}. aim, norm, smallest: what was sought, see `QueryCurve`. traffic: null, or what went
    over the wire to an `HttpModel` (see `Traffic`). attacks: a list, in the order given, of {name, settings, access, goal,
    budget, seconds, notes} with what `QueryCurve.to_dict` says.
    """
    if not curves:
        raise InputError("there are no query curves to report")
    first = next(iter(curves.values()))
    for name, curve in curves.items():
        if (curve.aim, curve.smallest) != (first.aim, first.smallest):
            raise InputError(f"the curve of {name!r} is of another aim than the first one: {curve.aim}, not {first.aim}")
        most = int(curve.result.index.max()) if len(curve.result) else 0
        if most >= len(x):
            raise InputError(f"the result of {name!r} is of other inputs: it has sample {most}, and x has {len(x)}")
    complete = all(len(torch.unique(curve.result.index)) == len(x) for curve in curves.values())
    document: dict[str, Any] = plain({
        **frame(
            x, title=title, complete=complete, command=command, seed=seed, data_name=data_name,
            data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "aim": first.aim,
        "norm": first.norm.value,
        "smallest": first.smallest,
        "verdict": _verdict(curves, model_name, complete),
        "models": [{"name": model_name, "settings": model.describe()}],
        "traffic": asdict(model.traffic) if isinstance(model, HttpModel) else None,
        "attacks": [
            {
                "name": name,
                "settings": curve.result.config["attack"],
                **{key: curve.result.config[key] for key in ("access", "goal", "budget")},
                **curve.to_dict(),
                "seconds": curve.result.seconds,
                "notes": list(curve.result.notes),
            }
            for name, curve in curves.items()
        ],
    })  # fmt: skip
    return document


def _verdict(curves: Mapping[str, QueryCurve], model_name: str, complete: bool) -> str:
    """A paragraph; names are in backquotes."""
    sentences = [_sentence(name, curve, model_name) for name, curve in curves.items()]
    reach = min(curve.reach for curve in curves.values())
    if len(curves) > 1 and all(len(curve) for curve in curves.values()):
        best = max(curves, key=lambda name: _merit(curves[name], reach))
        ahead = [name for name in curves if _merit(curves[name], reach) == _merit(curves[best], reach)]
        if len(ahead) == 1:
            did = "comes nearest" if curves[best].smallest else "fools most"
            sentences.append(f"After {count(reach)} queries `{best}` {did}.")
    if any(curve.result.having(Status.FOOLED).any() for curve in curves.values()):
        sentences.append("Another attack, or the same with more queries, may do better.")
    if not complete:
        sentences.append("The run was stopped: the figures are those of the samples that were finished.")
    return " ".join(sentences)


def _merit(curve: QueryCurve, queries: int) -> float:
    return -curve.quantile(queries).value if curve.smallest else curve.share(queries)


def _sentence(name: str, curve: QueryCurve, model_name: str) -> str:
    if not len(curve):
        return f"`{model_name}` gets none of the {len(curve.result)} samples right, so there is nothing to attack."
    targeted = curve.result.config["goal"]["targeted"]
    samples = f"the {len(curve)} samples" + ("" if targeted else f" that `{model_name}` gets right")
    last = curve.reach
    if curve.smallest:
        after, half = f"After {count(last)} queries each, `{name}` has", curve.quantile(last)
        if math.isinf(half.value):
            return f"{after} found no adversarial input for most of {samples}."
        early = curve.quantile(curve.at[0])
        text = f"{after} an adversarial input within {curve.norm} {length(half.value)} ({_limits(half.low, half.high, length)})"
        text += f" for half of {samples}"
        if len(curve.at) == 1 or curve.at[0] == last:
            return f"{text}."
        before = "there was none for most" if math.isinf(early.value) else f"it was {length(early.value)}"
        return f"{text}; after {count(curve.at[0])} queries {before}."
    does, share, half = "leads" if targeted else "fools the model on", percent(curve.share(last)), curve.needed()
    text = f"With at most {count(last)} queries each, `{name}` {does} {share} ({_limits(*curve.limits(last), percent)}) of"
    text += f" {samples}{' to the target' if targeted else ''}, {curve.aim}."
    return text + (f" Half of them fall within {count(half.value)} queries." if math.isfinite(half.value) else "")


def _limits(low: float, high: float, words: Any) -> str:  # Any: a function from a number to its words
    return f"95%: {words(low)} {f'to {words(high)}' if math.isfinite(high) else 'upwards'}"


def _page(
    curves: Mapping[str, QueryCurve],
    model: Classifier,
    x: Tensor,
    document: dict[str, Any],
    class_names: Sequence[str],
    examples: int,
    seed: int,
) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    figure = figures.queries(curves)
    points = {name: {point["queries"]: point for point in attack["points"]} for name, attack in
              zip(curves, document["attacks"], strict=True)}  # fmt: skip
    page = environment().get_template("queries.html.j2").render(
        document=document,
        curve=Markup(figures.to_svg(figure, "queries")),
        checkpoints=sorted({queries for each in points.values() for queries in each}),
        points=points,
        levels=LEVELS,
        galleries=[
            {"attack": name, "groups": list(_galleries(name, curve, model, x, examples, seed))}
            for name, curve in curves.items()
        ],
        **drawing(curves, class_names),
        targeted=any(curve.result.config["goal"]["targeted"] for curve in curves.values()),
        notes=[
            (note, listed(f"`{name}`" for name, curve in curves.items() if note in curve.result.notes))
            for note in dict.fromkeys(note for curve in curves.values() for note in curve.result.notes)
        ],
        bounds=model.bounds,
    )  # fmt: skip
    return page, {"queries.png": figures.to_png(figure)}


def _galleries(
    name: str, curve: QueryCurve, model: Classifier, x: Tensor, examples: int, seed: int
) -> Iterable[tuple[str, Gallery, list[str]]]:
    """The easiest and the hardest of the fooled samples: (what they are, the pictures, what is to be said of each)."""
    result = curve.result
    fooled = result.having(Status.FOOLED).cpu().nonzero()[:, 0]
    effort = (result.distance if curve.smallest else result.queries.forward).cpu()[fooled]
    rows = fooled[effort.argsort(stable=True)]
    silent = Model(nn.Identity(), model.bounds, access=Access.LABELS)  # has no confidences to ask for
    words = ("nearest", "farthest") if curve.smallest else ("fewest queries", "most queries")
    for word, chosen in zip(words, (rows[:examples], rows[examples:].flip(0)[:examples]), strict=True):
        shown = album(
            name, silent, x[result.index.to(x.device)], result.adversarial, chosen, numbers=result.index, labels=result.labels,
            clean_predicted=result.clean_predicted, predicted=result.predicted, distance=result.distance, status=Status.FOOLED,
            attack=curve.attack, threat=curve.aim, seed=seed,
        )  # fmt: skip
        took, away = (column.cpu()[chosen].tolist() for column in (result.queries.forward, result.distance))
        near, quick = [f"{curve.norm} {length(d)}" for d in away], [f"{count(queries)} queries" for queries in took]
        yield word, shown, near if curve.smallest else quick


def _rows(curves: Mapping[str, QueryCurve]) -> str:
    """A row for each attack and sample, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    head = ("attack", "sample", "status", "class", "target", "clean_predicted", "predicted", "queries", "backward_passes")
    writer.writerow([*head, "first_fooled", "distance"])
    for name, curve in curves.items():
        result = curve.result
        first = torch.full((len(result),), torch.nan, dtype=torch.float64)
        first[curve.attacked] = curve.first
        columns = [result.labels, result.targets, result.clean_predicted, result.predicted, result.queries.forward]
        columns += [result.queries.backward, first, result.distance]
        values = zip(*(column.tolist() for column in columns), strict=True)
        for index, status, row in zip(result.index.tolist(), result.status, values, strict=True):
            writer.writerow([name, index, status, *row])
    return stream.getvalue()
