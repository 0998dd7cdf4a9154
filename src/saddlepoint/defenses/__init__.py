"""The outer minimum: training that makes models robust."""

from saddlepoint.defenses.hardening import Hardening, harden
from saddlepoint.defenses.loop import EpochRecord, Fit, Sample, fit
from saddlepoint.defenses.objectives import Adversarial, Batch, Objective, Standard
from saddlepoint.defenses.training import Training, train

__all__ = [
    "Adversarial", "Batch", "EpochRecord", "Fit", "Hardening", "Objective", "Sample", "Standard", "Training", "fit", "harden",
    "train",
]  # fmt: skip
