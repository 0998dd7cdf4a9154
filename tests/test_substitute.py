"""Substitutes: the paper's algorithm in a loop of its own, queries counted to the last one, and oracles of every kind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import InputError
from saddlepoint.evaluate.substitute import Round, Substitute, stepped, substitute

module = sys.modules[Substitute.__module__]  # the package gives the function by this name
DIGITS = sp.data.load("digits")
SEEDS = DIGITS.test.x[:20]


def network(seed: int = 0) -> nn.Module:
    return sp.zoo.build("mlp", in_shape=(1, 8, 8), seed=seed)


class Teller:
    """Answers with labels of a fixed linear rule, and remembers what it was asked."""

    def __init__(self) -> None:
        self.rule = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return ((x - 0.3).flatten(1) @ self.rule).argmax(1)

    @property
    def model(self) -> sp.Model:
        return sp.Model(self, gives="labels", num_classes=10)


def learn(**settings: object) -> tuple[Substitute, Teller]:
    teller = Teller()
    return substitute(teller.model, SEEDS, network(), **{"epochs": 1} | settings), teller


def test_papers_algorithm() -> None:
    """Algorithm 1 of Papernot et al. (2017), one sample after another, in probabilities."""
    found, _ = learn(rounds=2, step=0.1, epochs=3, seed=4)
    net, rule = network(), Teller()
    asked, answers = SEEDS, rule(SEEDS)
    for number in range(3):
        sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        sp.train(net, (asked, answers), epochs=3, seed=4 + number, optimizer=lambda _, sgd=sgd: sgd)
        if number == 2:
            break
        new, precise = [], copy.deepcopy(net).double()
        for x, label in zip(asked, answers, strict=True):
            leaf = x[None].double().requires_grad_()
            precise(leaf).softmax(1)[0, label].backward()
            assert leaf.grad is not None
            new.append((x + 0.1 * leaf.grad[0].sign().float()).clamp(0, 1))
        points = torch.stack(new)
        asked, answers = torch.cat([asked, points]), torch.cat([answers, rule(points)])
    differing = (found.x != asked).flatten(1).any(1)
    assert float(differing.double().mean()) < 0.1, "but where an entry of the gradient is a rounding error"
    torch.testing.assert_close(found.x[:20], asked[:20])
    assert found.x.shape == asked.shape


def test_every_query_is_counted_and_none_is_made_twice() -> None:
    found, teller = learn(rounds=3)
    asked = torch.cat(teller.asked)
    assert torch.equal(asked, found.x)
    assert found.queries == len(asked) == 160
    assert [len(part) for part in teller.asked] == [20, 20, 40, 80]
    assert torch.equal(found.y, Teller()(found.x))
    assert [(one.number, one.samples, one.queries) for one in found.rounds] == [
        (0, 20, 20),
        (1, 40, 40),
        (2, 80, 80),
        (3, 160, 160),
    ]


@pytest.mark.parametrize(
    ("limit", "expected"), [(20, [20]), (21, [20, 21]), (59, [20, 40, 59]), (80, [20, 40, 80]), (100, [20, 40, 80, 100])]
)
def test_the_limit_holds_to_the_query(limit: int, expected: list[int]) -> None:
    found, teller = learn(rounds=5, queries=limit)
    assert sum(map(len, teller.asked)) == limit
    assert [one.queries for one in found.rounds] == expected
    assert found.complete


def test_what_the_test_asks_is_not_the_adversarys() -> None:
    found, teller = learn(rounds=1, queries=30, test=DIGITS.test.take(50))
    assert found.queries == 30
    assert sum(map(len, teller.asked)) == 80
    x = DIGITS.test.x[:50]
    ours = found.model.predict(x)
    assert found.rounds[-1].agreement == pytest.approx(float((ours == Teller()(x)).double().mean()))
    assert found.rounds[-1].accuracy == pytest.approx(float((ours == DIGITS.test.y[:50]).double().mean()))
    assert found.rounds[-1].fit == pytest.approx(float((found.model.predict(found.x) == found.y).double().mean()))


def test_reservoir() -> None:
    """After `full` rounds a fixed number of new inputs, each a step from a different earlier one."""
    _, teller = learn(rounds=4, full=1, fresh=7)
    assert [len(part) for part in teller.asked] == [20, 20, 7, 7, 7]
    for number, part in enumerate(teller.asked[2:], 2):
        earlier = torch.cat(teller.asked[:number])
        near = (part[:, None] - earlier).flatten(2).abs().amax(2) <= 0.1 + 1e-6
        assert bool(near.any(1).all())
    drawn = [
        substitute(Teller().model, SEEDS, network(), rounds=1, full=0, fresh=5, epochs=1, seed=seed).x[20:]
        for seed in (0, 1, 0)
    ]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_steps_turn_round(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def watched(model: sp.Model, x: Tensor, labels: Tensor, step: float) -> Tensor:
        taken.append(step)
        return stepped(model, x, labels, step)

    monkeypatch.setattr(module, "stepped", watched)
    learn(rounds=7, alternate=3, full=0, fresh=1, step=0.2)
    assert taken == [0.2, 0.2, 0.2, -0.2, -0.2, -0.2, 0.2]


def test_a_step_leads_to_where_the_label_is_surer() -> None:
    """On a linear model in closed form; and where the probability is 1 in float32, too."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1000.0):
        net = nn.Linear(5, 3)
        with torch.no_grad():
            net.weight.copy_(scale * weight)
            net.bias.zero_()
        x, labels = torch.full((3, 5), 0.5), torch.arange(3)
        moved = stepped(sp.Model(net, bounds=(0, 1)), x, labels, 0.25)
        p = (scale * x.double() @ weight.T.double()).softmax(1)
        for k in range(3):
            others = sum(p[k, j] * weight[j].double() for j in range(3) if j != k) / (1 - p[k, k]) if scale == 1 else None
            if others is not None:
                torch.testing.assert_close(moved[k], x[k] + 0.25 * (weight[k].double() - others).sign().float())
        assert bool((moved != x).all()), "no entry stands still"
    assert bool((stepped(sp.Model(net, bounds=(0.4, 0.6)), x, labels, 0.25) <= 0.6).all())


