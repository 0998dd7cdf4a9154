"""`saddlepoint detect`: fit detectors, and see what they notice, what they mistake, and what gets past them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    DataText,
    Device,
    JsonFile,
    Mean,
    ModelText,
    NormText,
    Root,
    Seed,
    Std,
    console,
    each,
    make_way,
    warn_of_random_weights,
    write_json,
)
from saddlepoint.detectors import Samples
from saddlepoint.engine import Budget
from saddlepoint.errors import InputError
from saddlepoint.evaluate import detection
from saddlepoint.evaluate.detection import SUGGESTED, Detection
from saddlepoint.report.detections import write_detection
from saddlepoint.report.words import percent
from saddlepoint.taxonomy import Norm

FOLDER = "detectors"


def detect(
    context: typer.Context,
    model: ModelText,
    data: DataText = "digits",
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as kernel-density:bandwidth=1 or energy, with commas between; or repeat. "
            f"Default: {', '.join(SUGGESTED)}. See saddlepoint list detectors.",
            show_default=False,
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Whose examples to notice; with commas, or repeat. Default: fgsm, pgd.", show_default=False),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option(help="Attacks whose examples are shown to detectors that learn from them; default the first one."),
    ] = None,
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Sizes of the perturbation, such as 0.1,0.2.")] = "0.1",
    adaptive: Annotated[bool, typer.Option(help="Attack model and detector together, too.")] = True,
    fpr: Annotated[float, typer.Option(help="False-positive rate that the adaptive adversary's threshold is for.")] = 0.05,
    passes: Annotated[int | None, typer.Option(min=1, help="At most so many passes a sample in each attack.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Judge on the N test samples after those that set thresholds; default all others.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Test samples that thresholds are chosen on; default a third.")
    ] = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    json: JsonFile = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the fitted detectors.")] = Path("reports/detect"),
    config: ConfigFile = None,
) -> None:
    """Fit detectors on training samples, set thresholds on some test samples, and judge on others: a report with every figure.

    Detectors are judged on attacks that they saw and didn't see, on clean inputs that look odd, and on an adversary who knows
    them. What is fitted is kept: sp.detectors.load("…/energy.safetensors", model).
    """
    chosen, shown = each(detector or SUGGESTED), each(attack or ("fgsm", "pgd"))
    context.params["detector"], context.params["attack"] = chosen, shown  # the configuration that is written shows them
    found = inputs.dataset(data, root)
    if found.train is None:
        raise InputError(f"{found.name} has no training part here ({found.source}), and detectors are fitted on one")
    threats = inputs.threats(norm, eps)
    attacks = {
        text if len(threats) == 1 else f"{text} {threat.largest_eps:g}": (inputs.attack(text, norm, passes), threat)
        for text in shown
        for threat in threats
    }
    name, victim = inputs.model(model, found, mean=mean, std=std, device=device)
    warn_of_random_weights([model])
    make_way(json)
    learnt = None if seen is None else [key for key in attacks if key.rpartition(" ")[0] in each([seen]) or key in each([seen])]
    if learnt is not None and not learnt:
        raise InputError(f"--seen {seen} names none of the attacks: {', '.join(attacks)}")
    parts = Samples.split(found.train, found.test, calibration, samples)
    told: set[str] = set()

    def write(so_far: Detection) -> Path:
        report = write_detection(
            so_far, out, title=f"Detectors for {name}", data_name=found.name, data_fingerprint=found.fingerprint(),
            class_names=found.class_names, config=configuration.ran(context), command=context.obj or "", model_name=name,
        )  # fmt: skip
        configuration.write(context, out)
        write_json(json, so_far.to_dict())
        return report

    def on_row(so_far: Detection) -> None:
        for row in so_far.rows:
            if row.name not in told:
                told.add(row.name)
                row.detector.save(out / FOLDER / f"{_file(row.name)}.safetensors")
                evaded = "" if not row.bypasses else f", evaded by who knows it for {percent(row.evasion_rate)}"
                console.print(f"{row.name}: mean AUC {row.mean_auc:.3f}{evaded}", markup=False)
        if so_far.rows:
            write(so_far)

    budget = None if passes is None else Budget(passes=passes)
    judged = detection.detect(
        victim, parts, attacks, chosen, seen=learnt, adaptive=adaptive, seed=seed, fpr=fpr, budget=budget, on_row=on_row
    )
    if not judged.rows:
        for who, why in judged.failed:
            console.print(f"{who} could not be fitted: {why}", markup=False)
        if judged.complete:
            raise InputError("none of the detectors could be fitted")
        console.print("interrupted before the first detector was finished")
        raise typer.Exit(130)
    report = write(judged)
    _show(judged)
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)", soft_wrap=True)
    console.print(f"fitted detectors: [bold]{escape(str(out / FOLDER))}[/]", soft_wrap=True)
    if not judged.complete:
        console.print("interrupted: the report holds what was finished")
        raise typer.Exit(130)


def _file(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)


def _show(judged: Detection) -> None:
    table = Table(title="area under the ROC curve for each attack, and what gets past who knows the detector")
    table.add_column("detector", overflow="fold")
    for one in judged.examples:
        table.add_column(escape(one.name + ("" if one.seen else "*")), justify="right")
    for head in ("flags clean", "flags noise", "evaded"):
        table.add_column(head, justify="right")
    for row in judged.ranking:
        areas = ["-" if one.auc is None else f"{one.auc:.3f}" for one in row.detected]
        alarms = [percent(row.false_positives[how][detection.RATES[1]]) for how in ("clean", "noise")]
        table.add_row(escape(row.name), *areas, *alarms, percent(row.evasion_rate) if row.bypasses else "-")
    console.print(table)
    console.print("* examples of these attacks were not shown in fitting; clean inputs are flagged at the threshold for 5 %")
    console.print(judged.verdict.replace("`", ""), markup=False)
    for row in judged.ranking:
        for note in row.notes:
            console.print(f"note on {row.name}: {note}", markup=False)
    for name, why in judged.failed:
        console.print(f"{name} could not be fitted: {why}", markup=False)
