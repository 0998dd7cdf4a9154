"""One training loop for every objective: schedule, validation, early stopping, checkpoints with exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.objectives import Batch, Objective, Standard
from saddlepoint.engine.source import check_labels, fingerprint
from saddlepoint.errors import DataError, InputError, ModelError
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.progress import bar

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LearningRateSchedule = Literal["constant", "linear", "cosine", "cyclic"]
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
class Training:
    """A finished (or, after Ctrl-C, unfinished) training. `model` holds the trained network, in eval mode."""

    model: Model
    epochs: tuple[EpochRecord, ...]
    complete: bool
    config: dict[str, Any]


@dataclass
class _Progress:
    """Where the loop stands; with weights, optimiser and random state, all that a checkpoint needs."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    best_score: float = -math.inf
    best_epoch: int = -1
    best_weights: dict[str, Tensor] | None = None


def train(
    net: nn.Module | Model,
    data: Labelled | tuple[Tensor, Tensor],
    *,
    adversary: Objective | None = None,
    validation: Labelled | tuple[Tensor, Tensor] | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: OptimizerFactory | None = None,
    schedule: LearningRateSchedule = "constant",
    patience: int | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    augment: Callable[[Tensor], Tensor] | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Training:
    """Train `net` in place, clean or against an adversary, and return it with the history.

    net: gives logits (N, C); a `Model` keeps its bounds and normalisation. data: x (N, ...) and classes y (N,).
    adversary: `Adversarial(attack=..., threat=...)` or another objective; None trains on clean inputs.
    validation: samples for the accuracies after each epoch; robust accuracy is under the adversary's own attack.
    optimizer: from parameters, default Adam with `learning_rate`. schedule: of the learning rate, "constant", "linear" or
    "cosine" decay to 0, or "cyclic" (up for 40% of the run, then down; Wong et al. 2020, arXiv:2001.03994).
    patience: stop when the robust (clean, without an adversary) validation accuracy has not risen for so many epochs, and
    restore the best weights. augment: changes a batch of inputs, drawing from torch's global random numbers.
    checkpoint: file that is written every minute and after each epoch; if it exists, training goes on from there, to
    exactly the weights that an uninterrupted run gives. seed: of order, attacks, augmentation and dropout; the global random
    state is restored.

    Ctrl-C returns what was trained so far (`complete` False). Errors: `InputError`; `ModelError` when the loss becomes NaN;
    `DataError` for a checkpoint of another run or a damaged one.

    >>> import saddlepoint as sp
    >>> digits, net = sp.data.load("digits"), sp.zoo.build("digits-cnn")
    >>> adversary = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.1))
    >>> len(sp.train(net, digits.train.take(256), adversary=adversary, epochs=1).epochs)
    1
    """
    model = net if isinstance(net, Model) else Model(net, bounds=bounds)
    if not isinstance(model.net, nn.Module):
        raise InputError("train needs a network with parameters, an nn.Module")
    if adversary is not None and not isinstance(adversary, Objective):
        raise InputError(f"adversary must be such as sp.Adversarial(attack=..., threat=...); got {adversary!r}")
    loop = _Loop(
        model, _pairs(data, model, "data"), adversary or Standard(),
        _pairs(validation, model, "validation") if validation is not None else None,
        epochs, batch_size, learning_rate, optimizer, schedule, patience, augment,
        Path(checkpoint) if checkpoint is not None else None, seed, progress, on_epoch,
    )  # fmt: skip
    return loop.run()


def _pairs(data: Labelled | tuple[Tensor, Tensor], model: Model, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(data, tuple):
        x, y = data
    elif hasattr(data, "x") and hasattr(data, "y"):
        x, y = data.x, data.y
    else:
        raise InputError(
            f"{name} must be (x, y) tensors or have x and y, such as a dataset's train part; got {type(data).__name__}. "
            "For your own loader, use sp.perturb in your own loop"
        )
    try:
        model.check_inputs(x)
        if not len(x):
            raise InputError("there are no samples")
        return x, check_labels(y, len(x), model.probe(x).num_classes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


@dataclass
class _Loop:
    model: Model
    data: tuple[Tensor, Tensor]
    objective: Objective
    validation: tuple[Tensor, Tensor] | None
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer_factory: OptimizerFactory | None
    schedule: LearningRateSchedule
    patience: int | None
    augment: Callable[[Tensor], Tensor] | None
    checkpoint: Path | None
    seed: int
    progress: bool
    on_epoch: Callable[[EpochRecord], None] | None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.schedule not in ("constant", "linear", "cosine", "cyclic"):
            raise InputError(f'schedule must be "constant", "linear", "cosine" or "cyclic"; got {self.schedule!r}')
        if self.patience is not None and (self.patience < 1 or self.validation is None):
            raise InputError("patience must be at least 1 epoch, and needs validation samples")
        assert isinstance(self.model.net, nn.Module)
        self.net = self.model.net
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the network has no parameters that require gradients: there is nothing to train")
        if self.optimizer_factory is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        else:
            self.optimizer = self.optimizer_factory(parameters)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.batches = math.ceil(len(self.data[0]) / self.batch_size)
        self.at = _Progress()

    @property
    def config(self) -> dict[str, Any]:
        """What the run is, as JSON values; a checkpoint of another run is refused by it."""
        optimizer = {k: v for k, v in self.optimizer.state_dict()["param_groups"][0].items() if k != "params"}
        optimizer["lr"] = self.base_rates[0]
        config = {
            "objective": self.objective.settings(), "data": fingerprint(*self.data), "epochs": self.epochs,
            "batch_size": self.batch_size, "optimizer": {"name": type(self.optimizer).__name__, **optimizer},
            "schedule": self.schedule, "patience": self.patience, "seed": self.seed, "model": self.model.describe(),
        }  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
        return plain

    def run(self) -> Training:
        config = self.config  # before training: the optimiser's settings change with the schedule
        complete = True
        name = f"training ({type(self.objective).__name__.lower()})"
        with global_random_state_kept(), bar(name, self.epochs * self.batches, show=self.progress) as report:
            torch.manual_seed(self.seed)
            self._resume(config)
            self._last_saved = time.monotonic()
            try:
                while self.at.epoch < self.epochs and not self._out_of_patience():
                    self._epoch(config, report)
            except KeyboardInterrupt:
                complete = False
            if self.patience is not None and self.at.best_weights is not None:
                self.net.load_state_dict(self.at.best_weights)
        self.net.eval()
        self.net.zero_grad(set_to_none=True)
        return Training(self.model, tuple(self.at.history), complete, config)

    def _epoch(self, config: dict[str, Any], report: Callable[[int], None]) -> None:
        started = time.monotonic() - self.at.seconds
        order = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(self._epoch_seed()))
        self.net.train()
        for number, index in enumerate(torch.split(order, self.batch_size)):
            if number < self.at.batch:
                continue  # done before the checkpoint
            self.at.loss_sum += self._batch(number, index) * len(index)
            self.at.batch = number + 1
            self.at.seconds = time.monotonic() - started
            report(self.at.epoch * self.batches + self.at.batch)
            if self.checkpoint is not None and time.monotonic() - self._last_saved > _CHECKPOINT_SECONDS:
                self._save(config)
        clean, robust = self._validate()
        record = EpochRecord(
            self.at.epoch, self.at.loss_sum / len(order), clean, robust,
            self.base_rates[0] * self._factor(self.batches - 1), time.monotonic() - started,
        )  # fmt: skip
        self._finish_epoch(record)
        if self.checkpoint is not None:
            self._save(config)
        if self.on_epoch is not None:
            self.on_epoch(record)

    def _batch(self, number: int, index: Tensor) -> float:
        device = self.model.device
        x, y = (column[index.to(column.device)].to(device) for column in self.data)
        if self.augment is not None:
            x = self.augment(x)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * self._factor(number)
        progress = self.at.epoch + number / self.batches
        loss = self.objective.loss(Batch(self.model, x, y, index.to(device), self._epoch_seed(), progress))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the training loss is {value} in epoch {self.at.epoch}, batch {number}: try a smaller learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        self.optimizer.step()
        return value

    def _epoch_seed(self) -> int:
        return self.seed * 1_000_003 + self.at.epoch

    def _factor(self, batch: int) -> float:
        """The schedule's factor for the learning rate."""
        done = (self.at.epoch * self.batches + batch) / (self.epochs * self.batches)
        match self.schedule:
            case "linear":
                return 1 - done
            case "cosine":
                return (1 + math.cos(math.pi * done)) / 2
            case "cyclic":
                return max(done / 0.4, 1e-3) if done < 0.4 else (1 - done) / 0.6
            case _:
                return 1.0

    def _validate(self) -> tuple[float | None, float | None]:
        if self.validation is None:
            return None, None
        x, y = self.validation
        clean = float((self.model.predict(x).to(y.device) == y).double().mean())
        if self.objective.adversary is None:
            return clean, None
        attack, threat = self.objective.adversary
        return clean, run_attack(self.model, x, y, attack, threat, seed=self.seed).robust_accuracy

    def _finish_epoch(self, record: EpochRecord) -> None:
        at = self.at
        at.history.append(record)
        score = record.robust_accuracy if record.robust_accuracy is not None else record.clean_accuracy
        if self.patience is not None and score is not None and score > at.best_score:
            at.best_score, at.best_epoch = score, record.epoch
            at.best_weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        at.epoch, at.batch, at.loss_sum, at.seconds = at.epoch + 1, 0, 0.0, 0.0

    def _out_of_patience(self) -> bool:
        return self.patience is not None and bool(self.at.history) and self.at.epoch - 1 - self.at.best_epoch >= self.patience

    def _save(self, config: dict[str, Any]) -> None:
        assert self.checkpoint is not None
        document = {
            "config": config,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "progress": {**vars(self.at), "history": [asdict(record) for record in self.at.history]},
        }
        draft = self.checkpoint.with_name(f".{self.checkpoint.name}.part")
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(document, draft)
            os.replace(draft, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            draft.unlink(missing_ok=True)
            raise DataError(f"cannot write the checkpoint {self.checkpoint}: {error}") from error
        self._last_saved = time.monotonic()

    def _resume(self, config: dict[str, Any]) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            found = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
            differing = [key for key in config if found["config"].get(key) != config[key]]
            if differing:
                raise DataError(
                    f"the checkpoint {self.checkpoint} belongs to another run, which differs in: {', '.join(differing)}. "
                    "Remove it to start anew"
                )
            state = found["progress"]
            state["history"] = [EpochRecord(**record) for record in state["history"]]
            self.at = _Progress(**state)
            self.net.load_state_dict(found["net"])
            self.optimizer.load_state_dict(found["optimizer"])
            torch.set_rng_state(found["random"].cpu())
        except DataError:
            raise
        except Exception as error:  # on damaged bytes torch raises a dozen kinds
            raise DataError(f"the checkpoint {self.checkpoint} is damaged or none of Saddlepoint's: {error}") from error
