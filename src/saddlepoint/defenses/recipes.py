"""Defenses by name, with the settings of their papers: how a network is trained, and what stands before it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from torch import Tensor

from saddlepoint.attacks.ascent import FGSM, ILLC, PGD, RFGSM
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses import transforms
from saddlepoint.defenses.augmentation import (
    CropAndFlip,
    Cutout,
    Dropout,
    GaussianAugmentation,
    LabelSmoothing,
    Mixup,
    static_augmentation,
)
from saddlepoint.defenses.certified import CROWNIBP, IBP, MTLIBP, SABR, ConvexDual
from saddlepoint.defenses.classifiers import Smoothed
from saddlepoint.defenses.distillation import Tempered, distill
from saddlepoint.defenses.ensemble import EnsembleAdversarial
from saddlepoint.defenses.gradients import CURE, InputGradientPenalty, JacobianPenalty
from saddlepoint.defenses.noise import SmoothAdv
from saddlepoint.defenses.objectives import Adversarial, Objective, Standard
from saddlepoint.defenses.single_step import NFGSM, Fast, Free, GradAlign, StopAtCollapse
from saddlepoint.defenses.smoothness import HAT, MART, TRADES, AdversarialLogitPairing, CleanLogitPairing
from saddlepoint.defenses.training import Training, train
from saddlepoint.defenses.weights import AWP, LipschitzPenalty, LipschitzProjection, Parseval, WeightPenalty
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.models.compose import Defended
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.models.transforms import InputTransform
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
_LINEAR: Final = {"schedule": "linear"}
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
    "smoothadv": (SmoothAdv, {}),
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
    "crop-and-flip": (_plain(CropAndFlip), {}),
    "gaussian-augmentation": (_plain(GaussianAugmentation), {}),
    "dropout": (_plain(Dropout), {}),
    "ibp": (IBP, _LINEAR),
    "crown-ibp": (CROWNIBP, _LINEAR),
    "sabr": (SABR, _LINEAR),
    "mtl-ibp": (MTLIBP, _LINEAR),
    "convex-dual": (ConvexDual, _LINEAR),
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
    objective = _built(name, build, threat=threat, **settings)
    return Recipe(name, objective, extra, 1 / objective.replays)


def _built(name: str, build: Callable[..., Any], **settings: Any) -> Any:
    """What `build` makes of the settings; `InputError` for those that don't belong to it."""
    try:
        inspect.signature(build).bind(**settings)
        return build(**settings)
    except TypeError as error:
        raise InputError(f"the defense {name!r}: {error}") from error


DISTILLATION, STATIC, SMOOTHING = "distillation", "static-augmentation", "smoothing"
Shape = tuple[int, ...]


def _always(*kinds: Callable[..., InputTransform]) -> Callable[..., list[InputTransform]]:
    """Transformations that don't ask for the inputs' shape; settings go to the one that has them."""

    def build(shape: Shape, **settings: Any) -> list[InputTransform]:
        known = [inspect.signature(kind).parameters for kind in kinds]
        for key in settings:
            if not any(key in names for names in known):
                raise TypeError(f"got an unexpected keyword argument {key!r}")
        return [kind(**{k: settings[k] for k in settings if k in names}) for kind, names in zip(kinds, known, strict=True)]

    return build


