"""The attack that knows a model but not the defense in front of it: what papers reported, and no measure of robustness."""

from __future__ import annotations

import torch
from torch import Tensor

from saddlepoint.attacks import APGD, minimal
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.compose import Defended
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Threat


def takes(source: Classifier, x: Tensor) -> bool:
    """Whether the model can be attacked by gradients at inputs such as x: not where its transformations code them otherwise."""
    if source.access < Access.GRADIENTS:
        return False
    try:
        with source.frozen(), torch.no_grad():
            source.forward(x[:1].to(source.device))
        source.queries.forward += len(x[:1])
    except Exception:  # whatever a network raises for another shape
        return False
    return True


def naive_examples(
    source: Classifier, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int | None = None
) -> Tensor:
    """Of each sample the point of largest margin on `source` that APGD (in l0 the sparse search) finds, (N, ...)."""
    attack: Attack = minimal(Norm.L0, 100) if threat.norm is Norm.L0 else APGD(steps=20)
    return run_attack(source, x, y, attack, threat, seed=seed, batch_size=batch_size, keep="margin").adversarial


def averaged_predictions(model: Classifier, x: Tensor, *, seed: int = 0, batch_size: int | None = None) -> Tensor:
    """The classes (N,) by the mean logits over the model's draws, each from fresh random numbers; counted."""
    draws = model.draws if len(x) and model.probe(x).stochastic else 1
    found = []
    with model.frozen(), torch.no_grad():
        torch.manual_seed(seed)
        for part in torch.split(x, max(1, (batch_size or 256) // draws)):
            logits = model.forward(part.to(model.device).repeat_interleave(draws, 0))
            found.append(logits.view(len(part), draws, -1).mean(1).argmax(1).cpu())
    model.queries.forward += draws * len(x)
    return torch.cat(found) if len(x) else torch.empty(0, dtype=torch.int64)


def stands_naive(
    model: Defended, x: Tensor, y: Tensor, threat: Threat,
    *, source: Classifier | None = None, seed: int = 0, batch_size: int | None = None,
) -> Tensor | None:  # fmt: skip
    """Which samples the defended model gets right where the examples were made against the model inside, (N,) bool.

    source: an undefended model in its place, for a network that was trained behind its transformation. None where there is
    none that takes these inputs and has gradients. The passes are counted on the models that make them.
    """
    source = model.model if source is None else source
    if source.bounds != model.bounds:
        raise InputError(f"the bounds of model and source differ: {model.bounds} and {source.bounds}")
    if not len(x) or not takes(source, x):
        return None
    examples = naive_examples(source, x, y, threat, seed=seed, batch_size=batch_size)
    return averaged_predictions(model, examples, seed=seed, batch_size=batch_size) == y.cpu()
