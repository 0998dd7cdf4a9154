"""The one training loop: batches, learning rates, averages of weights, and checkpoints with exact resume.

What is trained, and on what loss, is the caller's: `fit` takes a function, `saddlepoint.defenses.train` an objective.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saddlepoint.defenses.distributed import processes
from saddlepoint.engine.source import fingerprint
from saddlepoint.errors import DataError, InputError, ModelError, UnknownNameError
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.progress import bar

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LearningRateSchedule = Literal["constant", "linear", "cosine", "cyclic"]
Average = Literal["ema", "swa"]
Precision = Literal["float32", "bfloat16"]
_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class EpochRecord:
    """How an epoch went: mean loss, accuracies on the validation samples (None if there are none), its learning rate."""

    epoch: int
    loss: float
    clean_accuracy: float | None
    robust_accuracy: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A finished (or, after Ctrl-C, unfinished) run of the loop; the network itself was trained in place."""

    epochs: tuple[EpochRecord, ...]
    complete: bool
    config: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One batch of the data; where several processes train, this one's share of it.

    tensors: the rows (B, ...) of each of the data's tensors, on the network's device. ids: their positions in the data (B,).
    seed: another one each epoch. progress: epochs done, with fraction. memory: what must outlive the batch, tensors and
    numbers by name; it is part of the checkpoint.
    """

    tensors: tuple[Tensor, ...]
    ids: Tensor
    seed: int
    progress: float
    memory: dict[str, Any] = field(default_factory=dict)  # Any: tensors, numbers, and dicts of them


class Work:
    """What a loop works at: a loss, and what else happens around a step, by default nothing.

    replays: how many steps are made with each batch.
    """

    replays: int = 1

    def __init__(self, loss: Callable[[Sample], Tensor]) -> None:
        self.loss = loss

    def prepare(self, sample: Sample) -> Sample:
        """What the steps with a batch are made with, such as its augmented inputs."""
        return sample

    def after_backward(self, sample: Sample) -> None:
        """The gradients are there; or there was an error, or only the forward pass was wanted, and there are none."""

    def after_step(self, sample: Sample) -> None:
        """The optimiser has moved the weights."""

    def after_epoch(self, epoch: int, memory: dict[str, Any]) -> bool:
        """An epoch is over; `memory` is that of the samples. Whether to stop."""
        return False

    def validate(self) -> tuple[float | None, float | None]:
        """Clean and robust accuracy on held-out samples."""
        return None, None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and in which steps; see `fit` and `train` for what each field is."""

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: OptimizerFactory | None = None
    schedule: LearningRateSchedule = "constant"
    average: Average | None = None
    decay: float = 0.999
    average_from: float = 0.75
    precision: Precision | None = None
    channels_last: bool | None = None
    patience: int | None = None
    restore_best: bool = False
    checkpoint: Path | None = None
    seed: int = 0
    progress: bool = False
    on_epoch: Callable[[EpochRecord], None] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive; got {self.learning_rate}")
        for name, allowed in (("schedule", LearningRateSchedule), ("average", Average), ("precision", Precision)):
            if (value := getattr(self, name)) is not None and value not in get_args(allowed):
                raise UnknownNameError(name, str(value), get_args(allowed))
        if not 0 <= self.decay < 1:
            raise InputError(f"decay must lie in [0, 1); got {self.decay}")
        if not 0 <= self.average_from < 1:
            raise InputError(f"average_from is a share of the epochs in [0, 1); got {self.average_from}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1 epoch; got {self.patience}")

    def factor(self, done: float) -> float:
        """The schedule's factor for the learning rate when this share of the run is done."""
        match self.schedule:
            case "linear":
                return 1 - done
            case "cosine":
                return (1 + math.cos(math.pi * done)) / 2
            case "cyclic":
                return max(done / 0.4, 1e-3) if done < 0.4 else (1 - done) / 0.6
            case _:
                return 1.0


