"""The commands. Each turns words into objects, calls the library, and says where the results are."""

from __future__ import annotations

import json
import shlex
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saddlepoint import data as data_module
from saddlepoint import zoo
from saddlepoint.attacks import find
from saddlepoint.cli import campaigns, inputs
from saddlepoint.cli import config as configuration
from saddlepoint.cli.attack import attack
from saddlepoint.cli.cascade import Cascade
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.defend import defend
from saddlepoint.cli.detect import detect
from saddlepoint.cli.distance import distance
from saddlepoint.cli.options import (
    BatchSize,
    DataText,
    Device,
    Mean,
    ModelText,
    ModelTexts,
    NormText,
    Passes,
    Root,
    Samples,
    Seed,
    Std,
    console,
    each,
    warn_of_random_weights,
)
from saddlepoint.cli.reproduce import reproduce
from saddlepoint.cli.transfer import substitute, transfer
from saddlepoint.cli.verify import verify
from saddlepoint.defenses import RECIPES, Adversarial, CropAndFlip, EpochRecord, Hardening, Objective, Standard, Training
from saddlepoint.defenses import defense as trained_by
from saddlepoint.defenses import harden as run_harden
from saddlepoint.defenses import train as run_train
from saddlepoint.defenses.distributed import processes
from saddlepoint.detectors import DETECTORS
from saddlepoint.engine import Budget
from saddlepoint.errors import InputError, SaddlepointError, SaddlepointWarning, UnknownNameError
from saddlepoint.evaluate import Cell, Comparison, Evaluation, compare
from saddlepoint.goals import LOSSES
from saddlepoint.models import Model
from saddlepoint.report.words import listed
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import size

