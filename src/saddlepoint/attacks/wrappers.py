"""Attacks made of attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import as_attack
from saddlepoint.engine import Attack, Problem, State
from saddlepoint.errors import InputError
from saddlepoint.goals import Goal, Loss
from saddlepoint.trees import select


@dataclass(frozen=True)
class Restarting:
    """The inner attack's state, and how far each sample has come: restart and iteration within it, (B,) each."""

    inner: State
    restart: Tensor
    k: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Restarts(Attack):
    """Run a randomised attack `times` times from fresh random starts; the best point of all runs counts.

    >>> import saddlepoint as sp
    >>> sp.attacks.Restarts(sp.attacks.PGD(steps=20), 5).iterations
    100
    """

    attack: Attack
    times: int

    def __init__(self, attack: Attack | str, times: int) -> None:
        attack = as_attack(attack)
        object.__setattr__(self, "attack", attack)
        object.__setattr__(self, "times", times)
        if not isinstance(times, int) or times < 1:
            raise InputError(f"times must be a whole number >= 1; got {times}")
        if not attack.randomized:
            raise InputError(f"{type(attack).__name__} has no random start: every restart would be the same")
        object.__setattr__(self, "declaration", attack.declaration)

    @property
    def _length(self) -> int:
        """Steps of a run; an attack without steps has one, which looks at its point."""
        return max(self.attack.iterations, 1)

    @property
    def iterations(self) -> int:
        return self._length * self.times - (self.attack.iterations == 0)

    @property
    def cost(self) -> tuple[int, int]:
        forward, backward = self.attack.cost
        return forward + 1, backward  # a run's last step also looks at where it ended

    @property
    def judge(self) -> bool:
        return self.attack.judge

    @property
    def objective(self) -> str | Loss:
        return self.attack.objective

    def default_goal(self) -> Goal:
        return self.attack.default_goal()

    def init(self, problem: Problem) -> Restarting:
        zero = torch.zeros_like(problem.k)
        return Restarting(self.attack.init(problem.restarted(zero, zero)), zero, zero)

    def step(self, problem: Problem, state: Restarting) -> Restarting:
        inner = state.inner
        if self.attack.iterations:
            inner = self.attack.step(problem.restarted(state.restart, state.k), inner)
        k, restart = state.k + 1, state.restart
        ended = (k >= self._length) & (restart + 1 < self.times)
        if bool(ended.any()):
            if not self.attack.judge:
                owner = ended.nonzero()[:, 0].to(problem.origin.device)
                problem.margin(self.attack.current(inner)[owner], owner)
            restart = restart + ended.long()
            k = torch.where(ended, torch.zeros_like(k), k)
            fresh = self.attack.init(problem.restarted(restart, torch.zeros_like(k)))
            inner = select(ended, fresh, inner)
        return Restarting(inner, restart, k)

    def current(self, state: Restarting) -> Tensor:
        return self.attack.current(state.inner)
