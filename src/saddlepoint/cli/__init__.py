"""The command line: one command per job."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (a check failed), 2 (bad input), 130 (Ctrl-C)."""
    from saddlepoint.cli.app import run

    return run(sys.argv[1:] if arguments is None else arguments)
