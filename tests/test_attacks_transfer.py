"""Attacks for other models: against the papers' equations in a loop for one sample, and their parts against torch and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, interpolate, pad

import saddlepoint as sp
from saddlepoint.attacks.transfer import DIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM, gaussian, resized, resizing
from saddlepoint.engine import Attack
from saddlepoint.rng import Keys
from saddlepoint.threats import Threat

EPS, STEPS, SEED, COUNT, CLASSES = 0.1, 4, 5, 3, 4
HEIGHT, WIDTH = 12, 10
_generator = torch.Generator().manual_seed(1)
X = 0.2 + 0.6 * torch.rand(COUNT, 2, HEIGHT, WIDTH, generator=_generator, dtype=torch.float64)


def network() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * (HEIGHT - 2) * (WIDTH - 2), CLASSES)
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=_generator, dtype=torch.float64))
    return net


NET = network()
Y = NET(X).argmax(1)
Transform = Callable[[Tensor], Tensor]


def gradient(x: Tensor, label: Tensor, transform: Transform = lambda x: x) -> Tensor:
    leaf = x.clone().requires_grad_()
    cross_entropy(NET(transform(leaf)), label[None]).backward()
    assert leaf.grad is not None
    return leaf.grad


def clip(x: Tensor, origin: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, origin - EPS), origin + EPS).clamp(0, 1)


def key(sample: int, k: int, stream: int = 0) -> Keys:
    return Keys.of(SEED, torch.tensor([sample])).absorb(k).absorb(stream)


def diverse(keys: Keys, probability: float) -> Transform:
    """Resize and pad with torch's own functions; the random numbers are the attack's."""

    def draw(number: int) -> float:
        return float(keys.absorb(number).uniform((), torch.float64))

    def transform(x: Tensor) -> Tensor:
        if draw(0) >= probability:
            return x
        sides = [math.floor(0.9 * side) + int(draw(1) * (side - math.floor(0.9 * side))) for side in (HEIGHT, WIDTH)]
        top, left = (
            int(draw(number) * (side - new + 1)) for number, side, new in zip((3, 4), (HEIGHT, WIDTH), sides, strict=True)
        )
        small = interpolate(x, sides, mode="bilinear", align_corners=False)
        return pad(small, (left, WIDTH - sides[1] - left, top, HEIGHT - sides[0] - top))

    return transform


def smoothed(g: Tensor, length: int) -> Tensor:
    """The kernel of Dong et al. (2019): densities at even distances up to 3, the outer product over its sum."""
    density = torch.from_numpy(stats.norm.pdf(torch.linspace(-3, 3, length, dtype=torch.float64)))
    kernel = density[:, None] * density / (density[:, None] * density).sum()
    return conv2d(g, kernel.expand(2, 1, length, length), padding=length // 2, groups=2)


def papers_loop(
    slope: Callable[[Tensor, Tensor, Keys], Tensor], *, momentum: float = 1.0, ahead: bool = False, neighbours: int = 0
) -> Tensor:
    """Algorithm 1 of Wang & He (2021) for one sample after another; without neighbours those of the other papers."""
    found = []
    for sample in range(COUNT):
        origin, label = X[sample : sample + 1], Y[sample]
        x, velocity, variance, alpha = origin, torch.zeros_like(origin), torch.zeros_like(origin), EPS / STEPS
        for k in range(STEPS):
            look = x + alpha * momentum * velocity if ahead else x
            g = slope(look, label, key(sample, k))
            whole = g + variance
            velocity = momentum * velocity + whole / whole.abs().mean() if momentum else whole
            if neighbours:
                total = torch.zeros_like(x)
                for j in range(neighbours):
                    keys = key(sample, k + 1, stream=1).absorb(j)  # drawn when the next step needs them
                    r = 1.5 * EPS * (2 * keys.uniform((2, HEIGHT, WIDTH), torch.float64) - 1)
                    total += slope(look + r, label, keys.absorb(2))
                variance = total / neighbours - g
            x = clip(x + alpha * velocity.sign(), origin)
        found.append(x)
    return torch.cat(found)


def plain(x: Tensor, label: Tensor, keys: Keys) -> Tensor:
    return gradient(x, label)


def scaled(x: Tensor, label: Tensor, keys: Keys) -> Tensor:
    return sum(gradient(x, label, lambda x, i=i: x / 2**i) for i in range(5)) / 5


def composite(x: Tensor, label: Tensor, keys: Keys) -> Tensor:
    parts = []
    for i in range(3):
        view = diverse(keys.absorb(i), 0.7)
        parts.append(gradient(x, label, lambda x, i=i, view=view: view(x / 2**i)))
    return smoothed(sum(parts) / 3, 7)


ROWS: dict[str, tuple[Attack, Callable[[], Tensor]]] = {
    "DIFGSM": (
        DIFGSM(steps=STEPS),
        lambda: papers_loop(lambda x, label, keys: gradient(x, label, diverse(keys.absorb(0), 0.5))),
    ),
    "DIFGSM without momentum": (
        DIFGSM(steps=STEPS, momentum=0.0),
        lambda: papers_loop(lambda x, label, keys: gradient(x, label, diverse(keys.absorb(0), 0.5)), momentum=0),
    ),
    "TIFGSM": (
        TIFGSM(steps=STEPS, kernel=5),
        lambda: papers_loop(lambda x, label, keys: smoothed(gradient(x, label), 5)),
    ),
    "TIFGSM with a kernel as large as the image": (
        TIFGSM(steps=STEPS),
        lambda: papers_loop(lambda x, label, keys: smoothed(gradient(x, label), 15)),
    ),
    "SINIFGSM": (SINIFGSM(steps=STEPS), lambda: papers_loop(scaled, ahead=True)),
    "SINIFGSM without looking ahead": (SINIFGSM(steps=STEPS, look_ahead=False), lambda: papers_loop(scaled)),
    "VMIFGSM": (VMIFGSM(steps=STEPS), lambda: papers_loop(plain, neighbours=20)),
    "VNIFGSM": (VNIFGSM(steps=STEPS), lambda: papers_loop(plain, neighbours=20, ahead=True)),
    "all of them": (
        VNIFGSM(steps=STEPS, neighbours=3, diversity=0.7, kernel=7, scales=3, momentum=0.8),
        lambda: papers_loop(composite, neighbours=3, ahead=True, momentum=0.8),
    ),
}


def ours(attack: Attack) -> Tensor:
    return sp.attack(sp.Model(NET), X, Y, attack, sp.Linf(EPS), seed=SEED, keep="last").adversarial


@pytest.mark.parametrize("name", ROWS)
def test_papers_equations(name: str) -> None:
    attack, equations = ROWS[name]
    torch.testing.assert_close(ours(attack), equations(), rtol=0, atol=1e-9)


def test_the_settings_differ() -> None:
    """So that none of the rows above would pass for another one."""
    found = [ours(attack) for attack, _ in ROWS.values()]
    for i, first in enumerate(found):
        assert not any(torch.allclose(first, other, atol=1e-6) for other in found[:i])


@pytest.mark.parametrize(("size", "offset"), [(12, 0), (11, 0), (11, 1), (7, 3), (1, 11)])
def test_resizing_is_that_of_torch(size: int, offset: int) -> None:
    x = torch.rand(2, 1, 12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = resized(torch.tensor([float(size)]), torch.tensor([float(offset)]), 12)[0]
    expected = pad(interpolate(x, (size, 1), mode="bilinear", align_corners=False), (0, 0, offset, 12 - size - offset))
    found = torch.einsum("ij,ncjw->nciw", matrix, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # torch finds its sources in float32


def test_unchanged_inputs_stay_bit_by_bit() -> None:
    for matrix in resizing(Keys.of(0, torch.arange(50)), torch.zeros(50, 1, 9, 8), 0.0):
        assert torch.equal(matrix, torch.eye(matrix.shape[1]).expand_as(matrix))


@pytest.mark.parametrize("shape", [(1, 30, 20), (3, 30), (30,), (1, 30, 20, 10)])
def test_sizes_and_places_are_those_that_the_paper_draws_from(shape: tuple[int, ...]) -> None:
    """Sizes from 0.9 of the side, all places alike, the same share along all axes, about half of the inputs changed."""
    matrices = resizing(Keys.of(0, torch.arange(4000)), torch.zeros(4000, *shape), 0.5)
    assert [m.shape[1] for m in matrices] == list(shape[1:] or shape)
    first = matrices[0]
    side, filled = 30, first.sum(2) > 0.5
    sizes = filled.sum(1)
    changed = sizes < side
    assert 0.46 < float(changed.double().mean()) < 0.54
    assert sizes[changed].unique().tolist() == [27, 28, 29]
    starts = filled.to(torch.uint8).argmax(1)
    for size in (27, 28, 29):
        counts = torch.bincount(starts[sizes == size], minlength=side - size + 1)
        assert len(counts) == side - size + 1
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    for other in matrices[1:]:
        smaller = (other.sum(2) > 0.5).sum(1)
        expected = math.floor(0.9 * other.shape[1]) + ((sizes - 27) / 3 * (other.shape[1] * 0.1)).floor()
        assert torch.equal(smaller < other.shape[1], changed)
        assert bool(((smaller - expected).abs() <= 1)[changed].all())


@pytest.mark.parametrize("length", [1, 3, 7, 15])
def test_the_kernel_is_separable_and_of_weight_one(length: int) -> None:
    matrix = gaussian(31, length)
    impulse = torch.zeros(1, 2, 31, 31, dtype=torch.float64)
    impulse[..., 15, 15] = 1
    expected = impulse if length == 1 else smoothed(impulse, length)
    torch.testing.assert_close(matrix @ impulse @ matrix.T, expected)
    torch.testing.assert_close(matrix[15].sum(), torch.tensor(1.0, dtype=torch.float64))
    assert int((matrix[15] > 0).sum()) == length


def test_smoothing_stays_inside_its_sample_and_channel() -> None:
    weight = torch.zeros(2, 2 * 9, dtype=torch.float64)
    weight[1, 4] = 1.0  # the middle of the first channel
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(weight)
    x = torch.full((2, 2, 3, 3), 0.5, dtype=torch.float64)
    never = sp.Untargeted(confidence=9)
    moved = sp.attack(sp.Model(net), x, torch.tensor([1, 1]), TIFGSM(steps=1, kernel=3), sp.Linf(0.1), never, keep="last")
    change = moved.adversarial - x
    assert bool((change[:, 0] < 0).all())
    assert bool((change[:, 1] == 0).all())


@pytest.mark.parametrize("threat", [sp.Linf(EPS), sp.L2(0.5)], ids=str)
def test_passes_are_the_stated_ones(threat: Threat) -> None:
    """Variance tuning of the last step would be of no use: 1 + (steps - 1) * (1 + N) gradients."""
    never = sp.Untargeted(confidence=1e6)
    for attack, forward, backward in [
        (TIFGSM(steps=STEPS), STEPS + 1, STEPS),
        (DIFGSM(steps=STEPS), 1 + 2 * STEPS, STEPS),
        (SINIFGSM(steps=STEPS), 1 + 6 * STEPS, 5 * STEPS),
        (SINIFGSM(steps=STEPS, look_ahead=False), 2 + 5 * STEPS, 5 * STEPS),
        (VMIFGSM(steps=STEPS, neighbours=7), 2 + 7 * (STEPS - 1) + STEPS - 1, 1 + 8 * (STEPS - 1)),
        (VNIFGSM(steps=STEPS, neighbours=7), 1 + 8 * (STEPS - 1) + 1 + STEPS, 1 + 8 * (STEPS - 1)),
    ]:
        queries = sp.attack(sp.Model(NET), X, Y, attack, threat, never).queries
        assert queries.forward.tolist() == [forward] * COUNT, attack
        assert queries.backward.tolist() == [backward] * COUNT, attack


def test_borders_are_inside_the_range_of_the_inputs() -> None:
    """Where 0 is no input, what is around a shrunk one is the input nearest to 0."""
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return NET(x)

    attack = DIFGSM(steps=STEPS, diversity=1.0)
    sp.attack(sp.Model(Watching(), bounds=(1, 3)), X + 1.5, Y, attack, sp.Linf(EPS), sp.Untargeted(confidence=1e6))
    assert min(float(x.min()) for x in seen) >= 1 - 1e-12
    assert any(bool((x[:, :, 0] == 1).all(dim=(1, 2)).any()) for x in seen), "a row of the ground"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"diversity": 1.5}, "diversity"),
        ({"kernel": 4}, "kernel"),
        ({"kernel": 0}, "kernel"),
        ({"scales": 0}, "scales"),
        ({"neighbours": -1}, "neighbours"),
        ({"neighbours": 2.5}, "neighbours"),
        ({"neighbourhood": 0.0}, "neighbourhood"),
        ({"neighbourhood": math.inf}, "neighbourhood"),
        ({"steps": 0}, "steps"),
        ({"momentum": -1.0}, "momentum"),
        ({"loss": "no such"}, "loss"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(sp.SaddlepointError, match=told):
        VMIFGSM(**settings)
