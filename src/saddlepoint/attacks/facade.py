"""`attack`: the one call that runs any attack on anything; `perturb`: the light path for training loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from saddlepoint.attacks.minimal import resolved
from saddlepoint.attacks.registry import as_attack
from saddlepoint.engine import (
    KEEPS,
    Attack,
    AttackResult,
    Budget,
    Interrupted,
    Keep,
    Problem,
    Record,
    Run,
    Source,
)
from saddlepoint.engine.problem import Evaluator, Found, Gradient, Jacobian, Weights, input_gradient
from saddlepoint.engine.source import Batches, fingerprint
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.goals import Aim, Evade, Goal, Loss, Targeted, bind, loss_named
from saddlepoint.models.base import Classifier
from saddlepoint.models.freeze import frozen
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Bounds, Region, Threat
from saddlepoint.trees import select, take

__all__ = ["Interrupted", "attack", "check_combination", "perturb"]


def check_combination(attack: Attack, threat: Threat, goal: Goal) -> None:
    """Raise `CapabilityError` where the attack cannot do what is asked."""
    if not isinstance(threat, Threat):
        raise InputError(f"threat must be such as sp.Linf(8 / 255) or sp.Minimize('l2'); got {threat!r}")
    if not isinstance(goal, Goal):
        raise InputError(f"goal must be such as sp.Untargeted() or sp.Targeted(3); got {goal!r}")
    name, can = type(attack).__name__, attack.declaration
    if threat.norm not in can.norms:
        norms = ", ".join(sorted(norm.value for norm in can.norms))
        raise CapabilityError(f"{name} works in {norms}; the threat is {type(threat).__name__} ({threat.norm.value})")
    if threat.minimizes and not can.minimizes:
        raise CapabilityError(
            f"{name} needs a ball of stated size, such as {type(threat).__name__}(eps); for the smallest perturbation take "
            "'minimal' or one of sp.attacks.find(minimizes=True)"
        )
    if goal.targeted and not can.targeted:
        raise CapabilityError(f"{name} is untargeted only; the goal is {goal}")
    if not goal.targeted and not can.untargeted:
        raise CapabilityError(f"{name} is targeted only; the goal is {goal}: give a Targeted one, or none for its default")


def attack(
    model: Classifier,
    x: Tensor | Batches,
    y: Tensor | None,
    attack: Attack | str,
    threat: Threat,
    goal: Goal | Evade | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    budget: Budget | None = None,
    progress: bool = False,
    keep: Keep | None = None,
    ids: Tensor | None = None,
    callback: Callable[[Record], None] | None = None,
    resume: AttackResult | None = None,
    start: Tensor | None = None,
) -> AttackResult:
    """Attack every sample, and report what became of it.

    model: what is attacked (`sp.Model(net)`). x: inputs (N, ...) inside the model's bounds, or an iterable of (x, y) batches (a
    DataLoader), which is then streamed. y: true classes (N,), None with a stream or where the goal needs none.
    attack: an attack or its name; "minimal" is `sp.attacks.minimal(norm)`, fitted to the budget.
    threat: the set to stay in, or `Minimize(norm)`. goal: default the attack's own, mostly `Untargeted()`; `Evade(detector)` is
    to fool the model and a detector at once.
    batch_size: samples under attack at once; default by size. seed: with the sample's id, the source of all randomness.
    budget: limits per sample and in seconds. progress: show a bar. keep: which point is returned, default "smallest" for
    `Minimize` and "first" otherwise (a sample is done at its first success). ids: names of the samples (N,) for the random
    numbers, default their positions. callback: is given a `Record` after every step. resume: the partial result of an
    `Interrupted` run with the same arguments. start: points (N, ...) to begin from in place of the attack's own choice, for
    attacks that can (`takes_start`); points outside the ball are projected (not for attacks that look for the smallest
    perturbation from afar), and later restarts begin where the attack likes.

    Errors: `InputError` for bad inputs, `CapabilityError` where attack, threat, goal and model don't fit (before any query),
    `Interrupted` on Ctrl-C.
    """
    if not isinstance(threat, Threat):
        raise InputError(f"threat must be such as sp.Linf(8 / 255) or sp.Minimize('l2'); got {threat!r}")
    if not isinstance(model, Classifier):
        raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    if isinstance(goal, Evade):
        model, goal = goal.detector.guard(model), goal.goal
    chosen = resolved(attack, threat.norm, budget, model.access)
    if keep is not None and keep not in get_args(Keep):
        raise UnknownNameError("keep", keep, KEEPS)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    goal = goal if goal is not None else chosen.default_goal()
    check_combination(chosen, threat, goal)
    if model.bounds is None and threat.norm is Norm.L0:
        raise CapabilityError("an l0 threat needs bounds: without them one feature can move without limit")
    model.require(chosen.declaration.access, type(chosen).__name__)
    if goal.needs_scores:
        model.require(Access.SCORES, str(goal))
    budget = budget or Budget()
    keep = keep or ("smallest" if threat.minimizes else "first")
    skip = frozenset(resume.order.tolist()) if resume is not None else frozenset[int]()
    source = Source(x, y, ids, model=model, threat=threat, goal=goal, skip=skip)
    data = fingerprint(x, y) if isinstance(x, Tensor) else None
    if start is not None:
        _check_start(chosen, x, start)
    elif chosen.needs_start:
        raise InputError(f"{chosen} goes on from a point: give start, or put it last in a Sequence or in Finally")
    run = Run(model, chosen, threat, goal, keep, seed, budget, batch_size, progress, callback, data, start)
    return run(source, resume)


def _check_start(attack: Attack, x: Tensor | Batches, start: Tensor) -> None:
    if not attack.takes_start:
        raise CapabilityError(
            f"{attack} chooses where it begins by itself: leave start out, or take PGD, APGD, Square or Trim, alone or as the "
            "first of a Sequence"
        )
    if not isinstance(x, Tensor):
        raise InputError("start needs the inputs as one tensor, not a stream of batches")
    if not isinstance(start, Tensor) or start.shape != x.shape or start.dtype != x.dtype:
        found = f"{start.dtype}, {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise InputError(f"start must be points like x ({x.dtype}, {tuple(x.shape)}); got {found}")
    if not bool(torch.isfinite(start).all()):
        row = int((~torch.isfinite(start)).flatten(1).any(1).nonzero()[0])
        raise InputError(f"start[{row}] has NaN or infinite values")


T = TypeVar("T")
PerSampleLoss = Callable[[Tensor, Tensor], Tensor]


class _Plain(Evaluator):
    """Evaluates for training loops: no bookkeeping, but for the nearest success, if the attack looks at it."""

    def __init__(
        self, net: Callable[[Tensor], Tensor], region: Region, y: Tensor, goal: Goal, keys: Keys, loss: PerSampleLoss | None,
        rejects: bool, recalls: bool,
    ) -> None:  # fmt: skip
        self.net, self.region, self.y, self.goal, self.keys, self.loss = net, region, y, goal, keys, loss
        self.rejects, self.recalls = rejects, recalls
        self._aim: Aim | None = None
        nothing = torch.full_like(region.eps, torch.inf)
        self._best = Found(region.origin, nothing, torch.zeros_like(nothing, dtype=torch.bool), -nothing)

    @property
    def aim(self) -> Aim:
        if self._aim is None:
            raise InputError("the number of classes is not known before the first evaluation")
        return self._aim

    def _bind(self, logits: Tensor) -> Aim:
        """The first logits tell how many classes there are, and which is least likely."""
        if self._aim is None:
            classes = logits.shape[1]
            given = self.goal.classes if isinstance(self.goal, Targeted) else None
            if isinstance(given, Tensor):
                targets = given.to(self.y.device)
            else:
                targets = self.goal.targets(self.y, classes - self.rejects, self.keys.absorb(-1))
            known = logits.detach()[:, :-1] if self.rejects else logits.detach()
            self._aim = bind(self.goal, self.y, self.goal.resolve(targets, known, self.y), classes, self.rejects)
        return self._aim

    def forward(self, points: Tensor, owner: Tensor | None) -> Tensor:
        with torch.no_grad():
            logits = self.net(points)
        if self.loss is None:
            self._bind(logits)
        self._remember(points, owner, logits)
        return logits

    def _remember(self, points: Tensor, owner: Tensor | None, logits: Tensor) -> None:
        """Keep each sample's nearest success, if the attack looks at it."""
        if not self.recalls:
            return
        row = torch.arange(len(points), device=points.device) if owner is None else owner
        points, region = points.detach(), take(self.region, row)
        surplus, distance = take(self.aim, row).margin(logits.detach()).double(), region.distance(points)
        distance = torch.where((surplus >= 0) & region.contains(points), distance, torch.inf)
        nearest = self._best.distance.scatter_reduce(0, row, distance, "amin")
        mine = (distance == nearest[row]).nonzero()[:, 0]  # of a sample's points
        at = torch.zeros_like(self.y, dtype=torch.int64).index_copy(0, row[mine], mine)
        new = take((points, distance, torch.isfinite(distance), surplus), at)
        self._best = Found(*select(nearest < self._best.distance, new, tuple(self._best)))

    def gradient(self, points: Tensor, owner: Tensor | None, loss: str | Loss, aim: Aim | None) -> Gradient:
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            logits = self.net(leaf)
            if self.loss is not None:
                values = self.loss(logits, self._of(self.y, owner))
            else:
                bound = self._bind(logits)
                values = loss_named(loss)(logits, self._of(aim if aim is not None else bound, owner))
        self._remember(points, owner, logits)
        return Gradient(values.detach(), input_gradient(values, leaf), logits.detach())

    def jacobian(self, points: Tensor, owner: Tensor | None, weights: Weights) -> Jacobian:
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            logits = self.net(leaf)
            aim = self._of(self._bind(logits), owner)
            chosen = weights if isinstance(weights, Tensor) else weights(logits.detach(), aim)
        each = chosen.to(logits.dtype).unbind(1)
        self._remember(points, owner, logits)
        columns = [input_gradient(logits, leaf, one, again=index + 1 < len(each)) for index, one in enumerate(each)]
        return Jacobian(logits.detach(), torch.stack(columns, 1))

    @staticmethod
    def _of(batch: T, owner: Tensor | None) -> T:
        return batch if owner is None else take(batch, owner)

    def allow(self, owner: Tensor, wanted_backward: bool, kept_back: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return torch.ones_like(owner, dtype=torch.bool)

    def affords(self, owner: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return torch.ones_like(owner, dtype=torch.bool)

    def best(self) -> Found:
        return self._best


def perturb(
    net: Callable[[Tensor], Tensor] | Classifier,
    x: Tensor,
    y: Tensor,
    attack: Attack | str,
    threat: Threat,
    loss: PerSampleLoss | None = None,
    *,
    goal: Goal | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    mode: Literal["eval", "train"] = "eval",
) -> Tensor:
    """The attack's last iterate, for training loops: same `init` and `step`, nothing else. Returns (N, ...), detached.

    net: a network (or a function) that gives logits (N, C) for inputs in `bounds`, or an `sp.Model`, which has its own bounds.
    x (N, ...), y (N,) integer classes, or anything that `loss` understands (soft labels, a clean model's outputs).
    loss: (logits, y) -> (N,) or a scalar sum to ascend in place of the attack's own, such as TRADES' divergence.
    seed: change it every epoch; ids (N,): names of the samples, default their positions in the batch.
    mode: what normalisation and dropout layers do during the attack. "eval": as in deployment; "train": as in training, but
    running statistics stay as they were. The modules' mode is restored.

    No stopping, no success check and no counts: a training step wants the loss's maximum. Errors: `CapabilityError`.
    """
    attack = as_attack(attack)
    goal = goal if goal is not None else attack.default_goal()
    if attack.needs_start:
        raise InputError(f"{attack} goes on from another attack's point: put it last in a Sequence")
    if loss is None:
        if y.is_floating_point() or y.dim() != 1:
            raise InputError("soft labels need a loss: perturb(..., loss=lambda logits, y: ...)")
        check_combination(attack, threat, goal)
    elif attack.recalls:
        raise CapabilityError(f"{attack} looks for the nearest success, which a loss of your own does not define")
    if mode not in ("eval", "train"):
        raise InputError(f'mode must be "eval" or "train"; got {mode!r}')
    modules: tuple[nn.Module, ...] = (net,) if isinstance(net, nn.Module) else ()
    forward: Callable[[Tensor], Tensor]
    if isinstance(net, Classifier):
        forward, modules, bounds = net.forward, net.networks(), net.bounds
    else:
        forward = net
    region = threat.around(x.detach(), bounds)
    keys = Keys.of(seed, torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device))
    with frozen(modules):
        if mode == "train":
            for module in modules:
                module.train()
        rejects = isinstance(net, Classifier) and net.rejects
        evaluator = _Plain(forward, region, y, goal, keys, loss, rejects, attack.recalls)
        k = torch.zeros(len(x), dtype=torch.int64)
        state = attack.init(Problem(region, y, k, keys, evaluator))
        for step in range(attack.iterations):
            state = attack.step(Problem(region, y, k + step, keys, evaluator), state)
    return region.snap(attack.current(state).detach())
