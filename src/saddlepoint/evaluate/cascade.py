"""Robust accuracy from the cheapest attack to the strongest: each sample leaves at its first success.

The heavier attacks climb a ladder: they begin with the samples of largest margin, which the earlier ones came closest to
breaking, and go on to the next ones as long as a rung breaks any. So where gradients are honest, few samples pay for them.
Signs of masked gradients lengthen the rungs and add searches that gradients do not lead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from saddlepoint.attacks import APGD, APGDT, DualAveraging, Restarts, SignNoise, Sprint, Square, minimal
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine import Attack, AttackResult, Interrupted
from saddlepoint.engine.result import merge
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.evaluate.campaign import Campaign, manifest
from saddlepoint.evaluate.diagnose import Diagnosis, diagnose
from saddlepoint.evaluate.evaluation import FAILED, STANDS, WRONG, Evaluation, Stage, WorstCase
from saddlepoint.goals import Untargeted
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access, Norm, Status
from saddlepoint.threats import Threat

Effort = Literal["quick", "standard", "thorough"]
_PART = 500  # samples of a stage that are finished, and kept by a campaign, together
_FEWEST = 8  # samples of a ladder's first rung
_LOOKED = 100  # samples whose gradients at the input are looked at
# Signs of masking: above this share of samples whose margin gained more than twice, or less than a quarter, of what the
# gradient at the input promised; above this share of vanished gradients; above this share of all samples that only a ladder
# broke.
_MISLED, _VANISHED, _LATE = 0.5, 0.05, 0.01
_FEW = 4  # so many at least


@dataclass(frozen=True)
class Plan:
    """A stage to come. share: None for all that stand, else the share of all samples of a ladder's first rung."""

    name: str
    why: str
    attack: Attack
    share: float | None = None


def plans(norm: Norm, effort: Effort, *, gradients: bool = True) -> tuple[Plan, ...]:
    """What `evaluate` runs if nothing looks suspicious."""
    if not gradients:
        queries = {"quick": 300, "standard": 1000, "thorough": 5000}[effort]
        return (Plan("noise", "the model gives no gradients", Restarts(SignNoise(), 10)),
                Plan("square", "search by scores", Square(steps=queries)))  # fmt: skip
    if norm is Norm.L0:
        return (
            Plan("minimal-100", "the cheapest search for few features", minimal(norm, 100)),
            Plan("minimal-400", "more walks for those that came closest", minimal(norm, 400), _share(effort, 0.1)),
            Plan("minimal-1000", "more walks for those that came closest", minimal(norm, 1000), _share(effort, 0.05)),
        )[: 1 if effort == "quick" else 3]
    hold = 3 if norm is Norm.LINF else None
    base = (
        Plan("sprint-margin", "the cheapest that breaks most", Sprint(steps=10)),
        Plan("sprint-probability", "another loss, another corner", Sprint(steps=20, loss="probability_margin")),
        Plan("walks", "no step size to choose", DualAveraging(steps=50, hold=hold), _share(effort, 0.1)),
    )
    if effort == "quick":
        return base
    long = DualAveraging(steps=120, targets=5, explore=40, again=50, hold=hold)
    return (
        *base,
        Plan("more-walks", "towards more classes, from further beyond", long, _share(effort, 0.05)),
        Plan("apgd-t", "towards each class in turn", APGDT(steps=30), _share(effort, 0.03)),
        Plan("square", "search without gradients", Square(steps=5000 if effort == "thorough" else 500), _share(effort, 0.03)),
    )


def escalation(norm: Norm, effort: Effort) -> tuple[Plan, ...]:
    """What is added where gradients mislead."""
    if norm is Norm.L0:
        return ()
    if effort == "quick":
        return (Plan("square", "signs of masking: search without gradients", Square(steps=300), 0.2),)
    return (
        Plan("apgd", "signs of masking: another step rule", APGD(steps=100), _share(effort, 0.1)),
        Plan("restarts", "signs of masking: other corners", Restarts(Sprint(steps=40), 3), _share(effort, 0.1)),
        Plan("apgd-t-wide", "signs of masking: each class, more steps", APGDT(steps=50), _share(effort, 0.04)),
        Plan("square-long", "signs of masking: search without gradients", Square(steps=2000), _share(effort, 0.04)),
    )


def _share(effort: Effort, share: float) -> float:
    return min(1.0, 5 * share) if effort == "thorough" else share


