"""Attacks. Each is a frozen dataclass of hyperparameters; `sp.attack` runs it.

A new attack is one file with `init` and `step` and the `@register` line (see CONTRIBUTING.md).
"""

from saddlepoint.attacks.ascent import BIM, FGM, FGSM, ILLC, MIFGSM, NIFGSM, OTCM, PGD, RFGSM, FastGradientValue
from saddlepoint.attacks.dual import DualAveraging
from saddlepoint.attacks.fmn import DDN, FMN, SigmaZero
from saddlepoint.attacks.minimal import minimal
from saddlepoint.attacks.noise import GaussianNoise, SignNoise, UniformNoise
from saddlepoint.attacks.registry import find, get, register
from saddlepoint.attacks.wrappers import Bisect, Restarts, Sequence

__all__ = [
    "BIM", "DDN", "FGM", "FGSM", "FMN", "ILLC", "MIFGSM", "NIFGSM", "OTCM", "PGD", "RFGSM", "Bisect", "DualAveraging",
    "FastGradientValue", "GaussianNoise", "Restarts", "Sequence", "SigmaZero", "SignNoise", "UniformNoise", "find", "get", "minimal",
    "register",
]  # fmt: skip
