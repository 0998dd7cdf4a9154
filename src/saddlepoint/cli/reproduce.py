"""`saddlepoint reproduce`: run papers' experiments again, and say whether the figures hold."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import each
from saddlepoint.reproduce import Context, Entry, Figure, Outcome, find, find_data

SCHEMA = 1
_output = Console(highlight=False, emoji=False)
_messages = Console(stderr=True, highlight=False, emoji=False)


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Entries such as R1 R5, or R1,R5; all without.", show_default=False)
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Say what the entries are, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The outcomes as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option(help="Fewer samples and epochs, judged by looser ranges.")] = False,
    seed: Annotated[int, typer.Option(help="Source of all randomness.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; the ranges were calibrated with one.")] = 1,
    root: Annotated[
        Path | None, typer.Option(help="Where MNIST lies; default SADDLEPOINT_DATA or the user's cache, else digits stand in.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Re-run papers' figures. The exit status is 0 when all are inside their ranges, and 1 otherwise.

    Entries that judge published weights are skipped where these aren't at hand; asked for by name, they count as failed.
    """
    entries = find(each(names or ()))
    if listing:
        _list(entries, as_json)
        return
    data, note = find_data(root)
    context = Context(data=data, note=note, seed=seed, threads=threads, quick=quick)
    outcomes, complete = _run(entries, context)
    passed = all(outcome.passed or (outcome.missing and not names) for outcome in outcomes)
    if as_json:
        print(json.dumps(document(outcomes, context, passed=passed and complete, complete=complete), indent=1, allow_nan=False))
    else:
        _output.print(table(outcomes))
        for line in remarks(outcomes, context):
            _output.print(line, markup=False, soft_wrap=True)
    if not complete:
        raise typer.Exit(130)
    if not passed:
        raise typer.Exit(1)


def document(outcomes: list[Outcome], context: Context, *, passed: bool, complete: bool) -> dict[str, object]:
    """The JSON of a run. `passed`: all entries ran but those that may be skipped, and no figure lies outside its range."""
    return {
        "schema": SCHEMA,
        "passed": passed,
        "complete": complete,
        "data": {"name": context.data.name, "source": context.data.source, "fingerprint": context.data.fingerprint()},
        "stand_in": context.stand_in,
        "note": context.note,
        "quick": context.quick,
        "seed": context.seed,
        "threads": context.threads,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "outcomes": [outcome.document() for outcome in outcomes],
    }


def table(outcomes: list[Outcome]) -> Table:
    """A row for each figure."""
    found = Table("id", "figure")
    for name in ("ours", "paper", "must", "goal"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("verdict")
    found.add_column("seconds", justify="right")
    for outcome in outcomes:
        for number, figure in enumerate(outcome.figures):
            first = number == 0
            style = {True: "green", False: "bold red", None: "dim"}[figure.inside]
            found.add_row(
                outcome.id if first else "",
                escape(figure.name),
                *(escape(cell) for cell in cells(figure)),
                f"[{style}]{figure.verdict}[/]",
                f"{outcome.seconds:.0f}" if first else "",
                end_section=number == len(outcome.figures) - 1,
            )
    return found


def cells(figure: Figure) -> tuple[str, str, str, str]:
    """Ours, the paper's, the range and the goal, as text. A star marks a paper's figure that has a note."""
    low_high = "" if figure.must is None else f"{_text(figure.must[0], figure.unit)} to {_text(figure.must[1], figure.unit)}"
    paper = _text(figure.paper, figure.unit) + ("*" if figure.paper_note else "")
    return _text(figure.ours, figure.unit), paper, low_high, _text(figure.goal, figure.unit)


def remarks(outcomes: list[Outcome], context: Context) -> list[str]:
    """What the reader of the table must know."""
    lines = [
        f"* {outcome.id}, {figure.name}: the paper's figure is {figure.paper_note}"
        for outcome in outcomes
        for figure in outcome.figures
        if figure.paper_note
    ]
    lines += [f"{outcome.id} was not run: {outcome.missing}." for outcome in outcomes if outcome.missing]
    if context.stand_in:
        lines.append(
            f"STAND-IN: these figures were measured on {context.data.name}, not on the papers' data. The accepted ranges are "
            "looser ones of this project, and the papers' figures are shown for orientation only."
        )
    if context.note:
        lines.append(f"Why: {context.note}")
    if context.quick:
        lines.append("QUICK: samples and training were cut, so the ranges are looser and say nothing about the papers.")
    lines += [f"Other than the settings say: {departure}." for departure in context.departures]
    outside = [f"{outcome.id} {figure.name}" for outcome in outcomes for figure in outcome.figures if figure.inside is False]
    judged = sum(figure.inside is not None for outcome in outcomes for figure in outcome.figures)
    lines.append(f"{judged - len(outside)} of {judged} judged figures are inside their ranges.")
    return lines + [f"outside: {name}" for name in outside]


def _run(entries: tuple[Entry, ...], context: Context) -> tuple[list[Outcome], bool]:
    """What was finished, and whether it is all; Ctrl-C keeps what there is."""
    outcomes: list[Outcome] = []
    try:
        for entry in entries:
            _messages.print(f"{entry.id}  {entry.title} ({context.data.name}) ...", markup=False)
            outcomes.append(entry(context))
    except KeyboardInterrupt:
        _messages.print(f"interrupted after {len(outcomes)} of {len(entries)} entries")
        return outcomes, False
    return outcomes, True


def _list(entries: tuple[Entry, ...], as_json: bool) -> None:
    rows = [{"id": e.id, "title": e.title, "reference": e.reference, "setting": e.setting} for e in entries]
    if as_json:
        print(json.dumps({"schema": SCHEMA, "entries": rows}, indent=1))
        return
    for row in rows:
        _output.print(f"[bold]{row['id']:<4}[/] {escape(row['title'])}")
        _output.print(f"     {escape(row['setting'])}\n     {escape(row['reference'])}", soft_wrap=True)


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if unit == "share" else f"{value:.3g}"
