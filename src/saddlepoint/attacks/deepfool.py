"""Newton-like steps to the nearest linearised boundary: DeepFool, and the attacks that are made of such steps.

With z the logits, y the class to leave and k the others,

    f_k = z_k - z_y,    w_k = grad f_k,    r = the smallest displacement with f_k + <w_k, r> = 0, over all k

f = 0 stands for where success begins: at the goal's confidence and the model's numerical noise above 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim, FalsePositive
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Region, ball
from saddlepoint.trees import rows

_REST = 0.02  # a step is short if it is at most this share of the way that lies behind


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of rows (B, ...), (B,) float64."""
    return (first.double() * second.double()).flatten(1).sum(1)


def in_norm(region: Region, norm: Norm) -> Region:
    """The same box, with this norm for measure."""
    return replace(region, threat=ball(norm, math.inf))


def plain(aim: Aim) -> bool:
    """Whether the margin is the largest wanted minus the largest unwanted logit."""
    return aim.goal.top_k == 1 and not isinstance(aim.goal, FalsePositive)


def candidates(logits: Tensor, aim: Aim, classes: int) -> Tensor:
    """Weights (Q, m, C) of z_k - z_y for the m likeliest wanted classes k, y being the likeliest unwanted one.

    `classes` counts y too. Goals with other margins have one row, their margin's gradient in the logits.
    """
    if not plain(aim):
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            return torch.autograd.grad(aim.margin(z).sum(), z)[0][:, None]
    size = logits.shape[1]
    count = min(classes, size) - 1
    if aim.goal.targeted:
        count = min(count, int(aim.wanted.sum(1).amax()))
    likeliest = logits.masked_fill(~aim.wanted, -math.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    rival = logits.masked_fill(~aim.unwanted, -math.inf).argmax(1)
    one_hot = torch.eye(size, dtype=logits.dtype, device=logits.device)
    there = aim.wanted.gather(1, likeliest)[:, :, None]  # groups of classes may leave fewer
    return (one_hot[likeliest] - one_hot[rival][:, None]) * there


def to_boundary(problem: Problem, points: Tensor, classes: int, region: Region) -> Tensor:
    """DeepFool's r from `points`: the way (B, ...) to the nearest of the linearised boundaries, measured in `region`.

    l2: |f| w / ||w||_2^2. linf: |f| sign(w) / ||w||_1. Where that leads out of the input range the caller clips it; it then
    falls short of the boundary, and the next steps make up for it. On networks that ends nearer than the projection inside the
    range, which goes all the way at once. But clipped steps only come closer and closer: a short rest of the way is projected,
    so that it is exact on linear models. In l1 everything is: there the formula moves one feature, which soon is at its end.
    """
    logits, gradients = problem.jacobian(points, lambda logits, aim: candidates(logits, aim, classes))
    if plain(problem.aim):
        f = (candidates(logits, problem.aim, classes) * logits[:, None]).sum(2).double()
        gain = (f - problem.needed).abs()
    else:
        gain = problem.surplus(logits).double().abs()[:, None]
    norm, each = region.threat.norm, torch.arange(len(points), device=points.device)
    slope = torch.linalg.vector_norm(gradients.flatten(2), ord=norm.dual, dim=2, dtype=torch.float64)
    far = torch.where(slope > 0, gain / slope, torch.full_like(slope, torch.inf))
    best = far.argmin(1)
    w, gain, slope = gradients[each, best], gain[each, best], slope[each, best]
    projected = region.reach(w, gain, points)
    if norm is Norm.L1:
        return projected
    step = torch.where(slope > 0, far[each, best], torch.zeros_like(slope))
    free = w.double() * rows(step / slope.clamp(min=1e-300), w) if norm is Norm.L2 else w.sign() * rows(step, w)
    short = region.threat.distance(projected, torch.zeros_like(projected)) <= _REST * region.distance(points)
    return torch.where(rows(short, w), projected, free.to(w.dtype))


@dataclass(frozen=True)
class Walk:
    """A run of DeepFool steps.

    x: the point to look at next. start: where the run began. edge: where it has come to, without the overshoot. made: its steps
    (B,). over: nothing is left to do (B,).
    """

    x: Tensor
    start: Tensor
    edge: Tensor
    made: Tensor
    over: Tensor

    @staticmethod
    def at(x: Tensor) -> Walk:
        """Before the first step from x."""
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Walk(x, x, x, none, none > 0)


class _Stepping(Attack):
    """What all of these share: a step looks at the new point, and takes a DeepFool step from those that are no success."""

    steps: int
    classes: int
    overshoot: float

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps}")
        if not isinstance(self.classes, int) or self.classes < 2:
            raise InputError(f"classes must be a whole number >= 2, the label's own included; got {self.classes}")
        if not (self.overshoot >= 0 and math.isfinite(self.overshoot)):
            raise InputError(f"overshoot must be a number >= 0; got {self.overshoot}")

    @property
    @final
    def starts_at_origin(self) -> bool:
        return True

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        return (2, max(1, min(self.classes, classes) - 1))

    @final
    def opening(self, classes: int) -> tuple[int, int]:
        return (1, self.cost(classes)[1])

    @final
    def _move(self, problem: Problem, walk: Walk) -> Walk:
        """One DeepFool step, linearised at x."""
        step = (1 + self.overshoot) * to_boundary(problem, walk.x, self.classes, problem.region)
        x = torch.clamp(walk.x + step, problem.region.lower, problem.region.upper)
        stuck = (x == walk.x).flatten(1).all(1)
        return replace(walk, x=x, edge=x, made=walk.made + 1, over=stuck)


