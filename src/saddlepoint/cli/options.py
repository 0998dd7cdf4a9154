"""What several commands share: their options, the console, and a word of caution."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from saddlepoint.errors import DataError
from saddlepoint.files import write_file
from saddlepoint.taxonomy import Norm

console = Console(highlight=False, emoji=False)

MODELS = "FILE.py:NAME, FILE.onnx or zoo:NAME[+weights.safetensors]"
ModelText = Annotated[str, typer.Option("--model", help=f"{MODELS}.", show_default=False)]
ModelTexts = Annotated[
    list[str],
    typer.Option(
        "--model", help="FILE.py:NAME or zoo:NAME[+weights.safetensors]; several with commas, or repeat.", show_default=False
    ),
]
OptionalModelText = Annotated[str | None, typer.Option("--model", help=f"{MODELS}.", show_default=False)]
AccessText = Annotated[
    Literal["labels", "scores", "gradients"] | None,
    typer.Option("--access", help="With --model: what the adversary may use of it; default what there is, gradients at most."),
]
Queries = Annotated[int | None, typer.Option(min=1, help="At most so many queries (forward passes) a sample.")]
DataText = Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, cifar10, a folder of images by class, or a .npz.")]
Root = Annotated[Path | None, typer.Option(help="Where the data lies; default SADDLEPOINT_DATA or the user's cache.")]
NormText = Annotated[Norm, typer.Option(help="How perturbations are measured.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Use the first N test samples.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Samples under attack at once; default by size.")]
Seed = Annotated[int, typer.Option(help="Source of all randomness.")]
Mean = Annotated[str | None, typer.Option(help="Normalisation inside the model: a number or one per channel, 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="As --mean.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Passes = Annotated[int | None, typer.Option(min=1, help="At most so many passes (forward and backward) a sample.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def make_way(path: Path | None) -> None:
    """Remove an old file, which must not speak for a run that fails; what can't be written is refused before the work."""
    if path is not None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)


def write_json(path: Path | None, document: Any) -> None:  # Any: JSON values
    """Write a document, if it is asked for; what is not finite becomes null."""
    if path is not None:
        from saddlepoint.report.document import plain

        with writing(path):
            write_file(path, json.dumps(plain(document), indent=1).encode())


def each(texts: Sequence[str]) -> list[str]:
    """What a list with commas names; a comma before `key=` belongs to the settings of the one before."""
    found: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if found and re.match(r"\w+\s*=", part):
            found[-1] += f",{part}"
        elif part:
            found.append(part)
    return found


def warn_of_random_weights(texts: Sequence[str]) -> None:
    """Say which of the models have no trained weights."""
    for text in texts:
        if text.startswith("zoo:") and "+" not in text:
            console.print(f"note: {text} has random weights; for trained ones write {text}+weights.safetensors", markup=False)
