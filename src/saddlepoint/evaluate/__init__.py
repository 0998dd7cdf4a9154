"""How robust models are: the same attacks on the same samples side by side, and how far samples are from the boundary."""

from saddlepoint.evaluate.compare import Cell, Comparison, compare
from saddlepoint.evaluate.distances import Distances, Quantile, distance

__all__ = ["Cell", "Comparison", "Distances", "Quantile", "compare", "distance"]
