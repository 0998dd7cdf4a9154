"""Keras models on PyTorch, in a process of their own: Keras reads its backend once, and may write a configuration file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saddlepoint as sp
from saddlepoint.models.keras_model import adapted, recognises


def images(count: int = 4) -> Tensor:
    """Channels last."""
    return torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(0))


def network(last: str | None = "softmax") -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Rescaling(2.0, offset=-1.0),
        keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Flatten(),
        keras.layers.Dense(5, activation=last),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def logits_precede_a_softmax() -> None:
    import keras

    x, net = images(), network()
    bare = network(None)
    bare.set_weights(net.get_weights())
    expected = torch.tensor(bare.predict_on_batch(x.numpy()))
    entrance = keras.Input((8, 8, 3))
    forms = {
        "Sequential": net,
        "nested": keras.Sequential([keras.Input((8, 8, 3)), net]),
        "functional": keras.Model(entrance, keras.layers.Softmax()(bare(entrance))),
        "without": bare,
    }
    for name, form in forms.items():
        torch.testing.assert_close(sp.Model(form).logits(x), expected, msg=lambda text, name=name: f"{name}: {text}")
    probabilities = torch.tensor(net.predict_on_batch(x.numpy()))
    torch.testing.assert_close(sp.Model(net).logits(x).softmax(1), probabilities)


def one_sigmoid_is_two_classes() -> None:
    import keras

    x = images()
    net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(1, activation="sigmoid")])
    expected = torch.tensor(net.predict_on_batch(x.numpy()))
    torch.testing.assert_close(sp.Model(net).logits(x).softmax(1)[:, 1:], expected)


def a_model_of_ones_own_class() -> None:
    import keras

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.drop, self.last = keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Dense(3)

        def call(self, x: Any, training: bool = False) -> Any:
            return keras.activations.softmax(self.last(self.drop(self.flat(x), training=training)))

    x, net = images(), Own()
    expected = torch.tensor(net.predict_on_batch(x.numpy()))
    torch.testing.assert_close(sp.Model(net).logits(x).softmax(1), expected)


def gradients_are_those_of_finite_differences() -> None:
    net, step = adapted(network()).call, 1e-2  # the network is smooth, and computes in float32
    x = images(2).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    with torch.no_grad():
        expected = (net(x + step * direction) - net(x - step * direction))[:, 2].sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-2, atol=0)


def an_attack_leaves_it_as_it_was() -> None:
    x, net = images(), network()
    net.train()
    model, before = sp.Model(net), [value.copy() for value in net.get_weights()]
    y = model.predict(x)
    result = sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.1))
    assert bool((result.distances["linf"] <= 0.1).all())
    assert all((old == new).all() for old, new in zip(before, net.get_weights(), strict=True))
    assert net.training
    assert model.predict(x).equal(y)
    assert model.access is sp.Access.GRADIENTS
    assert json.loads(json.dumps(model.describe()))["name"] == net.name


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        logits_precede_a_softmax,
        one_sigmoid_is_two_classes,
        a_model_of_ones_own_class,
        gradients_are_those_of_finite_differences,
        an_attack_leaves_it_as_it_was,
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What failed in the other process, by check; nothing where all was well."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    home = tmp_path_factory.mktemp("keras")
    environment = os.environ | {"KERAS_BACKEND": "torch", "KERAS_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, __file__, str(home / "out.json")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((home / "out.json").read_text())
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_keras(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


def test_other_backends_are_refused_with_a_way_out() -> None:
    other = type("Model", (), {"__module__": "keras.src.models.model"})()
    assert recognises(other)
    with pytest.raises(sp.InputError, match="KERAS_BACKEND=torch"):
        sp.Model(other)


def test_what_is_no_keras_model() -> None:
    own = type("Model", (torch.nn.Module,), {"__module__": "kerasify.models"})()
    assert not recognises(own)
    assert not recognises(torch.nn.Linear(1, 1))


def main(out: Path) -> None:
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
