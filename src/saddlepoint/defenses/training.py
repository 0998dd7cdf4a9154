"""`train`: a classifier, clean or against an adversary, in the loop of `loop.py`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.distributed import processes
from saddlepoint.defenses.loop import (
    Average,
    EpochRecord,
    Fit,
    LearningRateSchedule,
    Loop,
    OptimizerFactory,
    Plan,
    Precision,
    Sample,
    Work,
    fit,
)
from saddlepoint.defenses.objectives import Batch, Objective, Standard
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import InputError, ModelError, SaddlepointWarning
from saddlepoint.models.base import Classifier
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat

__all__ = ["EpochRecord", "Fit", "LearningRateSchedule", "OptimizerFactory", "Sample", "Training", "fit", "train"]


@dataclass(frozen=True)
class Training:
    """A finished (or, after Ctrl-C, unfinished) training. `model` holds the trained network, in eval mode."""

    model: Model
    epochs: tuple[EpochRecord, ...]
    complete: bool
    config: dict[str, Any]


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
    restore_best: bool | None = None,
    average: Average | None = None,
    decay: float = 0.999,
    average_from: float = 0.75,
    precision: Precision | None = None,
    channels_last: bool | None = None,
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
    restore_best: hand back the weights of the epoch with the best robust (clean, without an adversary) validation accuracy:
    adversarial training overfits long after clean training would (Rice et al. 2020, arXiv:2002.11569). patience: also stop
    when that accuracy has not risen for so many epochs. restore_best None: if there is a patience.
    average, decay, average_from: hand back averaged weights; precision, channels_last: speed on GPUs; see `fit`.
    augment: changes a batch of inputs, drawing from torch's global random numbers.
    checkpoint: file that is written every minute and after each epoch; if it exists, training goes on from there, to
    exactly the weights that an uninterrupted run gives. seed: of order, attacks, augmentation and dropout; the global random
    state is restored.

    Ctrl-C returns what was trained so far (`complete` False). Errors: `InputError`; `ModelError` when the loss becomes NaN,
    or the network gives probabilities; `DataError` for a checkpoint of another run or a damaged one.

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
        if hasattr(adversary, "objective") and not isinstance(adversary, type):
            raise InputError("adversary is a recipe: train(..., adversary=recipe.objective, **recipe.train)")
        raise InputError(
            "adversary must be an objective, such as sp.Adversarial(attack=..., threat=...) or "
            f'sp.defenses.recipe("trades", threat).objective; got {str(adversary)[:60]}'
        )
    keep = restore_best if restore_best is not None else patience is not None
    if (keep or patience is not None) and validation is None:
        raise InputError("patience and restore_best go by the accuracy on validation samples: give validation=")
    objective = adversary or Standard()
    plan = Plan(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule,
        average=average, decay=decay, average_from=average_from, precision=precision, channels_last=channels_last,
        patience=patience, restore_best=keep or patience is not None,
        checkpoint=Path(checkpoint) if checkpoint is not None else None, seed=seed, progress=progress, on_epoch=on_epoch,
    )  # fmt: skip
    pairs = labelled(data, model, "data")
    held_out = labelled(validation, model, "validation") if validation is not None else None
    if objective.adversary is not None:
        check_scale(objective.adversary[1], model, pairs[0])
    work = _Training(model, objective, held_out, augment, seed)
    settings: dict[str, object] = {"objective": objective.settings(), "model": model.describe()}
    done = Loop(model.net, pairs, work, plan, f"training ({type(objective).__name__.lower()})", settings).run()
    return Training(model, done.epochs, done.complete, done.config)


class _Training(Work):
    """An objective as the loop's work."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        validation: tuple[Tensor, Tensor] | None,
        augment: Callable[[Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        super().__init__(self._loss)
        self.model, self.objective, self.validation, self.augment, self.seed = model, objective, validation, augment, seed
        self.replays = objective.replays

    def prepare(self, sample: Sample) -> Sample:
        x, y = sample.tensors
        return sample if self.augment is None else replace(sample, tensors=(self.augment(x), y))

    def _batch(self, sample: Sample) -> Batch:
        x, y = sample.tensors
        return Batch(self.model, x, y, sample.ids, sample.seed, sample.progress, sample.memory)

    def _loss(self, sample: Sample) -> Tensor:
        return self.objective.loss(self._batch(sample))

    def after_backward(self, sample: Sample) -> None:
        self.objective.after_backward(self._batch(sample))

    def after_step(self, sample: Sample) -> None:
        self.objective.after_step(self._batch(sample))

    def after_epoch(self, epoch: int, memory: dict[str, Any]) -> bool:
        return self.objective.after_epoch(self.model, epoch, memory)

    def validate(self) -> tuple[float | None, float | None]:
        if self.validation is None:
            return None, None
        together = processes()
        ids = together.share(torch.arange(len(self.validation[1])))
        x, y = (column[ids.to(column.device)] for column in self.validation)
        found = [float((self.model.predict(x).to(y.device) == y).double().mean())]
        if self.objective.adversary is not None:
            attack, threat = self.objective.adversary
            found.append(run_attack(self.model, x, y, attack, threat, seed=self.seed, ids=ids).robust_accuracy)
        device = next(self.model.networks()[0].parameters()).device
        means = together.mean([torch.tensor(found, dtype=torch.float64, device=device)], len(y))[0].tolist()
        return means[0], means[1] if len(means) > 1 else None


def labelled(data: Labelled | tuple[Tensor, Tensor], model: Classifier, name: str) -> tuple[Tensor, Tensor]:
    """Inputs and classes that fit the model. `InputError` where they don't; `ModelError` where it gives probabilities."""
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaddlepointWarning)
            probe = model.probe(x)
        for note in probe.notes:
            if note.startswith("the outputs look like probabilities"):
                raise ModelError(f"{note}. The softmax is part of the loss")
            warnings.warn(note, SaddlepointWarning, stacklevel=3)
        return x, check_labels(y, len(x), probe.num_classes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def check_scale(threat: Threat, model: Classifier, x: Tensor) -> None:
    """Raise `InputError` where eps would reach from any input to any other, since then it was meant in other units."""
    if model.bounds is None:
        return
    low, high = model.bounds
    features = x[0].numel()
    order = {Norm.LINF: 0.0, Norm.L2: 0.5, Norm.L1: 1.0}.get(threat.norm)
    diameter = features if order is None else (high - low) * features**order
    if math.isfinite(threat.largest_eps) and threat.largest_eps >= diameter:
        raise InputError(
            f"eps = {threat.largest_eps:g} reaches across the whole input range {model.bounds}: it is in the inputs' own "
            "units, such as 8 / 255 for images in [0, 1]"
        )
