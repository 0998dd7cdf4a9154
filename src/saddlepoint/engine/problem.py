"""`Problem`: all that an attack may ask of a model, a threat and a goal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saddlepoint.errors import CapabilityError, ModelError
from saddlepoint.goals import Aim, Loss, loss_named
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access
from saddlepoint.threats import Region
from saddlepoint.trees import take, tree_map


class Gradient(NamedTuple):
    """What one forward and one backward pass tell about points (Q, ...)."""

    loss: Tensor  # (Q,)
    gradient: Tensor  # (Q, ...), of the loss with respect to the points
    logits: Tensor  # (Q, C)


class Jacobian(NamedTuple):
    """What one forward and m backward passes tell about points (Q, ...)."""

    logits: Tensor  # (Q, C)
    gradients: Tensor  # (Q, m, ...), of the m weighted sums of logits


class Found(NamedTuple):
    """The point that would be returned for each sample now (B, ...), what it is worth, (B,) each."""

    points: Tensor
    distance: Tensor  # float64, infinite where there is no success
    success: Tensor  # bool
    surplus: Tensor  # float64, the goal's margin less what success needs


def _verdict(surplus: Tensor) -> Tensor:
    """What labels tell of a surplus: 1 for a success, else -1."""
    return torch.where(surplus >= 0, 1.0, -1.0).to(surplus.dtype)


class Answers(NamedTuple):
    """What the model said of points (B, m, ...), as far as the budgets went."""

    answered: Tensor  # (B, m) bool
    surplus: Tensor  # (B, m): the goal's margin less what success needs; -inf where there is no answer
    logits: Tensor | None  # (B, m, C), 0 where there is no answer; None for attacks that see labels only

    @property
    def reached(self) -> Tensor:
        """Which points are successes, (B, m) bool."""
        return self.surplus >= 0


Weights = Tensor | Callable[[Tensor, Aim], Tensor]
"""Weights (Q, m, C) of m sums of logits, or the function of logits (Q, C) and aim that chooses them."""


def input_gradient(values: Tensor, points: Tensor, cotangents: Tensor | None = None, *, again: bool = False) -> Tensor:
    """Gradient of sum(values * cotangents) with respect to points alone; parameters are not touched.

    cotangents: like values; None for ones. again: whether the graph is needed for another gradient.
    Errors: `ModelError` if there is none.
    """
    if not values.requires_grad:
        raise ModelError(
            "the model's output does not depend differentiably on its input (detach(), no_grad() or numpy inside?): put a "
            "non-differentiable input transformation into sp.Defended with a backward, or use an attack without gradients"
        )
    weights = torch.ones_like(values) if cotangents is None else cotangents
    (gradient,) = torch.autograd.grad(values, points, weights, retain_graph=again, allow_unused=True)
    return torch.zeros_like(points) if gradient is None else gradient


class Evaluator(ABC):
    """Evaluates points for a `Problem`: with bookkeeping in the engine, without in training loops."""

    @property
    @abstractmethod
    def aim(self) -> Aim:
        """The goal, bound to the batch."""

    @abstractmethod
    def forward(self, points: Tensor, owner: Tensor | None) -> Tensor:
        """Logits (Q, C) without gradients."""

    @abstractmethod
    def gradient(self, points: Tensor, owner: Tensor | None, loss: str | Loss, aim: Aim | None) -> Gradient:
        """Loss, its gradient with respect to the points, and the logits. `aim` (B, C) in place of the goal's."""

    @abstractmethod
    def jacobian(self, points: Tensor, owner: Tensor | None, weights: Weights) -> Jacobian:
        """Gradients of m weighted sums of logits."""

    def pullback(self, points: Tensor, owner: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits, and the function from cotangents to gradients."""
        raise CapabilityError("attacks of other libraries run in sp.attack only, where passes are counted")

    @abstractmethod
    def allow(self, owner: Tensor, wanted_backward: bool, kept_back: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Which of the rows `owner` (Q,) fit into their samples' budgets, (Q,) bool.

        kept_back: less so many forward and backward passes of the rows' samples, (Q,) each on the CPU.
        """

    @abstractmethod
    def affords(self, owner: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        """Which of the rows `owner` (Q,) can make so many passes more; all on the CPU, (Q,) each."""

    @abstractmethod
    def best(self) -> Found:
        """What would be returned now."""

    def trust(self, points: Tensor) -> Tensor:
        """Note that these points are feasible by construction."""
        return points


class _Part(Evaluator):
    """Some samples (P,) of another evaluator's batch."""

    def __init__(self, whole: Evaluator, index: Tensor) -> None:
        self.whole, self.index = whole, index

    def _owner(self, owner: Tensor | None) -> Tensor:
        return self.index if owner is None else self.index[owner]

    @property
    def aim(self) -> Aim:
        return take(self.whole.aim, self.index)

    def forward(self, points: Tensor, owner: Tensor | None) -> Tensor:
        return self.whole.forward(points, self._owner(owner))

    def gradient(self, points: Tensor, owner: Tensor | None, loss: str | Loss, aim: Aim | None) -> Gradient:
        if aim is not None:  # back to the rows of the whole batch
            aim = tree_map(lambda part, full: full.index_copy(0, self.index, part), aim, self.whole.aim)
        return self.whole.gradient(points, self._owner(owner), loss, aim)

    def jacobian(self, points: Tensor, owner: Tensor | None, weights: Weights) -> Jacobian:
        return self.whole.jacobian(points, self._owner(owner), weights)

    def pullback(self, points: Tensor, owner: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.whole.pullback(points, self._owner(owner))

    def allow(self, owner: Tensor, wanted_backward: bool, kept_back: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.whole.allow(self.index[owner], wanted_backward, kept_back)

    def affords(self, owner: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return self.whole.affords(self.index.cpu()[owner], forward, backward)

    def best(self) -> Found:
        return Found(*(column[self.index] for column in self.whole.best()))


@dataclass(frozen=True)
class Problem:
    """One batch of samples under attack, as the attack sees it.

    `points` are (Q, ...) and `owner` (Q,) says to which sample of the batch each belongs; without it point i belongs to
    sample i. Every evaluated point counts for the result; the engine sees to that.

    region: the feasible sets, with `origin` (B, ...) and `eps` (B,). k: each sample's iteration (B,) int64.
    needed: the margin that counts as success: the goal's confidence and the model's own numerical noise.
    start: where the caller wants the first run to begin (B, ...), in `init` only; None for the attack's own choice.
    access: what the attack declared to need: it gets no more. kept_back: forward and backward passes of
        each sample, (B,) each on the CPU, that are for others, such as the last look: `ask` leaves them, `affords` counts them.
    """

    region: Region
    labels: Tensor  # (B,) int64
    k: Tensor  # (B,) int64, on the CPU
    keys: Keys
    evaluator: Evaluator
    needed: float = 0.0
    start: Tensor | None = None
    access: Access = Access.PARAMETERS
    kept_back: tuple[Tensor, Tensor] | None = None

    @property
    def origin(self) -> Tensor:
        """The clean inputs (B, ...)."""
        return self.region.origin

    @property
    def eps(self) -> Tensor:
        """The radius of every sample (B,), float64."""
        return self.region.eps

    @property
    def aim(self) -> Aim:
        """Which classes the goal wants, and which it does not."""
        return self.evaluator.aim

    def logits(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """(Q, C); one forward pass a point."""
        self._may(Access.SCORES)
        return self.evaluator.forward(points, owner)

    def _may(self, access: Access) -> None:
        if self.access < access:
            raise CapabilityError(
                f"the attack declares that it needs {self.access.name.lower()}, but asks for {access.name.lower()}: "
                "reached() and ask() give verdicts"
            )

    def ask(self, points: Tensor, wanted: Tensor | None = None) -> Answers:
        """What the model says of several points a sample (B, m, ...), each a query, as far as the sample's budget goes.

        wanted: which of them to ask about (B, m) bool; default all. Where the budget ends, the first ones are answered.
        """
        asked = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if wanted is None else wanted
        place = asked.flatten().nonzero()[:, 0]
        owner = place // points.shape[1]
        granted = self.evaluator.allow(owner, False, take(self.kept_back, owner))
        if not bool(granted.all()):
            place, owner = place[granted], owner[granted]
        logits = self.evaluator.forward(points.flatten(0, 1)[place], owner)
        answered = torch.zeros_like(asked).flatten().index_fill(0, place, True)
        surplus = self.surplus(logits, owner)
        if self.access <= Access.LABELS:
            surplus = _verdict(surplus)
        scattered = surplus.new_full((len(answered),), -torch.inf).index_copy(0, place, surplus)
        shown = None
        if self.access > Access.LABELS:
            shown = logits.new_zeros(len(answered), logits.shape[1]).index_copy(0, place, logits).view(*asked.shape, -1)
        return Answers(answered.view_as(asked), scattered.view_as(asked), shown)

    def losses(self, answers: Answers, loss: str | Loss) -> Tensor:
        """A loss of the answers, (B, m); -inf where there is none. No pass."""
        self._may(Access.SCORES)
        if answers.logits is None:
            raise CapabilityError("labels have no loss")
        owner = torch.arange(len(answers.logits), device=answers.logits.device).repeat_interleave(answers.logits.shape[1])
        values = loss_named(loss)(answers.logits.flatten(0, 1), take(self.aim, owner)).view_as(answers.surplus)
        return values.masked_fill(~answers.answered, -torch.inf)

    def reached(self, points: Tensor) -> Tensor:
        """Which points (B, ...) are successes, (B,) bool: a query each, False where the budget is spent."""
        return self.ask(points[:, None]).reached[:, 0]

    def margin(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """The goal's margin (Q,), positive where it is reached; one forward pass a point."""
        logits = self.logits(points, owner)
        aim = self.aim if owner is None else take(self.aim, owner)
        return aim.margin(logits)

    def scores(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """Probabilities (Q, C); one forward pass a point."""
        return self.logits(points, owner).softmax(1)

    def predictions(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """Predicted labels (Q,); one forward pass a point."""
        return self.evaluator.forward(points, owner).argmax(1)

    def surplus(self, logits: Tensor, owner: Tensor | None = None) -> Tensor:
        """By how much logits (Q, C) exceed what success needs, (Q,): a success is >= 0. No pass."""
        aim = self.aim if owner is None else take(self.aim, owner)
        return aim.margin(logits) - self.needed

    def loss_and_grad(
        self, points: Tensor, loss: str | Loss = "cross_entropy", owner: Tensor | None = None, *, aim: Aim | None = None
    ) -> Gradient:
        """The loss to ascend and its gradient; one forward and one backward pass a point.

        aim: in place of the goal's, such as `problem.aim.towards(classes)`; one row a sample of the batch, not a point.
        """
        self._may(Access.GRADIENTS)
        return self.evaluator.gradient(points, owner, loss, aim)

    def vjp(self, points: Tensor, cotangents: Tensor, owner: Tensor | None = None) -> Gradient:
        """Gradient of sum(cotangents * logits), cotangents (Q, C); one forward and one backward pass a point."""
        logits, gradients = self.jacobian(points, cotangents[:, None], owner)
        return Gradient((cotangents * logits).sum(1), gradients[:, 0], logits)

    def jacobian(self, points: Tensor, weights: Weights, owner: Tensor | None = None) -> Jacobian:
        """Gradients (Q, m, ...) of m weighted sums of logits, weights (Q, m, C): one forward and m backward passes a point.

        weights: a tensor, or a function of logits and aim that chooses them after the forward pass (the likeliest classes).
        They take m times the memory of the points; the engine chooses its batch by the m of `Attack.cost`.
        """
        self._may(Access.GRADIENTS)
        return self.evaluator.jacobian(points, owner, weights)

    def pullback(self, points: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits (Q, C) for one forward pass a point, and the function from cotangents (Q, C) to gradients (Q, ...).

        Each call of that function is one backward pass a point: for those who know only later what they want to differentiate.
        """
        self._may(Access.SCORES)
        return self.evaluator.pullback(points, owner)

    def project(self, points: Tensor, owner: Tensor | None = None) -> Tensor:
        """The nearest feasible points."""
        if owner is not None:
            return take(self.region, owner).project(points)
        return self.evaluator.trust(self.region.project(points))

    def steepest(self, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """The displacement of norm `size` (B,) along which a function with this gradient grows most."""
        return self.region.steepest(gradient, size, points)

    def random_point(self, stream: int = 0) -> Tensor:
        """A point drawn uniformly from each ball, inside the input range (B, ...)."""
        return self.region.random(self.random(stream))

    def begin(self, own: Tensor) -> Tensor:
        """Where a run begins: at the feasible points next to the caller's, or at the attack's `own` (B, ...)."""
        return own if self.start is None else self.project(self.start)

    def random(self, stream: int = 0) -> Keys:
        """Random numbers of this (sample, restart, iteration, stream)."""
        return self._here.absorb(stream)

    @cached_property
    def _here(self) -> Keys:
        return self.keys.absorb(self.k)

    def allow(self, owner: Tensor, *, backward: bool = False) -> Tensor:
        """Which of the rows `owner` (Q,) their samples can still pay for, first come first served: (Q,) bool."""
        return self.evaluator.allow(owner, backward)

    def affords(self, forward: Tensor, backward: Tensor) -> Tensor:
        """Which samples' budgets pay for so many passes more, (B,) each, on the CPU. No pass."""
        if self.kept_back is not None:
            forward, backward = forward + self.kept_back[0], backward + self.kept_back[1]
        return self.evaluator.affords(torch.arange(len(forward)), forward, backward)

    def keeping_back(self, more: tuple[Tensor, Tensor] | None) -> Problem:
        """The same problem with so many forward and backward passes more, (B,) each on the CPU, that are for others."""
        if more is None:
            return self
        forward, backward = (0, 0) if self.kept_back is None else self.kept_back
        return replace(self, kept_back=(forward + more[0], backward + more[1]))

    @property
    def best(self) -> Found:
        """What the run would return for each sample now; with keep="smallest" the smallest success so far."""
        found = self.evaluator.best()
        return found if self.access > Access.LABELS else found._replace(surplus=_verdict(found.surplus))

    def within(self, eps: Tensor) -> Problem:
        """The same problem in balls of radius eps (B,), where those are smaller. Points outside still count as found."""
        return replace(self, region=self.region.within(eps))

    def without_ball(self) -> Problem:
        """The same problem in the whole input range, for attacks that come from afar. Only what is in the ball counts."""
        return self if bool(torch.isinf(self.eps).all()) else replace(self, region=self.region.without_ball())

    def only(self, index: Tensor) -> Problem:
        """The same problem for the samples `index` (P,) alone."""
        if len(index) == len(self.k):
            return self
        part = _Part(self.evaluator, index)
        region, labels, keys = take((self.region, self.labels, self.keys), index)
        start = None if self.start is None else self.start[index]
        k, kept_back = take((self.k, self.kept_back), index)
        return replace(self, region=region, labels=labels, k=k, keys=keys, evaluator=part, start=start, kept_back=kept_back)

    def restarted(self, restart: Tensor, k: Tensor) -> Problem:
        """The same problem with the random numbers of another restart (B,), at that restart's iteration k (B,)."""
        return replace(self, keys=self.keys.absorb(restart), k=k)
