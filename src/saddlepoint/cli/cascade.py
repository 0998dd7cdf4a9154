"""`saddlepoint evaluate --effort`: the cascade, kept in a campaign for each model and size, and the gate for CI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer
from rich.markup import escape

from saddlepoint.cli.options import console
from saddlepoint.data.dataset import Split
from saddlepoint.evaluate import Campaign, Effort, evaluate
from saddlepoint.gates import check_share, gate
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat


def cascade(
    models: Mapping[str, Classifier],
    split: Split,
    threats: Sequence[Threat],
    effort: Effort,
    out: Path,
    *,
    seed: int,
    batch_size: int | None,
    at_least: float | None,
    junit: Path | None,
    write: Callable[[Path], object],
) -> None:
    """Evaluate each model within each threat; what is finished is kept in `out`, and the same command goes on with it.

    write: keeps the configuration in a folder. With several models or threats a JUnit file for each, named after its campaign.

    Exit status 1 if `at_least` is given and not reached, 130 after Ctrl-C.
    """
    if at_least is not None:
        check_share(at_least)
    if junit is not None:
        junit.unlink(missing_ok=True)  # an old one must not speak for a run that fails
    failed = stopped = False
    for name, model in models.items():
        for threat in threats:
            folder = out / f"{name}-{threat.norm.value}-{threat.largest_eps:.6g}"
            found = evaluate(
                model,
                split.x,
                split.y,
                threat,
                effort,
                seed=seed,
                batch_size=batch_size,
                progress=True,
                campaign=Campaign(folder),
            )
            write(folder)
            stopped |= not found.complete
            console.print(f"\n[bold]{escape(name)}[/]")
            console.print(escape(found.summary()))
            console.print(
                f"campaign: [bold]{escape(str(folder))}[/]   (sp.Campaign; the same command goes on where it stopped)"
            )
            if at_least is not None:
                result = gate(found, at_least)
                failed |= not result.passed
                console.print(escape(result.message))
                (folder / "gate.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
                if junit is not None:
                    junit.parent.mkdir(parents=True, exist_ok=True)
                    several = len(models) * len(threats) > 1
                    (junit.with_stem(f"{junit.stem}-{folder.name}") if several else junit).write_text(result.junit())
    if failed or stopped:
        raise typer.Exit(130 if stopped else 1)