app = typer.Typer(
    help="Attack and harden classifiers, and show what was found. For testing your own models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
listing = typer.Typer(help="What there is: attacks, data, networks, losses.", no_args_is_help=True)
fetching = typer.Typer(help="Datasets on this computer.", no_args_is_help=True)
app.add_typer(listing, name="list")
app.add_typer(fetching, name="data")
errors = Console(stderr=True, highlight=False, emoji=False)
_ATTACKS = ("uniformnoise", "fgm", "pgd")


def _version(wanted: bool) -> None:
    if wanted:
        from saddlepoint import __version__

        console.print(f"saddlepoint {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of every command; `run` looks at --debug wherever it stands."""


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/demo"),
    seed: Seed = 0,
    config: ConfigFile = None,
) -> None:
    """Train and attack two small networks on handwritten digits, and write a report with pictures."""
    from saddlepoint.cli.demo import demo as run_demo

    result, digits, trainings = run_demo(seed=seed, console=console)
    _report(context, result, digits, out, "An undefended and a hardened network under attack", seed, trainings)


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelTexts,
    data: DataText = "digits",
    norm: NormText = Norm.LINF,
    eps: Annotated[
        str, typer.Option(help="Sizes of the perturbation, such as 2/255,4/255; of several norms, such as linf:8/255,l2:0.5.")
    ] = "0.05,0.1,0.2",
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Such as pgd:steps=100 or pgd*5 (restarts); several with commas, or repeat. Default: {', '.join(_ATTACKS)}.",
            show_default=False,
        ),
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    passes: Passes = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    effort: Annotated[
        Literal["quick", "standard", "thorough"] | None,
        typer.Option(help="Instead of --attack: a cascade of attacks, for a figure to rely on; goes on where it was stopped."),
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(help="With --effort: exit status 1 if robust accuracy is below, such as 0.6.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="With --at-least: a JUnit XML file for CI.")] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="With --effort: look for the smallest perturbations too, for every size's figure.")
    ] = False,
    certify: Annotated[
        float | None,
        typer.Option(
            help="With --effort: prove what stands, in so many seconds a sample at most; campaigns go on with that too."
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="With --effort: another model, whose gradients are tried where this one's mislead; with commas, or repeat."
        ),
    ] = None,
    export: Annotated[
        Literal["png", "npz"] | None, typer.Option(help="With --effort: write the broken samples as an adversarial set.")
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(help="With --effort: a CSV with a header and a row for each test sample. Each column makes subgroups."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="With --effort: write all figures to this file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --effort: only say what it would cost in passes, time and memory.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/evaluate"),
    config: ConfigFile = None,
) -> None:
    """Attack models at several eps, and write a report: accuracies, security curve, pictures, results.json."""
    only = {
        "--at-least": at_least is not None, "--junit": junit is not None, "--curve": curve, "--source": bool(source),
        "--certify": certify is not None, "--export": export is not None, "--groups": groups is not None,
        "--json": json is not None, "--dry-run": dry_run,
    }  # fmt: skip
    if effort is None and any(only.values()):
        given = listed(name for name, here in only.items() if here)
        raise InputError(f"{given} only with a cascade of attacks: add --effort standard")
    if effort is not None and attack:
        raise InputError("--attack names single attacks, --effort brings a cascade of its own: leave out one of them")
    if effort is not None and passes is not None:
        raise InputError("--passes limits single attacks; --effort says how much the cascade tries")
    if junit is not None and at_least is None:
        raise InputError("--junit says whether --at-least is reached: add --at-least 0.6, for instance")
    if effort is None:
        attack = context.params["attack"] = attack or list(_ATTACKS)  # the configuration that is written shows them
    found = inputs.dataset(data, root)
    metadata = inputs.groups(groups, found, samples) if groups is not None else {}
    threats = inputs.threats(norm, eps)
    chosen = [inputs.attack(text, norm, passes) for text in each(attack or [])]
    models = inputs.models(each(model), found, mean=mean, std=std, device=device)
    warn_of_random_weights(each(model))
    split = inputs.samples(found, samples)
    if effort is not None:
        others = inputs.models(each(source or []), found, mean=mean, std=std, device=device)

        def report(evaluations: list[tuple[str, Evaluation]]) -> Path:
            from saddlepoint.report import write_evaluations  # matplotlib

            return write_evaluations(
                evaluations, models, out, title=f"Robustness of {', '.join(models)}", data_name=found.name, seed=seed,
                data_fingerprint=found.fingerprint(), class_names=found.class_names, config=configuration.ran(context),
                command=context.obj, groups=metadata,
            )  # fmt: skip

        cascade = Cascade(
            models, split, threats, effort, out, curve=curve, sources=tuple(others.values()), seed=seed, batch_size=batch_size,
            groups=metadata, certify=certify, at_least=at_least, junit=junit, json=json, kind=export,
            write=lambda folder: configuration.write(context, folder), report=report,
        )  # fmt: skip
        return cascade.estimate() if dry_run else cascade.run()
    result = compare(
        models, split.x, split.y, chosen, threats, seed=seed, batch_size=batch_size, budget=Budget(passes=passes), progress=True
    )
    _report(context, result, found, out, f"Robustness of {', '.join(models)}", seed)


@app.command()
def train(
    context: typer.Context,
    model: ModelText,
    data: DataText = "digits",
    adversary: Annotated[
        str | None,
        typer.Option(
            help="The inner attack, such as pgd:steps=7, or a training defense, such as trades:beta=6; none for clean training."
        ),
    ] = None,
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Size of the inner attack's perturbation.")] = "0.1",
    form: Annotated[
        Literal["replace", "add", "regularize"], typer.Option(help="How its examples enter the loss (Adversarial.form).")
    ] = "replace",
    warmup: Annotated[float, typer.Option(min=0, help="Epochs over which eps grows from 0.")] = 0.0,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "cyclic"], typer.Option(help="Of the learning rate.")
    ] = "linear",
    crop: Annotated[
        int, typer.Option(min=0, help="Move images by up to so many pixels at random; usual for photographs: 4.")
    ] = 0,
    flip: Annotated[bool, typer.Option(help="Mirror images half of the time; usual for photographs.")] = False,
    average: Annotated[Literal["ema", "swa"] | None, typer.Option(help="Hand back averaged weights.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without progress.")] = None,
    validation: Annotated[
        int | None,
        typer.Option(min=1, help="Hold out the last N training samples for validation; default a tenth, 500 at most."),
    ] = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="Folder for weights, history and checkpoint.")] = Path("reports/train"),
    config: ConfigFile = None,
) -> None:
    """Train a network, clean or adversarially. Run the same command again to continue after an interruption."""
    found = inputs.dataset(data, root)
    if found.train is None:
        raise InputError(f"{found.name} has no training part here ({found.source})")
    _, victim = inputs.model(model, found, mean=mean, std=std, device=device)
    if not isinstance(victim, Model):
        raise InputError("train needs a single network")
    objective: Objective | None = None
    if adversary is not None:
        (threat, *more) = inputs.threats(norm, eps)
        if more:
            raise InputError("train takes one eps")
        if adversary.partition(":")[0] in RECIPES:
            found_recipe = trained_by(adversary).recipe(threat)
            objective, epochs = found_recipe.objective, max(1, round(epochs * found_recipe.epochs))
            schedule = found_recipe.train.get("schedule", schedule) if schedule == "linear" else schedule
        else:
            objective = Adversarial(attack=inputs.attack(adversary), threat=threat, form=form, warmup=warmup)
    if crop or flip:
        objective = CropAndFlip(objective or Standard(), padding=crop, flip=flip)
    held_out = validation or min(500, len(found.train) // 10 + 1)
    if held_out >= len(found.train):
        raise InputError(f"--validation {held_out} leaves nothing of the {len(found.train)} training samples")
    kept = found.train.take(len(found.train) - held_out)
    rest = data_module.Split(found.train.x[len(kept) :], found.train.y[len(kept) :])
    result = run_train(
        victim, kept, adversary=objective, validation=rest, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, schedule=schedule, patience=patience, checkpoint=out / "checkpoint.pt", seed=seed,
        average=average, progress=True, on_epoch=_show_epoch,
    )  # fmt: skip
    if not processes().main:  # of those that a launcher started, one writes
        return
    configuration.write(context, out)
    history = {"config": result.config, "epochs": [asdict(e) for e in result.epochs], "complete": result.complete}
    (out / "history.json").write_text(json.dumps(history, indent=1))
    if not result.complete:
        console.print(f"interrupted; continue with the same command (checkpoint in {escape(str(out))})")
        raise typer.Exit(130)
    (net,) = result.model.networks()
    zoo.save_weights(net, out / "weights.safetensors")
    console.print(f"weights: [bold]{escape(str(out / 'weights.safetensors'))}[/]")


@app.command()
def harden(
    context: typer.Context,
    model: ModelText,
    data: DataText = "digits",
    attack: Annotated[str, typer.Option(help="The attack, such as fgsm or pgd:steps=10.")] = "fgm",
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Size of the perturbation.")] = "0.1",
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the weights.")] = Path("reports/harden"),
    config: ConfigFile = None,
) -> None:
    """The classical exercise: attack the test set, retrain with adversarial examples, and test again."""
    found = inputs.dataset(data, root)
    if found.train is None:
        raise InputError(f"{found.name} has no training part here ({found.source})")
    (threat, *more) = inputs.threats(norm, eps)
    if more:
        raise InputError("harden takes one eps")
    chosen = inputs.attack(attack, norm)
    name, victim = inputs.model(model, found, mean=mean, std=std, device=device)
    if not isinstance(victim, Model):
        raise InputError("harden needs a single network")
    outcome: Hardening = run_harden(
        victim, found.train, found.test, chosen, threat, seed=seed, epochs=epochs, learning_rate=learning_rate, progress=True
    )
    retrained = f"{name}-retrained"
    cells = (Cell(name, chosen, threat, outcome.before), Cell(retrained, chosen, threat, outcome.after))
    result = Comparison(found.test.x, found.test.y, {name: outcome.old, retrained: outcome.new}, cells)
    _report(context, result, found, out, f"{name} before and after retraining", seed, {retrained: outcome.training})
    zoo.save_weights(outcome.new.networks()[0], out / "weights.safetensors")
    console.print(
        f"\n{outcome.crafted} of {len(found.train)} training samples became adversarial examples.\n"
        f"accuracy of {name} under attack:                   {outcome.before.robust_accuracy:7.2%}\n"
        f"accuracy of {retrained} on those old examples:  {outcome.old_examples_accuracy:7.2%}\n"
        f"accuracy of {retrained} under a new attack:     {outcome.after.robust_accuracy:7.2%}   <- the honest figure",
        markup=False,
    )


app.command()(defend)
app.command()(detect)
app.command()(attack)
app.command()(distance)
app.command()(verify)
app.command()(transfer)
app.command()(substitute)
app.command()(campaigns.compare)
app.command()(campaigns.replay)
app.command()(campaigns.recheck)
app.command()(reproduce)


@listing.command("attacks")
def list_attacks(
    access: Annotated[str | None, typer.Option(help="What the model grants: transfer, labels, scores, gradients, ...")] = None,
    norm: Annotated[Norm | None, typer.Option(help="Only attacks that work in this norm.")] = None,
    targeted: Annotated[bool | None, typer.Option("--targeted/--untargeted-only", help="By the goals it can have.")] = None,
    minimizes: Annotated[
        bool | None, typer.Option("--minimizes/--ball-only", help="Whether it looks for the smallest perturbation.")
    ] = None,
) -> None:
    """Attacks, by access, norm, goal, and whether they look for the smallest perturbation or work in a ball of stated size."""
    level = None
    if access is not None:
        names = {a.name.lower(): a for a in Access}
        if access.lower() not in names:
            raise UnknownNameError("access", access, names)
        level = names[access.lower()]
    for cls in find(access=level, norm=norm, targeted=targeted, minimizes=minimizes):
        can = cls.declaration
        goals = "any goal" if can.targeted and can.untargeted else "targeted" if can.targeted else "untargeted"
        norms = " ".join(n.value for n in Norm if n in can.norms)
        steps = "iterative" if can.iterative else "one step"
        finds = "smallest" if can.minimizes else "in a ball"
        console.print(f"[bold]{cls.__name__:<18}[/] {norms:<13} {goals:<10} {can.access.name.lower():<10} {finds:<10} {steps}")
        console.print(f"{'':<18} {escape(can.summary)} ({escape(can.reference)})", soft_wrap=True)
    console.print("NAME:setting=value,... sets hyperparameters; NAME*5 runs a randomised attack from five starts", markup=False)
    console.print("minimal: what is recommended for the smallest perturbation, fitted to --passes", markup=False)


@listing.command("data")
def list_data() -> None:
    """Datasets by name."""
    for name in data_module.names():
        try:
            found = data_module.load(name)
            train_size = len(found.train) if found.train is not None else "no"
            console.print(f"{name:<15} {train_size} training and {len(found.test)} test samples, {escape(found.source)}")
        except SaddlepointError:
            console.print(f"{name:<15} not on this computer: saddlepoint data fetch {name}")


@listing.command("networks")
def list_networks() -> None:
    """Reference networks by name, for --model zoo:NAME."""
    table = Table("network", "input", "what it is", "source")
    for name, entry in zoo.ENTRIES.items():
        table.add_row(name, "x".join(map(str, entry.in_shape)), entry.summary, entry.source)
    console.print(table)


@listing.command("losses")
def list_losses() -> None:
    """Losses by name, for attacks' loss=NAME."""
    for name, loss in LOSSES.items():
        console.print(f"{name:<20} {(loss.__doc__ or '').splitlines()[0]}", markup=False)


@listing.command("detectors")
def list_detectors() -> None:
    """Detectors by name, for saddlepoint detect --detector NAME:setting=value."""
    for name, cls in DETECTORS.items():
        console.print(
            f"[bold]{name:<28}[/] {'learns from attacks' if cls.learns_attacks is True else 'learns from clean inputs'}"
        )
        console.print(f"{'':<30} {escape(cls.summary)} ({escape(cls.reference)})", soft_wrap=True)


@fetching.command("fetch")
def fetch_data(name: Annotated[str, typer.Argument(help="mnist, fashion-mnist or cifar10.")], root: Root = None) -> None:
    """Download a dataset, with checksums; an interrupted download is continued."""
    console.print(f"in {escape(str(data_module.fetch(name, root=root)))}")


def _report(
    context: typer.Context,
    result: Comparison,
    found: data_module.Dataset,
    out: Path,
    title: str,
    seed: int,
    histories: dict[str, Training] | None = None,
) -> None:
    if not result.cells:
        raise InputError("interrupted before the first attack was finished: there is nothing to report")
    from saddlepoint.report import write

    report = write(
        result, out, title=title, data_name=found.name, data_fingerprint=found.fingerprint(), class_names=found.class_names,
        config=configuration.ran(context), histories=histories or {}, command=context.obj, seed=seed,
    )  # fmt: skip
    configuration.write(context, out)
    _show(result)
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)")
    if not result.complete:
        console.print("interrupted: the report holds the attacks that were finished")
        raise typer.Exit(130)