def fit(
    net: nn.Module,
    data: tuple[Tensor, ...],
    loss: Callable[[Sample], Tensor],
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: OptimizerFactory | None = None,
    schedule: LearningRateSchedule = "constant",
    average: Average | None = None,
    decay: float = 0.999,
    average_from: float = 0.75,
    precision: Precision | None = None,
    channels_last: bool | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    name: str = "training",
    settings: Mapping[str, object] | None = None,
) -> Fit:
    """Train anything in place: minimise the mean of `loss` over batches of `data`.

    net: whose parameters that require gradients are trained; in train mode during the run, in eval mode afterwards.
    data: tensors with the samples as rows, (N, ...) each. loss: from a `Sample` to a scalar; it may draw from torch's global
    random numbers, which are seeded by `seed`, kept in checkpoints, and restored when the run is over.
    optimizer: from parameters, default Adam with `learning_rate`. schedule: of the learning rate, "constant", "linear" or
    "cosine" decay to 0, or "cyclic" (up for 40% of the run, then down; Wong et al. 2020, arXiv:2001.03994).
    average: what is left in the network at the end. None: the last weights. "ema": their exponential mean over the steps,
    m <- decay m + (1 - decay) w. "swa": the mean of the weights after each epoch from the share `average_from` of the epochs
    on, with normalisation statistics taken anew by one more pass over the data (Izmailov et al. 2018, arXiv:1803.05407).
    precision: "float32", or "bfloat16" for mixed precision; channels_last: memory format of images and their weights. None:
    bfloat16 and channels last on GPUs, neither on CPUs.
    checkpoint: file that is written every minute and after each epoch; if it exists, training goes on from there, to exactly
    the weights that an uninterrupted run gives. name: for the progress bar. settings: what defines the loss, ready for JSON;
    it is part of `config`, by which a checkpoint of another run is refused.

    Ctrl-C returns what was trained so far (`complete` False). Errors: `InputError`; `ModelError` when the loss becomes NaN;
    `DataError` for a checkpoint of another run or a damaged one.

    >>> import torch
    >>> net, x = torch.nn.Linear(4, 4), torch.rand(64, 4)
    >>> def reconstruction(sample):
    ...     (x,) = sample.tensors
    ...     return (net(x + 0.1 * torch.randn_like(x)) - x).square().mean()
    >>> len(fit(net, (x,), reconstruction, epochs=2).epochs)
    2
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"fit trains an nn.Module; got {type(net).__name__}")
    if not isinstance(data, tuple) or not data or not all(isinstance(column, Tensor) and column.dim() for column in data):
        raise InputError("data must be a tuple of tensors with the samples as rows, such as (x,) or (x, y)")
    if len({len(column) for column in data}) != 1 or not len(data[0]):
        raise InputError(f"data must have the same number of rows in each tensor; got {[len(column) for column in data]}")
    plan = Plan(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule,
        average=average, decay=decay, average_from=average_from, precision=precision, channels_last=channels_last,
        checkpoint=Path(checkpoint) if checkpoint is not None else None, seed=seed, progress=progress, on_epoch=on_epoch,
    )  # fmt: skip
    return Loop(net, data, Work(loss), plan, name, dict(settings or {})).run()


@dataclass
class _Progress:
    """Where the loop stands; with weights, optimiser and random state, all that a checkpoint needs."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    stopped: bool = False
    history: list[EpochRecord] = field(default_factory=list)
    best_score: float = -math.inf
    best_epoch: int = -1
    best_weights: dict[str, Tensor] | None = None
    mean_weights: dict[str, Tensor] | None = None
    mean_count: int = 0
    memory: dict[str, Any] = field(default_factory=dict)  # Any: see Sample


