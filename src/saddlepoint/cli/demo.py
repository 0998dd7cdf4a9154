"""The main job on embedded data: train two small networks on handwritten digits, attack both, and show what happens."""

from __future__ import annotations

import torch
from rich.console import Console

import saddlepoint.data
from saddlepoint import attacks, zoo
from saddlepoint.data import Dataset
from saddlepoint.defenses import Adversarial, Training, train
from saddlepoint.evaluate import Comparison, compare
from saddlepoint.threats import Linf

RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_TRAIN_EPS = 0.2


def demo(*, seed: int, console: Console) -> tuple[Comparison, Dataset, dict[str, Training]]:
    """Train and attack; nothing of it is prepared beforehand. Returns what came out, the data, and the trainings.

    Errors: `KeyboardInterrupt` on Ctrl-C during training, since a half-trained network would tell a false story.
    """
    # the networks are so small that a second thread costs more than it brings, much more on a busy machine
    torch.set_num_threads(1)
    digits = saddlepoint.data.load("digits")
    assert digits.train is not None
    console.print(f"data: {len(digits.train)} + {len(digits.test)} handwritten digits of 8x8 pixels (scikit-learn's)")
    console.print("training an undefended network")
    standard = _whole(
        train(zoo.build("digits-cnn", seed=seed), digits.train, validation=digits.test, epochs=20, seed=seed, progress=True)
    )
    console.print(f"training a hardened one: every batch is replaced by PGD examples within linf {_TRAIN_EPS:g}")
    hardened = _whole(
        train(
            zoo.build("digits-cnn", seed=seed),
            digits.train,
            validation=digits.test,
            adversary=Adversarial(attack=attacks.PGD(steps=7), threat=Linf(_TRAIN_EPS), warmup=20),
            epochs=60,
            learning_rate=2e-3,
            schedule="linear",
            seed=seed,
            progress=True,
        )
    )
    console.print("attacking both")
    trainings = {"undefended": standard, "hardened": hardened}
    models = {name: training.model for name, training in trainings.items()}
    tried = [attacks.UniformNoise(), attacks.FGSM(), attacks.PGD(steps=40)]
    threats = [Linf(eps) for eps in RADII]
    result = compare(models, digits.test.x, digits.test.y, tried, threats, seed=seed, progress=True)
    return result, digits, trainings


def _whole(training: Training) -> Training:
    if not training.complete:
        raise KeyboardInterrupt
    return training
