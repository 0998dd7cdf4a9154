"""The outer minimum: training that makes models robust."""

from saddlepoint.defenses.hardening import Hardening, harden
from saddlepoint.defenses.objectives import Adversarial, Batch, Objective, Standard
from saddlepoint.defenses.training import EpochRecord, Training, train

__all__ = [
    "Adversarial", "Batch", "EpochRecord", "Hardening", "Objective", "Standard", "Training", "harden", "train",
]  # fmt: skip
