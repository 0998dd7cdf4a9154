"""The Jacobian-based saliency map attack: the few features that help the target most and hurt the others most.

With alpha_j = d F_t / d x_j and beta_j = sum_(c != t) d F_c / d x_j, a step of direction s (+1 or -1) moves the pair

    argmax_(p, q) -(alpha_p + alpha_q) (beta_p + beta_q)    with    s (alpha_p + alpha_q) > 0  and  s (beta_p + beta_q) < 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping, advance
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.goals import Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import take

_ELEMENTS = 2**23  # pairs that are scored at once
_END = 0.01  # a feature is at its end if so little of the range is left


def best_pairs(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs p != q with the largest (a_p + a_q)(c_p + c_q), both sums positive: features (N, 2), and the product (N,),
    0 where there is no such pair. a, c (N, D); -inf in both takes a feature out.

    Exact without a look at all D^2 pairs: a feature with both a and c at least as large as p's can take p's place in a pair
    that it isn't in already, and no sum gets smaller. So p matters only if at most one feature (its partner) is like that.
    Sorted by a, those are the features whose c is above the second largest before them.
    """
    a, order = a.sort(1, descending=True)
    c = c.gather(1, order)
    largest = _before(c.cummax(1).values)
    second = _before(torch.minimum(largest, c).cummax(1).values)
    matters = c > second
    count = max(1, int(matters.sum(1).amax()))
    index = matters.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    matters, order = matters.gather(1, index), order.gather(1, index)
    a, c = (t.gather(1, index).masked_fill(~matters, -torch.inf) for t in (a, c))
    best = torch.zeros_like(a[:, 0])
    pair = torch.zeros_like(order[:, :1]).expand(-1, 2)
    block = max(1, _ELEMENTS // (len(a) * count))
    for start in range(0, count, block):  # one block unless nearly all features matter
        rows = slice(start, start + block)
        up, down = a[:, rows, None] + a[:, None], c[:, rows, None] + c[:, None]
        score = torch.where((up > 0) & (down > 0), up * down, torch.zeros_like(up))
        score.diagonal(start, 1, 2).zero_()
        value, place = score.flatten(1).max(1)
        found = torch.stack([place // count + start, place % count], 1)
        better = value > best
        best, pair = torch.where(better, value, best), torch.where(better[:, None], found, pair)
    return order.gather(1, pair), best


def _before(values: Tensor) -> Tensor:
    """values (N, D) moved one place back, -inf in front."""
    return torch.nn.functional.pad(values[:, :-1], (1, 0), value=-torch.inf)


def best_features(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The features with the largest a_p c_p, both positive: (N, 1), and the product (N,), 0 where there is none."""
    score = torch.where((a > 0) & (c > 0), a * c, torch.zeros_like(a))
    value, feature = score.max(1, keepdim=True)
    return feature, value[:, 0]


@dataclass(frozen=True)
class Saliency:
    """The point (B, ...), which way each feature was moved (B, D) int8, steps left (B,), and whether there is an end (B,)."""

    x: Tensor
    moved: Tensor
    left: Tensor
    over: Tensor


@register(
    Declaration(
        summary="moves the pairs of features of largest saliency to the ends of their range",
        reference="Papernot et al. 2016, arXiv:1511.07528; Wiyatno & Xu 2018, arXiv:1808.07945",
        norms=frozenset({Norm.L0}),
        minimizes=True,
        no_oracle="pairs with a view to all other classes are not the fewest features that cross one boundary",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class JSMA(Stepping):
    """Jacobian-based saliency map attack: see the module for the saliency of a pair.

    Each step moves one pair by theta times the range, clips, and repeats until the goal is reached, gamma is spent or no pair
    helps. A feature at its end is out; less than 1 % of the range counts as the end, so that none is spent on nothing.
    theta: +1 or -1 in the paper: features go to the upper or to the lower end at once; its share of the range otherwise.
    gamma: the largest share of features that may change, 0.145 in the paper: floor(gamma D / 2) steps of a pair. That is with
        `Minimize("l0")`; a ball `L0(eps)` says itself how many may.
    pairs: False moves single features, of saliency -alpha_j beta_j (the paper's maps of eq. 8 and 9).
    jacobian: F, "logits", as in the paper, or "softmax", the probabilities, as in its authors' later ones ("JSMA-Z" and
        "JSMA-F" of Carlini & Wagner, arXiv:1608.04644). There beta = -alpha, so the pair is the two features of largest alpha.
        With two classes only the difference of the logits means anything, so F is that and its negative.
    untargeted: what an untargeted goal does. "non-targeted" (NT-JSMA): the same with the label's roles turned round,
        s alpha < 0 and s beta > 0. "maximal" (M-JSMA): the best pair over all classes and both directions, theta's sign does
        not matter; no feature goes back. Features without room in a direction are left out beforehand, where the paper drops
        them after they were chosen.
    steps: an upper limit, whatever else allows more.

    Source: Papernot, McDaniel, Jha, Fredrikson, Celik & Swami (2016), The limitations of deep learning in adversarial settings,
    arXiv:1511.07528, algorithms 2 and 3; Wiyatno & Xu (2018), Maximal Jacobian-based saliency map attack, arXiv:1808.07945.
    """

    theta: float = 1.0
    gamma: float = 0.145
    pairs: bool = True
    jacobian: Literal["logits", "softmax"] = "logits"
    untargeted: Literal["maximal", "non-targeted"] = "non-targeted"
    steps: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < abs(self.theta) <= 1:
            raise InputError(f"theta is a share of the range, in [-1, 0) or (0, 1]; got {self.theta}")
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma is a share of the features, in (0, 1]; got {self.gamma}")
        if self.jacobian not in ("logits", "softmax"):
            raise InputError(f'jacobian must be "logits" or "softmax"; got {self.jacobian!r}')
        if self.untargeted not in ("maximal", "non-targeted"):
            raise InputError(f'untargeted must be "maximal" or "non-targeted"; got {self.untargeted!r}')
        self._check_whole(steps=1)

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, classes if self.untargeted == "maximal" else 2)

    def init(self, problem: Problem) -> Saliency:
        x, region = problem.origin, problem.region
        if bool(torch.isinf(region.upper - region.lower).any()):
            raise CapabilityError("JSMA moves features to the ends of their range: the model needs bounds")
        still = torch.zeros_like(x.flatten(1), dtype=torch.int8)
        paper = int(self.gamma * still.shape[1] + 1e-9) // (2 if self.pairs else 1)
        left = torch.where(torch.isinf(problem.eps), paper, self.steps)
        return Saliency(x, still, left, left == 0)

    def step(self, problem: Problem, state: Saliency) -> Saliency:
        return advance(~state.over, self._move, problem, state)

    def _move(self, problem: Problem, state: Saliency) -> Saliency:
        """Move the features of largest saliency."""
        logits, gradients = problem.jacobian(state.x, self._weights)
        success = problem.surplus(logits) >= 0
        x, lower, upper = (t.flatten(1) for t in (state.x, problem.region.lower, problem.region.upper))
        least = _END * (upper - lower)
        up, down = (upper - x > least) & (state.moved >= 0), (x - lower > least) & (state.moved <= 0)
        each, together = torch.arange(len(x), device=x.device), max(1, _ELEMENTS // (2 * logits.shape[1] * x.shape[1]))
        found = [
            self._best(gradients[part].flatten(2), take(problem.aim, part), up[part], down[part])
            for part in torch.split(each, together)
        ]
        chosen, direction, worth = (torch.cat(column) for column in zip(*found, strict=True))
        direction, moves = direction[:, None], (worth > 0) & ~success
        place, low, high = x.gather(1, chosen), lower.gather(1, chosen), upper.gather(1, chosen)
        size = 2 * (high - low) if abs(self.theta) == 1 else abs(self.theta) * (high - low)  # clipped below
        moved_to = torch.clamp(place + direction.to(x.dtype) * size, low, high)
        x = x.scatter(1, chosen, torch.where(moves[:, None], moved_to, place))
        now = torch.where(moves[:, None], direction, state.moved.gather(1, chosen))
        left = state.left - moves.long()
        point = x.view_as(state.x)
        hopeless = problem.region.distance(point) > problem.eps  # no feature ever goes back
        return Saliency(point, state.moved.scatter(1, chosen, now), left, ~moves | (left <= 0) | hopeless)

    def done(self, state: Saliency) -> Tensor:
        return state.over

    def _maximal(self, aim: Aim) -> bool:
        return self.untargeted == "maximal" and not aim.goal.targeted

    def _weights(self, logits: Tensor, aim: Aim) -> Tensor:
        """Sums of logits whose gradients are alpha of every class; or those of one class and then, for logits, beta."""
        one_hot = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        if self._maximal(aim):
            classes = one_hot.expand(len(logits), -1, -1)
        else:
            side = aim.wanted if aim.goal.targeted else aim.unwanted
            classes = one_hot[logits.masked_fill(~side, -torch.inf).argmax(1)][:, None]
            if self._two_sums(logits.shape[1]):
                return torch.cat([classes, 1 - classes], 1)
        if self.jacobian == "logits":
            return classes - 0.5 if logits.shape[1] == 2 else classes
        probability = logits.softmax(1)[:, None]
        return (probability * classes).sum(2, keepdim=True) * (classes - probability)

    def _two_sums(self, classes: int) -> bool:
        """Whether beta is something else than -alpha."""
        return self.jacobian == "logits" and classes > 2

    def _best(self, gradients: Tensor, aim: Aim, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features to move (B, 1 or 2), which way (B,) int8, and their saliency (B,)."""
        if not self._two_sums(aim.wanted.shape[1]):
            alpha, beta = gradients, -gradients
        elif self._maximal(aim):
            alpha, beta = gradients, gradients.sum(1, keepdim=True) - gradients
        else:
            alpha, beta = gradients[:, :1], gradients[:, 1:]
        if self._maximal(aim):
            role = torch.where(aim.wanted, 1.0, -1.0)[:, :, None].to(alpha.dtype)
            alpha, beta = role * alpha, role * beta
            a, c = torch.cat([alpha, -alpha], 1), torch.cat([-beta, beta], 1)
            free = torch.cat([up[:, None].expand_as(alpha), down[:, None].expand_as(alpha)], 1)
            ways = torch.ones_like(a[0, :, 0], dtype=torch.int8)
            ways[alpha.shape[1] :] = -1
        else:
            upwards = self.theta > 0
            sign = 1 if upwards == aim.goal.targeted else -1
            a, c, free = sign * alpha, -sign * beta, (up if upwards else down)[:, None]
            ways = torch.full_like(a[0, :, 0], 1 if upwards else -1, dtype=torch.int8)
        a, c = (t.masked_fill(~free, -torch.inf).flatten(0, 1) for t in (a, c))
        features, worth = best_pairs(a, c) if self.pairs else best_features(a, c)
        worth, which = worth.view(len(gradients), -1).max(1)
        each = torch.arange(len(gradients), device=which.device)
        return features.view(len(gradients), -1, features.shape[1])[each, which], ways[which], worth
