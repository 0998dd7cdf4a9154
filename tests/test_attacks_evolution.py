"""Few pixels, GenAttack and CMA-ES against loops for one sample, the cma library, brute force and closed forms."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks import evolution
from saddlepoint.attacks.evolution import CMAES, FewPixel, GenAttack, Normal, log_odds, strategy, updated
from saddlepoint.rng import Keys

SEED, C, H, W = 3, 2, 5, 6
_generator = torch.Generator().manual_seed(1)
WEIGHT = torch.randn(4, C * H * W, generator=_generator, dtype=torch.float64).numpy() / 3
X = (0.05 + 0.9 * torch.rand(3, C, H, W, generator=_generator, dtype=torch.float64)).numpy()


class Curved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ torch.from_numpy(WEIGHT).T)


def logits(x: np.ndarray) -> np.ndarray:
    return np.tanh(WEIGHT @ x.ravel())


def probabilities(x: np.ndarray) -> np.ndarray:
    z = np.exp(logits(x))
    return z / z.sum()


Y = np.array([logits(x).argmax() for x in X])
each_sample = pytest.mark.parametrize("sample", range(len(X)))


def keys(sample: int, k: int, stream: int) -> Keys:
    return Keys.of(SEED, torch.tensor([sample])).absorb(k).absorb(stream)


def uniform(sample: int, k: int, stream: int, *shape: int) -> np.ndarray:
    return keys(sample, k, stream).uniform(shape, torch.float64)[0].numpy()


def normal(sample: int, k: int, stream: int, *shape: int) -> np.ndarray:
    return keys(sample, k, stream).normal(shape, torch.float64)[0].numpy()


def asked(attack: object, threat: object, sample: int, **options: object) -> np.ndarray:
    """All points that the attack asks about for one sample, after the clean one."""
    recording = Recording(Curved())
    model = sp.Model(recording)
    x, y = torch.from_numpy(X[[sample]]), torch.from_numpy(Y[[sample]])
    model.probe(x)
    recording.points.clear()
    options = {"seed": SEED, "keep": "margin", "ids": torch.tensor([sample])} | options
    result = sp.attack(model, x, y, attack, threat, **options)
    points = torch.cat(recording.points)
    assert len(points) == int(result.queries.forward + result.queries.verify)
    return points[1 : int(result.queries.forward)].numpy()


# The papers, for one sample


def pixels_changed(x: np.ndarray, genes: np.ndarray) -> np.ndarray:
    image = x.copy()
    for row, column, *colour in genes:
        image[:, int(row), int(column)] = colour
    return image


def differential_evolution(sample: int, pixels: int, count: int, steps: int, target: int | None) -> list[np.ndarray]:
    x, points = X[sample], []

    def fitness(image: np.ndarray) -> float:
        return -probabilities(image)[Y[sample]] if target is None else probabilities(image)[target]

    place = uniform(sample, 0, 1, count, pixels, 2) * (H, W)
    colour = np.clip((128 + 127 * normal(sample, 0, 2, count, pixels, C)) / 255, 0, 1)
    parents = np.concatenate([place, colour], 2)
    points = [pixels_changed(x, genes) for genes in parents]
    worth = [fitness(point) for point in points]
    for k in range(1, steps + 1):
        draw, fresh = uniform(sample, k, 1, 3, count), uniform(sample, k, 2, count, pixels, 2) * (H, W)
        children = []
        for i in range(count):
            ahead = list(range(1, count))  # of the others, by how far they are behind
            a, b, c = (parents[(i + ahead.pop(int(draw[j, i] * (count - 1 - j)))) % count] for j in range(3))
            child = a + 0.5 * (b - c)
            for pixel, axis in product(range(pixels), range(2)):
                if not 0 <= child[pixel, axis] < (H, W)[axis]:
                    child[pixel, axis] = fresh[i, pixel, axis]
            child[:, 2:] = np.clip(child[:, 2:], 0, 1)
            children.append(child)
        points += [pixels_changed(x, child) for child in children]
        for i, child in enumerate(children):
            if (value := fitness(pixels_changed(x, child))) > worth[i]:
                parents[i], worth[i] = child, value
    return points


@each_sample
@pytest.mark.parametrize(("pixels", "targeted"), [(1, False), (3, False), (2, True)])
def test_few_pixel_is_differential_evolution(sample: int, pixels: int, targeted: bool) -> None:
    target = (int(Y[sample]) + 1) % 4 if targeted else None
    expected = differential_evolution(sample, pixels, 7, 4, target)
    goal = None if target is None else sp.Targeted(target)
    found = asked(FewPixel(pixels=pixels, population=7, steps=4), sp.L0(pixels, per="pixel"), sample, goal=goal)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def enlarged(noise: np.ndarray) -> np.ndarray:
    """Bilinear, pixels as areas."""

    def along(values: np.ndarray, length: int, axis: int) -> np.ndarray:
        n = values.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * n / length - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, n - 1), (at - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        return (1 - share) * values.take(low, axis) + share * values.take(high, axis)

    return along(along(noise, H, 1), W, 2)


def genetic_algorithm(sample: int, eps: float, size: int | None, steps: int, plateau: int) -> list[np.ndarray]:
    x, y, count = X[sample], Y[sample], 5
    shape = (C, H, W) if size is None else (C, size, size)

    def image(noise: np.ndarray) -> np.ndarray:
        return np.clip(x + eps * (noise if size is None else enlarged(noise)), np.maximum(x - eps, 0), np.minimum(x + eps, 1))

    def fitness(noise: np.ndarray) -> float:
        p = probabilities(image(noise))
        return math.log(1 - p[y]) - math.log(p[y])

    population = list(2 * uniform(sample, 0, 1, count, *shape) - 1)
    points = [image(noise) for noise in population]
    best, stale, plateaus = -math.inf, 0, 0
    for k in range(steps):
        worth = np.array([fitness(noise) for noise in population])
        stale = 0 if worth.max() > best else stale + 1
        best = worth.max()
        plateaus, stale = (plateaus + 1, 0) if stale >= plateau else (plateaus, stale)
        chance = np.exp((worth - worth.max()) / 0.1)
        chance /= chance.sum()
        rho, alpha = max(0.1, 0.5 * 0.9**plateaus), max(0.15, 0.4 * 0.9**plateaus)
        parents = np.searchsorted(chance.cumsum(), uniform(sample, k, 1, 2 * (count - 1)))
        cross, move = uniform(sample, k, 2, count - 1, *shape), uniform(sample, k, 3, count - 1, *shape)
        following = [population[worth.argmax()]]
        for i in range(count - 1):
            one, two = parents[i], parents[i + count - 1]
            child = np.where(cross[i] < chance[one] / (chance[one] + chance[two]), population[one], population[two])
            child = np.where(move[i] < rho, child + alpha * (2 * move[i] / rho - 1), child)
            following.append(np.clip(child, -1, 1))
        population = following
        points += [image(noise) for noise in population[1:]]
    return points[: -(count - 1)]


@each_sample
@pytest.mark.parametrize("size", [None, 3])
def test_gen_attack_is_the_genetic_algorithm(sample: int, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "_PLATEAU", 2)
    expected = genetic_algorithm(sample, 0.02, size, 12, plateau=2)
    found = asked(GenAttack(population=5, steps=12, size=size), sp.Linf(0.02), sample)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_gen_attacks_fitness_is_the_papers() -> None:
    """log p_t - log of the others' sum, and the other way round for the true class."""
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, y = z.softmax(1), torch.arange(6) % 5
    of_y = p[torch.arange(6), y]
    towards = sp.Targeted(y).aim(y, y, 5)
    torch.testing.assert_close(log_odds(z, towards), of_y.log() - (1 - of_y).log())
    torch.testing.assert_close(log_odds(z, sp.Untargeted().aim(y, y, 5)), (1 - of_y).log() - of_y.log())