@dataclass
class _Cascade:
    """An evaluation that is going on. certified, looked and the like: (N,), as in `Evaluation`."""

    model: Classifier
    x: Tensor
    y: Tensor
    threat: Threat
    seed: int
    batch_size: int | None
    progress: bool
    campaign: Campaign | None
    broken_by: Tensor
    adversarial: Tensor
    margin: Tensor
    clean_predicted: Tensor
    looked: Tensor
    probe: int = 0
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, plan: Plan) -> None:
        """One stage: all samples that stand, or rung by rung."""
        standing = (self.broken_by == STANDS).nonzero()[:, 0]
        if not self.stages:
            standing = torch.arange(len(self.y))  # the first one also tells which are wrong
        if not len(standing):
            return
        done: list[AttackResult] = []
        try:
            if plan.share is None:
                self._attack(plan, standing, done)
                return
            order = standing[self.margin[standing].argsort(descending=True, stable=True)]
            size = max(_FEWEST, math.ceil(plan.share * len(self.y)))
            while len(order):
                broke = self._attack(plan, order[:size].sort().values, done)
                order, size = order[size:], 2 * size
                if not broke:
                    return
        finally:
            if done:
                result = merge(done)
                self.stages.append(Stage(plan.name, plan.why, result.index, result))
                self._learn(len(self.stages) - 1)

    def _attack(self, plan: Plan, rows: Tensor, done: list[AttackResult]) -> int:
        """Attack these samples part by part; how many broke."""
        before = len(done)
        kept = self.campaign.finished(plan.name) if self.campaign is not None else None
        if kept is not None:
            done.append(kept.select(torch.isin(kept.index, rows).nonzero()[:, 0]))
            rows = rows[~torch.isin(rows, kept.index)]
        for part in torch.split(rows, _PART) if len(rows) else ():
            try:
                result = run_attack(
                    self.model, self.x[part], self.y[part], plan.attack, self.threat,
                    batch_size=self.batch_size, seed=self.seed, ids=part, progress=self.progress,
                )  # fmt: skip
            except Interrupted as stop:
                self._keep(plan, stop.result, part, done)
                raise
            self._keep(plan, result, part, done)
        return sum(int(result.having(Status.FOOLED).sum()) for result in done[before:])

    def _keep(self, plan: Plan, result: AttackResult, part: Tensor, done: list[AttackResult]) -> None:
        if len(result):
            result = result.at(part[result.index])
            if self.campaign is not None:
                self.campaign.add(plan.name, result, result.index)
            done.append(result)

    def _learn(self, number: int) -> None:
        """Take over what stage `number` found."""
        rows, result = self.stages[number].rows, self.stages[number].result
        if number == 0:
            self.clean_predicted[rows] = result.clean_predicted
            self.broken_by[rows[result.having(Status.ALREADY_WRONG)]] = WRONG
        fooled = result.having(Status.FOOLED)
        self.broken_by[rows[fooled]] = number
        closer = fooled | (result.margin.double() > self.margin[rows])
        self.margin[rows[closer]] = result.margin[closer].double()
        self.adversarial[rows[closer]] = result.adversarial[closer]
        self.broken_by[rows[result.having(Status.ERROR)]] = FAILED
        if failed := int(result.having(Status.ERROR).sum()):
            self.notes.append(f"{self.stages[number].name}: the model gave NaN or infinite values for {failed} samples")

    def signs(self) -> list[str]:
        """Reasons to distrust the gradients, from what was seen so far."""
        found, count = [], max(len(self.y), 1)
        first = [stage for stage in self.stages if stage.name != "sprint-probability"]  # probabilities may well saturate
        steps = sum(int(stage.result.iterations.sum()) for stage in first)
        vanished = sum(int(stage.result.zero_gradients.sum()) for stage in first) / max(steps, 1)
        if vanished > _VANISHED:
            found.append(f"{vanished:.0%} of the gradients vanished")
        late = [number for number, stage in enumerate(self.stages) if number >= 2]
        fell = sum(int((self.broken_by == number).sum()) for number in late)
        if fell >= _FEW and fell > _LATE * count:
            found.append(f"{fell / count:.1%} of the samples fell to heavier attacks only")
        if (misled := self._misled()) is not None and misled > _MISLED:
            found.append(
                f"for {misled:.0%} of the samples that stand, the margin does not change as its gradient at the input says"
            )
        return found

    def _misled(self) -> float | None:
        """Share of those that stand whose margin gained something else than promised, on the way to the best attempt."""
        rows = (self.broken_by == STANDS).nonzero()[:, 0]
        rows = rows[self.margin[rows].argsort(descending=True, stable=True)][:_LOOKED]
        if not len(rows):
            return None
        self.looked[rows] = True
        x, device = self.x[rows], self.model.device
        with self.model.frozen(), torch.enable_grad():
            leaf = x.to(device).requires_grad_()
            logits = self.model.forward(leaf)
            aim = Untargeted().aim(self.y[rows].to(device), torch.full_like(rows, -1).to(device), logits.shape[1])
            before = aim.margin(logits)
            (gradient,) = torch.autograd.grad(before.sum(), leaf)
        way = (self.adversarial[rows] - x).double()
        promised = (gradient.cpu().double() * way).flatten(1).sum(1)
        gained = (self.margin[rows] - before.detach().cpu().double()).clamp(min=0)
        return float(((gained > 2 * promised) | (promised > 4 * gained)).double().mean())

    def diagnosis(self) -> Diagnosis:
        """What the campaign holds, or a new one."""
        if self.campaign is not None and (kept := self.campaign.document("diagnosis")) is not None:
            return Diagnosis.from_dict(kept)
        found = diagnose(
            self.model, self.x, self.y, self.threat, seed=self.seed, batch_size=self.batch_size, progress=self.progress
        )
        if self.campaign is not None:
            self.campaign.record("diagnosis", found.to_dict())
        return found

    def evaluation(self, diagnosis: Diagnosis | None, complete: bool) -> Evaluation:
        return Evaluation(
            self.x, self.y, self.threat, self.clean_predicted, tuple(self.stages), self.broken_by, self.adversarial,
            self.margin, torch.zeros_like(self.looked), self.looked, diagnosis, tuple(self.notes), self.probe, complete,
        )  # fmt: skip


