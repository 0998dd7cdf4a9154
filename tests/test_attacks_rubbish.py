"""Evolved rubbish images: encodings against loops written out, MAP-Elites against the record of what was asked."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from contract_support import Counting, Recording, random_states
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.rubbish import CPPN, Direct, Encoding, Networks, evolve_rubbish, polynomial
from saddlepoint.rng import Keys

SHAPE = (1, 8, 8)
ENCODINGS: list[Encoding] = [Direct(), CPPN()]
each_encoding = pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: type(encoding).__name__)


def keys(count: int, seed: int = 0) -> Keys:
    return Keys.of(seed, torch.arange(count))


def generations(encoding: Encoding, count: int, shape: tuple[int, ...], times: int) -> list:
    """Each individual's descendants, without selection."""
    found = [encoding.first(keys(count).absorb(0), shape)]
    for generation in range(1, times):
        found.append(encoding.mutated(found[-1], keys(count).absorb(generation), generation))
    return found


# MAP-Elites


@each_encoding
def test_the_archive_holds_the_best_image_for_every_class(encoding: Encoding, mlp: nn.Module) -> None:
    recording = Recording(mlp)
    found = evolve_rubbish(sp.Model(recording), SHAPE, encoding=encoding, generations=6, population=40, probability=1.0)
    sizes = [len(points) for points in recording.points]
    assert sizes == [40] * 6 + [10]
    points = torch.cat(recording.points[:-1])
    probability = mlp(points).double().softmax(1)
    best = torch.stack([probability[: 40 * (generation + 1)].amax(0) for generation in range(6)])
    torch.testing.assert_close(found.history, best, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.images, points[probability.argmax(0)])
    torch.testing.assert_close(found.images, recording.points[-1])
    torch.testing.assert_close(found.probabilities, best[-1], rtol=1e-5, atol=1e-7)
    assert found.classes.tolist() == list(range(10))
    assert found.queries == sum(sizes)


def test_children_come_from_champions(mlp: nn.Module) -> None:
    """A directly encoded child is one of the images in the archive, but for a tenth of its values."""
    recording = Recording(mlp)
    evolve_rubbish(sp.Model(recording), SHAPE, encoding="direct", generations=3, population=30, probability=1.0)
    for generation in (1, 2):
        seen = torch.cat(recording.points[:generation])
        champions = seen[mlp(seen).softmax(1).argmax(0)]
        kept = (recording.points[generation][:, None] == champions).flatten(2).double().mean(2)
        assert (kept.amax(1) > 0.7).all()
        assert len(kept.argmax(1).unique()) > 3


@each_encoding
def test_a_search_is_a_function_of_its_seed(encoding: Encoding, mlp: nn.Module) -> None:
    model, states = sp.Model(mlp), random_states()

    def images(**options: object) -> Tensor:
        return evolve_rubbish(model, SHAPE, encoding=encoding, generations=4, population=20, **options).images

    first = images()
    assert torch.equal(first, images(batch_size=20))
    torch.testing.assert_close(first, images(batch_size=7), rtol=0, atol=1e-5)
    assert not torch.equal(first, images(seed=1))
    assert random_states() == states


def test_it_ends_when_all_classes_are_there(mlp: nn.Module) -> None:
    model = sp.Model(mlp)
    found = evolve_rubbish(model, SHAPE, generations=100, population=50, probability=0.9)
    assert 1 < len(found.history) < 100
    assert (found.history[-1] >= 0.9).all()
    assert (found.history[-2] < 0.9).any()
    assert (found.probabilities > 0.9 - 1e-5).all()
    assert found.queries == 50 * len(found.history) + 10
    goal = sp.FalsePositive(target=3, probability=0.89)
    aim = goal.aim(torch.tensor([0]), torch.tensor([3]), 10)
    assert float(aim.margin(model.logits(found.images[3:4]))) > 0


