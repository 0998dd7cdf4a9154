"""How robust models are: the same attacks on the same samples, side by side."""

from saddlepoint.evaluate.compare import Cell, Comparison, compare

__all__ = ["Cell", "Comparison", "compare"]