# CMA-ES


@pytest.mark.parametrize(("n", "count"), [(20, 6), (40, 12), (90, 30)])
def test_the_update_is_that_of_the_cma_library(n: int, count: int) -> None:
    """The same points and fitness; three samples of one batch at different iterations."""
    cma = pytest.importorskip("cma")
    optimum, scale = np.linspace(-1, 1, n), np.arange(1, n + 1) ** 2.0
    zero = torch.zeros(1, n, dtype=torch.float64)
    states, oracles, rates = [], [], strategy(n, count)
    for sample in range(3):
        step = torch.tensor([0.3 * (sample + 1)], dtype=torch.float64)
        states.append(Normal(zero, zero[:, 0], zero, step, zero + 1, zero, zero))
        options = {"CMA_diagonal": True, "popsize": count, "verbose": -9, "seed": 1}
        oracles.append(cma.CMAEvolutionStrategy(np.zeros(n), float(step), options))
    ahead = (0, 1, 7)
    for k in range(45):
        batch = [sample for sample in range(3) if k >= ahead[sample]]
        state = Normal(*(torch.cat([vars(states[s])[name] for s in batch]) for name in Normal.__dataclass_fields__))
        iteration = torch.tensor([k - ahead[s] for s in batch])
        z = torch.randn(len(batch), count, n, generator=_generator, dtype=torch.float64)
        points = (state.mean[:, None] + state.step[:, None, None] * state.scales[:, None] * z).numpy()
        loss = (scale * (points - optimum) ** 2).sum(2)
        after = updated(state, z, torch.from_numpy(-loss), iteration, rates)
        for row, sample in enumerate(batch):
            oracles[sample].ask()
            oracles[sample].tell(list(points[row]), list(loss[row]), check_points=False)
            states[sample] = Normal(*(value[row : row + 1] for value in vars(after).values()))
            oracle = oracles[sample]
            for ours, theirs in (
                (after.mean, oracle.mean),
                (after.step, oracle.sigma),
                (after.scales, oracle.sigma_vec.scaling),
                (after.path, oracle.adapt_sigma.ps),
                (after.drift, oracle.pc),
            ):
                np.testing.assert_allclose(ours[row].numpy(), theirs, rtol=1e-9, atol=1e-12)
    assert (states[0].scales / states[0].scales[0, 0] - 1).abs().max() > 0.05


