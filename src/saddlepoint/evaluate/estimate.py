"""What an evaluation will cost, before it begins: passes, seconds and memory."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saddlepoint.attacks import Finally, Fork, Restarts
from saddlepoint.attacks import Sequence as Chain
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine import Attack, Record
from saddlepoint.errors import InputError
from saddlepoint.evaluate.cascade import (
    PART,
    Effort,
    averaging,
    borrowing,
    escalation,
    evaluate,
    finishing,
    guided,
    nearest,
    no_gradients,
    plans,
    unbounded,
)
from saddlepoint.goals import Targeted
from saddlepoint.models.base import Classifier
from saddlepoint.models.torch_model import Model
from saddlepoint.taxonomy import Access
from saddlepoint.threats import Threat

_REPEATS, _ENOUGH = 3, 0.5  # the fastest of so many calls, or of fewer if so many seconds are over
_TIMED = 256  # rows at most
_NEVER = 1e9  # a margin that no sample reaches, so that none leaves before the step


@dataclass(frozen=True)
class Estimate:
    """Limits of what `evaluate` costs.

    samples: how many are to be evaluated. least, most: passes of a sample, forward and backward, as `Evaluation.queries`
    counts them. The first look at a sample is its clean prediction: what is wrong there costs the least. The most is paid where
    nothing falls, the gradients look masked, and every ladder is climbed to its end.
    seconds: (least, most) for all samples, from the time of a pass and of each attack's own arithmetic in a full batch; the
    smaller batches of later stages are less efficient, which shows with small networks.
    memory: bytes that a step of a batch takes at its peak, on top of what was there before. On CUDA what PyTorch allocates, on
    other devices what autograd keeps for the backward pass; None where there is none. kept: bytes of the inputs that the
    evaluation holds to its end, its own and those of the stages; Python and PyTorch may hold more. batch: samples under attack
    at once.

    Apart are `diagnose`, the confirmation of successes, the probe of the model, and the search by scores for samples whose
    gradients are NaN or infinite.
    """

    samples: int
    least: int
    most: int
    seconds: tuple[float, float]
    memory: int | None
    kept: int
    batch: int

    def summary(self) -> str:
        """In words."""
        memory = "not known without gradients" if self.memory is None else f"{_bytes(self.memory)} at its peak"
        passes = f"{self.least:,} to {self.most:,} (forward and backward; a diagnosis of the gradients is apart)"
        return (
            f"Estimate for {self.samples} samples\n"
            f"  passes a sample  {passes}\n"
            f"  time             {_time(self.seconds[0])} to {_time(self.seconds[1])} at the speed that was measured\n"
            f"  memory           {memory}, for a batch of {self.batch}; inputs that are kept: {_bytes(self.kept)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return asdict(self) | {"seconds": list(self.seconds)}


def estimate(
    model: Classifier,
    x: Tensor,
    threat: Threat,
    effort: Effort = "standard",
    *,
    curve: bool = False,
    sources: Sequence[Classifier] = (),
    batch_size: int | None = None,
) -> Estimate:
    """What `evaluate` with the same arguments will cost at least and at most; a step of its first attack is made to measure.

    x (N, ...): the samples. No classes are needed. The passes made here count in `model.queries`.

    Errors: those of `evaluate`.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> sp.estimate(model, torch.rand(20, 4), sp.Linf(0.1), "quick").least
    1
    """
    if not isinstance(threat, Threat) or not isinstance(x, Tensor):
        raise InputError(f"estimate needs samples as a tensor and one threat; got {type(x).__name__} and {threat!r}")
    # without samples it asks the model nothing, and refuses what can't be
    evaluate(model, x[:0], torch.zeros(0, dtype=torch.int64), threat, effort, curve=curve, sources=sources)
    model.check_inputs(x)
    x = x.detach()
    if not len(x):
        return Estimate(0, 0, 0, (0.0, 0.0), None, 0, 0)
    probe = model.probe(x)
    gradients = model.access >= Access.GRADIENTS and not no_gradients(model, x[:1])
    access = model.access if gradients else min(model.access, Access.SCORES)
    todo = [*plans(threat.norm, effort, access), *borrowing(model, sources, threat.norm)]
    if gradients:
        todo += [*finishing(threat.norm, effort), *escalation(threat.norm, effort)]
        todo += [plan for plan in guided(model, threat.norm, effort) if not unbounded(plan, x[:1])]
        if probe.stochastic and model.draws == 1:
            todo.append(averaging(model, threat.norm))
    attacks = [(plan.attack, plan.model or model, plan.queries) for plan in todo]
    if curve:
        attack, queries = nearest(threat.norm, model.access)
        attacks.append((attack, model, queries))
    first = torch.arange(min(len(x), PART))
    idle = Model(_Idle(probe.num_classes), bounds=model.bounds, device=model.device)
    told = model if access >= Access.SCORES else idle  # a goal that is never reached takes scores
    batch, _, memory = _steps(told, x[first], threat.only(first, x), todo[0].attack, batch_size, 1)
    forward_seconds, backward_seconds = _seconds(model, x[: min(batch, _TIMED)], gradients)
    some = first[:batch]
    forward = backward = int(gradients)  # a look at the gradient at the input
    beside = 0.0
    for attack, victim, queries in attacks:
        draws = victim.draws if probe.stochastic else 1
        ahead, back = (queries, 0) if queries else _most(attack, probe.num_classes)
        forward += draws * (ahead + (not attack.starts_at_origin))  # a clean prediction of its own
        backward += draws * back
        _, each, _ = _steps(idle, x[some], threat.only(some, x), attack, batch_size, _REPEATS)
        beside += (queries or attack.iterations) * each / len(some)
    least = model.draws if probe.stochastic else 1
    most_seconds = forward * forward_seconds + backward * backward_seconds + beside
    known = memory if gradients or model.device.type == "cuda" else None
    seconds = (len(x) * least * forward_seconds, len(x) * most_seconds)
    kept = x.nbytes * (1 + sum(1 if plan.share is None else plan.share for plan in todo) + curve)
    return Estimate(len(x), least, forward + backward, seconds, known, round(kept), batch)


class _Idle(nn.Module):
    """Takes hardly any time, so that the attacks' own arithmetic shows."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return 7 * (x.flatten(1)[:, :1] + 1) * torch.arange(self.classes, device=x.device, dtype=x.dtype)


