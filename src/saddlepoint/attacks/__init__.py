"""Attacks. Each is a frozen dataclass of hyperparameters; `sp.attack` runs it.

A new attack is one file with `init` and `step` and the `@register` line (see CONTRIBUTING.md).
"""

from saddlepoint.attacks.ascent import BIM, FGM, FGSM, ILLC, MIFGSM, NIFGSM, OTCM, PGD, RFGSM, FastGradientValue
from saddlepoint.attacks.noise import GaussianNoise, SignNoise, UniformNoise
from saddlepoint.attacks.registry import find, get, register
from saddlepoint.attacks.wrappers import Bisect, Restarts, Sequence

__all__ = [
    "BIM",
    "FGM",
    "FGSM",
    "ILLC",
    "MIFGSM",
    "NIFGSM",
    "OTCM",
    "PGD",
    "RFGSM",
    "Bisect",
    "FastGradientValue",
    "GaussianNoise",
    "Restarts",
    "Sequence",
    "SignNoise",
    "UniformNoise",
    "find",
    "get",
    "register",
]  # fmt: skip
