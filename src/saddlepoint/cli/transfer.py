"""`saddlepoint transfer`: who fools whom; `saddlepoint substitute`: learn a model from its labels, and fool it by that."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from saddlepoint import data as data_module
from saddlepoint import zoo
from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs, remote
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    BatchSize,
    DataText,
    Device,
    JsonFile,
    Mean,
    NormText,
    OptionalModelText,
    Passes,
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
from saddlepoint.engine import Budget
from saddlepoint.errors import InputError
from saddlepoint.evaluate.substitute import Round
from saddlepoint.evaluate.substitute import substitute as learn
from saddlepoint.evaluate.transfer import TransferMatrix, transfer_matrix
from saddlepoint.models import Classifier
from saddlepoint.report.words import percent
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat


def transfer(
    context: typer.Context,
    models: Annotated[
        list[str], typer.Option(help="FILE.py:NAME or zoo:NAME[+weights.safetensors], with commas between; or repeat.")
    ],
    data: DataText = "digits",
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Size of the perturbation, such as 8/255.")] = "0.1",
    attack: Annotated[str, typer.Option(help="By what examples are made, such as pgd or vmifgsm:diversity=0.5.")] = "pgd",
    instead: Annotated[
        str | None, typer.Option(help="Attack on models that don't grant what that one needs. Default: square:steps=1000.")
    ] = None,
    equal_distance: Annotated[
        float | None, typer.Option(help="Bring all perturbations to this l2 length, to compare where they point.")
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    passes: Passes = None,
    url: Annotated[
        str | None, typer.Option(help="One more target, an endpoint as in saddlepoint attack, which only sees the examples.")
    ] = None,
    classes: remote.Classes = None,
    gives: remote.GivesText = None,
    labels: remote.Labels = None,
    header: remote.Header = None,
    batch_rows: remote.BatchRows = None,
    concurrency: remote.Concurrency = None,
    rate: remote.Rate = None,
    limit: remote.Limit = None,
    cache: remote.Cache = False,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    json: JsonFile = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/transfer"),
    config: ConfigFile = None,
) -> None:
    """Make examples on each model, show them to all, and write a report: who fools whom, as a heat map."""
    remote.one_of(
        None if url else "the ones of --models", url, classes=classes, gives=gives, labels=labels, header=header,
        batch_rows=batch_rows, concurrency=concurrency, rate=rate, limit=limit, cache=cache,
    )  # fmt: skip
    texts = each(models)
    found = inputs.dataset(data, root)
    threat, chosen = _one(norm, eps), inputs.attack(attack, norm, passes)
    named = inputs.models(texts, found, mean=mean, std=std, device=device)
    warn_of_random_weights(texts)
    split, sources = inputs.samples(found, samples), list(named)
    if url is not None:
        name, endpoint = remote.model(
            url, found, classes=classes, gives=gives, labels=labels, header=header, batch_rows=batch_rows,
            concurrency=concurrency, rate=rate, limit=limit, cache=cache,
        )  # fmt: skip
        named[f"{name} (url)" if name in named else name] = endpoint
    make_way(json)
    with ExitStack() as open_endpoints:
        for model in named.values():
            open_endpoints.enter_context(remote.closing(model))
        matrix = transfer_matrix(
            named, split.x, split.y, chosen, threat, instead=None if instead is None else inputs.attack(instead, norm, passes),
            sources=sources, equal_distance=equal_distance, budget=Budget(passes=passes), batch_size=batch_size, seed=seed,
            progress=True,
        )  # fmt: skip
    _finish(context, matrix, found, out, f"Who fools whom: {', '.join(named)}", json)


def substitute(
    context: typer.Context,
    network: Annotated[str, typer.Option(help="What is trained: FILE.py:NAME or zoo:NAME.")],
    model: OptionalModelText = None,
    data: DataText = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="Begin with the first N test samples, which are not attacked.")] = 150,
    rounds: Annotated[int, typer.Option(min=0, help="How often the inputs to ask about grow.")] = 6,
    step: Annotated[float, typer.Option(help="By how much new inputs differ from old ones (lambda).")] = 0.1,
    alternate: Annotated[int | None, typer.Option(min=1, help="Turn the step's sign after so many rounds (tau).")] = None,
    full: Annotated[
        int | None, typer.Option(min=0, help="After so many rounds (sigma), step from --fresh inputs instead of all.")
    ] = None,
    fresh: Annotated[int, typer.Option(min=1, help="New inputs of a round after --full (kappa).")] = 400,
    queries: Annotated[int | None, typer.Option(min=1, help="The most inputs to ask about.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 10,
    norm: NormText = Norm.LINF,
    eps: Annotated[str, typer.Option(help="Size of the perturbation, such as 0.3.")] = "0.3",
    attack: Annotated[str, typer.Option(help="By what the substitute is attacked.")] = "fgsm",
    samples: Annotated[int | None, typer.Option(min=1, help="Attack the next N test samples; default all others.")] = None,
    batch_size: BatchSize = None,
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
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    json: JsonFile = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the weights and substitute.json.")] = Path(
        "reports/substitute"
    ),
    config: ConfigFile = None,
) -> None:
    """Train a substitute on a model's labels for inputs of its own choice, and fool the model with examples made on that."""
    found = inputs.dataset(data, root)
    threat, chosen = _one(norm, eps), inputs.attack(attack, norm)
    remote.one_of(
        model, url, {"mean": mean, "std": std, "device": device},
        classes=classes, gives=gives, labels=labels, header=header, batch_rows=batch_rows, concurrency=concurrency, rate=rate,
        limit=limit, cache=cache,
    )  # fmt: skip
    oracle: Classifier
    if url is not None:
        name, oracle = remote.model(
            url, found, classes=classes, gives=gives, labels=labels, header=header, batch_rows=batch_rows,
            concurrency=concurrency, rate=rate, limit=limit, cache=cache,
        )  # fmt: skip
    else:
        assert model is not None
        name, oracle = inputs.model(model, found, mean=mean, std=std, device=device)
        warn_of_random_weights([model])
    _, net = inputs.network(network, found, seed=seed)
    if isinstance(net, Classifier):
        raise InputError("--network must be an nn.Module to train, not an sp.Model")
    if seeds >= len(found.test):
        raise InputError(f"--seeds {seeds} leaves nothing to attack of the {len(found.test)} test samples")
    first = found.test.take(seeds)
    rest = data_module.Split(found.test.x[seeds:], found.test.y[seeds:])
    rest = rest if samples is None else rest.take(samples)
    make_way(json)
    with remote.closing(oracle):
        learnt = learn(
            oracle, first.x, net, rounds=rounds, step=step, alternate=alternate, full=full, fresh=fresh, queries=queries,
            epochs=epochs, test=rest, seed=seed, progress=True, on_round=_show_round,
        )  # fmt: skip
        configuration.write(context, out)
        zoo.save_weights(net, out / "weights.safetensors")
        write_json(out / "substitute.json", learnt.to_dict())
        console.print(f"{learnt.queries} queries; weights: [bold]{escape(str(out / 'weights.safetensors'))}[/]")
        if not learnt.complete:
            console.print("interrupted: the substitute is as far as it was trained, and nothing was attacked")
            raise typer.Exit(130)
        name = "oracle" if name == "substitute" else name
        matrix = transfer_matrix(
            {"substitute": learnt.model, name: oracle}, rest.x, rest.y, chosen, threat, sources=["substitute"],
            batch_size=batch_size, seed=seed, progress=True,
        )  # fmt: skip
    _finish(context, matrix, found, out, f"A substitute of {name}, learnt from {learnt.queries} labels", json)


