"""How robust models are: a figure with its evidence, attacks side by side, distances to the boundary, and what to trust."""

from saddlepoint.evaluate.campaign import Campaign
from saddlepoint.evaluate.cascade import Effort, evaluate
from saddlepoint.evaluate.compare import Cell, Comparison, compare
from saddlepoint.evaluate.defended import DefendedComparison, compare_defended
from saddlepoint.evaluate.detection import Bypass, Detection, bypass, detect
from saddlepoint.evaluate.diagnose import Diagnosis, Finding, diagnose
from saddlepoint.evaluate.distances import Distances, Quantile, distance
from saddlepoint.evaluate.estimate import Estimate, estimate
from saddlepoint.evaluate.evaluation import Evaluation, Interval, Stage, WorstCase
from saddlepoint.evaluate.export import AdversarialSet, export
from saddlepoint.evaluate.paired import Case, Paired, compare_campaigns, replay
from saddlepoint.evaluate.queries import QueryCurve, Trace, query_curve
from saddlepoint.evaluate.substitute import Round, Substitute, substitute
from saddlepoint.evaluate.tournament import Entry, Tournament, defend
from saddlepoint.evaluate.transfer import Transfer, TransferMatrix, transfer_matrix

__all__ = [
    "AdversarialSet",
    "Bypass",
    "Campaign",
    "Case",
    "Cell",
    "Comparison",
    "DefendedComparison",
    "Detection",
    "Diagnosis",
    "Distances",
    "Effort",
    "Entry",
    "Estimate",
    "Evaluation",
    "Finding",
    "Interval",
    "Paired",
    "Quantile",
    "QueryCurve",
    "Round",
    "Samples",
    "Stage",
    "Substitute",
    "Tournament",
    "Trace",
    "Transfer",
    "TransferMatrix",
    "WorstCase",
    "bypass",
    "compare",
    "compare_campaigns",
    "compare_defended",
    "defend",
    "detect",
    "diagnose",
    "distance",
    "estimate",
    "evaluate",
    "export",
    "query_curve",
    "replay",
    "substitute",
    "transfer_matrix",
]  # fmt: skip
