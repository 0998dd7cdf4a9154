"""Training defenses by name, with the settings of their papers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from saddlepoint.attacks.ascent import FGSM, ILLC, PGD, RFGSM
from saddlepoint.defenses.augmentation import Cutout, Dropout, GaussianAugmentation, LabelSmoothing, Mixup
from saddlepoint.defenses.ensemble import EnsembleAdversarial
from saddlepoint.defenses.gradients import CURE, InputGradientPenalty, JacobianPenalty
from saddlepoint.defenses.objectives import Adversarial, Objective, Standard
from saddlepoint.defenses.single_step import NFGSM, Fast, Free, GradAlign, StopAtCollapse
from saddlepoint.defenses.smoothness import HAT, MART, TRADES, AdversarialLogitPairing, CleanLogitPairing
from saddlepoint.defenses.weights import AWP, LipschitzPenalty, LipschitzProjection, Parseval, WeightPenalty
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.threats import Threat


@dataclass(frozen=True)
class Recipe:
    """A training defense: its objective, and what else it asks of `sp.train` (Any since it is passed on).

    epochs: what to multiply the user's number of epochs by, so that recipes cost about as many updates.
    """

    name: str
    objective: Objective
    train: Mapping[str, Any]
    epochs: float = 1.0


def _pgd(threat: Threat, *, steps: int = 10, **settings: Any) -> Adversarial:
    return Adversarial(attack=PGD(steps=steps), threat=threat, **settings)


def _fast(threat: Threat, **settings: Any) -> Objective:
    return StopAtCollapse(Fast(threat=threat, **settings), threat)


def _gradalign(threat: Threat, *, strength: float = 0.2, **settings: Any) -> Objective:
    return GradAlign(Fast(threat=threat, **settings), threat, strength)


def _fgsm(form: str) -> Callable[..., Objective]:
    def build(threat: Threat, **settings: Any) -> Objective:
        return Adversarial(attack=FGSM(), threat=threat, **({"form": form} | settings))

    return build


def _rfgsm(threat: Threat, **settings: Any) -> Objective:
    return Adversarial(attack=RFGSM(), threat=threat, **({"form": "regularize"} | settings))


def _mixed(threat: Threat, *, steps: int = 10, **settings: Any) -> Objective:
    attacks = (PGD(steps=steps), ILLC(steps=steps))
    return Adversarial(attack=attacks, threat=threat, **({"form": "weighted"} | settings))


def _awp(threat: Threat, *, gamma: float = 0.01, warmup: float = 0.0, **settings: Any) -> Objective:
    return AWP(_pgd(threat, **settings), gamma, warmup)


def _trades_awp(threat: Threat, *, gamma: float = 0.005, warmup: float = 0.0, **settings: Any) -> Objective:
    return AWP(TRADES(threat=threat, **settings), gamma, warmup)


def _plain(around: Callable[..., Objective]) -> Callable[..., Objective]:
    """A regulariser around clean training."""

    def build(threat: Threat, **settings: Any) -> Objective:
        return around(Standard(), **settings)

    return build


def _clean(threat: Threat) -> Objective:
    return Standard()


def _clean_logit_pairing(threat: Threat, **settings: Any) -> Objective:
    return CleanLogitPairing(**settings)


_CYCLIC: Final = {"schedule": "cyclic"}
_BUILDERS: Final[Mapping[str, tuple[Callable[..., Objective], Mapping[str, Any]]]] = {
    "standard": (_clean, {}),
    "pgd-training": (_pgd, {}),
    "fgsm-regularizer": (_fgsm("regularize"), {}),
    "fgsm-added": (_fgsm("add"), {}),
    "rfgsm": (_rfgsm, {}),
    "mixed": (_mixed, {}),
    "fast": (_fast, _CYCLIC),
    "n-fgsm": (NFGSM, _CYCLIC),
    "gradalign": (_gradalign, _CYCLIC),
    "free": (Free, {}),
    "trades": (TRADES, {}),
    "mart": (MART, {}),
    "hat": (HAT, {}),
    "awp": (_awp, {}),
    "trades-awp": (_trades_awp, {}),
    "ensemble": (EnsembleAdversarial, {}),
    "logit-pairing": (AdversarialLogitPairing, {}),
    "clean-logit-pairing": (_clean_logit_pairing, {}),
    "input-gradient": (_plain(InputGradientPenalty), {}),
    "jacobian": (_plain(JacobianPenalty), {}),
    "cure": (_plain(CURE), {}),
    "weight-penalty": (_plain(WeightPenalty), {}),
    "parseval": (_plain(Parseval), {}),
    "lipschitz-penalty": (_plain(LipschitzPenalty), {}),
    "lipschitz-projection": (_plain(LipschitzProjection), {}),
    "label-smoothing": (_plain(LabelSmoothing), {}),
    "mixup": (_plain(Mixup), {}),
    "cutout": (_plain(Cutout), {}),
    "gaussian-augmentation": (_plain(GaussianAugmentation), {}),
    "dropout": (_plain(Dropout), {}),
}

RECIPES: Final = tuple(_BUILDERS)
"""The names that `recipe` knows."""


def recipe(name: str, threat: Threat, **settings: Any) -> Recipe:
    """The training defense of this name for a threat, with its paper's settings unless `settings` say otherwise.

    settings: of the objective, such as beta=6 for "trades" (Any since they are passed on); "hat" needs helper=, "ensemble"
    sources=. Defenses that know no threat ignore it. What is more than an objective has its own function: `distill`, and
    `static_augmentation`. Errors: `UnknownNameError` with the nearest names; `InputError` for settings that don't belong to it.

    >>> import saddlepoint as sp
    >>> recipe("trades", sp.Linf(0.3), beta=1.0).objective.beta
    1.0
    """
    if name not in _BUILDERS:
        raise UnknownNameError("defense", name, RECIPES)
    build, extra = _BUILDERS[name]
    try:
        inspect.signature(build).bind(threat=threat, **settings)
        objective = build(threat=threat, **settings)
    except TypeError as error:
        raise InputError(f"the defense {name!r}: {error}") from error
    return Recipe(name, objective, extra, 1 / objective.replays)
