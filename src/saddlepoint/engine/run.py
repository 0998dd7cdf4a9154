"""The loop: continuous batching, stopping, budgets, verification of every claim."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.engine.attack import Attack
from saddlepoint.engine.budget import Budget
from saddlepoint.engine.judge import ChunkSize, Judge
from saddlepoint.engine.problem import Problem
from saddlepoint.engine.result import STATUSES, AttackResult, Queries, measure, merge
from saddlepoint.engine.slots import Keep, Recorder, Slots, beyond_confidence
from saddlepoint.engine.source import Source
from saddlepoint.errors import SaddlepointError
from saddlepoint.goals import UNRESOLVED, Goal
from saddlepoint.models.base import Classifier, Probe
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Status
from saddlepoint.threats import Threat
from saddlepoint.trees import join, take

_VOTES = 11  # fresh draws by which a success against a random model is confirmed
_SLOT_BYTES = {"cpu": 2**25, "cuda": 2**30}  # inputs under attack at once, unless the caller says how many


@dataclass(frozen=True)
class Record:
    """One step of the samples under attack, for callbacks: all (B, ...)."""

    ids: Tensor
    iteration: Tensor
    points: Tensor
    best_margin: Tensor
    success: Tensor


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
    config: dict[str, Any]

    def __call__(self, source: Source, resume: AttackResult | None) -> AttackResult:
        """Attack everything that `source` yields. Errors: `Interrupted` on Ctrl-C."""
        started = time.perf_counter()
        before = self.model.queries.forward
        first = source.first()
        # an empty input still has a result; nothing can be asked of the model then
        probe = self.model.probe(first) if len(first) else Probe(0.0, self.model.num_classes or 2, False, (), 0)
        spent = self.model.queries.forward - before
        self._deadline = started + self.budget.seconds if self.budget.seconds is not None else float("inf")
        self._recorder = Recorder(self.keep, probe.tau)
        self._draws = self.model.draws if probe.stochastic else 1
        self._classes = probe.num_classes
        self._stochastic = probe.stochastic
        self._unconfirmed = 0
        capacity = self.batch_size or self._automatic(first)
        self._chunk = ChunkSize(capacity)
        parts = [resume] if resume is not None else []
        with self._progress(source) as report, self.model.frozen():
            if probe.stochastic:
                torch.manual_seed(self.seed)
            try:
                for part in self._finished(source, capacity):
                    parts.append(part)
                    report(part)
            except KeyboardInterrupt:
                raise Interrupted(self._assemble(parts, first, probe, spent, started)) from None
        return self._assemble(parts, first, probe, spent, started)

    def _finished(self, source: Source, capacity: int) -> Iterator[AttackResult]:
        """Results of samples as they finish: waiting ones take the place of those that leave."""
        slots: Slots | None = None
        while True:
            free = capacity - (len(slots) if slots is not None else 0)
            if free == capacity or free * 8 >= capacity:
                new = self._admit(source, free)
                slots = new if slots is None else slots if new is None else join(slots, new)
            if slots is None:
                return
            judge = self._judge(slots)
            decided = self._recorder.decided(slots)
            over = self._over(slots).to(decided.device)
            if bool(over.any()):
                self._look_at_last(judge, over & ~decided)
                decided = self._recorder.decided(slots)
            leaving = decided | over
            if bool(leaving.any()):
                leaving = self._confirm(slots, leaving, over)
                if bool(leaving.any()):
                    yield self._leave(take(slots, leaving.nonzero()[:, 0]))
                    staying = (~leaving).nonzero()[:, 0]
                    slots = take(slots, staying) if len(staying) else None
                continue
            self._step(slots, judge)

    def _judge(self, slots: Slots) -> Judge:
        return Judge(self.model, slots, self._recorder, self.budget, self._chunk, draws=self._draws)

    def _problem(self, slots: Slots, judge: Judge) -> Problem:
        return Problem(slots.region, slots.labels, slots.k, slots.keys, judge)

    def _automatic(self, x: Tensor) -> int:
        bytes_each = max(1, x[:1].numel() * x.element_size())
        return max(16, min(1024, _SLOT_BYTES.get(self.model.device.type, 2**28) // bytes_each))

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
        targets = torch.where(targets == UNRESOLVED, self.goal.targets(labels, self._classes, keys.absorb(-1)), targets)
        aim = self.goal.aim(labels, targets, self._classes)
        slots = Slots.enter(
            samples.index.to(device), sample, samples.ids.to(device), labels, targets, region, aim, keys, state=None
        )
        judge = self._judge(slots)
        if not self.attack.starts_at_origin:
            judge.forward(region.origin, None)
        slots.state = self.attack.init(self._problem(slots, judge))
        return slots

    def _over(self, slots: Slots) -> Tensor:
        """Samples without a further step: the attack's iterations are done, or the budget doesn't pay for another."""
        over = slots.k >= self.attack.iterations
        if time.perf_counter() > self._deadline:
            return torch.ones_like(over)
        forward, backward = (self._draws * passes for passes in self.attack.cost)
        last = self._draws * self._must_look(slots.k + 1)
        if self.budget.passes is not None:
            over |= slots.forward + slots.backward + forward + backward + last > self.budget.passes
        if self.budget.queries is not None:
            over |= slots.forward + forward + last > self.budget.queries
        return over

    def _must_look(self, k: Tensor) -> Tensor:
        """Whether the iterate after k steps has not been evaluated yet, (B,)."""
        return torch.zeros_like(k) if self.attack.judge else torch.ones_like(k)

    def _look_at_last(self, judge: Judge, rows: Tensor) -> None:
        """Evaluate the last iterates of these rows (B,) where no step did and the budget allows it."""
        slots = judge.slots
        look = rows & ((self._must_look(slots.k) == 1) | (slots.k == 0)).to(rows.device)
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
            self.callback(Record(slots.ids, slots.k, points, slots.best.margin, slots.best.success))

    def _confirm(self, slots: Slots, leaving: Tensor, over: Tensor) -> Tensor:
        """Predict every success once more on the bare model. A refuted one goes on if it has steps left."""
        rows = (leaving & slots.best.success).nonzero()[:, 0]
        if not len(rows):
            return leaving
        if not bool(take(slots.region, rows).contains(slots.best.points[rows]).all()):
            raise SaddlepointError(f"{self.attack} returned points outside its threat set: please report this")
        votes = torch.zeros(len(rows), device=rows.device)
        rounds = _VOTES if self._stochastic else 1
        aim = take(slots.aim, rows)
        for _ in range(rounds):
            with torch.no_grad(), _full_precision(self.model.device.type):
                logits = torch.cat(
                    [self.model.forward(part) for part in torch.split(slots.best.points[rows], self._chunk.rows)]
                )
            votes += beyond_confidence(aim, logits) > 0
        self.model.queries.forward += rounds * len(rows)
        slots.verify[rows.cpu()] += rounds
        refuted = rows[votes * 2 <= rounds]
        if len(refuted):
            self._unconfirmed += len(refuted)
            success, value = slots.best.success.clone(), slots.best.value.clone()
            success[refuted], value[refuted] = False, -torch.inf
            slots.best = type(slots.best)(slots.best.points, slots.best.margin, value, slots.best.prediction, success)
            leaving = leaving & ~(torch.isin(torch.arange(len(slots), device=rows.device), refuted) & ~over)
        return leaving

    def _leave(self, slots: Slots) -> AttackResult:
        best = slots.best
        code = torch.full_like(slots.labels, STATUSES.index(Status.SURVIVED))
        code[slots.broken] = STATUSES.index(Status.ERROR)
        code[best.success] = STATUSES.index(Status.FOOLED)
        code[slots.wrong] = STATUSES.index(Status.ALREADY_WRONG)
        points = torch.where(slots.wrong.view(-1, *([1] * (best.points.dim() - 1))), slots.region.origin, best.points)
        away = slots.region.distance(points)
        if self.threat.minimizes:
            away = torch.where(best.success | slots.wrong, away, torch.full_like(away, torch.inf))
        out = self._output_device
        columns = {
            "adversarial": points, "codes": code.to(torch.int8), "labels": slots.labels, "targets": slots.targets,
            "clean_predicted": slots.clean_prediction,
            "predicted": torch.where(slots.wrong, slots.clean_prediction, best.prediction),
            "margin": best.margin, "distance": away, "iterations": slots.k, "zero_gradients": slots.zero_gradients,
            "ids": slots.ids, "index": slots.sample, "order": slots.index,
        }  # fmt: skip
        return AttackResult(
            **{name: value.to(out) for name, value in columns.items()},
            distances={name: value.to(out) for name, value in measure(points, slots.region.origin).items()},
            queries=Queries(slots.forward.to(out), slots.backward.to(out), slots.verify.to(out)),
            seconds=0.0, tau=self._recorder.tau, notes=(), config=self.config,
        )  # fmt: skip

    def _assemble(self, parts: list[AttackResult], like: Tensor, probe: Probe, spent: int, started: float) -> AttackResult:
        parts = parts or [self._nothing(like)]
        whole = merge(parts)
        notes = list(whole.notes) + list(probe.notes)
        if self._chunk.halvings:
            notes.append(f"memory ran out: the model's batch was halved {self._chunk.halvings} times, to {self._chunk.rows}")
        if self._unconfirmed:
            notes.append(f"{self._unconfirmed} successes were refuted by re-prediction on the bare model and not counted")
        vanished = int((whole.zero_gradients > 0).sum())
        if vanished:
            notes.append(f"the gradient was exactly zero at least once for {vanished} samples: is it masked?")
        if bool(whole.having(Status.ERROR).any()):
            notes.append(f"NaN or infinite values came up for {int(whole.having(Status.ERROR).sum())} samples (status error)")
        queries = replace(whole.queries, probe=whole.queries.probe + spent)
        seconds = whole.seconds + time.perf_counter() - started
        return replace(whole, notes=tuple(dict.fromkeys(notes)), queries=queries, seconds=seconds)

    def _nothing(self, like: Tensor) -> AttackResult:
        """The result for no samples at all."""
        self._output_device = like.device
        x, none = like[:0], torch.zeros(0, dtype=torch.int64)
        region = self.threat.around(x, self.model.bounds, none)
        aim = self.goal.aim(none, none, self._classes)
        return self._leave(Slots.enter(none, none, none, none, none, region, aim, Keys.of(self.seed, none), state=None))

    @contextmanager
    def _progress(self, source: Source) -> Iterator[Callable[[AttackResult], None]]:
        if not self.progress:
            yield lambda part: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(type(self.attack).__name__, total=source.total)
            yield lambda part: bar.advance(task, len(part))


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Without autocast and TF32: the model as it is stored."""
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        if device != "cuda":
            yield
            return
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


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
