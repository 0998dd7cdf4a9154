"""The outer minimum: training that makes models robust."""

from saddlepoint.defenses.augmentation import (
    Augmented,
    Cutout,
    Dropout,
    GaussianAugmentation,
    LabelSmoothing,
    Mixup,
    static_augmentation,
)
from saddlepoint.defenses.distillation import Tempered, distill
from saddlepoint.defenses.ensemble import EnsembleAdversarial
from saddlepoint.defenses.gradients import CURE, InputGradientPenalty, JacobianPenalty
from saddlepoint.defenses.hardening import Hardening, harden
from saddlepoint.defenses.loop import EpochRecord, Fit, Sample, fit
from saddlepoint.defenses.objectives import Adversarial, Around, Batch, MinMax, Objective, Standard
from saddlepoint.defenses.recipes import RECIPES, Recipe, recipe
from saddlepoint.defenses.single_step import NFGSM, Fast, Free, GradAlign, StopAtCollapse
from saddlepoint.defenses.smoothness import HAT, MART, TRADES, AdversarialLogitPairing, CleanLogitPairing
from saddlepoint.defenses.training import Training, train
from saddlepoint.defenses.weights import AWP, LipschitzPenalty, LipschitzProjection, Parseval, WeightPenalty

__all__ = [
    "AWP", "CURE", "HAT", "MART", "NFGSM", "RECIPES", "TRADES", "Adversarial", "AdversarialLogitPairing", "Around", "Augmented",
    "Batch", "CleanLogitPairing", "Cutout", "Dropout", "EnsembleAdversarial", "EpochRecord", "Fast", "Fit", "Free",
    "GaussianAugmentation", "GradAlign", "Hardening", "InputGradientPenalty", "JacobianPenalty", "LabelSmoothing",
    "LipschitzPenalty", "LipschitzProjection", "MinMax", "Mixup", "Objective", "Parseval", "Recipe", "Sample", "Standard",
    "StopAtCollapse", "Tempered", "Training", "WeightPenalty", "distill", "fit", "harden", "recipe", "static_augmentation",
    "train",
]  # fmt: skip
