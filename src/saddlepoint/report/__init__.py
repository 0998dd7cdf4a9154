"""The figure made visible: `write` turns a comparison into a folder with a self-contained HTML report, `write_distances`
distances to the boundary, `write_evaluations` robust accuracies with their evidence.

`saddlepoint.report.figures` has the plots by themselves, as matplotlib Figures; it is imported when it is asked for.
"""

from saddlepoint.report.distances import distance_results, write_distances
from saddlepoint.report.document import History, results
from saddlepoint.report.evaluations import evaluation_results, write_evaluations
from saddlepoint.report.folder import write

__all__ = [
    "History", "distance_results", "evaluation_results", "results", "write", "write_distances", "write_evaluations",
]  # fmt: skip