def test_some_classes_and_other_ranges(mlp: nn.Module) -> None:
    counting = Counting(lambda x: mlp((x + 2) / 5))
    model = sp.Model(counting, bounds=(-2.0, 3.0))
    found = evolve_rubbish(model, (64,), classes=[7, 2], encoding="direct", generations=3, population=10)
    assert found.images.shape == (2, 64)
    assert found.history.shape == (3, 2)
    assert -2 <= float(found.images.min()) < -1
    assert 2 < float(found.images.max()) <= 3
    assert counting.forward_rows == found.queries == model.queries.forward == 32
    stated = mlp((found.images + 2) / 5).double().softmax(1)[torch.arange(2), torch.tensor([7, 2])]
    torch.testing.assert_close(found.probabilities, stated, rtol=1e-5, atol=1e-7)


def test_nan_is_no_champion(mlp: nn.Module) -> None:
    """Where a third of the answers are NaN, the others are kept."""

    def poisoned(x: Tensor) -> Tensor:
        return mlp(x) + torch.where(x[:, 0, 0, :1] < 0.33, torch.nan, 0.0)

    found = evolve_rubbish(sp.Model(poisoned), SHAPE, encoding="direct", generations=4, population=30, probability=1.0)
    assert torch.isfinite(found.history).all()
    assert (found.images[:, 0, 0, 0] >= 0.33).all()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"generations": 0}, sp.InputError, "generations"),
        ({"population": 1.5}, sp.InputError, "population"),
        ({"probability": 0.0}, sp.InputError, "probability"),
        ({"classes": [10]}, sp.InputError, "class 10"),
        ({"classes": []}, sp.InputError, "empty"),
        ({"encoding": "indirect"}, sp.UnknownNameError, "direct"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], named: str, mlp: nn.Module) -> None:
    with pytest.raises(error, match=named):
        evolve_rubbish(sp.Model(mlp), SHAPE, **options)


def test_scores_and_a_range_are_needed(mlp: nn.Module) -> None:
    with pytest.raises(sp.CapabilityError, match="scores"):
        evolve_rubbish(sp.Model(mlp, access=sp.Access.LABELS), SHAPE)
    with pytest.raises(sp.CapabilityError, match="bounds"):
        evolve_rubbish(sp.Model(mlp, bounds=None), SHAPE)


# Encodings


def test_polynomial_mutation() -> None:
    """It inverts the distribution function of the density (eta + 1) / 2 (1 - |d|)^eta."""
    step = torch.linspace(-0.6, 0.6, 401, dtype=torch.float64)
    for eta in (1.0, 15.0, 20.0):
        half = (1 - step.abs()) ** (eta + 1) / 2
        torch.testing.assert_close(polynomial(torch.where(step < 0, half, 1 - half), eta), step, rtol=0, atol=1e-6)


def test_direct_mutation_halves() -> None:
    """A tenth of the values change, and half as many after each thousand generations, by as much."""
    start = torch.full((200, 1, 20, 20), 0.5)
    for generation, rate in ((1, 0.1), (999, 0.1), (1000, 0.05), (3500, 0.0125)):
        child = Direct().mutated(start, keys(200, generation), generation)
        change = (child - start)[child != start]
        assert abs(len(change) / start.numel() - rate) < 4 * math.sqrt(rate / start.numel())
        assert abs(float(change.abs().mean()) - 1 / 17) < 0.005  # the mean of the density
    ends = torch.cat([torch.zeros(50, 400), torch.ones(50, 400)])
    mutated = Direct().mutated(ends, keys(100), 1)
    assert float(mutated.min()) == 0
    assert float(mutated.max()) == 1