@overload
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    effort: Effort = ...,
    *,
    seed: int = ...,
    batch_size: int | None = ...,
    progress: bool = ...,
    campaign: Campaign | str | Path | None = ...,
) -> Evaluation: ...
@overload
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Sequence[Threat],
    effort: Effort = ...,
    *,
    seed: int = ...,
    batch_size: int | None = ...,
    progress: bool = ...,
) -> WorstCase: ...
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat | Sequence[Threat],
    effort: Effort = "standard",
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    campaign: Campaign | str | Path | None = None,
) -> Evaluation | WorstCase:
    """Robust accuracy within a threat, with the evidence: a cascade of attacks from cheap to strong.

    x (N, ...), y (N,): samples inside the model's bounds and their true classes. threat: a ball of stated size; several for
    the worst case over them. effort: "quick" for a first look, "standard", or "thorough" for a figure to publish.
    campaign: a folder that keeps what is finished; the same call goes on where an earlier one was stopped.

    Where there are signs of masked gradients, more and other attacks run, and `diagnose` says what is wrong. Ctrl-C returns
    what is finished. Errors: `InputError` for bad inputs, `CapabilityError` for a model that gives labels only, those of
    `Campaign`.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> x = torch.rand(20, 4)
    >>> sp.evaluate(model, x, model.predict(x), sp.Linf(0.0)).robust_accuracy
    1.0
    """
    if not isinstance(model, Classifier):
        raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    if not isinstance(threat, Threat) and (not isinstance(threat, Sequence) or not all(isinstance(t, Threat) for t in threat)):
        raise InputError(f"threat must be such as sp.Linf(8 / 255), or a list of them; got {threat!r}")
    if effort not in get_args(Effort):
        raise UnknownNameError("effort", str(effort), get_args(Effort))
    if not isinstance(threat, Threat):
        if campaign is not None:
            raise InputError("a campaign holds one threat: evaluate one after another, each in its own folder")
        parts: list[Evaluation] = []
        for one in threat:
            parts.append(evaluate(model, x, y, one, effort, seed=seed, batch_size=batch_size, progress=progress))
            if not parts[-1].complete:
                break
        if not parts:
            raise InputError("evaluate needs at least one threat")
        return WorstCase(tuple(parts))
    if threat.minimizes:
        raise InputError("evaluate needs a ball of stated size, such as sp.Linf(8 / 255); for distances there is sp.distance")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        kinds = f"{type(x).__name__} and {type(y).__name__}"
        raise InputError(f"evaluate needs the samples as tensors, since each attack sees all of them; got {kinds}")
    if y.shape != (len(x),):
        raise InputError(f"y must have shape ({len(x)},), one class per input; its shape is {tuple(y.shape)}")
    if model.access < Access.SCORES:
        raise CapabilityError("evaluate needs gradients or scores; this model exposes labels only")
    gradients = model.access >= Access.GRADIENTS
    todo = plans(threat.norm, effort, gradients=gradients)
    campaign = Campaign(campaign) if isinstance(campaign, str | Path) else campaign
    if campaign is not None:
        settings = {"effort": effort, "plans": [plan.attack.settings() | {"share": plan.share} for plan in todo]}
        campaign.open(manifest(model, x, y, threat, seed=seed, configuration=settings))
    before = model.queries.forward
    if len(x):
        model.probe(x)  # here, so that a resumed run has the same margin of success
    none = torch.full((len(x),), STANDS)
    run = _Cascade(
        model, x, y, threat, seed, batch_size, progress, campaign, none, x.clone(),
        torch.full((len(x),), -math.inf, dtype=torch.float64), none.clone(), torch.zeros(len(x), dtype=torch.bool),
        probe=model.queries.forward - before,
    )  # fmt: skip
    try:
        evaluation = _through(run, todo, effort, gradients)
        if campaign is not None and evaluation.complete:
            campaign.record("evaluation", evaluation.to_dict())
            campaign.finish()
    finally:
        if campaign is not None:
            campaign.close()
    return evaluation


def _through(run: _Cascade, todo: Sequence[Plan], effort: Effort, gradients: bool) -> Evaluation:
    """All stages; after Ctrl-C what is finished."""
    diagnosis = None
    try:
        for plan in todo:
            run.run(plan)
        if gradients and (signs := run.signs()):
            run.notes += signs
            if effort != "quick":
                diagnosis = run.diagnosis()
            for plan in escalation(run.threat.norm, effort):
                run.run(plan)
    except Interrupted:
        return run.evaluation(diagnosis, complete=False)
    return run.evaluation(diagnosis, complete=True)
