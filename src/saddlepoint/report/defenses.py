"""The report of a tournament: which defense keeps how much, at what price, and how to use the one that keeps the most."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saddlepoint.errors import InputError
from saddlepoint.evaluate.tournament import Tournament
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish
from saddlepoint.threats import size
from saddlepoint.zoo import save_weights

WEIGHTS = "winner.safetensors"


def write_defenses(
    tournament: Tournament,
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    architecture: str = "net",
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
    again: str = "",
) -> Path:
    """Write the report of a tournament into `folder`, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `defense_results`), `defenses.csv` (a row
    for each defense), `winner.safetensors` (the weights of the first of the ranking) and `figures/`. architecture: Python that
    makes the untrained network, an
    expression in its last line, for the lines that load the weights. again: a command that evaluates the winner, if there is
    one. The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` for a tournament without rows.
    """
    if not tournament.rows:
        raise InputError("there are no defenses to report")
    document = defense_results(
        tournament, title=title, data_name=data_name, config=config, data_fingerprint=data_fingerprint,
        class_names=class_names, command=command,
    )  # fmt: skip
    page, pictures = _page(tournament, document, loading(tournament, architecture), again)
    report = publish(Path(folder), page, document, pictures, tables={"defenses.csv": _table(tournament)})
    save_weights(tournament.winner.network.networks()[0], Path(folder) / WEIGHTS)
    return report


def defense_results(
    tournament: Tournament,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config: as in `saddlepoint.report.results`. The rest is
    `Tournament.to_dict`:

    | key | content |
    | --- | --- |
    | threat, samples, verdict | settings of the threat, how many samples were attacked, and what came out in words |
    | winner | name of the first of the ranking |
    | tied | names of those that the samples can't tell from it (McNemar's exact test, p > 0.05) |
    | front | names of those on the Pareto front of clean and robust accuracy |
    | failed | a list of {name, why}: could not be made |
    | models | a list, the undefended network first, then in the order that was asked for |

    Each of `models`:

    | key | content |
    | --- | --- |
    | name, settings | the defense as it was written, and what `Classifier.describe` says |
    | clean_accuracy | without an attack |
    | naive_accuracy, adaptive_accuracy | what is left by attacks that don't know the defense, and by such that do |
    | transfer_accuracy | {undefended, independent}: what is left by examples that were made on these networks |
    | robust_accuracy, low, high | share of the samples that stand all of these attacks, and its 95 % limits |
    | p_value | of McNemar's exact test against the winner |
    | training | {seconds, forward, backward}: what its network cost; passes of one sample each |
    | slowdown, parameters | time of a prediction by that of the undefended network; size of the network |
    | notes | what to know about the figures |
    | evaluation | `Evaluation.to_dict` of the adaptive attacks |
    """
    document: dict[str, Any] = plain({
        **frame(
            tournament.x, title=title, complete=tournament.complete, command=command, seed=tournament.seed, data_name=data_name,
            data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        **tournament.to_dict(),
    })  # fmt: skip
    return document


def loading(tournament: Tournament, architecture: str) -> str:
    """Python that makes the winner again from its weights, and evaluates it."""
    winner, threat = tournament.winner, tournament.threat
    known = {"bounds": winner.network.bounds} | {key: winner.network.describe().get(key) for key in ("mean", "std")}
    arguments = "".join(f", {key}={value}" for key, value in known.items() if value is not None or key == "bounds")
    *needed, network = architecture.splitlines()
    lines = [
        "import saddlepoint as sp",
        *needed,
        "",
        f'net = sp.zoo.load_weights({network}, "{WEIGHTS}")',
        f"model = sp.Model(net.eval(){arguments})",
    ]
    if winner.defense is not None and winner.model is not winner.network:
        shape = tuple(tournament.x.shape[1:])
        lines.append(f"model = sp.defenses.defense({winner.defense.name!r}).protect(model, {shape})")
    ball = f"sp.{type(threat).__name__}({size(threat.largest_eps)})"
    return "\n".join([*lines, f"print(sp.evaluate(model, x, y, {ball}).summary())"])


def _page(tournament: Tournament, document: dict[str, Any], code: str, again: str) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    picture = figures.defenses(tournament)
    plain_passes = next((row.training.passes for row in tournament.rows if row.defense is None), 0)
    page = environment().get_template("defenses.html.j2").render(
        document=document,
        tournament=tournament,
        tied={row.name for row in tournament.tied},
        figure=Markup(figures.to_svg(picture, "defenses").replace('<svg', '<svg style="max-width: none"', 1)),
        plain_passes=plain_passes,
        code_lines=code,
        again=again,
        **drawing([row.name for row in tournament.rows], ()),
    )  # fmt: skip
    return page, {"defenses.png": figures.to_png(picture)}


def _table(tournament: Tournament) -> str:
    """A row for each defense, the most robust first, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    sources = tournament.sources
    transfers = [f"from_{source}" for source in sources]
    costs = ["training_seconds", "training_forward", "training_backward", "slowdown", "parameters"]
    writer.writerow(["defense", "clean", "naive", "adaptive", *transfers, "robust", "low", "high", *costs])
    for row in tournament.ranking:
        shares = [row.clean_accuracy, row.naive_accuracy, row.adaptive_accuracy, *map(row.transfer_accuracy, sources)]
        spent = row.training
        writer.writerow([
            row.name, *("" if share is None else share for share in shares), row.robust_accuracy, *row.limits,
            spent.seconds, spent.forward, spent.backward, row.slowdown, row.parameters,
        ])  # fmt: skip
    return stream.getvalue()
