"""`Model` for callables: what they give, what they take, and what they grant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import CapabilityError, InputError, ModelError

W = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -1.0], [-1.0, 0.0, 1.0]])
X = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.5], [0.4, 0.1, 0.9]])


def logits(x: Tensor) -> Tensor:
    return x @ W.T


def probabilities(x: np.ndarray) -> np.ndarray:
    assert isinstance(x, np.ndarray)
    return torch.softmax(logits(torch.from_numpy(x)), 1).numpy()


def labels(x: Tensor) -> Tensor:
    return logits(x).argmax(1)


def test_probabilities_become_logits() -> None:
    model = sp.Model(probabilities, gives="probabilities", inputs="numpy")
    torch.testing.assert_close(model.logits(X), logits(X).log_softmax(1))
    assert model.access is sp.Access.SCORES
    assert model.probe(X).notes == ()


def test_one_probability_is_that_of_the_second_class() -> None:
    model = sp.Model(lambda x: x[:, :1], gives="probabilities")
    torch.testing.assert_close(model.logits(X).exp(), torch.cat([1 - X[:, :1], X[:, :1]], 1))


def test_no_probability_is_no_infinity() -> None:
    model = sp.Model(lambda x: nn.functional.one_hot(labels(x), 3).float(), gives="probabilities")
    assert bool(torch.isfinite(model.logits(X)).all())


@pytest.mark.parametrize("as_list", [False, True])
def test_labels(as_list: bool) -> None:
    def oracle(x: np.ndarray) -> object:
        said = labels(torch.from_numpy(x)).numpy()
        return said.tolist() if as_list else said

    model = sp.Model(oracle, gives="labels", inputs="numpy", num_classes=3)
    assert model.access is sp.Access.LABELS
    assert model.predict(X).equal(labels(X))
    assert model.forward(X).equal(nn.functional.one_hot(labels(X), 3).float())
    assert model.probe(X).notes == ()
    with pytest.raises(CapabilityError, match="labels"):
        model.logits(X)


def test_a_network_that_grants_labels_shows_no_more() -> None:
    model = sp.Model(nn.Linear(3, 4), access=sp.Access.LABELS)
    assert model.forward(X).unique().tolist() == [0.0, 1.0]
    broken = sp.Model(lambda x: logits(x) * torch.tensor([1.0, torch.nan, 1.0]), access=sp.Access.LABELS)
    assert bool(broken.forward(X).isnan().any())


@pytest.mark.parametrize("access", [sp.Access.SCORES, sp.Access.GRADIENTS])
def test_no_more_is_granted_than_there_is(access: sp.Access) -> None:
    with pytest.raises(CapabilityError, match="at most"):
        sp.Model(labels, gives="labels", num_classes=3, access=access)
    if access is sp.Access.GRADIENTS:
        with pytest.raises(CapabilityError, match="scores at most"):
            sp.Model(probabilities, gives="probabilities", inputs="numpy", access=access)


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        (labels, {"gives": "labels"}, InputError, "num_classes"),
        (labels, {"gives": "label", "num_classes": 3}, InputError, "did you mean 'labels'"),
        (labels, {"inputs": "numpi"}, InputError, "numpy"),
        (3, {}, InputError, "scikit-learn"),
        ("no-such-file.onnx", {}, InputError, "no-such-file"),
    ],
)
def test_bad_settings(given: object, settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sp.Model(given, **settings)  # type: ignore[arg-type]  # as a user may write


@pytest.mark.parametrize(
    ("said", "gives", "message"),
    [
        (torch.tensor([0, 1, 5]), "labels", "0 to 2"),
        (torch.tensor([0, 1]), "labels", "one for each input"),
        (torch.tensor([0.5, 1.0, 0.0]), "labels", "whole numbers"),
        (torch.tensor([[2.0, -1.0, 0.0]] * 3), "probabilities", "not all in"),
        (torch.tensor([[1, 2, 3]] * 3), "logits", "floating"),
    ],
)
def test_bad_answers(said: Tensor, gives: str, message: str) -> None:
    model = sp.Model(lambda x: said, gives=gives, num_classes=3)  # type: ignore[arg-type]  # one of three names
    with pytest.raises(ModelError, match=message):
        model.predict(X)


def test_an_attack_on_a_function_of_arrays() -> None:
    """What the answers are made of changes nothing but the access."""
    y = labels(X)
    there = sp.attack(sp.Model(logits), X, y, sp.attacks.Square(steps=40), sp.Linf(0.3))
    model = sp.Model(probabilities, gives="probabilities", inputs="numpy")
    here = sp.attack(model, X, y, sp.attacks.Square(steps=40), sp.Linf(0.3))
    assert here.status.tolist() == there.status.tolist()
    with pytest.raises(CapabilityError, match="PGD needs gradients"):
        sp.attack(model, X, y, "pgd", sp.Linf(0.3))


def test_a_function_of_arrays_that_was_not_declared_one_is_told_how():
    with pytest.raises(sp.ModelError, match='inputs="numpy"'):
        sp.Model(lambda x: logits(x).numpy(), bounds=(0, 1)).predict(X)
