"""What an attack is: hyperparameters, a declaration, `init` and `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from saddlepoint.engine.problem import Problem
from saddlepoint.goals import Goal, Loss, Untargeted
from saddlepoint.taxonomy import Access, Norm, Scope

ALL_NORMS = frozenset(Norm)
State = Any  # each attack's own frozen dataclass of tensors (B, ...); only the attack looks inside


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Where an attack stands in the field's taxonomy, and what it promises.

    minimizes: whether it looks for the smallest perturbation, so that `Minimize(norm)` can be asked of it. Given a ball it does
        the same, and what it finds inside counts.
    spatial: whether it matters which features are neighbours, so that the same numbers in another shape are another input.
    linear_oracle: within which factor it reaches the closed-form result on a linear model (see the contract tests);
        None needs a `no_oracle` reason.
    """

    summary: str
    reference: str
    norms: frozenset[Norm] = ALL_NORMS
    access: Access = Access.GRADIENTS
    scope: Scope = Scope.INDIVIDUAL
    targeted: bool = True
    untargeted: bool = True
    minimizes: bool = False
    iterative: bool = True
    spatial: bool = False
    linear_oracle: float | None = None
    no_oracle: str = ""

    def __post_init__(self) -> None:
        if (self.linear_oracle is None) != bool(self.no_oracle):
            raise ValueError("state a linear_oracle factor, or why there is none in no_oracle")


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base of all attacks: an immutable description. It compares, hashes, and its repr rebuilds it.

    A subclass is a frozen dataclass with a `declaration`; its `init` and `step` are the paper's algorithm over a batch of
    per-sample state. Everything else (the loop, stopping, best-so-far, budgets, verification) is the engine's.
    """

    declaration: ClassVar[Declaration]

    @property
    @abstractmethod
    def iterations(self) -> int:
        """How many times `step` is called for a sample that does not stop early."""

    @abstractmethod
    def init(self, problem: Problem) -> State:
        """The first state. Draws random numbers at most: no queries."""

    @abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """One micro-step for the whole batch: a new state. What stays as it is may be in both; no tensor is written into."""

    def current(self, state: State) -> Tensor:
        """The iterate (B, ...) in `state`; the engine evaluates the last one."""
        iterate: Tensor = state.x
        return iterate

    def cost(self, classes: int) -> tuple[int, int]:
        """Forward and backward passes that a step makes at most for one sample of a model with so many classes.

        Of an attack that uses `Problem.ask`: what a step needs at least, for `ask` trims the rest to the budget.
        """
        return (1, 1)

    @property
    def width(self) -> int:
        """Points that a step holds at once for each sample; the engine chooses its batch by them."""
        return 1

    def opening(self, classes: int) -> tuple[int, int]:
        """What the first step costs at most, where that is something else."""
        return self.cost(classes)

    def next_cost(self, state: State, k: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of each sample's next step at most, after k (B,) steps: (B,) int64 each, on the CPU.

        Of an attack that uses `Problem.ask`: at least, as with `cost`. A look at the last iterate is apart.
        """
        forward, backward = (torch.where(k == 0, *each) for each in zip(self.opening(classes), self.cost(classes), strict=True))
        return forward, backward

    def done(self, state: State) -> Tensor | None:
        """Which samples (B,) need no further step, before `iterations`; None where that never happens."""
        return None

    @property
    def starts_at_origin(self) -> bool:
        """Whether the first point that `step` evaluates is the input itself, which is then the clean prediction too."""
        return False

    @property
    def takes_start(self) -> bool:
        """Whether `init` begins at `problem.begin(...)`, so that the caller can say where."""
        return False

    @property
    def needs_start(self) -> bool:
        """Whether it does nothing without a point to go on from: the caller's, or that of an earlier attack."""
        return False

    @property
    def recalls(self) -> bool:
        """Whether it looks at `problem.best`, so that training loops must keep it too."""
        return False

    @property
    def randomized(self) -> bool:
        """Whether another restart takes another way."""
        return not self.starts_at_origin

    @property
    def judge(self) -> bool:
        """Whether steps evaluate other points than their iterates, so that the engine must judge each iterate."""
        return False

    @property
    def looks_last(self) -> bool:
        """Whether the engine shall evaluate the last iterate: not where every step has evaluated its own."""
        return True

    def unseen(self, state: State) -> Tensor | bool:
        """For which samples (B,), on the CPU, it shall do so now: attacks made of others say it for each sample."""
        return self.looks_last and not self.judge

    @property
    def objective(self) -> str | Loss:
        """The loss that `step` ascends."""
        return "margin"

    def default_goal(self) -> Goal:
        """The goal if the caller gives none."""
        return Untargeted()

    def settings(self) -> dict[str, object]:
        """Name and hyperparameters, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"name": type(self).__name__} | {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.settings() if isinstance(value, Attack) else value
