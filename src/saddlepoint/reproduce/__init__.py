"""Papers' figures, measured again: ours, the paper's, and the range that ours must lie in.

>>> from saddlepoint import data, reproduce
>>> (outcome,) = reproduce.run(["R2"], reproduce.Context(data=data.load("digits"), quick=True))
>>> outcome.passed, outcome.stand_in
(True, True)
"""

from saddlepoint.reproduce import (  # noqa: F401  # they register their entries
    boundary,
    certified,
    detection_networks,
    detection_statistics,
    evaluation,
    evolved,
    goodfellow,
    least,
    liu,
    masking,
    papernot_blackbox,
    purification,
    smoothing,
    szegedy,
    training,
    verification,
)
from saddlepoint.reproduce.frame import ENTRIES, Context, Entry, Figure, Outcome, Recipe, find, find_data, run

__all__ = ["ENTRIES", "Context", "Entry", "Figure", "Outcome", "Recipe", "find", "find_data", "run"]
