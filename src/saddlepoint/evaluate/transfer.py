"""Who fools whom: examples crafted on each model, shown to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.facade import check_combination, perturb
from saddlepoint.attacks.minimal import resolved
from saddlepoint.attacks.noise import GaussianNoise, SignNoise, UniformNoise
from saddlepoint.attacks.registry import as_attack
from saddlepoint.attacks.square import Square
from saddlepoint.engine import Attack, AttackResult, Budget, Interrupted, Keep
from saddlepoint.engine.result import attack_name
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import CapabilityError, InputError, SaddlepointError, UnknownNameError
from saddlepoint.evaluate.evaluation import binomial_limits
from saddlepoint.goals import Goal, Targeted, Untargeted, bind
from saddlepoint.models.base import Classifier
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import L2, Bounds, Threat
from saddlepoint.threats import distance as size_of
from saddlepoint.trees import rows as per_sample

NOISE = "noise"
_FAR = 1e6  # times a length, so that only the box and the length limit how far a direction is followed
_QUERIES = 1000
_SHORT = 14  # characters of a name in the summary's columns

Instead = Attack | str | Classifier | Tensor


@dataclass(frozen=True)
class Transfer:
    """What became of the examples of one model when they were shown to another.

    count: samples that both models get right; only these count. fooled: of these, the examples that reach the goal on the
    target. crafted: those that reach it on the source; both: on both. same: of both, how many the two give the same class; None
    where their labels differ in kind. For noise, which has no source, crafted and both are 0.
    """

    source: str
    target: str
    count: int
    fooled: int
    crafted: int
    both: int
    same: int | None

    @property
    def rate(self) -> float:
        """fooled / count; nan where no sample counts."""
        return _share(self.fooled, self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % limits of the rate for all such samples (Clopper-Pearson)."""
        return binomial_limits(self.fooled, self.count) if self.count else (0.0, 1.0)

    @property
    def carried(self) -> float:
        """both / crafted: the rate among the examples that fool their own model; nan where there are none."""
        return _share(self.both, self.crafted)

    @property
    def matched(self) -> float:
        """same / both: how often two fooled models are fooled alike; nan where that can't be said."""
        return _share(self.same or 0, self.both) if self.same is not None else torch.nan