def _one(norm: str, eps: str) -> Threat:
    threat, *more = inputs.threats(norm, eps)
    if more:
        raise InputError("one eps is needed here; saddlepoint evaluate takes several")
    return threat


def _finish(
    context: typer.Context, matrix: TransferMatrix, found: data_module.Dataset, out: Path, title: str, json: Path | None
) -> None:
    if not matrix.rows:
        raise InputError("interrupted before the first source was finished: there is nothing to report")
    from saddlepoint.report.transfers import write_transfers  # matplotlib

    report = write_transfers(
        matrix, out, title=title, data_name=found.name, data_fingerprint=found.fingerprint(), class_names=found.class_names,
        config=configuration.ran(context), command=context.obj or "",
    )  # fmt: skip
    configuration.write(context, out)
    write_json(json, matrix.to_dict())
    _show(matrix)
    console.print(f"\nreport: [bold]{escape(str(report))}[/]   (open it in a browser)")
    if not matrix.complete:
        console.print(
            f"interrupted: the report holds the sources that were finished ({', '.join(matrix.sources)})", markup=False
        )
        raise typer.Exit(130)


def _show(matrix: TransferMatrix) -> None:
    table = Table(title=f"share of examples that fool the target, where both are right ({matrix.setting})")
    table.add_column("crafted on")
    for name in matrix.targets:
        table.add_column(escape(name), justify="right")
    for row in matrix.rows:
        crafted = row.name if row.result is None or row.how == matrix.usual else f"{row.name} ({row.how})"
        table.add_row(escape(crafted), *(percent(matrix.rate(row.name, name)) for name in matrix.targets))
    console.print(table)
    noted = [(row.name, note) for row in matrix.rows if row.result is not None for note in row.result.notes]
    for name, note in noted:
        console.print(f"note on {name}: {note}", markup=False)


def _show_round(one: Round, _: object) -> None:
    agreement, accuracy = percent(one.agreement), percent(one.accuracy)
    console.print(
        f"round {one.number}: {one.queries} queries, agrees with the oracle on {agreement} of the other test samples, "
        f"right on {accuracy}"
    )
