"""What was kept, looked at again: `compare` and `replay` read campaigns, `recheck` tries a set on other models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from saddlepoint.cli import inputs
from saddlepoint.cli.options import (
    BatchSize,
    Device,
    JsonFile,
    Mean,
    ModelTexts,
    Std,
    console,
    each,
    warn_of_random_weights,
    write_json,
)
from saddlepoint.data.dataset import Dataset, Split
from saddlepoint.engine.result import attack_name
from saddlepoint.errors import InputError
from saddlepoint.evaluate import AdversarialSet, compare_campaigns
from saddlepoint.evaluate import replay as find_case
from saddlepoint.models.base import Classifier
from saddlepoint.report.words import percent

_ROWS = 256  # through a model at once


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a campaign, such as reports/robustness/net-linf-0.05.")],
    b: Annotated[Path, typer.Argument(help="Another one, on the same samples.")],
    level: Annotated[float, typer.Option(help="Of the confidence interval.")] = 0.95,
    json: JsonFile = None,
) -> None:
    """What changed between two campaigns on the same samples, sample by sample, and whether that can be chance."""
    found = compare_campaigns(a, b, level=level)
    console.print(found.summary(), markup=False, soft_wrap=True)
    write_json(json, found.to_dict())


def replay(
    campaign: Annotated[Path, typer.Argument(help="Folder of a campaign.")],
    case: Annotated[int, typer.Argument(help="The sample's position in the data.")],
    json: JsonFile = None,
) -> None:
    """What each attack of a campaign made of one sample."""
    found = find_case(campaign, case)
    console.print(found.summary(), markup=False, soft_wrap=True)
    attempts = [
        {
            "stage": one.stage, "attack": attack_name(one.result.config["attack"]), "status": one.status.value,
            "predicted": int(one.result.predicted[0]), "margin": float(one.result.margin[0]),
            "distance": float(one.result.distance[0]), "passes": int(one.result.queries.total[0]),
        }
        for one in found.attempts
    ]  # fmt: skip
    write_json(json, {
        "sample": found.sample, "label": found.label, "clean_predicted": found.clean_predicted, "verdict": str(found.verdict),
        "attempts": attempts,
    })  # fmt: skip


def recheck(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="An adversarial set, as sp.export and --export write it.")],
    model: ModelTexts,
    classes: Annotated[
        int | None, typer.Option(min=2, help="Number of classes, for zoo networks; default up to the largest in the set.")
    ] = None,
    batch_size: BatchSize = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    json: JsonFile = None,
) -> None:
    """Try adversarial inputs that were made for one model on others: their accuracy, beside that on the originals."""
    attacked, clean = AdversarialSet(folder), AdversarialSet(folder, original=True)
    if not len(attacked):
        raise InputError(f"{folder} has no samples")
    models = inputs.models(each(model), _dataset(attacked, classes), mean=mean, std=std, device=device)
    warn_of_random_weights(each(model))
    table = Table(title=f"accuracy on the {len(attacked)} samples of {escape(str(folder))}")
    table.add_column("network")
    for title in ("originals", "adversarial inputs", "of those right before"):
        table.add_column(title, justify="right")
    found = []
    for name, victim in models.items():
        before, after = (_right(victim, samples, batch_size or _ROWS) for samples in (clean, attacked))
        kept = float(after[before].double().mean()) if bool(before.any()) else None
        figures = {"originals": float(before.double().mean()), "adversarial": float(after.double().mean()), "kept": kept}
        table.add_row(escape(name), *map(percent, figures.values()))
        found.append({"model": name} | figures)
    console.print(table)
    write_json(json, {"format": 1, "set": str(folder), "samples": len(attacked), "models": found})


def _dataset(samples: AdversarialSet, classes: int | None) -> Dataset:
    """The set as data, which says what its models look like."""
    image, label = samples[0]
    names = tuple(map(str, range(classes or max(1, *samples.labels) + 1)))
    test = Split(image[None].float(), torch.tensor([label]))
    return Dataset(samples.folder.name, None, test, names, str(samples.folder), samples.bounds)


def _right(model: Classifier, samples: AdversarialSet, rows: int) -> Tensor:
    """Which of them the model gets right, (N,) bool."""
    found = []
    for x, y in DataLoader(samples, batch_size=rows):
        model.check_inputs(x)
        model.probe(x)  # says in words where the network can't take them
        found.append(model.predict(x).cpu() == y)
    return torch.cat(found)
