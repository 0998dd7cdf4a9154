"""The classical exercise: attack a network, retrain it with the examples, and test it again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.augmentation import static_augmentation
from saddlepoint.defenses.training import Training, train
from saddlepoint.engine import Attack, AttackResult
from saddlepoint.errors import InputError
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.threats import Threat


@dataclass(frozen=True)
class Hardening:
    """What the exercise showed.

    before: the attack on the test set of the old network. after: the same attack made anew on the new network, which is the
    honest test. old_examples_accuracy: the new network's accuracy on the examples that were made for the old one, which is
    easy to confuse with robustness. crafted: how many training samples were right before and became examples.
    """

    old: Model
    new: Model
    training: Training
    before: AttackResult
    after: AttackResult
    old_examples_accuracy: float
    crafted: int


def harden(
    model: Model, train_data: Labelled, test: Labelled, attack: Attack | str, threat: Threat, *, seed: int = 0, **settings: Any
) -> Hardening:
    """Attack the test set; retrain a copy of the network on the training set and its adversarial examples; test again.

    The examples are made from the training set, so that the test stays a test. They are static, made once against the old
    network: compare with `train(adversary=Adversarial(...))`, which makes new ones for every batch.
    settings: of `sp.train` (epochs, learning_rate, ...; Any since they are passed on). `model` is left as it is.

    Errors: those of `attack` and `train`; `KeyboardInterrupt` on Ctrl-C, also during the training.
    """
    if not isinstance(model, Model):
        raise InputError(f"harden retrains a network: give an sp.Model; got {type(model).__name__}")
    before = run_attack(model, test.x, test.y, attack, threat, seed=seed)
    augmented = static_augmentation(model, train_data, attack, threat, seed=seed)
    new = copy.deepcopy(model)
    training = train(new, augmented, seed=seed, **settings)
    if not training.complete:
        raise KeyboardInterrupt  # figures of a half-trained network would mislead
    after = run_attack(new, test.x, test.y, attack, threat, seed=seed)
    on_old = float((new.predict(before.adversarial).to(test.y.device) == test.y).double().mean())
    return Hardening(model, new, training, before, after, on_old, int(augmented.crafted.having("fooled").sum()))
