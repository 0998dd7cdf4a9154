"""Where attacks that see labels only can begin: inputs that the model takes for what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.goals import UNRESOLVED, Goal, Targeted, Untargeted
from saddlepoint.models.base import Classifier
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import distance

_BLOCK = 2**24  # numbers compared at once


def starting_points(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    goal: Goal | None = None,
    *,
    norm: Norm | str = Norm.L2,
    seed: int = 0,
) -> Tensor:
    """For each input (N, ...) the nearest one of `pool` (M, ...) that reaches the goal, for `sp.attack(..., start=)`.

    Noise rarely looks like a given class, so a targeted search by labels needs another input of that class to begin at. Costs a
    query for each input of the pool, which `model.queries` counts. y: true classes (N,). goal, seed: those of the attack.
    Where the pool holds nothing for an input, the input itself is returned, and the attack looks for a start by itself.

    Errors: `InputError` for shapes that differ, and for least likely or all targets, which take scores or several runs.

    >>> import torch, saddlepoint as sp
    >>> oracle = sp.Model(torch.nn.Linear(4, 3), access=sp.Access.LABELS)
    >>> x, others = torch.rand(2, 4), torch.rand(50, 4)
    >>> sp.attacks.starting_points(oracle, x, oracle.predict(x), others, sp.Targeted("next")).shape
    torch.Size([2, 4])
    """
    goal, norm = goal if goal is not None else Untargeted(), Norm(norm)
    if pool.shape[1:] != x.shape[1:]:
        raise InputError(f"pool must hold inputs like x {tuple(x.shape[1:])}; got {tuple(pool.shape[1:])}")
    if y.shape != (len(x),):
        raise InputError(f"y must have shape ({len(x)},), a class for each input; got {tuple(y.shape)}")
    if isinstance(goal, Targeted) and goal.classes in ("least_likely", "all"):
        raise InputError(f"starting_points() takes one target for each input that is known before; the goal is {goal}")
    if not len(pool):
        return x.clone()
    predicted = model.predict(pool).cpu()
    classes = model.num_classes or int(predicted.max()) + 1
    labels, ids = y.cpu(), torch.arange(len(x))
    if isinstance(goal, Targeted) and isinstance(goal.classes, Tensor):
        targets = goal.classes.cpu()
    else:
        targets = goal.targets(labels, classes, Keys.of(seed, ids).absorb(UNRESOLVED))
    wanted = goal.aim(labels, targets, classes).wanted
    found = x.clone()
    at_once = max(1, _BLOCK // max(1, pool.numel()))
    for rows in torch.split(ids, at_once):
        away = distance(
            pool.repeat(len(rows), *([1] * (pool.dim() - 1))), x[rows].repeat_interleave(len(pool), 0), norm
        ).view(len(rows), len(pool))  # fmt: skip
        away = away.cpu().masked_fill(~wanted[rows][:, predicted], torch.inf)
        nearest = away.min(1)
        known = torch.isfinite(nearest.values)
        found[rows[known]] = pool[nearest.indices[known]]
    return found
