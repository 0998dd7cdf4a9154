"""`saddlepoint distance`: how far samples are from the decision boundary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from saddlepoint.attacks.minimal import MINIMAL
from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    BatchSize,
    DataText,
    Device,
    Mean,
    ModelTexts,
    NormText,
    Root,
    Samples,
    Seed,
    Std,
    console,
    each,
    warn_of_random_weights,
)
from saddlepoint.engine import Budget
from saddlepoint.errors import InputError
from saddlepoint.evaluate import Distances
from saddlepoint.evaluate import distance as find_distance
from saddlepoint.evaluate.distances import PASSES
from saddlepoint.report.words import length
from saddlepoint.taxonomy import Norm

_LEVELS = (0.05, 0.5, 0.95)


def distance(
    context: typer.Context,
    model: ModelTexts,
    data: DataText = "digits",
    norm: NormText = Norm.L2,
    attack: Annotated[
        str, typer.Option(help="One that looks for the smallest perturbation, such as ddn:steps=100 or fmn.")
    ] = MINIMAL,
    targeted: Annotated[
        str | None, typer.Option(help="A class, or: random, next, least_likely, untargeted. Default: the attack's own.")
    ] = None,
    own_decision: Annotated[
        bool, typer.Option("--own-decision", help="Measure from the model's own answers, right or wrong, not the true classes.")
    ] = False,
    samples: Samples = None,
    batch_size: BatchSize = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help=f"At most so many passes (forward and backward) a sample; default {PASSES} for {MINIMAL}."),
    ] = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/distance"),
    config: ConfigFile = None,
) -> None:
    """Measure how far samples are from the decision boundary, and write a report: distribution, pictures, robustness."""
    found = inputs.dataset(data, root)
    chosen = MINIMAL if attack.lower() == MINIMAL else inputs.attack(attack)
    goal = inputs.goal(targeted)
    models = inputs.models(each(model), found, mean=mean, std=std, device=device)
    warn_of_random_weights(each(model))
    split = inputs.samples(found, samples)
    budget = None if passes is None else Budget(passes=passes)
    measured: dict[str, Distances] = {}
    for name, victim in models.items():
        measured[name] = find_distance(
            victim, split.x, None if own_decision else split.y, norm, chosen,
            goal=goal, budget=budget, batch_size=batch_size, seed=seed, progress=True,
        )  # fmt: skip
        if not measured[name].complete:
            break
    measured = {name: distances for name, distances in measured.items() if len(distances)}
    if not measured:
        raise InputError("interrupted before the first sample was finished: there is nothing to report")
    from saddlepoint.report import write_distances

    report = write_distances(
        measured, models, out, title=f"{norm.value} distance to the boundary: {', '.join(measured)}", data_name=found.name,
        data_fingerprint=found.fingerprint(), class_names=found.class_names, config=configuration.ran(context),
        command=context.obj, seed=seed,
    )  # fmt: skip
    configuration.write(context, out)
    _show(measured)
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)")
    if len(measured) < len(models) or not all(distances.complete for distances in measured.values()):
        done = ", ".join(f"{len(distances)} of {len(split)} on {name}" for name, distances in measured.items())
        console.print(f"interrupted: the report holds the samples that were finished ({done})", markup=False)
        raise typer.Exit(130)


def _show(measured: Mapping[str, Distances]) -> None:
    """Quantiles and average robustness as a table."""
    norm = next(iter(measured.values())).norm
    table = Table(title=f"{norm} size of change that is enough for a share of the samples (upper bounds)")
    table.add_column("network")
    for title in ("attacked", "not found", *("half" if level == 0.5 else f"{level:.0%}" for level in _LEVELS), "rho"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, distances in measured.items():
        values = [quantile.value for quantile in distances.quantiles(_LEVELS)]
        table.add_row(
            escape(name),
            str(int((distances.found | distances.missing).sum())),
            str(int(distances.missing.sum())),
            *(length(value) for value in values),
            _rho(distances),
        )
    console.print(table)
    for name, note in dict.fromkeys((name, note) for name, d in measured.items() for note in d.result.notes):
        console.print(f"note on {name}: {note}", markup=False)


def _rho(distances: Distances) -> str:
    low, high = distances.rho_interval
    if math.isnan(distances.rho):
        return "–"
    return f"{distances.rho:#.3g}" + (f" ± {(high - low) / 2:.1g}" if high >= low else "")
