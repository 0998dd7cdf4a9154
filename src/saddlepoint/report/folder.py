"""`write`: the report as a folder."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddlepoint.engine import AttackResult
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate import Comparison
from saddlepoint.files import write_file
from saddlepoint.report import words
from saddlepoint.report.document import History, cell_folders, results
from saddlepoint.report.gallery import Gallery, gallery
from saddlepoint.report.verdict import measured, norms
from saddlepoint.threats import size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from jinja2 import Environment
    from markupsafe import Markup

_PICTURE_SIDE = 96  # pixels; smaller images are enlarged without smoothing, which print drivers would do otherwise


def write(
    comparison: Comparison,
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    histories: Mapping[str, History] | None = None,
    command: str = "",
    examples: int = 8,
) -> Path:
    """Write the report of a comparison into `folder`, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `saddlepoint.report.results`),
    `adversarial/` (one saved `AttackResult` per attack and threat) and `figures/` (PNGs for a README). Every file appears
    complete or not at all, report.html last; what an earlier report left under the same names is replaced.

    config: what was run, for the reader to repeat. histories: the trainings of some of the models, by name: anything with
    `epochs`. command: the command line, if there was one. examples: how many samples to show as pictures.
    The few examples are shown to the models once more, for their confidences.

    Errors: `DataError` where the folder can't be written, `InputError` for histories of models that there are not.
    """
    folder, histories = Path(folder), dict(histories or {})
    if examples < 0:
        raise InputError(f"examples must be at least 0; got {examples}")
    if unknown := [name for name in histories if name not in comparison.models]:
        raise InputError(f"there is a history for {unknown[0]!r}, but the models are {', '.join(comparison.models)}")
    document = results(
        comparison, title=title, data_name=data_name, data_fingerprint=data_fingerprint, class_names=class_names,
        config=config, histories=histories, command=command, seed=seed,
    )  # fmt: skip
    shown = gallery(comparison, examples, seed)
    page, pictures = _page(comparison, document, shown, class_names, histories)
    return publish(folder, page, document, pictures, {name: cell.result for cell, name in cell_folders(comparison)})


def publish(
    folder: Path,
    page: str,
    document: Mapping[str, object],
    pictures: Mapping[str, bytes],
    found: Mapping[str, AttackResult] | None = None,
    tables: Mapping[str, str] | None = None,
) -> Path:
    """Write a report's files, the page last, and return its path.

    pictures: PNGs by their names in `figures/`. found: results by their folders; tables: texts by their names.

    Errors: `DataError` where the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in (found or {}).items():
            replace_result(result, folder / name)
        for name, content in pictures.items():
            write_file(folder / "figures" / name, content)
        for name, table in (tables or {}).items():
            write_file(folder / name, table.encode(errors="replace"))
        write_file(folder / "results.json", json.dumps(document, indent=1, allow_nan=False).encode())
        write_file(folder / "report.html", page.encode(errors="replace"))
    except OSError as error:
        raise DataError(f"cannot write the report to {folder}: {error}") from error
    return folder / "report.html"


def replace_result(result: AttackResult, path: Path) -> None:
    """Save a result; an older one stays until the new one is complete, and comes back if that can't take its place."""
    if not path.exists():
        result.save(path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as draft:
        new, old = Path(draft) / "new", Path(draft) / "old"
        result.save(new)
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _page(
    comparison: Comparison,
    document: dict[str, Any],
    shown: Gallery,
    class_names: Sequence[str],
    histories: Mapping[str, History],
) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    curves: dict[str, Markup] = {}
    pictures: dict[str, bytes] = {}
    for norm in norms(comparison):
        curves[norm.value] = Markup(figures.to_svg(figures.security_curve(comparison, norm), f"curve-{norm}"))
    if curves:
        pictures["security_curve.png"] = figures.to_png(figures.security_curve(comparison))
    if shown.examples:
        pictures["examples.png"] = figures.to_png(figures.examples(shown, class_names))
    trained = Markup(figures.to_svg(figures.training(histories), "training")) if histories else None

    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            document=document,
            curves=curves,
            tables=_tables(comparison, document),
            gallery=shown,
            original=lambda image: data_url(figures.picture(image, shown)),
            change=lambda delta: data_url(figures.change_picture(delta, shown.factor)),
            class_name=lambda label: words.class_name(label, class_names),
            measured=measured(comparison),
            training=trained,
            notes=_notes(document),
            bounds=next((m.bounds for m in comparison.models.values()), None),
            targeted=any(cell.result.config["goal"]["targeted"] for cell in comparison.cells),
            noisy=any(words.is_noise(cell.attack) for cell in comparison.cells),
            places={name: place for place, name in enumerate(comparison.models)},
            series=len(figures.SERIES),
        )
    )
    return page, pictures


def environment() -> Environment:
    """Of the templates. What they are given is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("saddlepoint.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": words.percent, "size": size, "length_of": words.length, "count": words.count,
        "code": _code, "pretty": _pretty,
    }  # fmt: skip
    return made


def drawing(models: Iterable[str], class_names: Sequence[str]) -> dict[str, Any]:
    """What the templates' macros ask for: pictures, names of classes, and the place of each model among the colours."""
    from saddlepoint.report import figures

    return {
        "original": lambda image, shown: data_url(figures.picture(image, shown)),
        "change": lambda delta, shown: data_url(figures.change_picture(delta, shown.factor)),
        "class_name": lambda label: words.class_name(label, class_names),
        "places": {name: place for place, name in enumerate(models)},
        "series": len(figures.SERIES),
    }


def _tables(comparison: Comparison, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Per norm and model the cells of each eps, upwards, with the worst over all attacks; eps None comes last."""
    tables = []
    for norm in norms(comparison):
        columns: dict[float | None, None] = {}
        groups = []
        for model in document["models"]:
            worst = dict(model["curves"].get(norm.value, [])[1:])
            own = [cell for cell in model["cells"] if cell["norm"] == norm.value]
            rows = [
                {"eps": eps, "worst": accuracy, "cells": [cell for cell in own if cell["eps"] == eps]}
                for eps, accuracy in worst.items()
            ]
            columns |= dict.fromkeys(worst)
            groups.append({"model": model, "worst": worst, "rows": rows, "cells": own})
        radii = sorted(columns, key=lambda eps: (eps is None, eps or 0.0))
        tables.append({"norm": norm.value, "groups": groups, "radii": radii})
    return tables


def _notes(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The engine's notes, each once, with where it came up."""
    where: dict[str, dict[str, list[str]]] = {}
    for model in document["models"]:
        for cell in model["cells"]:
            for note in cell["notes"]:
                where.setdefault(note, {}).setdefault(model["name"], []).append(f"{cell['attack']} within {cell['threat']}")
    return [
        (note, "; ".join(f"`{model}`: {words.listed(dict.fromkeys(runs))}" for model, runs in models.items()))
        for note, models in where.items()
    ]


def _code(text: str) -> Markup:
    """Escaped text in which what stands in backquotes is marked as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def data_url(pixels: npt.NDArray[np.uint8]) -> str:
    """The pixels (H, W, 3) as a PNG inside a URL."""
    from PIL import Image

    image = Image.fromarray(pixels)
    times = -(-_PICTURE_SIDE // max(image.size))
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