def _random_resize(shape: Shape, *, smallest: int | None = None, size: int | None = None) -> list[InputTransform]:
    if len(shape) != 3:
        raise InputError(f"random-resize is for images (C, H, W); the inputs' shape is {shape}")
    size = shape[-1] if size is None else size
    return [transforms.RandomResizePad(size * 9 // 10 if smallest is None else smallest, size)]


_BEFORE: Final[Mapping[str, Callable[..., list[InputTransform]]]] = {
    "feature-squeezing": _always(transforms.BitDepth, transforms.Median),
    "bit-depth": _always(transforms.BitDepth),
    "median": _always(transforms.Median),
    "mean": _always(transforms.Mean),
    "gaussian": _always(transforms.Gaussian),
    "bilateral": _always(transforms.Bilateral),
    "non-local-means": _always(transforms.NonLocalMeans),
    "jpeg": _always(transforms.JPEG),
    "total-variance": _always(transforms.TotalVariance),
    "random-resize": _random_resize,
    "crop-rescale": _always(transforms.CropRescale),
    "gaussian-noise": _always(transforms.GaussianNoise),
}

TRAININGS: Final = (*RECIPES, DISTILLATION, STATIC)
DEFENSES: Final = (*TRAININGS, *_BEFORE, SMOOTHING)
"""The names that `defense` knows: trainings, what stands before a network, and votes under noise."""


@dataclass(frozen=True)
class Defense:
    """How a defended classifier is made: what its network is trained by, and what stands before it.

    name: as it was written. training: name and settings of `TRAININGS`; None for the undefended network as it is.
    before: names and settings of input transformations, the first is applied first; votes: settings of `Smoothed`, or None.
    """

    name: str
    training: tuple[str, Mapping[str, Any]] | None
    before: tuple[tuple[str, Mapping[str, Any]], ...]
    votes: Mapping[str, Any] | None

    @property
    def network(self) -> str:
        """What its network is trained by, as text: defenses with the same can share a network. Empty if it isn't trained."""
        if self.training is None:
            return ""
        name, settings = self.training
        return name + (":" if settings else "") + ",".join(f"{key}={value}" for key, value in settings.items())

    def recipe(self, threat: Threat) -> Recipe:
        """What its network is trained by, of `RECIPES`. Errors: those of `recipe`, such as a network that it needs."""
        name, settings = self.training or ("standard", {})
        return recipe(name, threat, **settings)

    def objective(self, threat: Threat, undefended: Model) -> tuple[Objective, Mapping[str, Any], float]:
        """What its network is trained on: objective, what else `train` is told, and by what the epochs are multiplied.

        undefended: trained without a defense; "hat" and "ensemble" look at it. Errors: those of `recipe`.
        """
        name, settings = self.training or ("standard", {})
        if name == DISTILLATION:
            return _built(name, Tempered, **settings), {}, 1.0
        if name == STATIC:
            _built(name, _static, **settings)
            return Standard(), {}, 1.0
        networks: dict[str, dict[str, Any]] = {"hat": {"helper": undefended}, "ensemble": {"sources": (undefended,)}}
        found = recipe(name, threat, **{**networks.get(name, {}), **settings})
        return found.objective, found.train, found.epochs

    def train(
        self, start: Model, data: Labelled | tuple[Tensor, Tensor], threat: Threat, *, undefended: Model, epochs: int = 10,
        **settings: Any,
    ) -> Training:  # fmt: skip
        """Train `start` in place by this defense's training. settings: of `sp.train` (Any since they are passed on).

        Errors: those of `train`, `distill` and `static_augmentation`; `KeyboardInterrupt` where these raise it.
        """
        objective, extra, factor = self.objective(threat, undefended)
        settings = {**settings, "epochs": max(1, round(epochs * factor)), **extra}
        if self.training is not None and self.training[0] == DISTILLATION:
            return distill(copy.deepcopy(start), start, data, **self.training[1], **settings)
        if self.training is not None and self.training[0] == STATIC:
            attack = _static(**self.training[1])
            augmented = static_augmentation(undefended, data, attack, threat, seed=settings.get("seed", 0))
            return train(start, augmented, **settings)
        return train(start, data, adversary=objective, **settings)

    def protect(self, model: Classifier, shape: Sequence[int]) -> Classifier:
        """The model behind what this defense puts before it. shape: of one input, without the batch."""
        chain = [one for name, settings in self.before for one in _built(name, _BEFORE[name], shape=tuple(shape), **settings)]
        protected: Classifier = Defended(model, chain) if chain else model
        if self.votes is not None:
            protected = _built(SMOOTHING, _smoothed, model=protected, **self.votes)
        return protected


def defense(text: str) -> Defense:
    """A defense by name, with settings, and several joined by a plus sign: `trades:beta=1`, `pgd-training:steps=7+jpeg`.

    At most one part is a training; input transformations are applied in the order that they are written in.
    Errors: `UnknownNameError` with the nearest names, `InputError`. Settings are looked at when the defense is made.

    >>> defense("trades:beta=1+jpeg").before
    (('jpeg', {}),)
    """
    training: tuple[str, dict[str, Any]] | None = None
    before: list[tuple[str, dict[str, Any]]] = []
    votes: dict[str, Any] | None = None
    for part in re.split(r"\+(?=\s*[A-Za-z])", text):
        name, settings = named_settings(part)
        if name in _BEFORE:
            before.append((name, settings))
        elif name == SMOOTHING and votes is None:
            votes = settings
        elif name in TRAININGS and training is None:
            training = name, settings
        elif name in DEFENSES:
            first = SMOOTHING if training is None else training[0]
            raise InputError(f"the defense {text!r} joins {first} and {name}: a network is trained, and smoothed, in one way")
        else:
            raise UnknownNameError("defense", name, DEFENSES)
    return Defense(text.strip(), training, tuple(before), votes)


def named_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of text such as `trades:beta=1`. Errors: `InputError`."""
    name, _, rest = text.strip().partition(":")
    settings = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"write settings as {name}:{key}=VALUE; got {text!r}")
        settings[key.strip()] = _value(value.strip())
    return name.lower(), settings


def _value(text: str) -> int | float | bool | str:
    """A number (also 8/255) or a truth value if it is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float, Fraction):
        try:
            number = kind(text)
        except (ValueError, ZeroDivisionError):
            continue
        return number if isinstance(number, int | float) else float(number)
    return text


def _static(attack: str = "fgsm") -> Any:
    return as_attack(attack)


def _smoothed(model: Classifier, sigma: float = 0.25, votes: int = 100, draws: int = 2) -> Smoothed:
    return Smoothed(model, sigma, votes, draws)
