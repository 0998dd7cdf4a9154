"""Our own attack for the smallest perturbation: averaged gradients turn the perturbation, a radius chases the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.fmn import DUAL, length
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping, advance
from saddlepoint.engine import ALL_NORMS, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import L2
from saddlepoint.trees import rows, select, take

CURVED, MASKED = 0, 1  # what the gradient at the input may turn out to be, as numbers of a `Fork`'s branches
FAR = 0  # what a point that an earlier attack has found may be
_OPEN = -1
_STREAK = 2  # so many iterations in a row on one side of the boundary are no reason to hurry


@dataclass(frozen=True)
class Walk:
    """One walk: the next point and the averaged gradient (B, ...), the radius and the smallest success (B,)."""

    x: Tensor
    gradient: Tensor
    eps: Tensor
    best: Tensor


@dataclass(frozen=True)
class Search:
    """The present walk and the best point of all. (B,) each: number of the walk, its iteration j, how many more it waited,
    how many in a row (negative: failures) were on one side of the boundary, its class, and what the gradients are.

    order: the classes in the order in which they are tried (B, T), -1 for none; first (B, T, ...) and gap (B, T): the gradients
    of their margins at the input, and what these margins lack there.
    """

    walk: Walk
    top: Walk
    number: Tensor
    j: Tensor
    waited: Tensor
    streak: Tensor
    target: Tensor
    verdict: Tensor
    order: Tensor
    first: Tensor
    gap: Tensor


@register(
    Declaration(
        summary="the ball's extreme point along the averaged gradient; the radius chases the boundary, class by class",
        reference="ours; after Frank & Wolfe 1956 and Nesterov 2009, doi:10.1007/s10107-007-0149-x",
        norms=ALL_NORMS,
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class DualAveraging(Stepping):
    """Smallest perturbations in any norm, without a step size to choose; "minimal" is made of it.

    A walk goes to a class, with w_k falling from 1 to `averaging` and gamma_k from `gamma_init` to `gamma_final`:

        h_k     = (1 - w_k) h_(k-1) + w_k grad margin(x_k)
        eps_k   = the radius at which the linearised margin vanishes, within (1 +- gamma_k) ||x_k - x||
        s_k     = argmax <h_k, s> over ||s|| <= eps_k and the input range
        x_(k+1) = x + (1 - w_k) (eps_k / ||x_k - x||) (x_k - x) + w_k s_k                        (l0: x + s_k)

    s_k is h_k cut by the input range in l2, its sign in l-infinity, the features of largest gain in l1 and l0. A fixed point
    meets the optimality conditions of the smallest perturbation, and averaging makes the walk settle where the gradient jumps.

    As long as the walk stays on one side of the boundary for more than three iterations, the radius's speed doubles with each
    further one, up to `gamma_init`: in masked networks the first success can be ten times too far away. Before its first
    success a walk does not grow older, and with `hold` it doesn't after so many successes in a row. If a walk ends and no point
    is found yet, the next ones average with w_k = `averaging` from the middle on: w_k = 1 may lead around in a circle.

    The first step ranks the `classes` likeliest classes by the linearised distance to them. The first `targets` walks, of
    `explore` steps, lead to the nearest ones; one that is more than `slack` times as far as the best after `patience` steps
    is given up. All later walks, of `again` steps, lead to any class, and start beyond the best point: where an l2 move along
    its gradient promises `push` times its gain (cycling through `pushes`), for other boundaries show from there. In a
    `Sequence`, all walks are later ones if an earlier attack has found a point.

    hand_over: after `patience` steps, or with its first walk, a sample gets a `verdict`: what did the margin gain on the way
    from the input, and what did its gradient there promise? If they differ by more than this factor, the sample leaves, and
    in a `Fork` another attack goes on with it. Far too little gained, on a way that promised enough: the margin is CURVED.
    Otherwise the gradient is MASKED: what moves the margin does not show at the input.
    far: asked instead where an earlier attack has found a point. If it is further from the input than `far` times the boundary
    of the margin linearised there, the sample leaves after its first step, with the verdict FAR.

    Ours. The linear step on a ball is that of Frank & Wolfe (1956), averages of gradients are those of Nesterov (2009).
    """

    steps: int = 100
    classes: int = 9
    targets: int = 3
    explore: int = 25
    again: int = 35
    pushes: tuple[float, ...] = (1.5, 1.0, 2.0, 3.0)
    averaging: float = 0.05
    gamma_init: float = 0.3
    gamma_final: float = 1e-3
    patience: int = 5
    slack: float = 1.1
    hold: int | None = None
    hand_over: float | None = None
    far: float | None = None

    def __post_init__(self) -> None:
        self._check_whole(steps=1, classes=1, targets=1, explore=2, again=2, patience=1)
        if self.hold is not None:
            self._check_whole(hold=0)
        for name in ("averaging", "gamma_init", "gamma_final"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in (0, 1]; got {getattr(self, name)}")
        if not (self.slack >= 1 and (self.hand_over is None or self.hand_over >= 1)):
            raise InputError(f"slack and hand_over must be at least 1; got {self.slack} and {self.hand_over}")
        if self.far is not None:
            self._check_positive("far")
        if not self.pushes or not all(push > 0 and math.isfinite(push) for push in self.pushes):
            raise InputError(f"pushes must be positive numbers; got {self.pushes}")

    def verdict(self, state: Search) -> Tensor:
        """What was found out, (B,): CURVED, MASKED, FAR, or -1 for nothing."""
        return state.verdict

    def done(self, state: Search) -> Tensor:
        return state.verdict != _OPEN

    def opening(self, classes: int) -> tuple[int, int]:
        asks = 1 if self.far is None else 2  # gradients of a later walk
        return asks, max(asks, min(self.classes, classes - 1))

    @property
    def recalls(self) -> bool:
        return True

    def current(self, state: Search) -> Tensor:
        return state.walk.x

    def init(self, problem: Problem) -> Search:
        x, zero = problem.origin, torch.zeros_like(problem.labels)
        nothing = torch.full_like(problem.eps, torch.inf)
        walk, tried = Walk(x, torch.zeros_like(x), nothing, nothing), (len(x), self.targets)
        first, gap = x.new_zeros(*tried, *x.shape[1:]), nothing.new_zeros(tried)
        found = problem.best
        away = torch.where(found.success, found.distance, nothing)
        top = select(found.success, Walk(found.points, torch.zeros_like(x), away, away), walk)
        number = found.success.long() * self.targets  # in a `Sequence`: no class needs to be explored
        return Search(walk, top, number, zero, zero, zero, zero, zero + _OPEN, zero[:, None].expand(tried) - 1, first, gap)

    def step(self, problem: Problem, state: Search) -> Search:
        opening, known = (problem.k == 0).to(problem.origin.device), state.number >= self.targets
        for which, move in ((opening & ~known, self._open), (opening & known, self._go_on), (~opening, self._walk)):
            state = advance(which, move, problem, state)
        return state

    def _open(self, problem: Problem, state: Search) -> Search:
        """Rank the classes by the linearised distance, and set out for the nearest."""
        classes: list[Tensor] = []

        def towards_each(logits: Tensor, aim: Aim) -> Tensor:
            count = min(self.classes, int(aim.wanted.sum(1).amax()))
            likeliest = logits.masked_fill(~aim.wanted, -torch.inf).topk(count, 1)
            classes.append(torch.where(torch.isfinite(likeliest.values), likeliest.indices, -1))
            rival = logits.masked_fill(~aim.unwanted, -torch.inf).argmax(1)
            one_hot = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
            return one_hot[likeliest.indices] - one_hot[rival][:, None]

        found = problem.jacobian(problem.origin, towards_each)
        order = torch.cat(classes)
        rival = problem.aim.best(found.logits)[1]
        gap = (rival[:, None] - found.logits.gather(1, order.clamp(min=0)) + problem.needed).double()
        each = torch.arange(len(order), device=order.device)[:, None]
        region = take(problem.region, each.expand_as(order).flatten())
        move = region.reach(found.gradients.flatten(0, 1), gap.flatten(), region.origin)
        away = region.threat.distance(move, torch.zeros_like(move)).view(order.shape)
        nearest = torch.where(order < 0, torch.inf, away).argsort(1)[:, : self.targets]
        tried = slice(0, nearest.shape[1])
        ranked, first, gaps = state.order.clone(), state.first.clone(), state.gap.clone()
        ranked[:, tried], gaps[:, tried] = order[each, nearest], gap[each, nearest]
        first[:, tried] = found.gradients[each, nearest]
        walk = self._set_out(problem, first[:, 0], gaps[:, 0])
        return replace(state, walk=walk, j=state.j + 1, target=ranked[:, 0], order=ranked, first=first, gap=gaps)

    def _go_on(self, problem: Problem, state: Search) -> Search:
        """Set out from beyond the best point that an earlier attack has found."""
        top, verdict = state.top, state.verdict
        if self.far is not None:
            found = problem.loss_and_grad(problem.origin, "margin")
            move = problem.region.reach(found.gradient, -problem.surplus(found.logits), problem.origin)
            promised = problem.region.threat.distance(move, torch.zeros_like(move))
            verdict = torch.where((promised > 0) & (top.best > self.far * promised), FAR, verdict)  # 0: no gradient
        top = replace(top, gradient=problem.loss_and_grad(top.x, "margin").gradient)
        push = torch.full_like(top.best, self.pushes[0])
        return replace(state, walk=self._beyond(problem, top, push), top=top, verdict=verdict)

    def _set_out(self, problem: Problem, gradient: Tensor, gap: Tensor) -> Walk:
        """To the extreme point where the margin, linearised at the input, vanishes."""
        move = problem.region.reach(gradient, gap, problem.origin)
        eps = 1.02 * problem.region.threat.distance(move, torch.zeros_like(move))
        eps = eps.ceil() if problem.region.threat.norm is Norm.L0 else eps
        return Walk(problem.within(eps).region.extreme(gradient), gradient, eps, torch.full_like(eps, torch.inf))

    def _beyond(self, problem: Problem, top: Walk, push: Tensor) -> Walk:
        """Past the best point: the shortest l2 move along its gradient that promises `push` (B,) times its gain."""
        euclidean = replace(problem.region, threat=L2(torch.inf))
        gain = push * (top.gradient.double() * (top.x - problem.origin).double()).flatten(1).sum(1)
        x = problem.origin + euclidean.reach(top.gradient, gain, problem.origin)
        x = torch.clamp(x, problem.region.lower, problem.region.upper)
        return Walk(x, top.gradient, top.eps, torch.full_like(top.best, torch.inf))

    def _walk(self, problem: Problem, state: Search) -> Search:
        walk, top, norm = state.walk, state.top, problem.region.threat.norm
        exploring = state.number < state.order.shape[1]
        aim = select(exploring, problem.aim.towards(state.target), problem.aim)
        found = problem.loss_and_grad(walk.x, "margin", aim=aim)
        surplus, away = problem.surplus(found.logits).double(), problem.region.distance(walk.x)
        success = surplus >= 0
        surplus = torch.where(success, surplus, found.loss.double() - problem.needed)
        best = torch.where(success, torch.minimum(walk.best, away), walk.best)

        last = torch.where(exploring, self.explore, self.again) - 1
        progress = state.j.double() / last
        lost = (state.number > 0) & ~torch.isfinite(top.best)
        w = self.averaging ** torch.where(lost, 2 * (state.j + state.waited).double() / last, progress).clamp(max=1.0)
        gamma = self.gamma_init * (self.gamma_final / self.gamma_init) ** progress
        streak = torch.where(success, state.streak.clamp(min=0) + 1, state.streak.clamp(max=0) - 1)
        speed = 2.0 ** (streak.abs() - 1 - _STREAK).clamp(min=0).double()
        rate = torch.minimum(speed * gamma, gamma.clamp(min=self.gamma_init))
        gradient = walk.gradient + (found.gradient - walk.gradient) * rows(w.to(walk.x.dtype), walk.x)
        if norm is Norm.L0:
            eps = _next_count(success, best, walk.eps, away, rate)
        else:
            steepness = length(found.gradient, DUAL[norm])
            move = torch.where(steepness > 0, -surplus / steepness, torch.zeros_like(steepness))
            eps = _next_radius(success, best, speed * move, away, rate)
        x = problem.within(eps).region.extreme(gradient)
        if norm is not Norm.L0:
            scale = torch.where(away > 0, eps / away, torch.zeros_like(eps))
            kept = (walk.x - problem.origin) * rows(scale.to(x.dtype), x)
            x = problem.project(problem.origin + kept + (x - problem.origin - kept) * rows(w.to(x.dtype), x))

        better = success & (away <= best) & (best < top.best)
        top = select(better, Walk(walk.x, gradient, best, best), top)
        steps = state.j + state.waited + 1
        behind = exploring & (steps >= self.patience) & (torch.minimum(eps, best) > self.slack * top.best)
        over = behind | (state.j >= last) | (state.waited >= last)
        verdict = state.verdict
        if self.hand_over is not None:
            asked = (state.number == 0) & ((steps == self.patience) | over)
            verdict = torch.where(asked, self._judge(problem, state, surplus, self.hand_over), verdict)
        waits = ~torch.isfinite(best)
        if self.hold is not None:
            waits |= success & (streak > self.hold)
        state = replace(
            state, walk=Walk(x, gradient, eps, best), top=top, j=state.j + (~waits).long(),
            waited=state.waited + waits.long(), streak=streak, verdict=verdict,
        )  # fmt: skip
        return self._begin_again(problem, state, over) if bool(over.any()) else state

    def _judge(self, problem: Problem, state: Search, surplus: Tensor, factor: float) -> Tensor:
        """Compare what the margin gained on the way from the input with what its gradient there promised."""
        gained = surplus + state.gap[:, 0]
        promised = (state.first[:, 0].double() * (state.walk.x - problem.origin).double()).flatten(1).sum(1)
        gained = gained.clamp(min=0)
        as_promised = (gained <= factor * promised) & (promised <= factor * gained)
        curved = (promised > 2 * factor * gained) & (promised > state.gap[:, 0])
        return torch.where(as_promised, _OPEN, torch.where(curved, CURVED, MASKED))

    def _begin_again(self, problem: Problem, state: Search, over: Tensor) -> Search:
        """The next walk for the samples whose walk is over."""
        count = state.order.shape[1]
        each = torch.arange(len(over), device=over.device)
        number = state.number + over.long()
        at = number.clamp(max=count - 1)
        target = state.order[each, at]
        number = torch.where(over & (target < 0), number.clamp(min=count), number)  # fewer classes than walks to them
        exploring = number < count
        known = torch.isfinite(state.top.best)
        pushes = torch.tensor(self.pushes, dtype=torch.float64, device=over.device)
        push = pushes[(number - count).clamp(min=0) % len(pushes)] * torch.where(known, 1.0, 2.0)
        beyond = self._beyond(problem, select(known, state.top, state.walk), push)
        fresh = select(exploring, self._set_out(problem, state.first[each, at], state.gap[each, at]), beyond)
        return replace(
            state,
            walk=select(over, fresh, state.walk),
            number=number,
            waited=torch.where(over, 0, state.waited),
            streak=torch.where(over, 0, state.streak),
            j=torch.where(over, exploring.long(), state.j),  # setting out is an exploring walk's first step
            target=torch.where(over & exploring, target, state.target),
        )


def _next_radius(success: Tensor, best: Tensor, move: Tensor, away: Tensor, gamma: Tensor) -> Tensor:
    """`away` + `move`, the linearised margin's zero, but gamma / 10 to gamma of `away` off, on its side, inside `best`."""
    far = gamma * away
    smaller = torch.minimum(away + torch.clamp(move, -far, -0.1 * far), best)
    free = 1.02 * (away + torch.where(away > 0, torch.minimum(move, 3 * away), move))  # nothing is known before a success
    larger = torch.where(torch.isfinite(best), away + torch.clamp(move, 0.1 * far, far), free)
    return torch.where(success, smaller, larger)


def _next_count(success: Tensor, best: Tensor, eps: Tensor, away: Tensor, gamma: Tensor) -> Tensor:
    """The same for a number of features: at least one fewer, or one more."""
    smaller = torch.minimum((eps * (1 - gamma)).floor(), best - 1)
    larger = torch.where(torch.isfinite(best), torch.maximum((eps * (1 + gamma)).floor(), eps + 1), away + 1)
    return torch.where(success, smaller, larger).clamp(min=1)
