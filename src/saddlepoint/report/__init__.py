"""The figure made visible: `write` turns a comparison into a folder with a self-contained HTML report, `write_distances`
distances to the boundary, `write_evaluations` robust accuracies with their evidence, `write_queries` how far
attacks come with how many queries.

`saddlepoint.report.figures` has the plots by themselves, as matplotlib Figures; it is imported when it is asked for.
"""

from saddlepoint.report.distances import distance_results, write_distances
from saddlepoint.report.document import History, results
from saddlepoint.report.evaluations import evaluation_results, write_evaluations
from saddlepoint.report.folder import write
from saddlepoint.report.queries import query_results, write_queries

__all__ = [
    "History", "distance_results", "evaluation_results", "query_results", "results", "write", "write_distances",
    "write_evaluations", "write_queries",
]  # fmt: skip
