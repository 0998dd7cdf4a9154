"""Runs any attack over any stream of samples."""

from saddlepoint.engine.attack import ALL_NORMS, Attack, Declaration, State
from saddlepoint.engine.budget import Budget
from saddlepoint.engine.problem import Answers, Found, Gradient, Jacobian, Problem
from saddlepoint.engine.result import AttackResult, Queries
from saddlepoint.engine.run import Interrupted, Record, Run, configuration
from saddlepoint.engine.slots import KEEPS, Keep
from saddlepoint.engine.source import Source

__all__ = [
    "ALL_NORMS", "KEEPS", "Answers", "Attack", "AttackResult", "Budget", "Declaration", "Found", "Gradient", "Interrupted",
    "Jacobian", "Keep", "Problem",
    "Queries", "Record", "Run", "Source", "State", "configuration",
]  # fmt: skip
