"""Naive and adaptive figures of defended models side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.defenses.transforms import JPEG, BitDepth, GaussianNoise, Median, Thermometer, TotalVariance
from saddlepoint.errors import InputError
from saddlepoint.evaluate.defended import compare_defended
from saddlepoint.evaluate.naive import averaged_predictions, stands_naive
from saddlepoint.models import TransformLayer

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:32], DIGITS.test.y[:32]
THREAT = sp.Linf(0.15)


@pytest.fixture(scope="module")
def model() -> sp.Model:
    return sp.train(sp.zoo.build("digits-cnn"), DIGITS.train, epochs=8).model


@pytest.mark.parametrize("transforms", [[BitDepth(1)], [JPEG(30), Median(3)], [TotalVariance(steps=30)]], ids=str)
def test_the_adaptive_attack_breaks_what_the_naive_one_leaves(model: sp.Model, transforms: list) -> None:
    found = compare_defended(sp.Defended(model, transforms), X, Y, THREAT)
    assert found.undefended is not None
    assert found.naive_accuracy is not None
    assert found.undefended.robust_accuracy < found.naive_accuracy
    assert found.robust_accuracy < found.naive_accuracy - 0.05
    assert found.robust_accuracy <= found.adaptive.robust_accuracy
    assert found.adaptive.clean_accuracy > 0.6
    table = found.summary()
    for figure in (found.naive_accuracy, found.robust_accuracy, found.undefended.robust_accuracy):
        assert f"{figure:.2%}" in table
    assert json.loads(json.dumps(found.to_dict()))["naive_accuracy"] == found.naive_accuracy


def test_the_naive_figure_is_what_it_says(model: sp.Model) -> None:
    """Against predictions by hand: the attack knows the model inside, and the defended one judges."""
    defended = sp.Defended(model, [BitDepth(1)])
    examples = sp.attack(model, X, Y, sp.attacks.APGD(steps=20), THREAT, keep="margin").adversarial
    by_hand = model.predict(examples.round()) == Y
    assert torch.equal(stands_naive(defended, X, Y, THREAT), by_hand)
    evaluation = sp.evaluate(defended, X, Y, THREAT, "quick")
    assert torch.equal(evaluation.naive, by_hand)
    assert evaluation.naive_accuracy == float((by_hand & (defended.predict(X) == Y)).double().mean())
    assert f"naive attack     {evaluation.naive_accuracy:.2%}" in evaluation.summary()
    assert evaluation.to_dict()["naive_accuracy"] == evaluation.naive_accuracy
    half = evaluation.group(torch.arange(16))
    assert torch.equal(half.naive, by_hand[:16])


def test_undefended_models_have_no_naive_figure(model: sp.Model) -> None:
    for plain in (model, sp.Defended(model, [])):
        evaluation = sp.evaluate(plain, X[:10], Y[:10], THREAT, "quick")
        assert evaluation.naive is None
        assert evaluation.naive_accuracy is None
        assert "naive" not in evaluation.summary()
        with pytest.raises(InputError, match="Defended with transformations"):
            compare_defended(plain, X, Y, THREAT)


def test_gradients_of_the_model_inside_are_tried_where_the_own_ones_mislead(model: sp.Model) -> None:
    """A transformation that wrongly declares its zero gradient as exact falls all the same."""
    x, y = DIGITS.test.x[:64], DIGITS.test.y[:64]
    hidden = sp.Defended(model, [replace(BitDepth(2).transform((0, 1)), backward="exact")])
    evaluation = sp.evaluate(hidden, x, y, THREAT, "quick")
    inside = evaluation.stages[-1]
    assert inside.name == "inside"
    assert len(inside.broke) > 0
    fooled = inside.broke
    assert bool((hidden.predict(evaluation.adversarial[fooled]) != y[fooled]).all())
    assert evaluation.robust_accuracy < evaluation.naive_accuracy


def test_passes_are_counted(model: sp.Model) -> None:
    defended = sp.Defended(sp.Model(model.net), [BitDepth(3)])
    evaluation = sp.evaluate(defended, X[:20], Y[:20], THREAT, "quick")
    assert defended.model.queries.forward > 0  # of the naive attack, whose passes are not those of the defended model
    spent = evaluation.queries
    passes = defended.queries.forward + defended.queries.backward
    assert passes == int(spent.total.sum() + spent.verify.sum()) + spent.probe


def test_predictions_of_random_models_are_averages(model: sp.Model) -> None:
    noisy = sp.Defended(model, [GaussianNoise(0.4)], draws=32)
    state = torch.get_rng_state()
    found = averaged_predictions(noisy, X, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, averaged_predictions(noisy, X, seed=3))
    assert float((found == Y).double().mean()) > float((noisy.predict(X) == Y).double().mean())
    assert torch.equal(averaged_predictions(model, X), model.predict(X))


def test_networks_behind_codes_need_another_source(model: sp.Model) -> None:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    sp.train(nn.Sequential(TransformLayer(Thermometer(4)), inner), DIGITS.train.take(500), epochs=5)
    coded = sp.Defended(sp.Model(inner), [Thermometer(4)])
    alone = compare_defended(coded, X, Y, THREAT)
    assert (alone.undefended, alone.naive, alone.naive_accuracy, alone.cost) == (None, None, None, None)
    assert "undefended" not in alone.summary()
    beside = compare_defended(coded, X, Y, THREAT, source=model)
    assert beside.undefended is not None
    assert beside.naive_accuracy is not None
    assert beside.robust_accuracy < beside.naive_accuracy
    with pytest.raises(InputError, match="bounds"):
        stands_naive(coded, X, Y, THREAT, source=sp.Model(model.net, bounds=(-1, 1)))


class Slow(nn.Module):
    """The identity, after many of them."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(300):
            x = x + 0.0
        return x