@register(
    Declaration(
        summary="steps to the nearest linearised class boundary",
        reference="Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv:1511.04599",
        norms=frozenset({Norm.LINF, Norm.L2, Norm.L1}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class DeepFool(_Stepping):
    """DeepFool: go to the nearest boundary of the linearised classifier until the class changes.

        l = argmin_k |f_k| / ||w_k||_q,    r_i = |f_l| / ||w_l||_q^q * |w_l|^(q-1) * sign(w_l)
        x_(i+1) = x_i + (1 + eta) r_i

    (l2: |f| w / ||w||_2^2; linf: |f| sign(w) / ||w||_1.) With two classes that is the closed form for a binary classifier.
    A targeted goal has one boundary, between the target and its strongest rival. Points are clipped to the input range, as
    everybody's code does; `to_boundary` says what more happens there.
    steps: the paper's code has 50; two or three are usual. overshoot: eta, 0.02 in the paper.
    classes: how many are looked at, the label included: the likeliest ones at each step. The paper's algorithm has all of them,
    its code the 10 likeliest at the clean input.

    Source: Moosavi-Dezfooli, Fawzi & Frossard (2016), DeepFool: a simple and accurate method to fool deep neural networks,
    arXiv:1511.04599, algorithm 2; lp norms: eq. 10 and 11.
    """

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    @property
    def iterations(self) -> int:
        return self.steps

    def init(self, problem: Problem) -> Walk:
        return Walk.at(problem.origin)

    def step(self, problem: Problem, state: Walk) -> Walk:
        def look(part: Problem, walk: Walk) -> Walk:
            return replace(walk, over=walk.over | (part.surplus(part.logits(walk.x)) >= 0))

        state = advance((problem.k > 0) & ~state.over.cpu(), look, problem, state)
        return advance(~state.over, self._move, problem, state)

    def done(self, state: Walk) -> Tensor:
        return state.over


@dataclass(frozen=True)
class Rounds:
    """Runs of DeepFool steps with something in between.

    waiting: how often the end of the present run is still to be treated (B,). end: the last success (B, ...). found: whether
    there was one (B,). low: the largest share of the way there that is known to fail (B,). looked: how many points of it were
    tried, -1 before that (B,).
    """

    walk: Walk
    waiting: Tensor
    end: Tensor
    found: Tensor
    low: Tensor
    looked: Tensor


class _InRounds(_Stepping):
    """DeepFool steps to the boundary, then something made of the boundary's normal there, and again from there."""

    @property
    @abstractmethod
    def _longest(self) -> int:
        """DeepFool steps in a run, at most."""

    @property
    @abstractmethod
    def _repeats(self) -> int:
        """How often the end of a run is treated."""

    @property
    @abstractmethod
    def _search(self) -> int:
        """Points that the search along the way to the last success tries in the end."""

    @property
    @final
    def iterations(self) -> int:
        return self.steps + 1 + self._search

    @final
    def init(self, problem: Problem) -> Rounds:
        walk = Walk.at(problem.origin)
        return Rounds(walk, walk.made, problem.origin, walk.over, torch.zeros_like(problem.eps), walk.made - 1)

    @final
    def step(self, problem: Problem, state: Rounds) -> Rounds:
        k = problem.k.to(problem.origin.device)
        searching, turning = state.looked >= 0, state.waiting > 0
        seeking = ~searching & ~turning
        state = advance(searching & ~state.walk.over, self._bisect, problem, state)
        state = advance(turning & ~state.walk.over, self._turn, problem, state)
        state = advance(seeking & ~state.walk.over & (k > 0), self._look, problem, state)
        seeking &= (state.waiting == 0) & (state.looked < 0) & ~state.walk.over  # a success is all that a step looks at
        state = advance(seeking & (k < self.steps), self._go, problem, state)
        late = (state.looked < 0) & (k >= self.steps)
        return advance(late | (seeking & state.walk.over), self._finish, problem, state)  # no time, or no boundary in sight

    def _look(self, problem: Problem, state: Rounds) -> Rounds:
        """Is the new point a success? Then the run is over; before the first step of a run, the whole attack."""
        walk = state.walk
        success, fresh = problem.surplus(problem.logits(walk.x)) >= 0, walk.made == 0
        turn = ~fresh & (success | (walk.made >= self._longest))
        end = torch.where(rows(success, walk.x), walk.x, state.end)
        state = replace(state, waiting=turn * self._repeats, end=end, found=state.found | success)
        return advance(success & fresh, self._finish, problem, state)

    def _finish(self, problem: Problem, state: Rounds) -> Rounds:
        """Search the way to the last success."""
        over = ~state.found if self._search else torch.ones_like(state.found)
        half = (problem.origin + state.end) / 2
        x = torch.where(rows(over, half), state.walk.x, half)
        return replace(state, walk=replace(state.walk, x=x, over=over), looked=torch.zeros_like(state.looked))

    def _bisect(self, problem: Problem, state: Rounds) -> Rounds:
        """`end` moves to the point where that is a success; else `low` grows. Shares are of the present way."""
        x, half = state.walk.x, (1 + state.low) / 2
        success = problem.surplus(problem.logits(x)) >= 0
        low = torch.where(success, state.low / half, half)
        end = torch.where(rows(success, x), x, state.end)
        looked = state.looked + 1
        share = rows((1 + low) / 2, x).to(x.dtype)
        point = torch.clamp(problem.origin + share * (end - problem.origin), problem.region.lower, problem.region.upper)
        over = looked >= self._search
        x = torch.where(rows(over, x), end, point)
        return replace(state, walk=replace(state.walk, x=x, over=over), end=end, low=low, looked=looked)

    @abstractmethod
    def _go(self, problem: Problem, state: Rounds) -> Rounds:
        """A DeepFool step."""

    @abstractmethod
    def _turn(self, problem: Problem, state: Rounds) -> Rounds:
        """Treat the end of a run, and begin the next one."""

    @final
    def current(self, state: Rounds) -> Tensor:
        return state.walk.x

    @final
    def done(self, state: Rounds) -> Tensor:
        return state.walk.over


@register(
    Declaration(
        summary="DeepFool to the boundary, then the perturbation's projection on the boundary's normal, again and again",
        reference="Abdollahpour, Abroshan & Moosavi-Dezfooli 2023, arXiv:2303.12481",
        norms=frozenset({Norm.LINF, Norm.L2, Norm.L1}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SuperDeepFool(_InRounds):
    """SDF(m, n): m DeepFool steps, then n times the projection that turns the perturbation to the boundary's normal.

        x~ = m DeepFool steps from x_i (or fewer, to the boundary),    w = grad (z_k - z_y)(x~)
        x_(i+1) = x_i + <x~ - x, w> / ||w||_2^2 * w

    It ends when such a point is a success. From x_0 = x that is the projection on the hyperplane through x~ with normal w; in
    other norms, and at the ends of the range, the smallest displacement that reaches it. The paper's algorithms have x in place
    of x_i. The authors' code has x_i, which ends after two or three rounds; the other may go round in circles at a boundary
    with edges.
    deepfool_steps: m; None, the paper's choice, goes on to the boundary. projections: n; the paper's choice is 1.
    steps: of both kinds together, and one to see each boundary. search: points of the bisection at the end, on the line from
    the input to the last success; it takes back the overshoot, and is an option of the authors' code. classes, overshoot: see
    `DeepFool`.

    Source: Abdollahpour, Abroshan & Moosavi-Dezfooli (2023), Revisiting DeepFool: generalization and improvement,
    arXiv:2303.12481, algorithms 1 and 2.
    """

    steps: int = 100
    deepfool_steps: int | None = None
    projections: int = 1
    overshoot: float = 0.02
    classes: int = 10
    search: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepfool_steps is not None and not (isinstance(self.deepfool_steps, int) and self.deepfool_steps >= 1):
            raise InputError(
                f"deepfool_steps must be a whole number >= 1, or None for as many as it takes; got {self.deepfool_steps}"
            )
        if not isinstance(self.projections, int) or self.projections < 1:
            raise InputError(f"projections must be a whole number >= 1; got {self.projections}")
        if not isinstance(self.search, int) or self.search < 0:
            raise InputError(f"search must be a whole number >= 0; got {self.search}")

    @property
    def _longest(self) -> int:
        return self.deepfool_steps or self.steps

    @property
    def _repeats(self) -> int:
        return self.projections

    @property
    def _search(self) -> int:
        return self.search

    def _go(self, problem: Problem, state: Rounds) -> Rounds:
        return replace(state, walk=self._move(problem, state.walk))

    def _turn(self, problem: Problem, state: Rounds) -> Rounds:
        region, walk = problem.region, state.walk
        w = problem.loss_and_grad(walk.x, "margin").gradient
        move = region.reach(w, inner(w, walk.x - region.origin), region.origin)
        x = torch.clamp(walk.start + move, region.lower, region.upper)
        return replace(state, walk=Walk.at(x), waiting=state.waiting - 1)


@register(
    Declaration(
        summary="DeepFool to the boundary, then the fewest features that cross its tangent plane, again and again",
        reference="Modas, Moosavi-Dezfooli & Frossard 2019, arXiv:1811.02248",
        norms=frozenset({Norm.L1, Norm.L0}),
        minimizes=True,
        no_oracle="it aims at a plane several times as far away as the boundary, on purpose",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SparseFool(_InRounds):
    """SparseFool: the l1 projection on the boundary's tangent plane, feature by feature inside the range.

        r = DeepFool's steps (l2) from x_i to the boundary,    w = grad (z_k - z_y)(x_i + r)
        x_(i+1) = the smallest l1 move from x_i, in the range, to the plane <w, . - (x_i + lambda r)> = 0
        tried is x + (1 + eta) (x_(i+1) - x), clipped

    The l1 move takes the features of largest |w_j| one after another to the end of their range. pushing: lambda, how far behind
    the boundary the plane lies, 3 in the paper (1 to 3: fewer features against fewer steps). steps: DeepFool steps and
    projections together, and one to see each boundary (the authors' code: 20 rounds of up to 50 DeepFool steps). That code goes
    0.001 beyond the plane, and DeepFool's inner steps leave the range there. classes, overshoot: see `DeepFool`.

    Source: Modas, Moosavi-Dezfooli & Frossard (2019), SparseFool: a few pixels make a big difference, arXiv:1811.02248,
    algorithms 1 and 2.
    """

    steps: int = 100
    pushing: float = 3.0
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pushing >= 1 and math.isfinite(self.pushing)):
            raise InputError(f"pushing must be a number >= 1; got {self.pushing}")

    @property
    def _longest(self) -> int:
        return min(50, self.steps)

    @property
    def _repeats(self) -> int:
        return 1

    @property
    def _search(self) -> int:
        return 0

    def _go(self, problem: Problem, state: Rounds) -> Rounds:
        region, walk = problem.region, state.walk
        step = to_boundary(problem, walk.edge, self.classes, in_norm(region, Norm.L2))
        edge = torch.clamp(walk.edge + step, region.lower, region.upper)
        x = self._beyond(problem, walk.start, edge)
        return replace(
            state, walk=replace(walk, x=x, edge=edge, made=walk.made + 1, over=(edge == walk.edge).flatten(1).all(1))
        )

    def _turn(self, problem: Problem, state: Rounds) -> Rounds:
        region, walk = problem.region, state.walk
        w = problem.loss_and_grad(walk.edge, "margin").gradient
        gain = self.pushing * inner(w, walk.edge - walk.start)
        start = torch.clamp(walk.start + in_norm(region, Norm.L1).reach(w, gain, walk.start), region.lower, region.upper)
        x = self._beyond(problem, region.origin, start)
        return replace(state, walk=replace(Walk.at(start), x=x), waiting=state.waiting - 1)

    def _beyond(self, problem: Problem, start: Tensor, end: Tensor) -> Tensor:
        """The point a little behind `end`."""
        return torch.clamp(start + (1 + self.overshoot) * (end - start), problem.region.lower, problem.region.upper)
