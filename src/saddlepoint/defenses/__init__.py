"""The outer minimum: training that makes models robust, and what stands before or in place of a classifier.

Input transformations are in `saddlepoint.defenses.transforms`, which is `sp.transforms`, purifiers in
`saddlepoint.defenses.purification`.
"""

from saddlepoint.defenses import purification, transforms
from saddlepoint.defenses.augmentation import (
    Augmented,
    Cutout,
    Dropout,
    GaussianAugmentation,
    LabelSmoothing,
    Mixup,
    static_augmentation,
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
    "CURE",
    "DEFENSES",
    "HAT",
    "MART",
    "NFGSM",
    "RBF",
    "RECIPES",
    "TRADES",
    "Adversarial",
    "AdversarialLogitPairing",
    "Around",
    "Augmented",
    "Batch",
    "CleanLogitPairing",
    "Cutout",
    "Defense",
    "Dropout",
    "EnsembleAdversarial",
    "EpochRecord",
    "Fast",
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
    "LipschitzPenalty",
    "LipschitzProjection",
    "MinMax",
    "Mixup",
    "NearestNeighbours",
    "Objective",
    "Parseval",
    "PrototypeLoss",
    "Prototypes",
    "Recipe",
    "Sample",
    "SmoothAdv",
    "Smoothed",
    "Standard",
    "StopAtCollapse",
    "Tempered",
    "Training",
    "WeightPenalty",
    "defense",
    "distill",
    "fit",
    "harden",
    "purification",
    "recipe",
    "static_augmentation",
    "train",
    "train_noise_denoiser",
    "transforms",
]  # fmt: skip