def test_the_cost_of_a_prediction(model: sp.Model) -> None:
    slow = sp.Defended(model, [sp.Transform(name="slow", apply=Slow())])
    assert compare_defended(slow, X[:10], Y[:10], THREAT).cost > 1


def test_a_campaign_keeps_the_naive_figure(model: sp.Model, tmp_path) -> None:
    defended = sp.Defended(model, [BitDepth(2)])
    first = sp.evaluate(defended, X[:20], Y[:20], THREAT, "quick", campaign=tmp_path / "run")
    spent = model.queries.forward
    again = sp.evaluate(defended, X[:20], Y[:20], THREAT, "quick", campaign=tmp_path / "run")
    assert model.queries.forward == spent
    assert torch.equal(first.naive, again.naive)
    assert first.robust_accuracy == again.robust_accuracy


def test_what_has_no_gradients_is_said(model: sp.Model) -> None:
    """A transformation that is detached, and declares nothing, is searched by scores; the table says so."""
    halves = sp.Transform(name="halves", apply=lambda x: ((2 * x).round() / 2).detach())
    found = compare_defended(sp.Defended(model, [halves]), X[:8], Y[:8], THREAT)
    assert "searched by scores alone" in found.summary()


def test_what_is_random_is_told_how_to_say_so(model: sp.Model) -> None:
    noisy = sp.Transform(name="noisy", apply=lambda x: x + 0.1 * torch.randn_like(x))
    with pytest.warns(sp.SaddlepointWarning, match="random=True"):
        found = sp.evaluate(sp.Defended(model, [noisy]), X[:8], Y[:8], THREAT, "quick")
    assert sum("random=True" in note for note in found.notes) == 1


def test_an_eps_of_the_whole_range_is_doubted(model: sp.Model) -> None:
    found = sp.evaluate(model, X[:4], Y[:4], sp.Linf(8.0), "quick")
    assert any("1/255" in note for note in found.notes)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda model: sp.Defended(model.net, [Median(3)]), "sp.Model"),
        (lambda model: sp.Defended(model, Median(3)), "must be a list"),
        (lambda model: sp.Defended(model, [torch.round]), "sp.Transform"),
    ],
)
def test_what_is_no_defended_model(model: sp.Model, make: Callable[[sp.Model], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make(model)
