"""The main job on embedded data: train two small networks on handwritten digits, attack both, and show what happens."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

import saddlepoint.data
from saddlepoint import attacks, zoo
from saddlepoint.defenses import Adversarial, train
from saddlepoint.evaluate import Comparison, compare
from saddlepoint.report import write
from saddlepoint.threats import Linf

RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_TRAIN_EPS = 0.2


def demo(folder: Path, *, seed: int, console: Console, config: dict[str, object]) -> tuple[Comparison, Path]:
    """Train, attack and report; nothing of it is prepared beforehand. Returns the comparison and the report's path."""
    # the networks are so small that a second thread costs more than it brings, much more on a busy machine
    torch.set_num_threads(1)
    digits = saddlepoint.data.load("digits")
    assert digits.train is not None
    console.print(f"data: {len(digits.train)} + {len(digits.test)} handwritten digits of 8x8 pixels (scikit-learn's)")
    console.print("training an undefended network")
    standard = train(
        zoo.build("digits-cnn", seed=seed), digits.train, validation=digits.test, epochs=20, seed=seed, progress=True
    )
    console.print(f"training a hardened one: every batch is replaced by PGD examples within linf {_TRAIN_EPS:g}")
    hardened = train(
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
    console.print("attacking both")
    models = {"undefended": standard.model, "hardened": hardened.model}
    tried = [attacks.UniformNoise(), attacks.FGSM(), attacks.PGD(steps=40)]
    threats = [Linf(eps) for eps in RADII]
    result = compare(models, digits.test.x, digits.test.y, tried, threats, seed=seed, progress=True)
    report = write(
        result,
        folder,
        title="An undefended and a hardened network under attack",
        data_name="digits",
        data_fingerprint=digits.fingerprint(),
        class_names=digits.class_names,
        config=config,
        histories={"undefended": standard, "hardened": hardened},
        command="saddlepoint demo",
        seed=seed,
    )
    return result, report
