"""Defensive distillation: a student trained on a teacher's soft labels, both at a high temperature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saddlepoint.defenses.objectives import Batch, Objective, check_number, frozen_logits
from saddlepoint.defenses.training import Training, train
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.torch_model import Labelled, Model


@final
@dataclass(frozen=True, kw_only=True)
class Tempered(Objective):
    """Cross-entropy of the softmax at temperature T: L = H(t, softmax(z(x) / T)).

    The targets t are the classes, or, with a teacher, its probabilities softmax(z_teacher(x) / T). Evaluated at T = 1, the
    network's logits are about T times as large as usual, so that softmax rounds to 0 and 1 and its gradient to 0.

    Source: Papernot, McDaniel, Wu, Jha & Swami (2016), Distillation as a defense to adversarial perturbations against deep
    neural networks, arXiv:1511.04508, sections III and IV.
    """

    temperature: float = 20.0
    teacher: Classifier | None = None

    def __post_init__(self) -> None:
        check_number(self, above=0, temperature=self.temperature)
        if self.teacher is not None and not isinstance(self.teacher, Classifier):
            raise InputError(f"Tempered: teacher must be a trained sp.Model; got {type(self.teacher).__name__}")

    def loss(self, batch: Batch) -> Tensor:
        target = batch.y
        if self.teacher is not None:
            target = (frozen_logits(self.teacher, batch.x) / self.temperature).softmax(1)
        return cross_entropy(batch.model.forward(batch.x) / self.temperature, target)


def distill(
    teacher: nn.Module | Model,
    student: nn.Module | Model,
    data: Labelled | tuple[Tensor, Tensor],
    *,
    temperature: float = 20.0,
    teach: bool = True,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Defensive distillation: train the teacher at temperature T, then the student on its soft labels, at T as well.

    Returned is the student's training; its model is used, and attacked, at temperature 1. The paper's two networks have one
    architecture. temperature: 20 for MNIST in the paper, up to 100. teach: False where the teacher was trained at T before.
    settings: of `sp.train`, for both (Any since they are passed on); a checkpoint has a second file beside it, "NAME.teacher".

    It is no defense: what it takes away is the gradient of the softmax. Attacks on the logits, such as Carlini & Wagner's
    (2017, arXiv:1608.04644, section 8), and transferred examples are not affected; `sp.evaluate` shows both.

    Source: see `Tempered`. Errors: those of `train`; `KeyboardInterrupt` on Ctrl-C while the teacher is trained.

    >>> import saddlepoint as sp
    >>> first, second = sp.zoo.build("digits-cnn"), sp.zoo.build("digits-cnn")
    >>> distill(first, second, sp.data.load("digits").train.take(200), temperature=10, epochs=1).complete
    True
    """
    check_number(Tempered(), above=0, temperature=temperature)
    networks = [net.net if isinstance(net, Model) else net for net in (teacher, student)]
    if networks[0] is networks[1]:
        raise InputError("distill needs two networks; a student that is its own teacher learns nothing")
    master = teacher if isinstance(teacher, Model) else Model(teacher, bounds=settings.get("bounds", (0.0, 1.0)))
    if teach:
        own = None if checkpoint is None else Path(checkpoint).with_name(f"{Path(checkpoint).name}.teacher")
        taught = train(master, data, adversary=Tempered(temperature=temperature), checkpoint=own, **settings)
        if not taught.complete:
            raise KeyboardInterrupt  # a half-trained teacher's labels would mislead
    objective = Tempered(temperature=temperature, teacher=master)
    return train(student, data, adversary=objective, checkpoint=checkpoint, **settings)
