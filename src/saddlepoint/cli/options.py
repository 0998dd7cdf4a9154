"""What several commands share: their options, the console, and a word of caution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saddlepoint.taxonomy import Norm

console = Console(highlight=False)

ModelText = Annotated[str, typer.Option("--model", help="FILE.py:NAME or zoo:NAME[+weights.safetensors].", show_default=False)]
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


def warn_of_random_weights(texts: Sequence[str]) -> None:
    """Say which of the models have no trained weights."""
    for text in texts:
        if text.startswith("zoo:") and "+" not in text:
            console.print(f"note: {text} has random weights; for trained ones write {text}+weights.safetensors", markup=False)