def test_it_learns_from_labels_alone_and_fools_the_oracle() -> None:
    known = sp.Model(sp.zoo.build("digits-cnn", seed=1))
    sp.train(known, DIGITS.train.take(800), epochs=5)
    oracle = sp.Model(known.net, access=sp.Access.LABELS)
    found = substitute(oracle, DIGITS.test.x[:40], network(), rounds=4, test=DIGITS.test.take(200), learning_rate=0.05)
    agreements = [one.agreement for one in found.rounds]
    assert agreements[-1] > 0.7
    assert agreements[-1] > agreements[0] + 0.1
    x, y = DIGITS.test.x[100:200], DIGITS.test.y[100:200]
    points = sp.attack(found.model, x, y, "fgsm", sp.Linf(0.3), keep="last").adversarial
    noise = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    wrong, by_noise = (float((known.predict(p) != y).double().mean()) for p in (points, noise))
    assert wrong > by_noise + 0.2


def test_oracles_of_other_kinds() -> None:
    """Numpy callables and scikit-learn estimators; the network may be an sp.Model with its own normalisation."""
    from sklearn.naive_bayes import GaussianNB

    bayes = GaussianNB(var_smoothing=0.1).fit(DIGITS.train.x.flatten(1).numpy(), DIGITS.train.y.numpy())
    rule = Teller().rule.numpy()
    for oracle in (
        sp.Model(bayes),
        sp.Model(lambda x: np.argmax(x.reshape(len(x), -1) @ rule, 1), gives="labels", inputs="numpy", num_classes=10),
    ):
        found = substitute(oracle, SEEDS, sp.Model(network(), mean=0.3, std=0.4), rounds=1, epochs=1)
        assert torch.equal(found.y, oracle.predict(found.x))
        assert found.queries == 40


def test_rounds_are_told_as_they_come_and_the_network_is_trained_in_place() -> None:
    told: list[Round] = []
    predictions: list[Tensor] = []

    def look(one: Round, model: sp.Model) -> None:
        told.append(one)
        predictions.append(model.logits(SEEDS))

    net = network()
    before = copy.deepcopy(net.state_dict())
    found = substitute(Teller().model, SEEDS, net, rounds=2, epochs=1, on_round=look)
    assert tuple(told) == found.rounds
    assert not torch.equal(predictions[0], predictions[1])
    assert torch.equal(predictions[-1], found.model.logits(SEEDS))
    assert found.model.net is net
    assert not torch.equal(before["1.weight"], net.state_dict()["1.weight"])


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    learn(rounds=2, full=0, fresh=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_ctrl_c_keeps_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: Iterator[bool] = iter([True, False])
    train = module.train

    def stopped(*arguments: object, **settings: object) -> sp.Training:
        return replace(train(*arguments, **settings), complete=next(trainings))

    monkeypatch.setattr(module, "train", stopped)
    found, _ = learn(rounds=5)
    assert not found.complete
    assert len(found.rounds) == 2
    assert found.queries == 40


def test_in_words_and_as_json() -> None:
    found, _ = learn(rounds=1, test=DIGITS.test.take(10))
    assert "40 queries" in found.summary()
    assert found.summary().splitlines()[1].split() == ["round", "samples", "queries", "fit", "agreement", "accuracy"]
    document = found.to_dict()
    assert (document["queries"], document["complete"]) == (40, True)
    assert document["config"]["step"] == 0.1
    assert document["rounds"][1]["queries"] == 40
    assert "–" in learn(rounds=0)[0].summary()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": -1}, "rounds"),
        ({"rounds": 1.5}, "rounds"),
        ({"step": 0.0}, "step"),
        ({"alternate": 0}, "alternate"),
        ({"full": -1}, "full"),
        ({"fresh": 0}, "fresh"),
        ({"queries": 19}, "pay for the labels"),
        ({"queries": 0}, "queries"),
        ({"test": (SEEDS, torch.zeros(3, dtype=torch.int64))}, "one class for each"),
    ],
)
def test_bad_settings_are_refused_before_any_query(settings: dict[str, object], told: str) -> None:
    teller = Teller()
    with pytest.raises(InputError, match=told):
        substitute(teller.model, SEEDS, network(), **settings)
    assert not teller.asked


def test_bad_oracles_and_networks_are_refused() -> None:
    teller = Teller()
    with pytest.raises(InputError, match="oracle must be"):
        substitute(teller, SEEDS, network())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bounds"):
        substitute(teller.model, SEEDS, sp.Model(network(), bounds=None))
    with pytest.raises(InputError, match="begin with"):
        substitute(teller.model, SEEDS[:0], network())
    with pytest.raises(InputError, match="bounds"):
        substitute(teller.model, SEEDS + 2, network())
    assert not teller.asked
    with pytest.raises(InputError, match="classes 0 to 1"):
        substitute(teller.model, SEEDS, nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), epochs=1)
