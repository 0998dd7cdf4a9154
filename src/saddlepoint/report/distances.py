"""The report of distances to the boundary: their distribution, the nearest and farthest samples, and average robustness."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.evaluate import Distances
from saddlepoint.models.base import Classifier
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish
from saddlepoint.report.gallery import Gallery, album
from saddlepoint.report.words import distinct, file_name, length, listed, percent
from saddlepoint.taxonomy import Norm, Status

_CURVE = 100  # parts into which the range of eps is cut for results.json
_LISTED = 60  # sample numbers that the page spells out


def write_distances(
    found: Mapping[str, Distances],
    models: Mapping[str, Classifier],
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
    examples: int = 6,
) -> Path:
    """Write the report of the distances of the same samples on one or more models, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `distance_results`), `distances.csv` (a
    row for each sample), `adversarial/` (one saved `AttackResult` per model) and `figures/`. Every file appears complete or
    not at all, report.html last; what an earlier report left under the same names is replaced.

    models: the models by the same names; they are shown the few examples once more, for their confidences. examples: how many
    of the nearest and of the farthest samples to show. The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` for no distances, or such of several norms or samples.
    """
    folder = Path(folder)
    if examples < 0:
        raise InputError(f"examples must be at least 0; got {examples}")
    if unknown := [name for name in found if name not in models]:
        raise InputError(f"there are distances of {unknown[0]!r}, but the models are {', '.join(models)}")
    document = distance_results(
        found, title=title, data_name=data_name, data_fingerprint=data_fingerprint, class_names=class_names, config=config,
        command=command, seed=seed,
    )  # fmt: skip
    page, pictures = _page(found, models, document, class_names, examples, seed)
    saved = {model["folder"]: distances.result for model, distances in zip(document["models"], found.values(), strict=True)}
    return publish(folder, page, document, pictures, saved, {"distances.csv": _rows(found)})


def distance_results(
    found: Mapping[str, Distances],
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config, verdict: as in `saddlepoint.report.results`.
    norm: in which distances are measured. own_decision: whether they are from the model's own answer rather than the true
    class. models: a list, in the order given, with for each:

    | key | content |
    | --- | --- |
    | name, settings | its name, and what `Classifier.describe` says |
    | attack | {name, settings, goal, budget}: how distances were looked for |
    | clean_accuracy | of all samples |
    | counts | samples: {wrong (from the start), found, missing (nothing was found), failed (NaN)} |
    | quantiles | a list of {level, value, low, high}: see `Quantile`; value null: farther than anything found |
    | mean | mean distance of the found |
    | rho, rho_interval | mean of size of the change over size of the input, of the found; [low, high] |
    | curve | [[eps, share of samples that are right and not fooled within eps], ...] |
    | passes, passes_per_sample | {forward, backward, verify, probe}; verify confirmed successes |
    | seconds, notes | wall time; what the engine noticed |
    | folder | where the adversarial inputs are, relative to this file; `AttackResult.load` reads them |
    """
    if not found:
        raise InputError("there are no distances to report")
    first = next(iter(found.values()))
    for name, distances in found.items():
        if (distances.norm, distances.own_decision) != (first.norm, first.own_decision):
            raise InputError(f"the distances of {name!r} are of another kind than the first ones: {distances.norm}")
        if first.complete and distances.complete and not torch.equal(first.x, distances.x):
            raise InputError(f"the distances of {name!r} are of other samples than the first ones")
    reach = max((float(d.values[d.found].max()) for d in found.values() if bool(d.found.any())), default=0.0)
    complete = all(distances.complete for distances in found.values())
    folders = distinct("adversarial/" + file_name(name, first.norm) for name in found)
    longest = max(found.values(), key=len)
    document: dict[str, Any] = plain({
        **frame(
            longest.x, title=title, complete=complete, command=command, seed=seed, data_name=data_name,
            data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "norm": first.norm.value,
        "own_decision": first.own_decision,
        "verdict": _verdict(found),
        "models": [_model(name, d, folder, reach) for (name, d), folder in zip(found.items(), folders, strict=True)],
    })  # fmt: skip
    return document


def _model(name: str, distances: Distances, folder: str, reach: float) -> dict[str, Any]:
    result, count = distances.result, max(len(distances), 1)
    radii = torch.linspace(0, reach, _CURVE + 1, dtype=torch.float64).tolist()
    passes = {kind: int(getattr(result.queries, kind).sum()) for kind in ("forward", "backward", "verify")}
    return {
        "name": name,
        "settings": result.config["model"],
        "attack": {
            "name": distances.attack_name,
            **{key: result.config[key] for key in ("goal", "budget")},
            "settings": result.config["attack"],
        },
        "clean_accuracy": math.nan if distances.own_decision else result.clean_accuracy,
        "counts": {group: int(getattr(distances, group).sum()) for group in ("wrong", "found", "missing", "failed")},
        "quantiles": [vars(quantile) for quantile in distances.quantiles()],
        "mean": distances.mean,
        "rho": distances.rho,
        "rho_interval": list(distances.rho_interval),
        "curve": list(zip(radii, distances.curve(radii), strict=True)),
        "passes": passes | {"probe": result.queries.probe},
        "passes_per_sample": {kind: passes[kind] / count for kind in ("forward", "backward")},
        "seconds": result.seconds,
        "notes": list(result.notes),
        "folder": folder,
    }  # fmt: skip


def _verdict(found: Mapping[str, Distances]) -> str:
    """A paragraph; names of models are in backquotes."""
    sentences = [_sentence(name, distances) for name, distances in found.items()]
    (first, one), *others = found.items()
    for name, other in others:
        if not torch.equal(one.result.index, other.result.index):
            continue  # one of them was interrupted
        both = one.found & other.found
        if not bool(both.any()):
            continue
        farther, nearer = (int(c.sum()) for c in (other.values[both] > one.values[both], other.values[both] < one.values[both]))
        # the sign test for paired samples: is the difference more than chance would give?
        if abs(farther - nearer) <= 1.96 * math.sqrt(farther + nearer):
            sentences.append(f"Sample by sample, `{name}` is neither nearer to the boundary nor farther than `{first}`.")
        else:
            share = percent(max(farther, nearer) / int(both.sum()))
            word = "farther from" if farther > nearer else "nearer to"
            sentences.append(
                f"Sample by sample, `{name}` is {word} the boundary than `{first}` on {share} of the {int(both.sum())} samples "
                "that have a distance on both."
            )
    if any(bool(distances.found.any()) for distances in found.values()):
        sentences.append("These are upper bounds: the true boundary may be nearer.")
    if not all(distances.complete for distances in found.values()):
        sentences.append("The run was interrupted: the figures are those of the samples that were finished.")
    return " ".join(sentences)


def _sentence(name: str, distances: Distances) -> str:
    attacked, found = int((distances.found | distances.missing).sum()), int(distances.found.sum())
    if not attacked:
        return f"`{name}` gets none of its {len(distances)} samples right, so there is no distance to measure."
    median = distances.quantile(0.5)
    if distances.result.config["goal"]["targeted"]:
        samples, happens = f"the {attacked} samples", f"lead `{name}` to the target"
    elif distances.own_decision:
        samples, happens = f"the {attacked} samples", f"turn the answer of `{name}`"
    else:
        samples, happens = f"the {attacked} samples that `{name}` gets right", "fool it"
    if math.isinf(median.value):
        text = f"For most of {samples} no change was found that would {happens}."
    else:
        bounds = f"{length(median.low)} {f'to {length(median.high)}' if math.isfinite(median.high) else 'upwards'}"
        text = f"On half of {samples}, {distances.norm} changes of size {length(median.value)} (95%: {bounds}) {happens}."
    if math.isfinite(distances.rho):
        which = f"The {found} changes found are" if found < attacked else "The change found is"
        text += f" {which} on average {100 * distances.rho:.2g}% as large as the input itself (ρ = {distances.rho:#.3g})."
    return text


def _page(
    found: Mapping[str, Distances],
    models: Mapping[str, Classifier],
    document: dict[str, Any],
    class_names: Sequence[str],
    examples: int,
    seed: int,
) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    curve = figures.distances(found)
    pictures = {"distances.png": figures.to_png(curve)}
    galleries = []
    for name, distances in found.items():
        near = _gallery(name, distances, models[name], distances.closest(examples), seed)
        left = max(0, int(distances.found.sum()) - len(near.examples))
        far = _gallery(name, distances, models[name], distances.farthest(min(examples, left)), seed)
        galleries.append({"model": name, "shown": len(near.examples), "groups": [("nearest", near), ("farthest", far)]})
    page = environment().get_template("distances.html.j2").render(
        document=document,
        curve=Markup(figures.to_svg(curve, "distances")),
        galleries=galleries,
        apart={name: _apart(distances) for name, distances in found.items()},
        **drawing(found, class_names),
        targeted=any(d.result.config["goal"]["targeted"] for d in found.values()),
        attacks=listed(dict.fromkeys(d.attack_name for d in found.values())),
        notes=[
            (note, listed(f"`{name}`" for name, d in found.items() if note in d.result.notes))
            for note in dict.fromkeys(note for d in found.values() for note in d.result.notes)
        ],
        bounds=next(iter(models.values())).bounds,
        listed=_LISTED,
    )  # fmt: skip
    return page, pictures


def _gallery(name: str, distances: Distances, model: Classifier, rows: Tensor, seed: int) -> Gallery:
    """These samples of one model, with what the attack did to them."""
    result = distances.result
    return album(
        name, model, distances.x, result.adversarial, rows, numbers=result.index, labels=result.labels,
        clean_predicted=result.clean_predicted, predicted=result.predicted, distance=distances.values, status=Status.FOOLED,
        attack=distances.attack_name, threat=f"{distances.norm}", seed=seed,
    )  # fmt: skip


def _apart(distances: Distances) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """The samples without a distance that was searched for and found, by group: (number, class, the model's answer)."""
    result = distances.result
    columns = torch.stack([result.index.cpu(), result.labels.cpu(), result.clean_predicted.cpu()], 1)
    groups = (("wrong", distances.wrong), ("missing", distances.missing), ("failed", distances.failed))
    return [(name, [(a, b, c) for a, b, c in columns[mask.cpu()].tolist()]) for name, mask in groups]


def _rows(found: Mapping[str, Distances]) -> str:
    """A row for each model and sample, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    names = ("l0", "l1", "l2", "linf")
    head = ("model", "sample", "status", "class", "clean_predicted", "predicted", "target", "distance", "relative")
    writer.writerow([*head, *names, "forward_passes", "backward_passes"])
    for name, d in found.items():
        result = d.result
        columns = [result.labels, result.clean_predicted, result.predicted, result.targets, d.values, d.relative]
        columns += [result.distances[Norm(norm).value] for norm in names] + [result.queries.forward, result.queries.backward]
        values = zip(*(column.tolist() for column in columns), strict=True)
        for index, status, row in zip(result.index.tolist(), result.status, values, strict=True):
            writer.writerow([name, index, status, *row])
    return stream.getvalue()
