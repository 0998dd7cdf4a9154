"""The figure made visible: `write` turns a comparison into a folder with a self-contained HTML report.

`saddlepoint.report.figures` has the plots by themselves, as matplotlib Figures; it is imported when it is asked for.
"""

from saddlepoint.report.document import History, results
from saddlepoint.report.folder import write

__all__ = ["History", "results", "write"]
