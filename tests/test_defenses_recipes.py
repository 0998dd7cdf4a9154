"""Every recipe by its name: it trains, and those that are meant to make robust do so against an attack they don't choose."""

import pytest
import torch
from torch import nn

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.attacks.ascent import PGD

DIGITS = sp.data.load("digits")
THREAT = sp.Linf(0.1)
SETTINGS = {"epochs": 10, "learning_rate": 1e-2, "batch_size": 100}
ROBUST = {  # least gain in accuracy under PGD-20 over clean training
    "standard": 0.0, "pgd-training": 0.2, "fgsm-regularizer": 0.15, "fgsm-added": 0.15, "rfgsm": 0.1, "mixed": 0.1, "fast": 0.2,
    "n-fgsm": 0.2, "gradalign": 0.2, "free": 0.1, "trades": 0.2, "mart": 0.2, "hat": 0.1, "awp": 0.2, "trades-awp": 0.2,
    "logit-pairing": 0.2, "input-gradient": 0.05, "jacobian": 0.0, "cure": 0.05,
}  # fmt: skip
FEWER_STEPS = {"attack": PGD(steps=4)}
GIVEN = {
    "pgd-training": {"steps": 4}, "mixed": {"steps": 4}, "trades": FEWER_STEPS, "mart": FEWER_STEPS, "awp": {"steps": 4},
    "trades-awp": FEWER_STEPS, "logit-pairing": FEWER_STEPS, "jacobian": {"strength": 0.1}, "input-gradient": {"strength": 0.3},
    "crop-and-flip": {"padding": 1, "flip": False}, "cutout": {"size": 3},
    "free": {"repeats": 3}, "lipschitz-projection": {"bound": 3.0},
}  # fmt: skip


def make_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def accuracies(model):
    x, y = DIGITS.test.x, DIGITS.test.y
    clean = float((model.predict(x) == y).double().mean())
    return clean, sp.attack(model, x, y, PGD(steps=20), THREAT).robust_accuracy


@pytest.fixture(scope="module")
def standard():
    """The network of clean training, and its robust accuracy."""
    model = sp.train(make_net(), DIGITS.train, **SETTINGS).model
    return model, accuracies(model)[1]


@pytest.mark.parametrize("name", defenses.RECIPES)
def test_recipe(name, standard):
    undefended, before = standard
    given = {"hat": {"helper": undefended, **FEWER_STEPS}, "ensemble": {"sources": (undefended,)}} | GIVEN
    recipe = defenses.recipe(name, THREAT, **given.get(name, {}))
    if name in ("cutout", "crop-and-flip"):
        with pytest.raises(sp.InputError, match="images"):
            sp.train(make_net(), (DIGITS.train.x.flatten(1), DIGITS.train.y), adversary=recipe.objective, epochs=1)
    settings = SETTINGS | {"epochs": max(1, round(SETTINGS["epochs"] * recipe.epochs))} | dict(recipe.train)
    trained = sp.train(make_net(), DIGITS.train, adversary=recipe.objective, **settings)
    clean, robust = accuracies(trained.model)
    assert clean > 0.75
    assert robust >= before + ROBUST.get(name, -1.0)


def test_the_nearest_name_is_suggested():
    with pytest.raises(sp.UnknownNameError, match="'pgd-training'"):
        defenses.recipe("pgd-trainin", THREAT)