def brought_in(x: np.ndarray, point: np.ndarray, eps: float, norm: str) -> np.ndarray:
    """Clipped, and in l2 then shortened."""
    if norm == "linf":
        return np.clip(point, np.maximum(x - eps, 0), np.minimum(x + eps, 1))
    delta = np.clip(point, 0, 1) - x
    return x + delta * min(1, eps / np.linalg.norm(delta))


@each_sample
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cmaes_asks_where_the_cma_library_would(norm: str, sample: int) -> None:
    """cma's distribution in place of ours, in a plane of 3 x 3 for each channel."""
    cma = pytest.importorskip("cma")
    x, y, eps, n, count = X[sample], Y[sample], 0.02, C * 9, 8
    first = 2.0 if norm == "linf" else 2.0 / math.sqrt(n)
    oracle = cma.CMAEvolutionStrategy(np.zeros(n), first, {"CMA_diagonal": True, "popsize": count, "verbose": -9, "seed": 1})
    points = []
    for k in range(10):
        u = oracle.mean + oracle.sigma * oracle.sigma_vec.scaling * normal(sample, k, 1, count, n)
        unit = eps if norm == "linf" else eps * math.sqrt(n / x.size)
        some = [brought_in(x, x + unit * enlarged(one.reshape(C, 3, 3)), eps, norm) for one in u]
        loss = [logits(point)[y] - max(np.delete(logits(point), y)) for point in some]
        oracle.ask()
        oracle.tell(list(u), loss, check_points=False)
        points += some
    threat = sp.Linf(eps) if norm == "linf" else sp.L2(eps)
    found = asked(CMAES(population=count, steps=10, size=3), threat, sample)
    np.testing.assert_allclose(found, points, rtol=0, atol=1e-6 * eps if norm == "linf" else 1e-4 * eps)


