"""The loop: continuous batching, stopping, budgets, verification of every claim."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.engine.attack import Attack
from saddlepoint.engine.budget import Budget
from saddlepoint.engine.judge import ChunkSize, Judge
from saddlepoint.engine.problem import Problem
from saddlepoint.engine.result import STATUSES, AttackResult, Queries, measure, merge
from saddlepoint.engine.slots import NO_CLASS, Keep, Pool, Recorder, Slots, beyond_confidence, split
from saddlepoint.engine.source import Source, fingerprint
from saddlepoint.errors import InputError, ModelError, SaddlepointError
from saddlepoint.goals import UNRESOLVED, Goal, bind, loss_named
from saddlepoint.models.base import Classifier, Probe
from saddlepoint.precision import full_precision
from saddlepoint.progress import bar
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Status
from saddlepoint.threats import Threat
from saddlepoint.trees import select, take

_VOTES = 11  # fresh draws by which a success against a random model is confirmed
_OFTEN = 9  # how many of them have to agree where one claim follows another: by majority the luckiest would be kept
# Inputs under attack at once, unless the caller says how many; a step's gradients may take eight times that.
_SLOT_BYTES = {"cpu": 2**25, "cuda": 2**30}


@dataclass(frozen=True)
class Record:
    """One step of the samples under attack, for callbacks: all (B, ...).

    queries: forward passes so far. distance: of the smallest success in the threat's norm, inf without one; only where the
    smallest is kept.
    """

    ids: Tensor
    iteration: Tensor
    points: Tensor
    best_margin: Tensor
    success: Tensor
    queries: Tensor
    distance: Tensor


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run. `result` holds the finished samples; give it back as `resume=` to go on."""

    def __init__(self, result: AttackResult) -> None:
        super().__init__(f"interrupted after {len(result)} samples; continue with sp.attack(..., resume=interrupted.result)")
        self.result = result