def _most(attack: Attack, classes: int) -> tuple[int, int]:
    """Forward and backward passes of a sample that stands to the end; the clean prediction is apart."""
    match attack:
        case Restarts():
            forward, backward = _most(attack.attack, classes)
            return attack.times * forward, attack.times * backward
        case Chain() | Finally():
            return _sum(_most(one, classes) for one in attack.attacks)
        case Fork():
            first, *branches = (_most(one, classes) for one in attack.attacks)
            return _sum([first, (max(f for f, _ in branches), max(b for _, b in branches))])
    last = int(not attack.judge)  # the look at the last iterate
    if not attack.iterations:
        return last, 0
    (forward, backward), (more_forward, more_backward) = attack.opening(classes), attack.cost(classes)
    steps = attack.iterations - 1
    return forward + steps * more_forward + last, backward + steps * more_backward


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    first, second = zip(*pairs, strict=True)
    return sum(first), sum(second)


class _EnoughError(Exception):
    """Ends a run."""


def _steps(
    model: Classifier, x: Tensor, threat: Threat, attack: Attack, batch_size: int | None, count: int
) -> tuple[int, float, int]:
    """Let the engine take its first steps: samples that it attacks at once, seconds of a later step, bytes at the peak."""
    times: list[float] = []
    batch = min(batch_size or len(x), len(x))  # where there are no steps

    def stop(record: Record) -> None:
        nonlocal batch
        batch = len(record.ids)
        _wait(model.device)
        times.append(time.perf_counter())
        if len(times) >= count:
            raise _EnoughError

    labels, goal = torch.zeros(len(x), dtype=torch.int64), Targeted("least_likely", confidence=_NEVER)  # any labels do
    with _peak(model) as peak, suppress(_EnoughError):
        run_attack(model, x, labels, attack, threat, goal, batch_size=batch_size, callback=stop)
    return batch, (times[-1] - times[0]) / max(len(times) - 1, 1) if times else 0.0, peak()


@contextmanager
def _peak(model: Classifier) -> Iterator[Callable[[], int]]:
    """How many bytes were taken at most inside, on top of what was taken before."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    saved = _Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda kept: kept.tensor):
        yield lambda: saved.peak


@dataclass(eq=False)
class _Kept:
    """A tensor that autograd keeps for a backward pass, as long as it does."""

    tensor: Tensor


class _Saved:
    """Bytes of the tensors that autograd keeps, without the model's own; those that share memory count once."""

    def __init__(self, model: Classifier) -> None:
        tensors = [tensor for net in model.networks() for tensor in (*net.parameters(), *net.buffers())]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._users: Counter[int] = Counter()
        self.now = self.peak = 0

    def keep(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(kept, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return kept

    def _count(self, address: int, size: int, user: int) -> None:
        before = self._users[address]
        self._users[address] += user
        if not before or not self._users[address]:  # the first one, or the last
            self.now += user * size
            self.peak = max(self.peak, self.now)


def _seconds(model: Classifier, x: Tensor, gradients: bool) -> tuple[float, float]:
    """Of the forward and of the backward pass of a row, in a batch as large as fits."""
    x = x.to(model.device)
    try:
        forward = _fastest(lambda: model.predict(x, batch_size=len(x)), model.device)
        both = _fastest(lambda: no_gradients(model, x), model.device) if gradients else 0.0
    except torch.OutOfMemoryError:
        if len(x) == 1:
            raise
        return _seconds(model, x[: len(x) // 2], gradients)
    return forward / len(x), max(both - forward, 0.0) / len(x)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _ENOUGH:
        started = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _wait(device: torch.device) -> None:
    """For what was begun on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(seconds: float) -> str:
    """Seconds with two digits, in the unit that fits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