@pytest.mark.parametrize(("norm", "dual", "factor"), [("linf", 1, 1.05), ("l2", 2, 1.1)])
def test_cmaes_comes_close_to_the_closed_form(norm: str, dual: int, factor: float) -> None:
    """Two thousand queries in 16 dimensions."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    model = sp.Model(linear(weight, torch.zeros(2, dtype=torch.float64)), bounds=None)
    scores = model.logits(x)
    y, gap = scores.argmax(1), (scores[:, 0] - scores[:, 1]).abs()
    eps = factor * gap / (weight[0] - weight[1]).norm(p=dual)
    threat = sp.Linf(eps) if norm == "linf" else sp.L2(eps)
    result = sp.attack(model, x, y, CMAES(steps=200, size=None), threat)
    assert result.success.all()
    assert (result.queries.forward <= 2401).all()


# Properties


def test_partners_are_three_others_all_equally_often() -> None:
    count, drawn = 5, 4000
    partners = torch.stack(evolution._three_others(Keys.of(0, torch.arange(drawn)), count), 2)  # (drawn, count, 3)
    for i in range(count):
        assert (partners[:, i] != i).all()
        assert all(len(set(row)) == 3 for row in partners[:, i].tolist())
        triples, often = partners[:, i].unique(dim=0, return_counts=True)
        assert len(triples) == 4 * 3 * 2
        expected = drawn / 24
        assert ((often - expected) ** 2 / expected).sum() < 49.7  # 99.9 % of chi squared with 23 degrees of freedom


POPULATIONS = [
    (FewPixel(pixels=2, population=5, steps=3), sp.L0(2, per="pixel"), [5, 5, 5, 5]),
    (GenAttack(population=4, steps=4), sp.Linf(0.01), [4, 3, 3, 3]),
    (CMAES(population=6, steps=3, size=3), sp.Linf(0.01), [6, 6, 6]),
    (CMAES(population=6, steps=3), sp.L2(0.05), [6, 6, 6]),
]


@pytest.mark.parametrize(("attack", "threat", "sizes"), POPULATIONS, ids=lambda value: type(value).__name__)
def test_budgets_hold_to_the_query(attack: object, threat: object, sizes: list[int]) -> None:
    """Each generation costs its new individuals; a budget cuts the same questions short wherever it ends."""
    whole = asked(attack, threat, 0)
    assert len(whole) == sum(sizes)
    for limit in range(1, sum(sizes) + 2):
        cut = asked(attack, threat, 0, budget=sp.Budget(queries=limit))
        np.testing.assert_array_equal(cut, whole[: limit - 1])


@pytest.mark.parametrize(("attack", "threat", "sizes"), POPULATIONS, ids=lambda value: type(value).__name__)
def test_samples_are_attacked_together(attack: object, threat: object, sizes: list[int]) -> None:
    """Every sample's questions are those that it has alone, and there is one call a generation."""
    recording = Recording(Curved())
    model, x, y = sp.Model(recording), torch.from_numpy(X), torch.from_numpy(Y)
    model.probe(x)
    recording.points.clear()
    sp.attack(model, x, y, attack, threat, seed=SEED, keep="margin")
    assert [len(points) for points in recording.points[: len(sizes) + 1]] == [3, *(3 * size for size in sizes)]
    for sample in range(3):
        together = [
            points[sample * size : (sample + 1) * size] for points, size in zip(recording.points[1:], sizes, strict=False)
        ]
        np.testing.assert_allclose(torch.cat(together).numpy(), asked(attack, threat, sample), rtol=0, atol=1e-9)


def test_images_made_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, threat = FewPixel(pixels=2, population=9, steps=3), sp.L0(2, per="pixel")
    whole = asked(attack, threat, 1)
    monkeypatch.setitem(evolution._AT_ONCE, "cpu", 2 * C * H * W)
    parts = asked(attack, threat, 1)
    np.testing.assert_array_equal(whole, parts)
    cut = asked(attack, threat, 1, budget=sp.Budget(queries=14))
    np.testing.assert_array_equal(cut, whole[:13])


@pytest.mark.parametrize(("eps", "per", "most"), [(0, "pixel", 0), (1, "pixel", 1), (5, "pixel", 3), (5, "feature", 5)])
def test_few_pixels_change(eps: int, per: str, most: int) -> None:
    """In a small ball fewer than `pixels`; never more than those, and never what a mask forbids."""
    mask = torch.ones(C, H, W, dtype=torch.bool)
    mask[:, :, :3] = False
    points = torch.from_numpy(asked(FewPixel(pixels=3, population=20, steps=3), sp.L0(eps, mask=mask, per=per), 0))
    origin = torch.from_numpy(X[0])
    moved = points != origin
    assert not moved[:, ~mask].any()
    units = moved.any(1).flatten(1) if per == "pixel" else moved.flatten(1)
    assert int(units.sum(1).max()) == most


