"""Attacks. Each is a frozen dataclass of hyperparameters; `sp.attack` runs it.

A new attack is one file with `init` and `step` and the `@register` line (see CONTRIBUTING.md).
"""

from saddlepoint.attacks.apgd import APGD, APGDT
from saddlepoint.attacks.ascent import BIM, FGM, FGSM, ILLC, MIFGSM, NIFGSM, OTCM, PGD, RFGSM, FastGradientValue, Sprint
from saddlepoint.attacks.autoattack import AutoAttack
from saddlepoint.attacks.brendel_bethge import BrendelBethge
from saddlepoint.attacks.carlini_wagner import CarliniWagnerL0, CarliniWagnerL2, CarliniWagnerLinf
from saddlepoint.attacks.coordinates import ZOO, SimBA
from saddlepoint.attacks.deepfool import DeepFool, SparseFool, SuperDeepFool
from saddlepoint.attacks.dual import DualAveraging
from saddlepoint.attacks.estimation import NES, SPSA, Bandits, NAttack
from saddlepoint.attacks.evasion import OrthogonalPGD
from saddlepoint.attacks.evolution import CMAES, FewPixel, GenAttack
from saddlepoint.attacks.external import External
from saddlepoint.attacks.fab import FAB
from saddlepoint.attacks.fmn import DDN, FMN, SigmaZero
from saddlepoint.attacks.guided import BoundGuided
from saddlepoint.attacks.lagrangian import ALMA, PDGD, PDPGD
from saddlepoint.attacks.leaf_boxes import LeafBoxes
from saddlepoint.attacks.linear import HotCold, LinearClosedForm
from saddlepoint.attacks.minimal import minimal
from saddlepoint.attacks.noise import GaussianNoise, SaltAndPepperNoise, SignNoise, UniformNoise
from saddlepoint.attacks.normals import CGBA, QEBA, GeoDA, HopSkipJump, SignOPT
from saddlepoint.attacks.penalty import EAD, LBFGS
from saddlepoint.attacks.rays import RayS
from saddlepoint.attacks.registry import find, get, register
from saddlepoint.attacks.rubbish import evolve_rubbish
from saddlepoint.attacks.saliency import JSMA
from saddlepoint.attacks.square import Square
from saddlepoint.attacks.starts import starting_points
from saddlepoint.attacks.transfer import DIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM
from saddlepoint.attacks.trim import Trim
from saddlepoint.attacks.walks import BoundaryAttack, SurFree
from saddlepoint.attacks.wrappers import Bisect, Finally, Fork, Restarts, Sequence

__all__ = [
    "ALMA",
    "APGD",
    "APGDT",
    "BIM",
    "CGBA",
    "CMAES",
    "DDN",
    "DIFGSM",
    "EAD",
    "FAB",
    "FGM",
    "FGSM",
    "FMN",
    "ILLC",
    "JSMA",
    "LBFGS",
    "MIFGSM",
    "NES",
    "NIFGSM",
    "OTCM",
    "PDGD",
    "PDPGD",
    "PGD",
    "QEBA",
    "RFGSM",
    "SINIFGSM",
    "SPSA",
    "TIFGSM",
    "VMIFGSM",
    "VNIFGSM",
    "ZOO",
    "AutoAttack",
    "Bandits",
    "Bisect",
    "BoundGuided",
    "BoundaryAttack",
    "BrendelBethge",
    "CarliniWagnerL0",
    "CarliniWagnerL2",
    "CarliniWagnerLinf",
    "DeepFool",
    "DualAveraging",
    "External",
    "FastGradientValue",
    "FewPixel",
    "Finally",
    "Fork",
    "GaussianNoise",
    "GenAttack",
    "GeoDA",
    "HopSkipJump",
    "HotCold",
    "LeafBoxes",
    "LinearClosedForm",
    "NAttack",
    "OrthogonalPGD",
    "RayS",
    "Restarts",
    "SaltAndPepperNoise",
    "Sequence",
    "SigmaZero",
    "SignNoise",
    "SignOPT",
    "SimBA",
    "SparseFool",
    "Sprint",
    "Square",
    "SuperDeepFool",
    "SurFree",
    "Trim",
    "UniformNoise",
    "evolve_rubbish",
    "find",
    "get",
    "minimal",
    "register",
    "starting_points",
]  # fmt: skip
