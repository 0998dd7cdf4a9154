"""The report of a transfer matrix: who fools whom as a heat map, with the counts and limits behind it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saddlepoint.errors import InputError
from saddlepoint.evaluate.transfer import Transfer, TransferMatrix
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish
from saddlepoint.report.words import distinct, file_name, listed, percent

_REM = 100 / 16  # of an inch of a figure on the page: 100 pixels, of which the letters take 16


def write_transfers(
    matrix: TransferMatrix,
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write the report of a transfer matrix into `folder`, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `transfer_results`), `transfers.csv` (a
    row for each source and target), `adversarial/` (one saved `AttackResult` per source, as the attack left it) and `figures/`.
    The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` for a matrix without rows.
    """
    if not matrix.rows:
        raise InputError("there are no examples to report")
    document = transfer_results(
        matrix, title=title, data_name=data_name, config=config, data_fingerprint=data_fingerprint, class_names=class_names,
        command=command,
    )  # fmt: skip
    page, pictures = _page(matrix, document, class_names)
    folders = distinct("adversarial/" + file_name(row.name) for row in matrix.rows)
    results = {name: row.result for name, row in zip(folders, matrix.rows, strict=True) if row.result is not None}
    return publish(Path(folder), page, document, pictures, results, {"transfers.csv": _table(matrix)})


def transfer_results(
    matrix: TransferMatrix,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config, verdict: as in `saddlepoint.report.results`. The
    rest is `TransferMatrix.to_dict`: attack, threat, goal, equal_distance, samples (how many), and

    | key | content |
    | --- | --- |
    | models | a list of {name, settings, clean_accuracy}, the targets |
    | sources | a list of {name, how, median_l2, median_linf}: by what its examples were made, and how large the changes are |
    | cells | a list of {source, target, count, fooled, crafted, both, same, rate, low, high}: see `Transfer`; 95 % limits |
    """
    document: dict[str, Any] = plain({
        **frame(
            matrix.x, title=title, complete=matrix.complete, command=command, seed=matrix.seed, data_name=data_name,
            data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "verdict": _verdict(matrix),
        **matrix.to_dict(),
    })  # fmt: skip
    return document


def _verdict(matrix: TransferMatrix) -> str:
    """A paragraph; names of models are in backquotes."""
    crafted = [row.name for row in matrix.crafted]
    across = [matrix.cells[s, t] for s in crafted for t in matrix.targets if s != t and matrix.cells[s, t].count]
    if not across:
        return "There is no pair of different models that both get some samples right."
    words = [f"On average, {percent(_mean(across))} of the examples made on one model fool another that is right on the input."]
    noise = [matrix.cells[row.name, t] for row in matrix.noise for t in matrix.targets]
    if noise:
        words.append(f"Noise of the same size fools {percent(_mean(noise))}.")
    for role, members, best, worst in (
        ("target", matrix.targets, "is the easiest to fool from elsewhere", "the hardest"),
        ("source", crafted, "makes the examples that carry over best", "those that carry over least"),
    ):
        means = {name: _mean([c for c in across if getattr(c, role) == name]) for name in members}
        means = {name: value for name, value in means.items() if math.isfinite(value)}
        high, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        if len(means) > 2 and means[high] > means[low]:
            words.append(f"`{high}` {best} ({percent(means[high])}), `{low}` {worst} ({percent(means[low])}).")
    if not matrix.complete:
        words.append("The run was interrupted: sources that were not finished are missing.")
    return " ".join(words)


def _mean(cells: Sequence[Transfer]) -> float:
    rates = [cell.rate for cell in cells if cell.count]
    return sum(rates) / len(rates) if rates else math.nan


def _page(matrix: TransferMatrix, document: dict[str, Any], class_names: Sequence[str]) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    heat = figures.transfers(matrix)
    page = environment().get_template("transfers.html.j2").render(
        document=document,
        matrix=matrix,
        heat=Markup(figures.to_svg(heat, "transfers").replace("<svg", '<svg style="max-width: none"', 1)),
        width=f"{heat.get_figwidth() * _REM:.3g}",
        tasks=listed(f"`{name}`" for name in own) if (own := _other_tasks(matrix)) else "",
        **drawing(matrix.models, class_names),
    )  # fmt: skip
    return page, {"transfers.png": figures.to_png(heat)}


def _other_tasks(matrix: TransferMatrix) -> list[str]:
    """Models whose labels aren't those of the first."""
    first = matrix.labels[matrix.targets[0]]
    return [name for name in matrix.targets if not bool((matrix.labels[name] == first).all())]


def _table(matrix: TransferMatrix) -> str:
    """A row for each source and target, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["source", "target", "count", "fooled", "rate", "low", "high", "crafted", "both", "same"])
    for cell in matrix.cells.values():
        numbers = [cell.count, cell.fooled, cell.rate, *cell.interval, cell.crafted, cell.both]
        writer.writerow([cell.source, cell.target, *numbers, "" if cell.same is None else cell.same])
    return stream.getvalue()