def by_hand(genome: Networks, row: float, column: float) -> list[float]:
    """The last nodes' values of one network at one place, node by node."""
    values = [column, row, math.hypot(column, row), 1.0]
    functions = (math.sin, lambda t: 1 / (1 + math.exp(-t)), lambda t: math.exp(-t * t), lambda t: t)
    for node in range(4, genome.weights.shape[1]):
        sources = [i for i in range(node) if bool(genome.connected[0, node, i])]
        total = sum(float(genome.weights[0, node, i]) * values[i] for i in sources)
        values.append(functions[int(genome.activations[0, node])](total))
    return values


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5), (2, 4, 5), (4, 5)])
def test_cppn_images(shape: tuple[int, ...]) -> None:
    encoding, count = CPPN(hidden=6), 12
    genomes = generations(encoding, count, shape, 25)[-1]
    images = encoding.images(genomes, shape)
    assert images.shape == (count, *shape)
    assert ((images >= 0) & (images <= 1)).all()
    channels = shape[0] if len(shape) == 3 else 1
    planes = images.view(count, channels, 4, 5)
    for one in range(count):
        genome = Networks(*(part[one : one + 1] for part in vars(genomes).values()))
        for i in range(4):
            for j in range(5):
                outputs = by_hand(genome, -1 + 2 * i / 3, -1 + 2 * j / 4)[-channels:]
                expected = [(min(max(v, -1), 1) + 1) / 2 for v in outputs]
                expected = colorsys.hsv_to_rgb(*expected) if channels == 3 else expected
                torch.testing.assert_close(planes[one, :, i, j], torch.tensor(list(expected)), rtol=0, atol=1e-3)


def test_cppn_genomes_stay_networks() -> None:
    """Connections lead forward, inputs have none, outputs feed none; every node of a sort turns up; weights stay in bounds."""
    encoding, found = CPPN(hidden=5), generations(CPPN(hidden=5), 60, (3, 4, 4), 40)
    assert torch.equal(found[0].connected.sum((1, 2)), torch.full((60,), 12))
    place = torch.arange(12)
    for genome in found:
        target, source = genome.connected.nonzero()[:, 1:].T
        assert (source < target).all()
        assert (target >= 4).all()
        assert (source < 9).all()
        assert float(genome.weights.abs().max()) <= encoding.largest
    last = found[-1]
    assert len(last.connected.flatten(1).unique(dim=0)) == 60, "each has a topology of its own"
    used = last.connected.any(1) | last.connected.any(2)
    assert used[:, (place >= 4) & (place < 9)].any(0).all()
    assert last.activations.unique().tolist() == [0, 1, 2, 3]


def test_cppn_mutations_happen_as_often_as_stated() -> None:
    """Each alone: the others' chances are 0."""
    none = {"rate": 1e-9, "add": 0.0, "remove": 0.0, "add_node": 0.0, "remove_node": 0.0}
    shape, count = (1, 4, 4), 4000
    parents = generations(CPPN(hidden=4), count, shape, 4)[-1]
    before = parents.connected.sum((1, 2))

    def children(**chance: float) -> Networks:
        return CPPN(hidden=4, **(none | chance)).mutated(parents, keys(count, 9), 1)

    def close(share: Tensor, expected: float) -> bool:
        return abs(float(share.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / share.numel())

    same = children()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(same).values(), vars(parents).values(), strict=True))
    free = before < 26  # there is room for another
    more = children(add=0.5).connected.sum((1, 2)) - before
    assert more.unique().tolist() == [0, 1]
    assert close(more[free], 0.5)
    less = before - children(remove=0.3).connected.sum((1, 2))
    assert less.unique().tolist() == [0, 1]
    assert close(less[before > 0], 0.3)
    drift = children(rate=0.1)
    assert close(drift.weights != parents.weights, 0.1)
    assert close(drift.activations != parents.activations, 0.1 * 3 / 4)

    split = children(add_node=1.0)
    changed = (split.connected != parents.connected).flatten(1).any(1)
    assert changed.double().mean() > 0.5
    for one in changed.nonzero()[:20, 0].tolist():
        gone = (parents.connected[one] & ~split.connected[one]).nonzero().tolist()
        new = (split.connected[one] & ~parents.connected[one]).nonzero().tolist()
        ((end, begin),), middle = gone, new[0][0]
        assert new == [[middle, begin], [end, middle]]
        assert float(split.weights[one, middle, begin]) == 1
        assert float(split.weights[one, end, middle]) == float(parents.weights[one, end, begin])

    fewer = children(remove_node=1.0)
    hidden = slice(4, 8)

    def used(genomes: Networks) -> Tensor:
        return (genomes.connected.any(1) | genomes.connected.any(2))[:, hidden]

    lost = used(parents) & ~used(fewer)
    assert (lost.any(1) == used(parents).any(1)).all()
    kept = ~(parents.connected & ~fewer.connected).any(2).any(1) | lost.any(1)
    assert kept.all()
