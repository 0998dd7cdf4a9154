"""The axes along which the literature sorts attacks (Yuan et al. 2019, arXiv:1712.07107), one type each."""

from __future__ import annotations

import math
from enum import IntEnum, StrEnum


class Access(IntEnum):
    """What a model grants, or an attack needs; each level includes those below it.

    `TRANSFER` means nothing of the model under attack: only a substitute is used.
    """

    TRANSFER = 0
    LABELS = 1
    SCORES = 2
    GRADIENTS = 3
    PARAMETERS = 4


class Norm(StrEnum):
    """How the size of a perturbation is measured."""

    L0 = "l0"
    L1 = "l1"
    L2 = "l2"
    LINF = "linf"

    @property
    def dual(self) -> float:
        """Order of the norm of a gradient by which a linear function's distance to a value is its gap divided by it."""
        return {Norm.LINF: 1.0, Norm.L2: 2.0, Norm.L1: math.inf}[self]


class Scope(StrEnum):
    """For how many inputs one perturbation is made."""

    INDIVIDUAL = "individual"
    UNIVERSAL = "universal"
    PATCH = "patch"


class Status(StrEnum):
    """What became of one sample.

    - `ALREADY_WRONG`: untargeted goals only; the model errs on the clean input, so there was nothing to attack.
    - `FOOLED`: the goal was reached, and re-prediction by the bare model confirmed it.
    - `SURVIVED`: the goal was not reached; the best attempt is returned.
    - `ERROR`: the model gave NaN or infinite values for this sample, as outputs (`predicted` is -2 then) or as a gradient.
    """

    ALREADY_WRONG = "already_wrong"
    FOOLED = "fooled"
    SURVIVED = "survived"
    ERROR = "error"
