"""`saddlepoint attack`: one attack on one model, here or behind an HTTP endpoint; with a report where queries count."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.minimal import MINIMAL, for_budget
from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs, remote
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    AccessText,
    BatchSize,
    DataText,
    Device,
    Mean,
    NormText,
    OptionalModelText,
    Passes,
    Queries,
    Root,
    Samples,
    Seed,
    Std,
    console,
    warn_of_random_weights,
)
from saddlepoint.data import Dataset, Split
from saddlepoint.engine import AttackResult, Budget, Interrupted
from saddlepoint.errors import InputError, ModelError
from saddlepoint.evaluate import QueryCurve, Trace, query_curve
from saddlepoint.models import Classifier
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Minimize, Threat

SMALLEST = "smallest"  # in place of an eps
_TRACE = "trace.safetensors"  # beside the result, for the query curve of a resumed run


def attack(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Such as pgd, pgd:steps=100 or minimal. See: saddlepoint list attacks.")],
    model: OptionalModelText = None,
    data: DataText = "digits",
    norm: NormText = Norm.LINF,
    eps: Annotated[
        str, typer.Option(help=f"Size of the perturbation, such as 8/255; {SMALLEST} looks for the smallest one.")
    ] = "0.1",
    targeted: Annotated[
        str | None, typer.Option(help="A class, or: random, next, least_likely, all, untargeted. Default: the attack's own.")
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    passes: Passes = None,
    queries: Queries = None,
    access: AccessText = None,
    url: remote.Url = None,
    classes: remote.Classes = None,
    gives: remote.GivesText = None,
    labels: remote.Labels = None,
    header: remote.Header = None,
    batch_rows: remote.BatchRows = None,
    concurrency: remote.Concurrency = None,
    rate: remote.Rate = None,
    limit: remote.Limit = None,
    cache: remote.Cache = False,
    resume: Annotated[
        Path | None, typer.Option(help="The result folder of a run with the same settings that was stopped: go on with it.")
    ] = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="Folder for the adversarial inputs and all figures.")] = Path("reports/attack"),
    config: ConfigFile = None,
) -> None:
    """Run one attack, print its summary and keep the adversarial inputs; with a report where queries count."""
    remote.one_of(
        model, url, {"mean": mean, "std": std, "device": device, "access": access},
        classes=classes, gives=gives, labels=labels, header=header, batch_rows=batch_rows, concurrency=concurrency, rate=rate,
        limit=limit, cache=cache,
    )  # fmt: skip
    found = inputs.dataset(data, root)
    threat, budget = _threat(norm, eps), Budget(passes=passes, queries=queries)
    if threat.minimizes and targeted == "all":
        raise InputError(f"--eps {SMALLEST} needs one target a sample: --targeted all has several")
    chosen = for_budget(norm, budget) if name.lower() == MINIMAL else inputs.attack(name, norm)
    goal, split = inputs.goal(targeted), inputs.samples(found, samples)
    earlier = None if resume is None else AttackResult.load(resume)
    trace = Trace.load(resume / _TRACE) if resume is not None and (resume / _TRACE).is_file() else Trace()
    victim: Classifier
    if url is not None:
        title, victim = remote.model(
            url, found, classes=classes, gives=gives, labels=labels, header=header, batch_rows=batch_rows,
            concurrency=concurrency, rate=rate, limit=limit, cache=cache,
        )  # fmt: skip
    else:
        assert model is not None
        title, victim = inputs.model(model, found, mean=mean, std=std, device=device, access=access)
        warn_of_random_weights([model])
    with remote.closing(victim):
        stopped: Interrupted | ModelError | None = None
        try:
            result = run_attack(
                victim, split.x, split.y, chosen, threat, goal, batch_size=batch_size, seed=seed, budget=budget,
                progress=True, callback=trace if threat.minimizes else None, resume=earlier,
            )  # fmt: skip
        except (Interrupted, ModelError) as stop:
            if not isinstance(stop.result, AttackResult) or not len(stop.result):
                hint = "; with a small --batch-size some finish early" if isinstance(stop, Interrupted) else ""
                console.print(f"no sample was finished, so nothing is kept{hint}")
                raise
            result, stopped = stop.result, stop
        folder = _fresh(out / "result")
        result.save(folder)
        if threat.minimizes:
            trace.save(folder / _TRACE, result)
        configuration.write(context, folder)
        console.print(escape(result.summary()))
        if queries is not None or min(victim.access, chosen.declaration.access) < Access.GRADIENTS:
            _report(context, query_curve(result, trace), victim, title, found, split, folder, seed)
        console.print(f"\nadversarial inputs: [bold]{escape(str(folder))}[/]   (sp.AttackResult.load)")
        if stopped is not None:
            done = f"{len(torch.unique(result.index))} of {len(split)} samples are finished"
            console.print(f"{done}; go on with: {context.obj} --resume {folder}", markup=False, soft_wrap=True)
        if isinstance(stopped, Interrupted):
            raise typer.Exit(130)
        if stopped is not None:
            raise stopped


def _threat(norm: str, eps: str) -> Threat:
    if eps.strip().lower() == SMALLEST:
        return Minimize(norm)
    threat, *more = inputs.threats(norm, eps)
    if more:
        raise InputError("attack takes one eps; saddlepoint evaluate takes several")
    return threat


def _fresh(path: Path) -> Path:
    """The path, or the next free numbered one: finished results are not overwritten."""
    candidate, count = path, 2
    while candidate.exists():
        candidate, count = path.with_name(f"{path.name}-{count}"), count + 1
    return candidate


def _report(
    context: typer.Context,
    curve: QueryCurve,
    victim: Classifier,
    name: str,
    found: Dataset,
    split: Split,
    folder: Path,
    seed: int,
) -> None:
    from saddlepoint.report import write_queries

    report = write_queries(
        {curve.attack: curve}, victim, split.x, folder, title=f"{curve.attack} against {name}", model_name=name,
        data_name=found.name, data_fingerprint=found.fingerprint(), class_names=found.class_names,
        config=configuration.ran(context), command=context.obj or "", seed=seed,
    )  # fmt: skip
    console.print(f"\n{escape(curve.summary())}")
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)")
