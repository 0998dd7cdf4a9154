"""`saddlepoint defend`: train, protect and attack a network in several ways, and keep the one that stands the most."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from saddlepoint import data as data_module
from saddlepoint import zoo
from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    BatchSize,
    DataText,
    Device,
    JsonFile,
    Mean,
    ModelText,
    NormText,
    Root,
    Samples,
    Seed,
    Std,
    console,
    each,
    make_way,
    warn_of_random_weights,
    write_json,
)
from saddlepoint.errors import InputError
from saddlepoint.evaluate.tournament import SUGGESTED, Tournament
from saddlepoint.evaluate.tournament import defend as run_defend
from saddlepoint.models import Model
from saddlepoint.report.defenses import WEIGHTS, write_defenses
from saddlepoint.report.words import percent
from saddlepoint.taxonomy import Norm


def defend(
    context: typer.Context,
    model: ModelText,
    data: DataText = "digits",
    defense: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as trades:beta=1 or pgd-training+jpeg, with commas between; or repeat. "
            f"Default: {', '.join(SUGGESTED)}.",
            show_default=False,
        ),
    ] = None,
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Size of the perturbation, in training and evaluation, such as 8/255.")] = "0.1",
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    from_weights: Annotated[
        bool, typer.Option("--from-weights", help="Begin with the model's weights; else all networks are trained anew.")
    ] = False,
    independent: Annotated[
        bool, typer.Option(help="Train a second undefended network, whose examples are shown to all defenses as well.")
    ] = True,
    effort: Annotated[
        Literal["quick", "standard", "thorough"], typer.Option(help="Of the attacks, as in saddlepoint evaluate.")
    ] = "standard",
    samples: Samples = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the trainings.")] = 128,
    attack_batch_size: BatchSize = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    json: JsonFile = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the winner's weights, and what is needed to go on.")] = Path(
        "reports/defend"
    ),
    config: ConfigFile = None,
) -> None:
    """Train and protect a network in several ways, attack each result, and write a report: who keeps how much, at what price.

    After an interruption, the same command goes on where it stopped.
    """
    chosen = each(defense or SUGGESTED)
    context.params["defense"] = chosen  # the configuration that is written shows them
    found = inputs.dataset(data, root)
    if found.train is None:
        raise InputError(f"{found.name} has no training part here ({found.source})")
    threat, *more = inputs.threats(norm, eps)
    if more:
        raise InputError("defend takes one eps: networks are trained against it")
    name, given = inputs.model(model, found, mean=mean, std=std, device=device)
    if not isinstance(given, Model):
        raise InputError("defend trains a single network")
    make_way(json)
    begin = _beginning(model, given, found, from_weights)
    if from_weights:
        warn_of_random_weights([model])
        console.print(
            f"every training begins with the weights of {name}, and the undefended network is {name} as it is", markup=False
        )
    else:
        console.print(
            f"every network is trained anew from the architecture of {name} (--from-weights keeps its weights)", markup=False
        )
    shown: set[str] = set()

    def write(tournament: Tournament) -> Path:
        report = write_defenses(
            tournament, out, title=f"Defenses of {name}", data_name=found.name, data_fingerprint=found.fingerprint(),
            class_names=found.class_names, config=configuration.ran(context), command=context.obj or "",
            architecture=_architecture(model, found), again=_again(tournament, context.params, out),
        )  # fmt: skip
        configuration.write(context, out)
        write_json(json, tournament.to_dict())
        return report

    def on_row(tournament: Tournament) -> None:
        write(tournament)
        for row in tournament.rows:
            if row.name not in shown:
                shown.add(row.name)
                console.print(
                    f"{row.name}: clean {percent(row.clean_accuracy)}, robust {percent(row.robust_accuracy)} at most",
                    markup=False,
                )

    tournament = run_defend(
        begin, found.train, inputs.samples(found, samples), threat, chosen, effort, epochs=epochs,
        from_weights=from_weights, independent=independent,
        folder=out, seed=seed, eval_batch_size=attack_batch_size, progress=True, on_row=on_row, learning_rate=learning_rate,
        batch_size=batch_size,
    )  # fmt: skip
    if not tournament.rows:
        console.print(
            f"interrupted before the undefended network was finished; the same command goes on (in {escape(str(out))})"
        )
        raise typer.Exit(130)
    report = write(tournament)
    _show(tournament)
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)", soft_wrap=True)
    console.print(f"weights of {escape(tournament.winner.name)}: [bold]{escape(str(out / WEIGHTS))}[/]", soft_wrap=True)
    if not tournament.complete:
        console.print("interrupted: the report holds what was finished; the same command goes on where it stopped")
        raise typer.Exit(130)


def _beginning(text: str, given: Model, found: data_module.Dataset, from_weights: bool) -> Model | Callable[[int], Model]:
    """The model, or, for a network of the zoo that is to be trained anew, how it is made from a seed."""
    if from_weights or not text.startswith("zoo:"):
        return given

    def begin(seed: int) -> Model:
        fresh = copy.deepcopy(given)
        (net,) = fresh.networks()
        made = zoo.build(_zoo_name(text), num_classes=found.num_classes, in_shape=tuple(found.test.x.shape[1:]), seed=seed)
        net.load_state_dict(made.state_dict())
        return fresh

    return begin


def _zoo_name(text: str) -> str:
    return text.removeprefix("zoo:").partition("+")[0]


def _architecture(text: str, found: data_module.Dataset) -> str:
    """Python that makes the untrained network: an expression, and above it what that needs."""
    if text.startswith("zoo:"):
        shape = tuple(found.test.x.shape[1:])
        return f"sp.zoo.build({_zoo_name(text)!r}, num_classes={found.num_classes}, in_shape={shape})"
    file, _, name = text.rpartition(":")
    return f"from {Path(file).stem} import {name}  # the network, or what makes it: then {name}()\n{name}"


def _again(tournament: Tournament, options: Mapping[str, object], out: Path) -> str:
    """The command that evaluates the winner; empty where a command line can't name it."""
    winner, model = tournament.winner, str(options["model"])
    if not model.startswith("zoo:") or winner.model is not winner.network:
        return ""
    words = ["saddlepoint", "evaluate", "--model", f"zoo:{_zoo_name(model)}+{out / WEIGHTS}", "--effort", "standard"]
    for key in ("data", "norm", "eps", "mean", "std", "root"):
        if options.get(key) is not None:
            words += [f"--{key}", str(options[key])]
    return shlex.join(words)


def _show(tournament: Tournament) -> None:
    table = Table(title=f"what is left of the accuracy ({tournament.threat}), the most robust first")
    table.add_column("defense", overflow="fold")
    for head in ("clean", "naive", "adaptive", "transfer", "robust", "training"):
        table.add_column(head, justify="right", no_wrap=True)
    tied = {row.name for row in tournament.tied}
    for row in tournament.ranking:
        transfer = min((share for share in map(row.transfer_accuracy, row.transferred) if share is not None), default=None)
        shares = (row.clean_accuracy, row.naive_accuracy, row.adaptive_accuracy, transfer, row.robust_accuracy)
        name = row.name + (" (tie)" if row.name in tied else "")
        table.add_row(escape(name), *map(percent, shares), f"{row.training.seconds:.1f} s")
    console.print(table)
    console.print(tournament.verdict.replace("`", ""), markup=False)
    for row in tournament.ranking:
        for note in row.notes:
            console.print(f"note on {row.name}: {note}", markup=False)
    for name, why in tournament.failed:
        console.print(f"{name} could not be made: {why}", markup=False)
