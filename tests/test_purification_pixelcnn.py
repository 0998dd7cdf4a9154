"""PixelCNN and PixelDefend: what a pixel depends on, likelihoods that sum to 1, decoding written out, both attacks."""

import itertools
import math

import pytest
import torch
from scipy.stats import percentileofscore

import saddlepoint as sp
from saddlepoint.defenses.purification import PixelCNN, PixelDefend, p_values, train_pixelcnn
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]


@pytest.fixture(scope="module")
def classifier() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def density() -> PixelCNN:
    net = built(torch.float32, levels=17, width=10, layers=3)
    train_pixelcnn(net, DIGITS.train.x, epochs=6, batch_size=32, learning_rate=1e-2, schedule="linear")
    return net


def built(dtype=torch.float64, **settings) -> PixelCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PixelCNN(**{"levels": 4, "width": 5, "layers": 3, **settings}).to(dtype)


def images(count: int, *shape: int) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def accuracy(model: sp.Model | sp.Defended, x: torch.Tensor) -> float:
    return float((model.predict(x) == Y).double().mean())


@pytest.mark.parametrize(("channels", "size"), [(1, 6), (3, 2)])
def test_a_pixel_depends_on_all_before_it_and_none_after(channels, size):
    """Within reach, which for four layers is six rows up and six columns aside, there is no blind spot."""
    net = built(channels=channels, layers=4, width=16)  # with few features, dead ReLUs would hide dependences
    planes = net.planes(net.quantised(images(1, channels, size, size))).requires_grad_()
    logits = net.along_rows(planes, net.seen_above(planes))[0]
    pixels = size * size * channels
    for place in range(pixels):
        (gradient,) = torch.autograd.grad(logits.flatten(1)[:, place].square().sum(), planes, retain_graph=True)
        depends = gradient[0, 0].flatten() != 0
        assert depends.tolist() == [other < place for other in range(pixels)], place


@pytest.mark.parametrize(("channels", "size"), [(1, (2, 3)), (2, (1, 3))])
def test_the_probabilities_of_all_images_sum_to_one(channels, size):
    net = built(channels=channels, levels=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=channels * math.prod(size))), dtype=torch.float64) / 2
    total = net.log_likelihood(every.view(-1, channels, *size)).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_bits_per_dimension_of_equal_chances_are_the_logarithm_of_the_levels():
    net = built(levels=16)
    torch.nn.init.zeros_(net.last[-1].weight)
    torch.nn.init.zeros_(net.last[-1].bias)
    torch.testing.assert_close(net.bits_per_dimension(images(3, 1, 4, 4)), torch.full((3,), 4.0, dtype=torch.float64))


def test_quantising_rounds_and_the_image_comes_back():
    net, x = built(channels=3, levels=5), images(2, 3, 4, 6)
    levels = net.quantised(x)
    torch.testing.assert_close(levels[1, 2, 3 * 5 + 1], (x[1, 1, 2, 5] * 4).round().long())
    torch.testing.assert_close(net.image(levels), (x * 4).round() / 4)


@pytest.mark.parametrize(
    ("channels", "size", "eps"), [(1, (5, 4), 0.3), (3, (3, 2), 0.2), (1, (14, 3), 1.0), (1, (3, 3), 0.01)]
)
def test_decoding_is_algorithm_1_pixel_by_pixel(channels, size, eps):
    net, x = built(channels=channels, levels=6, layers=2), images(3, channels, *size)
    found = PixelDefend(net, eps)(x)
    for one, purified in zip(x, found, strict=True):
        current = one[None].clone()
        for row, column, channel in itertools.product(range(size[0]), range(size[1]), range(channels)):
            pixel = float(one[channel, row, column])
            with torch.no_grad():
                logits = net(net.quantised(current))
            chances = logits[0, :, row, channels * column + channel]
            nearest = round(pixel * 5)
            near = [z for z in range(6) if abs(z / 5 - pixel) <= eps or z == nearest]
            current[0, channel, row, column] = max(near, key=lambda z, chances=chances: float(chances[z])) / 5
        torch.testing.assert_close(purified, current[0])


def test_adaptive_decoding_leaves_likely_images_alone():
    net, x = built(), images(6, 1, 4, 4)
    log_likelihood = net.log_likelihood(x).detach()
    threshold = float(log_likelihood.median())
    likely = log_likelihood >= threshold
    adaptive, always = PixelDefend(net, 0.5, threshold)(x), PixelDefend(net, 0.5)(x)
    torch.testing.assert_close(adaptive[likely], (x[likely] * 3).round() / 3)
    torch.testing.assert_close(adaptive[~likely], always[~likely])
    assert not torch.equal(always[likely], adaptive[likely])
    assert torch.equal(PixelDefend(net, 0.5, -math.inf)(x), net.image(net.quantised(x)))


def test_p_values_are_ranks_among_the_reference():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 20, (50,), generator=generator).double()
    values = torch.tensor([-1.0, 3.0, 10.0, 10.5, 30.0], dtype=torch.float64)
    ranks = [percentileofscore(reference.numpy(), float(v), kind="weak") / 100 * 50 for v in values]
    torch.testing.assert_close(p_values(values, reference), torch.tensor([(r + 1) / 51 for r in ranks], dtype=torch.float64))


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it(classifier, density):
    defended = sp.Defended(classifier, [PixelDefend(density, eps_defend=0.15).transform()])
    naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.2))
    adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.2))
    assert accuracy(defended, X) >= 0.9
    assert naive.robust_accuracy <= 0.1
    assert accuracy(defended, naive.adversarial) >= 0.7
    assert adaptive.robust_accuracy <= 0.4


def test_examples_are_unlikely(classifier, density):
    adversarial = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=5), sp.Linf(0.2)).adversarial
    with torch.no_grad():
        reference = density.log_likelihood(DIGITS.train.x[:300])
        clean, attacked = (p_values(density.log_likelihood(x), reference) for x in (X, adversarial))
    assert float(attacked.max()) < 0.05
    assert float(clean.mean()) > 0.3


def test_it_is_declared_bpda_identity():
    transform = PixelDefend(built(dtype=torch.float32), 0.1).transform()
    assert (transform.name, transform.backward, transform.random) == ("PixelDefend", "identity", False)
    x = X[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((3 * transform(x)).sum(), x)
    assert bool((gradient == 3).all())


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="levels must be 2 to 256"):
        PixelCNN(levels=1)
    with pytest.raises(InputError, match="at least 1"):
        PixelCNN(width=0)
    with pytest.raises(InputError, match="3 channels"):
        built(channels=3).log_likelihood(images(1, 1, 4, 4))
    with pytest.raises(InputError, match="eps_defend"):
        PixelDefend(built(), -0.1)
    with pytest.raises(InputError, match="vectors"):
        p_values(torch.zeros(3), torch.zeros(0))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        train_pixelcnn(built(), X.double() * 255, epochs=1)