class Loop:
    """One run. net: what is trained. settings: what defines the work, ready for JSON."""

    def __init__(
        self, net: nn.Module, data: tuple[Tensor, ...], work: Work, plan: Plan, name: str, settings: dict[str, object]
    ) -> None:
        self.net, self.data, self.work, self.plan, self.name, self.settings = net, data, work, plan, name, settings
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the network has no parameters that require gradients: there is nothing to train")
        self.device = parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.precision: Precision = plan.precision or ("bfloat16" if on_gpu else "float32")
        volumes = any(p.dim() == 5 for p in net.parameters())
        self.channels_last = plan.channels_last if plan.channels_last is not None else on_gpu and not volumes
        if self.channels_last and volumes:
            raise InputError("channels_last is for images; this network has three-dimensional convolutions")
        if self.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        if plan.optimizer is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=plan.learning_rate)
        else:
            self.optimizer = plan.optimizer(parameters)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.batches = math.ceil(len(data[0]) / plan.batch_size)
        self.parameters = parameters
        self.processes = processes(self.device)
        self.at = _Progress()

    @property
    def config(self) -> dict[str, Any]:
        """What the run is, as JSON values; a checkpoint of another run is refused by it."""
        plan = self.plan
        optimizer = {k: v for k, v in self.optimizer.state_dict()["param_groups"][0].items() if k != "params"}
        optimizer["lr"] = self.base_rates[0]
        mean = {"ema": plan.decay, "swa": plan.average_from, None: None}[plan.average]
        config = {
            **self.settings, "parameters": sum(p.numel() for p in self.net.parameters()),
            "data": [fingerprint(column, None) for column in self.data], "epochs": plan.epochs,
            "batch_size": plan.batch_size, "optimizer": {"name": type(self.optimizer).__name__, **optimizer},
            "schedule": plan.schedule, "average": [plan.average, mean], "precision": self.precision,
            "patience": plan.patience, "restore_best": plan.restore_best, "seed": plan.seed,
        }  # fmt: skip
        if self.processes.count > 1:
            config["processes"] = self.processes.count
        plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
        return plain

    def run(self) -> Fit:
        """Train to the end, or to Ctrl-C."""
        config = self.config  # before training: the optimiser's settings change with the schedule
        complete, plan, main = True, self.plan, self.processes.main
        with global_random_state_kept(), bar(self.name, plan.epochs * self.batches, show=plan.progress and main) as report:
            torch.manual_seed(plan.seed + (self.processes.rank << 32))  # for dropout and augmentation of this share
            self._resume(config)
            self._agree({**config, "place in the checkpoint": (self.at.epoch, self.at.batch)})
            self._take_main_weights()
            self._last_saved = time.monotonic()
            try:
                while self.at.epoch < plan.epochs and not self.at.stopped and not self._out_of_patience():
                    self._epoch(config, report)
            except KeyboardInterrupt:
                if (
                    self.processes.count > 1
                ):  # the others wait for this one, which can't say where they are: the launcher ends all
                    raise
                complete = False
            try:
                self._load_result()
            finally:
                self.net.eval()
                self.net.zero_grad(set_to_none=True)
        return Fit(tuple(self.at.history), complete, config)

    def _epoch(self, config: dict[str, Any], report: Callable[[int], None]) -> None:
        at = self.at
        started = time.monotonic() - at.seconds
        self.net.train()
        parts = self._parts()
        for number in range(at.batch, len(parts)):
            at.loss_sum += self._batch(number, parts[number]) * len(parts[number])
            at.batch = number + 1
            at.seconds = time.monotonic() - started
            report(at.epoch * self.batches + at.batch)
            last = number + 1 == len(parts)  # what follows an epoch is part of it
            if (
                not last
                and self.plan.checkpoint is not None
                and self._said(time.monotonic() - self._last_saved > _CHECKPOINT_SECONDS)
            ):
                self._save(config)
        at.stopped = self._said(self.work.after_epoch(at.epoch, at.memory))
        if self.plan.average == "swa" and at.epoch + 1 > self.plan.average_from * self.plan.epochs:
            self._add_to_mean(1 / (at.mean_count + 1))
        record = EpochRecord(
            at.epoch, at.loss_sum / len(self.data[0]), *self._validate(),
            self.base_rates[0] * self._factor(self.batches - 1), time.monotonic() - started,
        )  # fmt: skip
        at.history.append(record)
        at.epoch, at.batch, at.loss_sum, at.seconds = at.epoch + 1, 0, 0.0, 0.0
        if self.plan.checkpoint is not None:
            self._save(config)
        if self.plan.on_epoch is not None and self.processes.main:
            self.plan.on_epoch(record)

    def _parts(self) -> tuple[Tensor, ...]:
        """The batches of this epoch, as positions in the data."""
        order = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(self._epoch_seed()))
        return torch.split(order, self.plan.batch_size)

    def _batch(self, number: int, index: Tensor) -> float:
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * self._factor(number)
        values = []
        share = self.processes.share(index)
        prepared = self._sample(number, share)
        for replay in range(self.work.replays):
            progress = prepared.progress + replay / self.work.replays / self.batches
            sample = replace(prepared, progress=progress)
            try:
                loss = self._loss(sample)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise InputError(
                        f"{self.name}: the loss must be one number that the parameters' gradients come from, such as that of "
                        f"model.forward(x), not of model.logits(x) or of what was detached; got {found}"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                values.append(self._averaged_over_processes(loss.detach(), len(share)))
                if not math.isfinite(values[-1]):
                    where = f"epoch {self.at.epoch}, batch {number}"
                    raise ModelError(f"the training loss is {values[-1]} in {where}: try a smaller learning rate")
            finally:
                self.work.after_backward(sample)
            self.optimizer.step()
            self.work.after_step(sample)
            if self.plan.average == "ema":
                self._add_to_mean(1 - self.plan.decay)
        return sum(values) / len(values)

    def _averaged_over_processes(self, loss: Tensor, size: int) -> float:
        """The loss of the whole batch, of which `size` samples were this process's; gradients become its gradients.

        The running statistics of normalisation layers are averaged too: they are the same network's in every process.
        """
        if self.processes.count == 1:
            return float(loss)
        norms = [module for module in self.net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
        found = loss.new_tensor([p.grad is not None for p in self.parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        mean, found, *means = self.processes.mean([loss, found, *gradients, *statistics], size)
        for p, gradient, somewhere in zip(self.parameters, means, found, strict=False):
            p.grad = gradient if somewhere else None
        for own, average in zip(statistics, means[len(gradients) :], strict=True):
            own.copy_(average)
        return float(mean)

    def _said(self, answer: bool) -> bool:
        """The main process's answer to what all must do alike."""
        return bool(self.processes.from_main(torch.tensor(answer, device=self.device)))

    def _agree(self, config: dict[str, Any]) -> None:
        """`InputError` unless all processes were asked for the same run."""
        for other in self.processes.gather(config):
            differing = [key for key in config if other.get(key) != config[key]]
            if differing:
                hint = (
                    ". Give each process all the data: it takes its share of each batch by itself"
                    if "data" in differing
                    else ""
                )
                raise InputError(f"the processes were asked for different runs; they differ in: {', '.join(differing)}{hint}")

    def _take_main_weights(self) -> None:
        """The network's state is the main process's, wherever the others began or what they drew."""
        if self.processes.count > 1:
            for value in self.net.state_dict().values():
                value.copy_(self.processes.from_main(value))

    def _sample(self, number: int, index: Tensor) -> Sample:
        tensors = tuple(column[index.to(column.device)].to(self.device) for column in self.data)
        if self.channels_last:
            tensors = tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
        progress = self.at.epoch + number / self.batches
        return self.work.prepare(Sample(tensors, index.to(self.device), self._epoch_seed(), progress, self.at.memory))

    def _loss(self, sample: Sample) -> Tensor:
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()
        with mixed:
            return self.work.loss(sample)

    def _epoch_seed(self) -> int:
        return self.plan.seed * 1_000_003 + self.at.epoch

    def _factor(self, batch: int) -> float:
        return self.plan.factor((self.at.epoch * self.batches + batch) / (self.plan.epochs * self.batches))

    def _add_to_mean(self, share: float) -> None:
        """m <- m + share (w - m) for what is a floating number, and the newest value of the rest."""
        at, weights = self.at, self.net.state_dict()
        at.mean_count += 1
        if at.mean_weights is None:
            at.mean_weights = {name: value.detach().clone() for name, value in weights.items()}
            return
        for name, value in weights.items():
            mean = at.mean_weights[name]
            mean.lerp_(value.detach(), share) if mean.is_floating_point() else mean.copy_(value)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with the weights that it would be handed back with; afterwards those of the training again."""
        if self.at.mean_weights is None:
            yield
            return
        own = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self._load_mean()
        try:
            yield
        finally:
            self.net.load_state_dict(own)

    def _load_mean(self) -> None:
        assert self.at.mean_weights is not None
        self.net.load_state_dict(self.at.mean_weights)
        norms = [module for module in self.net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if self.plan.average == "swa" and norms:
            self._normalise_anew(norms)

    def _normalise_anew(self, norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
        """Statistics of the averaged weights, which no training step has seen: the plain mean over the batches."""
        momenta, modes = [norm.momentum for norm in norms], {module: module.training for module in self.net.modules()}
        memory = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.at.memory.items()}
        self.net.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the plain mean
        try:
            with global_random_state_kept():
                for number, index in enumerate(self._parts()):
                    sample = self._sample(number, index)
                    try:
                        self._loss(sample)
                    finally:
                        self.work.after_backward(sample)
            self._take_main_weights()
        finally:
            self.at.memory = memory
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for module, mode in modes.items():
                module.training = mode

    def _validate(self) -> tuple[float | None, float | None]:
        """The accuracies of what would be handed back; the best so far is kept where that was asked for."""
        at = self.at
        with self._averaged():
            clean, robust = self.work.validate()
            score = robust if robust is not None else clean
            if self.plan.restore_best and score is not None and score > at.best_score:
                at.best_score, at.best_epoch = score, at.epoch
                at.best_weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        return clean, robust

    def _load_result(self) -> None:
        if self.plan.restore_best and self.at.best_weights is not None:
            self.net.load_state_dict(self.at.best_weights)
        elif self.at.mean_weights is not None:
            self._load_mean()

    def _out_of_patience(self) -> bool:
        at, patience = self.at, self.plan.patience
        return patience is not None and bool(at.history) and at.epoch - 1 - at.best_epoch >= patience

    def _save(self, config: dict[str, Any]) -> None:
        path = self.plan.checkpoint
        assert path is not None
        own = {
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "memory": self.at.memory,
        }
        others = self._gathered(own)[1:]
        if not self.processes.main:
            return
        document = {
            "config": config,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": own["random"],
            "random_gpu": own["random_gpu"],
            "progress": {**vars(self.at), "history": [asdict(record) for record in self.at.history]},
            "others": others,
        }
        draft = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(document, draft)
            os.replace(draft, path)
        except BaseException as error:  # Ctrl-C too must leave no half a file
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError | RuntimeError):  # the latter is torch's word for a full disk
                raise DataError(f"cannot write the checkpoint {path}: {error}") from error
            raise
        self._last_saved = time.monotonic()

    def _gathered(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What differs between the processes, of each of them; the others' as it is loaded from a file."""
        if self.processes.count == 1:
            return [own]
        file = io.BytesIO()
        torch.save(own, file)
        return [torch.load(io.BytesIO(each), "cpu", weights_only=True) for each in self.processes.gather(file.getvalue())]

    def _resume(self, config: dict[str, Any]) -> None:
        path = self.plan.checkpoint
        if path is None or not path.exists():
            return
        try:
            found = torch.load(path, map_location=self.device, weights_only=True)
            differing = [key for key in {**config, **found["config"]} if found["config"].get(key) != config.get(key)]
            if differing:
                raise DataError(
                    f"the checkpoint {path} belongs to another run, which differs in: {', '.join(differing)}. "
                    "Remove it to start anew"
                )
            state = found["progress"]
            state["history"] = [EpochRecord(**record) for record in state["history"]]
            self.at = _Progress(**state)
            self.net.load_state_dict(found["net"])
            self.optimizer.load_state_dict(found["optimizer"])
            if not self.processes.main:
                found |= found["others"][self.processes.rank - 1]
                self.at.memory = found["memory"]
            torch.set_rng_state(found["random"].cpu())
            if found["random_gpu"] is not None:
                torch.cuda.set_rng_state(found["random_gpu"].cpu(), self.device)
        except DataError:
            raise
        except Exception as error:  # on damaged bytes torch raises a dozen kinds
            raise DataError(f"the checkpoint {path} is damaged or none of Saddlepoint's: {error}") from error