@dataclass(frozen=True)
class Crafted:
    """The examples of one row: `points` (N, ...), and the classes (N,) that each model gives them.

    how: in words, by what they were crafted. result: what the attack said; None for noise, and for examples that were given.
    reached: on each model, which examples reach the goal, (N,) bool.
    """

    name: str
    how: str
    points: Tensor
    result: AttackResult | None
    predicted: Mapping[str, Tensor]
    reached: Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class TransferMatrix:
    """Which examples, crafted on which model, fool which other, for the samples x (N, ...).

    models: those that are asked; labels: the right classes (N,) for each of them. clean: what they say of x. rows: the examples
    of each source, in order; the last may be noise. equal_distance: the l2 length to which all perturbations were brought; None
    as they came. complete: False after Ctrl-C, when only the finished rows are there.
    """

    x: Tensor
    models: Mapping[str, Classifier]
    labels: Mapping[str, Tensor]
    clean: Mapping[str, Tensor]
    rows: tuple[Crafted, ...]
    attack: Attack
    threat: Threat
    goal: Goal
    equal_distance: float | None
    seed: int
    complete: bool = True

    def __repr__(self) -> str:
        sources = sum(row.result is not None for row in self.rows)
        return (
            f"TransferMatrix({sources} sources, {len(self.models)} targets, {len(self.x)} samples; print .summary() for more)"
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(row.name for row in self.rows)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.models)

    @property
    def crafted(self) -> tuple[Crafted, ...]:
        """The rows of models: all but noise."""
        return tuple(row for row in self.rows if row.name in self.models)

    @property
    def noise(self) -> tuple[Crafted, ...]:
        """The row of noise, if there is one."""
        return tuple(row for row in self.rows if row.name not in self.models)

    def right(self, model: str) -> Tensor:
        """The samples that a model gets right as they are, (N,) bool."""
        return self.clean[model] == self.labels[model]

    @cached_property
    def cells(self) -> dict[tuple[str, str], Transfer]:
        """What became of each source's examples on each target."""
        return {(row.name, target): self._cell(row, target) for row in self.rows for target in self.models}

    def _cell(self, row: Crafted, target: str) -> Transfer:
        counted, there = self.right(target), row.reached[target]
        if row.name not in self.models:
            return Transfer(row.name, target, int(counted.sum()), int((counted & there).sum()), 0, 0, None)
        counted = counted & self.right(row.name)
        here = counted & row.reached[row.name]
        alike = torch.equal(self.labels[row.name], self.labels[target])
        both = here & there
        same = both & (row.predicted[row.name] == row.predicted[target])
        count, fooled, crafted, twice, equal = (int(m.sum()) for m in (counted, counted & there, here, both, same))
        return Transfer(row.name, target, count, fooled, crafted, twice, equal if alike else None)

    def rate(self, source: str, target: str) -> float:
        """Share of the samples that both get right whose example, crafted on `source`, fools `target`."""
        return self.cells[source, target].rate

    @property
    def rates(self) -> Tensor:
        """`rate` for all sources (rows) and targets (columns), float64."""
        return torch.tensor([[self.rate(s, t) for t in self.models] for s in self.sources], dtype=torch.float64)

    def length(self, source: str, norm: Norm | str = Norm.L2) -> float:
        """Median size of the perturbations of a source, over the samples that it gets right; nan if there are none."""
        row = self.rows[self.sources.index(source)]
        sizes = size_of(row.points, self.x, norm)
        if source in self.models:
            sizes = sizes[self.right(source).to(sizes.device)]
        return float(sizes.median()) if len(sizes) else torch.nan

    @property
    def setting(self) -> str:
        """What was done, in words: attack, threat and length."""
        words = f"{attack_name(self.attack.settings())}, {self.threat}"
        return words if self.equal_distance is None else f"{words}, every perturbation brought to l2 {self.equal_distance:g}"

    def summary(self) -> str:
        """The rates as a table in plain text."""
        heads = [name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…" for name in self.models]
        wide = max([len("crafted on"), *(len(name) for name in self.sources)])
        lines = [f"{'crafted on':<{wide}}  {'  '.join(f'{head:>8}' for head in heads)}"]
        for row in self.rows:
            cells = (f"{100 * self.rate(row.name, target):.1f}%" for target in self.models)
            shown = "  ".join(f"{cell:>{max(8, len(head))}}" for cell, head in zip(cells, heads, strict=True))
            lines.append(f"{row.name:<{wide}}  {shown}")
        others = [f"  {row.name}: {row.how}" for row in self.rows if row.how != self.usual]
        title = f"Share of examples that fool the model of the column, of {len(self.x)} samples where both models are right"
        return "\n".join([title, f"({self.setting})", *lines, *(["crafted otherwise:", *others] if others else [])])

    @property
    def usual(self) -> str:
        """How examples are crafted on models with gradients; other rows say otherwise in `how`."""
        return attack_name(self.attack.settings())

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "attack": self.attack.settings(), "threat": self.threat.settings(), "goal": self.goal.settings(),
            "equal_distance": self.equal_distance, "seed": self.seed, "samples": len(self.x), "complete": self.complete,
            "models": [
                {"name": name, "settings": model.describe(), "clean_accuracy": _share(int(self.right(name).sum()), len(self.x))}
                for name, model in self.models.items()
            ],
            "sources": [
                {"name": row.name, "how": row.how}
                | {f"median_{norm}": self.length(row.name, norm) for norm in (Norm.L2, Norm.LINF)}
                for row in self.rows
            ],
            "cells": [
                asdict(cell) | {"rate": cell.rate, "low": cell.interval[0], "high": cell.interval[1]}
                for cell in self.cells.values()
            ],
        }  # fmt: skip


