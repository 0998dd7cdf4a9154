"""The outer minimum: training that makes models robust, and what stands before or in place of a classifier.

Input transformations are in `saddlepoint.defenses.transforms`, which is `sp.transforms`, purifiers in
`saddlepoint.defenses.purification`.
"""

from saddlepoint.defenses import purification, transforms
from saddlepoint.defenses.augmentation import (
    Augmented,
    CropAndFlip,
    Cutout,
    Dropout,
    GaussianAugmentation,
    LabelSmoothing,
    Mixup,
    static_augmentation,
)
from saddlepoint.defenses.certified import (
    CROWNIBP,
    IBP,
    MTLIBP,
    SABR,
    ConvexDual,
    dual_bounds,
    interval_initialize,
    lowest_margins,
)
from saddlepoint.defenses.classifiers import (
    RBF,
    GaussianProcessHead,
    GradientMasked,
    NearestNeighbours,
    PrototypeLoss,
    Prototypes,
    Smoothed,
)
from saddlepoint.defenses.distillation import Tempered, distill
from saddlepoint.defenses.ensemble import EnsembleAdversarial
from saddlepoint.defenses.gradients import CURE, InputGradientPenalty, JacobianPenalty
from saddlepoint.defenses.hardening import Hardening, harden
from saddlepoint.defenses.lipschitz import (
    AOLConv2d,
    AOLLinear,
    FirstChannels,
    LipschitzMargin,
    MaxMin,
    SLLConv2d,
    SLLLinear,
    certified_radius,
)
from saddlepoint.defenses.loop import EpochRecord, Fit, Sample, fit
from saddlepoint.defenses.noise import SmoothAdv, train_noise_denoiser
from saddlepoint.defenses.objectives import Adversarial, Around, Batch, MinMax, Objective, Standard
from saddlepoint.defenses.recipes import DEFENSES, RECIPES, Defense, Recipe, defense, recipe
from saddlepoint.defenses.single_step import NFGSM, Fast, Free, GradAlign, StopAtCollapse
from saddlepoint.defenses.smoothness import HAT, MART, TRADES, AdversarialLogitPairing, CleanLogitPairing
from saddlepoint.defenses.training import Training, train
from saddlepoint.defenses.weights import AWP, LipschitzPenalty, LipschitzProjection, Parseval, WeightPenalty

__all__ = [
    "AWP",
    "CROWNIBP",
    "CURE",
    "DEFENSES",
    "HAT",
    "IBP",
    "MART",
    "MTLIBP",
    "NFGSM",
    "RBF",
    "RECIPES",
    "SABR",
    "TRADES",
    "AOLConv2d",
    "AOLLinear",
    "Adversarial",
    "AdversarialLogitPairing",
    "Around",
    "Augmented",
    "Batch",
    "CleanLogitPairing",
    "ConvexDual",
    "CropAndFlip",
    "Cutout",
    "Defense",
    "Dropout",
    "EnsembleAdversarial",
    "EpochRecord",
    "Fast",
    "FirstChannels",
    "Fit",
    "Free",
    "GaussianAugmentation",
    "GaussianProcessHead",
    "GradAlign",
    "GradientMasked",
    "Hardening",
    "InputGradientPenalty",
    "JacobianPenalty",
    "LabelSmoothing",
    "LipschitzMargin",
    "LipschitzPenalty",
    "LipschitzProjection",
    "MaxMin",
    "MinMax",
    "Mixup",
    "NearestNeighbours",
    "Objective",
    "Parseval",
    "PrototypeLoss",
    "Prototypes",
    "Recipe",
    "SLLConv2d",
    "SLLLinear",
    "Sample",
    "SmoothAdv",
    "Smoothed",
    "Standard",
    "StopAtCollapse",
    "Tempered",
    "Training",
    "WeightPenalty",
    "certified_radius",
    "defense",
    "distill",
    "dual_bounds",
    "fit",
    "harden",
    "interval_initialize",
    "lowest_margins",
    "purification",
    "recipe",
    "static_augmentation",
    "train",
    "train_noise_denoiser",
    "transforms",
]  # fmt: skip