def test_one_pixel_finds_what_brute_force_finds() -> None:
    """On a linear model with grey images, the best change of a pixel is to an end of the range."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 36, generator=generator, dtype=torch.float64)
    x = torch.rand(40, 1, 6, 6, generator=generator, dtype=torch.float64)
    model = sp.Model(linear(weight, torch.zeros(3, dtype=torch.float64)))
    y = model.predict(x)
    ends = torch.stack([x.flatten(1)[:, None].repeat(1, 36, 1).diagonal_scatter(torch.full((40, 36), end).double(), 0, 1, 2)
                        for end in (0.0, 1.0)], 1)  # fmt: skip
    breakable = (model.logits(ends.view(-1, 1, 6, 6)).argmax(1).view(40, -1) != y[:, None]).any(1)
    result = sp.attack(model, x, y, FewPixel(population=50, steps=20), sp.L0(1))
    assert 5 < int(breakable.sum()) < 35
    assert not (result.success & ~breakable).any()
    assert int(result.success.sum()) >= int(breakable.sum()) - 1


def test_the_best_individual_is_kept() -> None:
    """What the attack calls current is the fittest point that it asked about."""
    for attack, threat, _ in POPULATIONS:
        seen: list[Tensor] = []
        recording = Recording(Curved())
        model, x, y = sp.Model(recording), torch.from_numpy(X[:1]), torch.from_numpy(Y[:1])
        model.probe(x)
        recording.points.clear()
        sp.attack(model, x, y, attack, threat, keep="margin", callback=lambda record, seen=seen: seen.append(record.points))
        points, start = torch.cat(recording.points[1:]), 0
        for generation, current in zip(recording.points[1:], seen, strict=False):
            start += len(generation)
            scores = torch.tanh(points[:start].flatten(1) @ torch.from_numpy(WEIGHT).T)
            others = scores.scatter(1, y.expand(start)[:, None], -torch.inf)
            margin = others.amax(1) - scores[:, y[0]]
            worth = margin if isinstance(attack, CMAES) else -scores.log_softmax(1)[:, y[0]]
            torch.testing.assert_close(current[0], points[worth.argmax()])


def test_labels_are_not_enough_and_unbounded_inputs_have_no_colours() -> None:
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    counting = Counting(Curved())
    for attack, threat, _ in POPULATIONS:
        with pytest.raises(sp.CapabilityError, match="scores"):
            sp.attack(sp.Model(counting, access=sp.Access.LABELS), x, y, attack, threat)
    with pytest.raises(sp.CapabilityError, match="bounds"):
        sp.perturb(Curved(), x, y, FewPixel(), sp.L0(1), bounds=None)
    assert counting.calls == []


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (FewPixel, {"pixels": 0}, "pixels"),
        (FewPixel, {"population": 3}, "population"),
        (FewPixel, {"steps": -1}, "steps"),
        (FewPixel, {"scale": 0.0}, "scale"),
        (FewPixel, {"loss": "nonsense"}, "nonsense"),
        (GenAttack, {"population": 1}, "population"),
        (GenAttack, {"temperature": math.nan}, "temperature"),
        (GenAttack, {"rho_min": 1.5}, "rho_min"),
        (GenAttack, {"alpha_min": 0}, "alpha_min"),
        (GenAttack, {"size": 0}, "size"),
        (CMAES, {"steps": 0}, "steps"),
        (CMAES, {"population": 2}, "population"),
        (CMAES, {"spread": math.inf}, "spread"),
        (CMAES, {"size": 2.5}, "size"),
    ],
)
def test_bad_hyperparameters(cls: type, settings: dict[str, object], named: str) -> None:
    with pytest.raises(sp.InputError, match=named):
        cls(**settings)


@pytest.mark.parametrize(
    ("threat", "most"), [(sp.L0(3, per="pixel"), 3), (sp.L0(9, per="pixel"), 5), (sp.L0(5), 2), (sp.L0(1), 1)], ids=str
)
def test_few_pixel_changes_as_many_as_the_ball_allows(threat, most):
    """Two channels: five features are two pixels. Five pixels are the most of the paper."""
    model = sp.Model(Curved(), bounds=(0, 1))
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    found = sp.attack(model, x, y, FewPixel(population=8, steps=3), threat, keep="margin")
    changed = (found.adversarial != x).any(1).flatten(1).sum(1)
    assert int(changed.max()) == most