def transfer_matrix(
    models: Mapping[str, Classifier],
    x: Tensor,
    y: Tensor,
    attack: Attack | str,
    threat: Threat,
    *,
    sources: Sequence[str] | None = None,
    labels: Mapping[str, Tensor] | None = None,
    equal_distance: float | None = None,
    instead: Instead | Mapping[str, Instead] | None = None,
    goal: Goal | None = None,
    noise: bool = True,
    keep: Keep | None = None,
    budget: Budget | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TransferMatrix:
    """Craft examples on each model, show them to all of them, and count whom they fool.

    A rate is over the samples that both models get right, so that a weak target doesn't look like an easy one.

    models: at least one, by name; they share bounds. x (N, ...), y (N,): the samples and their classes. sources: names of those
    to craft on, default all. labels: the classes of models that have another task, by name: `{"parity": y % 2}`.
    attack: used on every model that grants what it needs. threat: a ball, or `Minimize(norm)`.
    equal_distance: an l2 length. Each perturbation is stretched or shrunk along its own direction, and clipped to the bounds,
    until it has that length; so sources are compared for where they point. With `Minimize("l2")` that is to the boundary.
    instead: for models that don't grant what the attack needs, another attack, or a model to craft on in the model's place (a
    `substitute`): one for all of them, or by name, where it is used in any case. By name it may also be examples (N, ...) that
    were made elsewhere, which are taken as they are. Default: Square with 1,000 queries.
    goal: default `Untargeted`. noise: whether the last row is random noise within the same ball, or of the same length.
    keep: which point of the search is shown to others; default the one with the largest margin on its own model, or the
    smallest for `Minimize`. budget, batch_size, seed, progress: as in `sp.attack`.

    Ctrl-C returns the rows that are finished. Errors: those of `sp.attack`, `InputError`.

    >>> import torch, saddlepoint as sp
    >>> one, other = (sp.Model(torch.nn.Linear(4, 3), bounds=None) for _ in range(2))
    >>> x = torch.randn(20, 4)
    >>> matrix = transfer_matrix({"one": one, "other": other}, x, one.predict(x), "fgsm", sp.Linf(0.5))
    >>> matrix.rates.shape  # from one, from other, from noise
    torch.Size([3, 2])
    """
    _check(models, x, threat, equal_distance)
    chosen = resolved(attack, threat.norm, budget)
    goal = goal if goal is not None else Untargeted()
    if not goal.needs_labels or (isinstance(goal, Targeted) and goal.classes == "all"):
        raise InputError(f"a transfer matrix needs one goal a sample, to leave its class or to reach another; got {goal}")
    for name in sources or ():
        if name not in models:
            raise UnknownNameError("source", name, models)
    names = list(models) if sources is None else list(dict.fromkeys(sources))
    plans = {name: _plan(name, models[name], x, chosen, threat, goal, instead) for name in names}
    own = _labels(models, x, y, labels)
    clean = {name: model.predict(x).to(x.device) for name, model in models.items()}
    found: list[Crafted] = []
    complete = True

    def asked(name: str, how: str, points: Tensor, result: AttackResult | None) -> Crafted:
        if equal_distance is not None:
            points = brought_to(equal_distance, points, x, next(iter(models.values())).bounds)
        predicted = {target: model.predict(points).to(x.device) for target, model in models.items()}
        targets = torch.full_like(y, -1) if result is None else result.targets.to(y.device)
        reached = {target: _reached(goal, own[target], targets, predicted[target], models[target]) for target in models}
        return Crafted(name, how, points, result, predicted, reached)

    try:
        for name, (how, means, victim) in plans.items():
            if isinstance(victim, Tensor):
                found.append(asked(name, how, victim, None))
                continue
            result = run_attack(
                victim, x, own[name], means, threat, goal, keep=keep or ("smallest" if threat.minimizes else "margin"),
                budget=budget, batch_size=batch_size, seed=seed, progress=progress,
            )  # fmt: skip
            found.append(asked(name, how, result.adversarial, result))
    except Interrupted:
        complete = False
    if complete and noise and not goal.targeted and NOISE not in models:
        made = _noise(x, y, threat, equal_distance, next(iter(models.values())).bounds, seed)
        if made is not None:
            found.append(asked(NOISE, made[0], made[1], None))
    return TransferMatrix(x, models, own, clean, tuple(found), chosen, threat, goal, equal_distance, seed, complete)


def brought_to(length: float, points: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """x + s * (points - x), clipped to the bounds, with the s for which that is `length` away in l2.

    Where the bounds don't let it be so long, it is as long as they let it be. Points that are x stay.
    """
    moved = (points - x).double()
    size = per_sample(size_of(points, x, Norm.L2), x)
    far = torch.where(size > 0, x + moved * (_FAR * length / size.clamp(min=torch.finfo(torch.float64).tiny)), x)
    return L2(length).project(far.to(x.dtype), x, bounds)


def _check(models: Mapping[str, Classifier], x: Tensor, threat: Threat, equal_distance: float | None) -> None:
    if not isinstance(models, Mapping) or not models:
        raise InputError(f'models must be a mapping from names to models, {{"mine": model}}; got {models!r}')
    for name, model in models.items():
        if not isinstance(model, Classifier):
            raise InputError(f"{name} must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    bounds = {name: model.bounds for name, model in models.items()}
    if len(set(bounds.values())) > 1:
        raise InputError(f"the models' bounds differ, so an input of one is none of another: {bounds}")
    if not isinstance(x, Tensor):
        raise InputError(f"x must be one tensor, since every model sees all samples; got {type(x).__name__}")
    if not isinstance(threat, Threat):
        raise InputError(f"threat must be such as sp.Linf(8 / 255) or sp.Minimize('l2'); got {threat!r}")
    if equal_distance is not None and not 0 < equal_distance < float("inf"):
        raise InputError(f"equal_distance must be a positive l2 length; got {equal_distance}")


def _labels(models: Mapping[str, Classifier], x: Tensor, y: Tensor, labels: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    given = dict(labels or {})
    if unknown := [name for name in given if name not in models]:
        raise InputError(f"there are labels for {unknown[0]!r}, but the models are {', '.join(models)}")
    return {
        name: check_labels(given.get(name, y), len(x), model.num_classes or model.probe(x).num_classes, f"labels of {name}")
        for name, model in models.items()
    }


def _plan(
    name: str,
    model: Classifier,
    x: Tensor,
    attack: Attack,
    threat: Threat,
    goal: Goal,
    instead: Instead | Mapping[str, Instead] | None,
) -> tuple[str, Attack, Classifier | Tensor]:
    """How to craft on a model: in words, by which attack, and on which model; or the examples themselves."""
    enough = model.access >= attack.declaration.access
    other = instead.get(name) if isinstance(instead, Mapping) else None if enough else instead
    if other is None and not enough:
        other = Square(steps=_QUERIES)
    means, victim, how = attack, model, attack_name(attack.settings())
    if isinstance(other, Tensor):
        if other.shape != x.shape:
            raise InputError(
                f"instead of {name}: examples must have the shape of x, {tuple(x.shape)}; got {tuple(other.shape)}"
            )
        model.check_inputs(other)
        return "examples made elsewhere", attack, other.to(x.device)
    if isinstance(other, Classifier):
        if other.bounds != model.bounds:
            raise InputError(f"instead of {name}: its bounds are {other.bounds}, not {model.bounds}")
        victim, how = other, f"{how}, on another model in its place"
    elif other is not None:
        means = as_attack(other)
        how = attack_name(means.settings())
    try:
        check_combination(means, threat, goal)
        victim.require(means.declaration.access, type(means).__name__)
    except SaddlepointError as error:
        if other is None:
            raise
        raise CapabilityError(
            f"{name} grants {model.access.name.lower()} only, and {how} can't take the place of {type(attack).__name__} "
            f"({error}): say what shall, instead={{{name!r}: an attack, or a substitute}}"
        ) from None
    return how, means, victim


def _reached(goal: Goal, labels: Tensor, targets: Tensor, predicted: Tensor, model: Classifier) -> Tensor:
    """Which predictions (N,) the goal wants."""
    assert model.num_classes is not None  # _labels saw to it
    return bind(goal, labels, targets, model.num_classes, model.rejects).wanted.gather(1, predicted[:, None])[:, 0]


def _noise(x: Tensor, y: Tensor, threat: Threat, length: float | None, bounds: Bounds, seed: int) -> tuple[str, Tensor] | None:
    """Random points of the same size, and what they are; None where no size is stated."""
    if length is not None:
        keys = Keys.of(seed, torch.arange(len(x), device=x.device))
        return "a random direction", x + keys.normal(tuple(x.shape[1:]), x.dtype)
    if threat.minimizes:
        return None
    attack: Attack = {Norm.LINF: SignNoise(), Norm.L2: GaussianNoise()}.get(threat.norm, UniformNoise())
    return f"{type(attack).__name__} within the same ball", perturb(lambda x: x, x, y, attack, threat, bounds=bounds, seed=seed)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