@dataclass
class Run:
    """One attack on one stream of samples."""

    model: Classifier
    attack: Attack
    threat: Threat
    goal: Goal
    keep: Keep
    seed: int
    budget: Budget
    batch_size: int | None
    progress: bool
    callback: Callable[[Record], None] | None
    data: str | None  # fingerprint of the inputs and labels, None for a stream
    start: Tensor | None = None  # (N, ...), where the caller wants the attack to begin

    def __call__(self, source: Source, resume: AttackResult | None) -> AttackResult:
        """Attack everything that `source` yields. Errors: `Interrupted` on Ctrl-C."""
        started = time.perf_counter()
        self._deadline = started + self.budget.seconds if self.budget.seconds is not None else float("inf")
        before = self.model.queries.forward
        self._unconfirmed = 0
        self._cut: list[int] = []  # steps made for the survivors that the budget ended
        parts = [resume] if resume is not None else []
        first = torch.empty(0, 1)
        # an empty input still has a result; nothing can be asked of the model then
        self._bind(Probe(0.0, self.model.num_classes or 2, False, (), 0), first, resume)
        spent = 0
        try:
            first = source.first()
            if len(first):
                self._bind(self.model.probe(first), first, resume)
            spent = self.model.queries.forward - before
            with bar(type(self.attack).__name__, source.total, show=self.progress) as report, self.model.frozen():
                if self._probe.stochastic:
                    torch.manual_seed(self.seed)
                for part in self._finished(source, self._chunk.rows):
                    parts.append(part)
                    report(sum(len(p) for p in parts))
        except KeyboardInterrupt:
            raise Interrupted(self._assemble(parts, first, spent, started)) from None
        except ModelError as error:
            error.result = self._assemble(parts, first, spent, started)
            raise
        return self._assemble(parts, first, spent, started)

    def _bind(self, probe: Probe, first: Tensor, resume: AttackResult | None) -> None:
        """What the run takes from the probe. A resumed run keeps its margin, so that it decides as if uninterrupted."""
        self._probe = probe
        tau = resume.tau if resume is not None and len(resume) else probe.tau
        self._config = configuration(
            self.model, self.attack, self.threat, self.goal, keep=self.keep, seed=self.seed, budget=self.budget
        )
        self._config["data"] = self.data
        if self.start is not None:
            self._config["start"] = fingerprint(self.start, None)
        if resume is not None and len(resume):
            differing = [key for key in self._config if _known(resume.config.get(key)) != _known(self._config[key])]
            if differing:
                raise InputError(f"this run differs from the one to resume in: {', '.join(differing)}")
        upheld = self._upheld if probe.stochastic and self.keep == "smallest" else None
        self._recorder = Recorder(self.keep, tau, loss_named(self.attack.objective), upheld)
        self._draws = self.model.draws if probe.stochastic else 1
        for name in ("passes", "queries"):
            limit = getattr(self.budget, name)
            if limit is not None and limit < self._draws:
                raise InputError(f"Budget({name}={limit}) pays for no prediction: each takes draws={self._draws} of this model")
        self._chunk = ChunkSize(self.batch_size or self._automatic(first))

    def _finished(self, source: Source, capacity: int) -> Iterator[AttackResult]:
        """Results of samples as they finish: waiting ones take the place of those that leave.

        Small groups would waste the model's batch. So the clean predictions of those who enter, and the last looks and the
        confirmations of those who leave, are made for `capacity` samples together, or when nothing else is left to do.
        """
        ready, active, ended, claimed = Pool(), Pool(), Pool(), Pool()
        judge: Judge | None = None
        while True:
            if (free := capacity - len(active)) * 8 >= capacity:
                if len(ready) < free:
                    ready.add(self._admit(source, capacity))
                active.add(ready.pop(free))
            idle = active.slots is None
            if len(ended) >= capacity or (idle and len(ended)):
                if (group := ended.pop(capacity)) is not None:
                    self._look_at_last(self._judge(group))
                    yield from self._retire(group, claimed)
            elif len(claimed) >= capacity or (idle and len(claimed)):
                if (group := claimed.pop(capacity)) is not None:
                    leaving, refuted = split(group, self._confirm(group))
                    ready.add(refuted)
                    if leaving is not None:
                        yield self._leave(leaving)
            elif active.slots is None:
                return
            else:
                slots = active.slots
                decided = self._recorder.decided(slots)
                over = self._over(slots) & ~decided
                if bool((decided | over).any()):
                    unlooked, rest = split(slots, over)
                    ended.add(unlooked)
                    gone, active.slots = split(rest, self._recorder.decided(rest)) if rest is not None else (None, None)
                    if gone is not None:
                        yield from self._retire(gone, claimed)
                    continue
                if judge is None or judge.slots is not slots:
                    judge = self._judge(slots)
                self._step(slots, judge)

    def _retire(self, slots: Slots, claimed: Pool) -> Iterator[AttackResult]:
        """Samples without a further step: those with a success wait for its confirmation, the others are results."""
        successes, others = split(slots, slots.best.success & ~slots.wrong)
        claimed.add(successes)
        if others is not None:
            yield self._leave(others)

    def _judge(self, slots: Slots) -> Judge:
        return Judge(self.model, slots, self._recorder, self.budget, self._chunk, draws=self._draws)

    def _problem(self, slots: Slots, judge: Judge) -> Problem:
        needed = self.goal.confidence + self._recorder.tau
        access = self.attack.declaration.access
        look = self._must_look(slots) + int(self.attack.judge)
        kept_back = look, torch.zeros_like(look)
        return Problem(slots.region, slots.labels, slots.k, slots.keys, judge, needed, access=access, kept_back=kept_back)

    def _automatic(self, x: Tensor) -> int:
        bytes_each = max(1, x[:1].numel() * x.element_size())
        limit = _SLOT_BYTES.get(self.model.device.type, 2**28)
        copies = max(self.attack.width, self.attack.cost(self._probe.num_classes)[1], 1)
        wide = max(1, 8 * limit // (bytes_each * copies))  # a Jacobian's or a population's batch
        return min(max(16, min(1024, limit // bytes_each)), wide)

    def _admit(self, source: Source, count: int) -> Slots | None:
        samples = source.take(count)
        if samples is None:
            return None
        self._output_device = samples.x.device
        device = self.model.device
        x, labels, targets, sample = (t.to(device) for t in (samples.x, samples.labels, samples.targets, samples.sample))
        region = self.threat.around(x, self.model.bounds, sample)
        keys = Keys.of(self.seed, samples.ids.to(device))
        if source.every_target:
            keys = keys.absorb(targets)
        classes = self._probe.num_classes
        if bool((targets == UNRESOLVED).any()):
            chosen = self.goal.targets(labels, classes - self.model.rejects, keys.absorb(-1))
            targets = torch.where(targets == UNRESOLVED, chosen, targets)
        aim = bind(self.goal, labels, targets, classes, self.model.rejects)
        slots = Slots.enter(
            samples.index.to(device), sample, samples.ids.to(device), labels, targets, region, aim, keys, state=None
        )
        judge = self._judge(slots)
        if self.start is not None or not self.attack.starts_at_origin:
            judge.forward(region.origin, None)
        start = None if self.start is None else self.start[samples.sample].to(device)
        slots.state = self.attack.init(replace(self._problem(slots, judge), start=start))
        return slots

    def _ended(self, slots: Slots) -> Tensor:
        """Samples with which the attack itself is through, (B,) on the CPU."""
        done = self.attack.done(slots.state)
        ended = slots.k >= self.attack.iterations
        return ended if done is None else ended | done.cpu()

    def _over(self, slots: Slots) -> Tensor:
        """Samples without a further step: the attack is through, or the budget doesn't pay for another."""
        over = self._ended(slots)
        if time.perf_counter() > self._deadline:
            return torch.ones_like(slots.settled)
        if not self.budget.counts_passes:  # as usual: what a step costs doesn't matter
            return over.to(slots.settled.device)
        costs = self.attack.next_cost(slots.state, slots.k, self._probe.num_classes)
        forward, backward = (self._draws * each for each in costs)
        last = self._draws * self._must_look(slots)
        over |= ~self.budget.covers(slots.forward + forward + last, slots.backward + backward)
        return over.to(slots.settled.device)

    def _must_look(self, slots: Slots) -> Tensor:
        """1 where the present iterate has not been evaluated yet, (B,) int64 on the CPU, and 0 elsewhere."""
        return torch.zeros_like(slots.k) + (0 if slots.state is None else self.attack.unseen(slots.state))

    def _look_at_last(self, judge: Judge) -> None:
        """Evaluate the last iterates where no step did and the budget allows it."""
        slots = judge.slots
        look = ((self._must_look(slots) == 1) | (slots.k == 0)).to(slots.index.device)
        if time.perf_counter() > self._deadline:  # time is up, but everyone gets a clean prediction
            look &= slots.clean_prediction == UNRESOLVED
        owner = look.nonzero()[:, 0]
        owner = owner[judge.allow(owner, False)]
        if len(owner):
            judge.forward(self.attack.current(slots.state)[owner], owner if len(owner) < len(slots) else None)

    def _step(self, slots: Slots, judge: Judge) -> None:
        slots.state = self.attack.step(self._problem(slots, judge), slots.state)
        slots.k = slots.k + 1
        if self.attack.judge:
            judge.forward(self.attack.current(slots.state), None)
        if self.callback is not None:
            points = self.attack.current(slots.state)
            self.callback(self._record(slots, points))

    def _record(self, slots: Slots, points: Tensor) -> Record:
        best = slots.best
        away = -best.value if self.keep == "smallest" else torch.full_like(best.value, torch.inf)
        distance = torch.where(best.success, away, torch.full_like(away, torch.inf))
        return Record(slots.ids, slots.k, points, best.margin, best.success, slots.forward.clone(), distance)

    def _confirm(self, slots: Slots) -> Tensor:
        """Predict every success once more on the bare model. Which leave, (B,) bool: a refuted one goes on if it can."""
        best, rows = slots.best, torch.arange(len(slots), device=slots.index.device)
        if not bool(slots.region.contains(best.points).all()):
            raise SaddlepointError(f"{self.attack} returned points outside its threat set: please report this")
        if self._recorder.upheld is not None:
            return torch.ones_like(best.success)  # they were when they came
        rounds = _VOTES if self._probe.stochastic else 1
        votes, seen = self._vote(slots, best.points, rows, rounds)
        refuted = votes * 2 <= rounds
        if not bool(refuted.any()):
            return ~refuted
        self._unconfirmed += int(refuted.sum())
        margin = beyond_confidence(slots.aim, seen).double()
        worthless = torch.full_like(best.value, -torch.inf)
        told = replace(best, margin=margin, value=worthless, prediction=seen.argmax(1), success=~refuted)
        slots.best = select(refuted, told, best)
        slots.settled = slots.settled & ~refuted
        return ~refuted | self._over(slots) | self._recorder.decided(slots)

    def _upheld(self, slots: Slots, points: Tensor, owner: Tensor) -> Tensor:
        """Which claims at points (Q, ...) are no luck, (Q,) bool, before what was found gives way to them.

        No more draws are asked for than the answer needs.
        """
        agree = torch.zeros_like(owner)
        for drawn in range(_VOTES):
            open_ = ((agree < _OFTEN) & (drawn - agree <= _VOTES - _OFTEN)).nonzero()[:, 0]
            if not len(open_):
                break
            agree[open_] += self._vote(slots, points[open_], owner[open_], 1)[0]
        upheld = agree >= _OFTEN
        self._unconfirmed += int((~upheld).sum())
        return upheld

    def _vote(self, slots: Slots, points: Tensor, owner: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """How many of the bare model's predictions reach the goal at points (Q, ...), (Q,), and the mean logits (Q, C)."""
        judge, aim = self._judge(slots), take(slots.aim, owner)
        with full_precision(self.model.device.type):
            logits = torch.stack([judge.bare(points, owner) for _ in range(rounds)])
        self.model.queries.forward += rounds * len(points)
        slots.verify += rounds * torch.bincount(owner.cpu(), minlength=len(slots))
        return torch.stack([beyond_confidence(aim, each) > 0 for each in logits]).sum(0), logits.mean(0)

    def _leave(self, slots: Slots) -> AttackResult:
        best = slots.best
        if len(slots):
            cut = ~(best.success | slots.wrong | slots.broken | slots.blind).cpu() & ~self._ended(slots)
            self._cut += slots.k[cut].tolist()
        code = torch.full_like(slots.labels, STATUSES.index(Status.SURVIVED))
        code[slots.broken | slots.blind] = STATUSES.index(Status.ERROR)
        code[best.success] = STATUSES.index(Status.FOOLED)
        predicted = best.prediction.masked_fill(slots.broken & ~best.success, NO_CLASS)
        code[slots.wrong] = STATUSES.index(Status.ALREADY_WRONG)
        points = torch.where(slots.wrong.view(-1, *([1] * (best.points.dim() - 1))), slots.region.origin, best.points)
        away = slots.region.distance(points)
        if self.threat.minimizes:
            away = torch.where(best.success | slots.wrong, away, torch.full_like(away, torch.inf))
        out = self._output_device
        columns = {
            "adversarial": points, "codes": code.to(torch.int8), "labels": slots.labels, "targets": slots.targets,
            "clean_predicted": slots.clean_prediction,
            "predicted": torch.where(slots.wrong, slots.clean_prediction, predicted),
            "margin": best.margin, "distance": away, "iterations": slots.k, "zero_gradients": slots.zero_gradients,
            "ids": slots.ids, "index": slots.sample, "order": slots.index,
        }  # fmt: skip
        return AttackResult(
            **{name: value.to(out) for name, value in columns.items()},
            distances={name: value.to(out) for name, value in measure(points, slots.region.origin).items()},
            queries=Queries(slots.forward.to(out), slots.backward.to(out), slots.verify.to(out)),
            seconds=0.0, tau=self._recorder.tau, notes=(), config=self._config,
        )  # fmt: skip

    def _assemble(self, parts: list[AttackResult], like: Tensor, spent: int, started: float) -> AttackResult:
        whole = merge(parts or [self._nothing(like)])
        notes = list(whole.notes) + list(self._probe.notes)
        if self._chunk.halvings:
            notes.append(f"memory ran out: the model's batch was halved {self._chunk.halvings} times, to {self._chunk.rows}")
        if self._unconfirmed:
            notes.append(f"{self._unconfirmed} claims of success were refuted by re-prediction on the bare model")
        if self._cut:
            made = sum(self._cut) / len(self._cut)
            notes.append(
                f"the budget ended the attack on {len(self._cut)} survivors after {made:.1f} of {self.attack.iterations} steps "
                "on average; they count as survivors all the same"
                if made
                else f"the budget does not pay for one step of the attack on {len(self._cut)} samples; they count as survivors"
            )
        if oversized := self.threat.oversized(self.model.bounds):
            notes.append(oversized)
        vanished = int((whole.zero_gradients > 0).sum())
        if vanished:
            notes.append(
                f"the gradient was exactly zero at least once for {vanished} samples: is it masked, or the softmax saturated? "
                'Try loss="margin"'
            )
        if bool(whole.having(Status.ERROR).any()):
            notes.append(f"NaN or infinite values came up for {int(whole.having(Status.ERROR).sum())} samples (status error)")
        queries = replace(whole.queries, probe=whole.queries.probe + spent)
        seconds = whole.seconds + time.perf_counter() - started
        tau = self._recorder.tau
        return replace(whole, notes=tuple(dict.fromkeys(notes)), queries=queries, seconds=seconds, tau=tau)

    def _nothing(self, like: Tensor) -> AttackResult:
        """The result for no samples at all."""
        self._output_device = like.device
        x, none = like[:0], torch.zeros(0, dtype=torch.int64)
        region = self.threat.around(x, self.model.bounds, none)
        aim = bind(self.goal, none, none, self._probe.num_classes, self.model.rejects)
        return self._leave(Slots.enter(none, none, none, none, none, region, aim, Keys.of(self.seed, none), state=None))


def _known(setting: Any) -> Any:  # Any: JSON
    """The setting without the number of classes, which is not known before the first prediction."""
    return {k: v for k, v in setting.items() if k != "num_classes"} if isinstance(setting, dict) else setting


def configuration(
    model: Classifier, attack: Attack, threat: Threat, goal: Goal, *, keep: Keep, seed: int, budget: Budget
) -> dict[str, Any]:
    """What a run was, as JSON values."""
    limits = {name: getattr(budget, name) for name in ("passes", "queries", "seconds")}
    config = {
        "attack": attack.settings(), "threat": threat.settings(), "goal": goal.settings(), "keep": keep, "seed": seed,
        "budget": limits, "model": model.describe(), "access": attack.declaration.access.name.lower(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain
