"""Saddlepoint: adversarial examples on PyTorch. Attack classifiers, harden them, and see what was found.

>>> import torch, saddlepoint as sp
>>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
>>> x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
>>> result = sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.1))
>>> len(result)
8
"""

from saddlepoint import attacks, data, defenses, detectors, models, verify, zoo
from saddlepoint.attacks.facade import attack, perturb
from saddlepoint.defenses import Adversarial, Hardening, Standard, Training, harden, train, transforms
from saddlepoint.detectors import Detector, Guarded
from saddlepoint.engine import AttackResult, Budget, Interrupted
from saddlepoint.errors import (
    CapabilityError,
    DataError,
    InputError,
    MissingExtraError,
    ModelError,
    SaddlepointError,
    SaddlepointWarning,
    Unavailable,
    UnknownNameError,
)
from saddlepoint.evaluate import (
    AdversarialSet,
    Campaign,
    Comparison,
    Detection,
    Diagnosis,
    Distances,
    Estimate,
    Evaluation,
    QueryCurve,
    Substitute,
    Tournament,
    Trace,
    TransferMatrix,
    WorstCase,
    bypass,
    compare,
    compare_campaigns,
    compare_defended,
    defend,
    detect,
    diagnose,
    distance,
    estimate,
    evaluate,
    export,
    query_curve,
    replay,
    substitute,
    transfer_matrix,
)
from saddlepoint.goals import Evade, FalsePositive, Targeted, Untargeted
from saddlepoint.models import Classifier, Defended, Ensemble, HttpModel, Model, Transform
from saddlepoint.taxonomy import Access, Norm, Scope, Status
from saddlepoint.threats import L0, L1, L2, Linf, Minimize

__version__ = "0.1.0"

__all__ = [
    "L0",
    "L1",
    "L2",
    "Access",
    "Adversarial",
    "AdversarialSet",
    "AttackResult",
    "Budget",
    "Campaign",
    "CapabilityError",
    "Classifier",
    "Comparison",
    "DataError",
    "Defended",
    "Detection",
    "Detector",
    "Diagnosis",
    "Distances",
    "Ensemble",
    "Estimate",
    "Evade",
    "Evaluation",
    "FalsePositive",
    "Guarded",
    "Hardening",
    "HttpModel",
    "InputError",
    "Interrupted",
    "Linf",
    "Minimize",
    "MissingExtraError",
    "Model",
    "ModelError",
    "Norm",
    "QueryCurve",
    "SaddlepointError",
    "SaddlepointWarning",
    "Scope",
    "Standard",
    "Status",
    "Substitute",
    "Targeted",
    "Tournament",
    "Trace",
    "Training",
    "TransferMatrix",
    "Transform",
    "Unavailable",
    "UnknownNameError",
    "Untargeted",
    "WorstCase",
    "attack",
    "attacks",
    "bypass",
    "compare",
    "compare_campaigns",
    "compare_defended",
    "data",
    "defend",
    "defenses",
    "detect",
    "detectors",
    "diagnose",
    "distance",
    "estimate",
    "evaluate",
    "export",
    "harden",
    "models",
    "perturb",
    "query_curve",
    "replay",
    "substitute",
    "train",
    "transfer_matrix",
    "transforms",
    "verify",
    "zoo",
]  # fmt: skip
