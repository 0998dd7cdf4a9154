"""`saddlepoint verify`: what is proved of a network, of a property file or of samples within a threat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saddlepoint.cli import config as configuration
from saddlepoint.cli import inputs
from saddlepoint.cli.config import ConfigFile
from saddlepoint.cli.options import (
    DataText,
    Device,
    JsonFile,
    Mean,
    NormText,
    OptionalModelText,
    Root,
    Samples,
    Seed,
    Std,
    console,
    make_way,
    warn_of_random_weights,
    write_json,
    writing,
)
from saddlepoint.defenses import Smoothed
from saddlepoint.engine import Budget
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat
from saddlepoint.verify import certify, certify_smoothed, decide, read_vnnlib

_NOTHING = {  # what has no effect, by the option that tells what is proved
    "onnx": ("sigma", "data", "norm", "eps", "votes", "alpha", "samples", "seed", "mean", "std", "device", "root", "out"),
    "sigma": ("norm", "budget", "rigorous"),
    "eps": ("votes", "alpha"),
}


def verify(
    context: typer.Context,
    model: OptionalModelText = None,
    data: DataText = "digits",
    norm: NormText = Norm.LINF,
    eps: Annotated[str | None, typer.Option(help="Size of the ball, 0.1 or 8/255.", show_default=False)] = None,
    onnx: Annotated[Path | None, typer.Option(help="With --vnnlib: the network, an ONNX file or .onnx.gz.")] = None,
    vnnlib: Annotated[Path | None, typer.Option(help="With --onnx: the property, a VNNLIB file or .vnnlib.gz.")] = None,
    budget: Annotated[float, typer.Option(min=0.001, help="Seconds for each sample, or for the property.")] = 60.0,
    sigma: Annotated[
        float | None, typer.Option(min=1e-9, help="Randomised smoothing instead: the model's vote under noise of this size.")
    ] = None,
    votes: Annotated[int, typer.Option(min=1, help="With --sigma: passes for each sample.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="With --sigma: probability of error for each sample.")] = 0.001,
    rigorous: Annotated[bool, typer.Option("--rigorous", help="Compute in float64 and allow for rounding; slower.")] = False,
    samples: Samples = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    root: Root = None,
    out: Annotated[
        Path | None, typer.Option(help="With --model: folder that keeps what is finished; the same command goes on there.")
    ] = None,
    json_file: JsonFile = None,
    config: ConfigFile = None,
) -> None:
    """Prove or refute: samples within a threat (--model, --data, --eps), or a property of a network (--onnx, --vnnlib).

    With --sigma it is the vote under noise that is proved, in l2 balls, of a network of any size; --eps are then the radii to
    tell.
    """
    if (onnx is None) != (vnnlib is None):
        raise InputError("--onnx and --vnnlib go together: a network and its property")
    if (onnx is None) == (model is None):
        raise InputError("give either --model with --eps, or --onnx with --vnnlib")
    _refuse(context, "onnx" if onnx is not None else "eps" if sigma is None else "sigma")
    make_way(json_file)
    limit = Budget(seconds=budget)
    if onnx is not None:
        assert vnnlib is not None
        write_json(json_file, _property(onnx, vnnlib, limit, rigorous))
        return
    assert model is not None
    threat = None if sigma is not None else _threat(norm, eps)
    found = inputs.dataset(data, root)
    name, victim = inputs.model(model, found, mean=mean, std=std, device=device)
    warn_of_random_weights([model])
    split = inputs.samples(found, samples)
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    if threat is None:
        assert sigma is not None
        radii = None if eps is None else inputs.numbers(eps)
        votes_file = None if out is None else out / "votes.json"
        voted = certify_smoothed(
            Smoothed(victim, sigma), split.x, split.y, n=votes, alpha=alpha, seed=seed, checkpoint=votes_file, progress=True
        )  # fmt: skip
        summary, document, complete = voted.summary(radii), voted.document(), voted.complete
    else:
        proved = certify(victim, split.x, split.y, threat, limit, seed=seed, rigorous=rigorous, progress=True, folder=out)
        summary, document, complete = proved.summary(), proved.to_dict(), proved.complete
    if out is not None:
        with writing(out):
            configuration.write(context, out)
    console.print(f"{name}: {summary}", markup=False)
    write_json(json_file, {"model": name, "data": found.name} | document)
    if not complete:
        raise typer.Exit(130)


def _refuse(context: typer.Context, kind: str) -> None:
    """Options of other kinds of proofs, which would have no effect."""
    for name in _NOTHING[kind]:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{name} means nothing with --{kind}: leave it out")


def _threat(norm: Norm, eps: str | None) -> Threat:
    """The only one."""
    if eps is None:
        raise InputError("--eps is missing: the size of the ball, such as 0.1 or 8/255")
    (threat, *more) = inputs.threats(norm.value, eps)
    if more:
        raise InputError("verify takes one --eps at a time")
    return threat


def _property(onnx: Path, vnnlib: Path, limit: Budget, rigorous: bool) -> dict[str, Any]:
    """Decide, say so, and what to write."""
    property_ = read_vnnlib(vnnlib)
    console.print(f"property: {property_}", markup=False)
    proof = decide(onnx, property_, limit, rigorous=rigorous)
    point = None if proof.counterexample is None else proof.counterexample.flatten().tolist()
    words = {
        "robust": "robust: none of the cases can occur",
        "falsified": "falsified: an input was found where one of the cases occurs",
        "unknown": f"unknown: {proof.reason}",
    }[proof.verdict]
    console.print(words, markup=False)
    searched = proof.verdict == "robust" and proof.stage in ("inputs", "search")
    least = "above 0" if searched else f"{proof.bound:.6g}"  # a search stops at the sign
    console.print(f"stage {proof.stage}, least margin {least}, {proof.parts} parts, {proof.seconds:.2f} s", markup=False)
    return {
        "verdict": proof.verdict, "stage": proof.stage, "bound": proof.bound, "parts": proof.parts, "seconds": proof.seconds,
        "reason": proof.reason, "rigorous": proof.rigorous, "counterexample": point,
    }  # fmt: skip