def _show(result: Comparison) -> None:
    """The security curves as a table."""
    for norm in dict.fromkeys(cell.norm for cell in result.cells):
        table = Table(title=f"accuracy under the strongest of {len({str(c.attack) for c in result.cells})} attacks ({norm})")
        table.add_column("eps")
        curves = {name: result.curve(name, norm) for name in dict.fromkeys(c.model for c in result.cells if c.norm == norm)}
        for eps in sorted({eps for curve in curves.values() for eps, _ in curve}):
            table.add_column(size(eps) if eps else "0 (clean)", justify="right")
        for name, curve in curves.items():
            table.add_row(escape(name), *(f"{accuracy:.1%}" for _, accuracy in curve))
        console.print(table)
    for name, note in dict.fromkeys((cell.model, note) for cell in result.cells for note in cell.result.notes):
        console.print(f"note on {name}: {note}", markup=False)


def _show_epoch(record: EpochRecord) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    console.print(
        f"epoch {record.epoch + 1}: loss {record.loss:.4f}, validation accuracy {share(record.clean_accuracy)}, "
        f"robust {share(record.robust_accuracy)}, {record.seconds:.1f} s"
    )


def run(arguments: list[str]) -> int:
    """Run the command line; errors become one line and a status."""
    debug = "--debug" in arguments
    # what is noticed about a model is in every result's notes, which the commands print
    warnings.simplefilter("ignore", SaddlepointWarning)
    try:
        # the context's object is the command line, for the reports
        app([a for a in arguments if a != "--debug"], prog_name="saddlepoint", obj=shlex.join(["saddlepoint", *arguments]))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    except SaddlepointError as error:
        if debug:
            traceback.print_exc()
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    return 0
