"""Defense-GAN: the critic's loss, the descent to the nearest image, whose turn it is, and both attacks."""

import numpy as np
import pytest
import torch
from torch import nn

import saddlepoint as sp
from saddlepoint.defenses.purification import Critic, DefenseGAN, Generator, critic_loss, train_gan
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:40], DIGITS.test.y[:40]


@pytest.fixture(scope="module")
def classifier() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def generator() -> Generator:
    net = built(8, 12)
    train_gan(net, DIGITS.train.x, critic=Critic((1, 8, 8), 12), critic_steps=2, epochs=15, batch_size=32, learning_rate=4e-3)
    return net


def built(latent=3, width=4, dtype=torch.float32) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generator((1, 8, 8), latent, width).to(dtype)


def linear() -> Generator:
    """G(z) = A z + b, for which the nearest image is a least-squares problem."""
    net = built(dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.layers = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8))).double()
    return net


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def accuracy(model: sp.Model | sp.Defended, x: torch.Tensor) -> float:
    return float((model.predict(x) == Y).double().mean())


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_the_critics_loss_in_closed_form_for_a_linear_critic(penalty):
    w, real, fake = normal(6), normal(4, 1, 2, 3), normal(4, 1, 2, 3).flip(0)
    found = critic_loss(lambda x: x.flatten(1) @ w, real, fake, torch.rand(4, dtype=torch.float64), penalty)
    difference = (fake.flatten(1) @ w).mean() - (real.flatten(1) @ w).mean()
    torch.testing.assert_close(found, difference + penalty * (w.norm() - 1) ** 2)


def test_the_penalty_is_taken_between_real_and_fake():
    real, fake, share = torch.full((3, 1, 1, 1), 2.0), torch.zeros(3, 1, 1, 1), torch.tensor([0.0, 0.25, 1.0])
    found = critic_loss(lambda x: x.flatten(1).square().sum(1), real, fake, share, 1.0)  # of gradient 2 u at u = 0, 0.5, 2
    torch.testing.assert_close(found, torch.tensor(0.0 - 4.0 + ((0 - 1) ** 2 + (1 - 1) ** 2 + (4 - 1) ** 2) / 3))


def test_for_a_linear_generator_the_nearest_image_is_the_least_squares_solution():
    net, x = linear(), normal(5, 1, 8, 8)
    matrix, offset = (p.detach().numpy() for p in net.layers[0].parameters())
    z = np.linalg.lstsq(matrix, (x.flatten(1).numpy() - offset).T, rcond=None)[0]
    expected = torch.as_tensor((matrix @ z).T + offset).view(5, 1, 8, 8)
    torch.testing.assert_close(DefenseGAN(net, steps=300, restarts=2)(x), expected)


def test_the_descent_is_gradient_descent_with_momentum():
    net, x, z = linear(), normal(1, 1, 8, 8), normal(1, 3)
    matrix, offset = (p.detach().numpy() for p in net.layers[0].parameters())
    point, velocity = z.numpy()[0].copy(), np.zeros(3)
    for _ in range(4):
        gradient = 2 / 64 * matrix.T @ (matrix @ point + offset - x.numpy().ravel())
        velocity = 0.5 * velocity - 3.0 * gradient
        point = point + velocity
    found = DefenseGAN(net, steps=4, restarts=1, learning_rate=3.0, momentum=0.5).project(x, z)
    torch.testing.assert_close(found, torch.as_tensor(matrix @ point + offset).view(1, 1, 8, 8))


def test_of_several_restarts_the_nearest_counts_for_each_image_alone():
    net, x, z = built(dtype=torch.float64), X[:4].double(), normal(12, 3)
    together = DefenseGAN(net, steps=2, restarts=3).project(x, z)
    for i, one in enumerate(x):
        each = [DefenseGAN(net, steps=2, restarts=1).project(one[None], z[3 * i + r][None])[0] for r in range(3)]
        torch.testing.assert_close(together[i], min(each, key=lambda image: float((image - one).square().sum())))


def test_the_generator_moves_at_every_kth_batch_and_the_critic_at_each():
    start = built().state_dict()
    moved, critics = [], []
    for batches, k in [(2, 3), (3, 3), (1, 1), (1, 2)]:
        net, critic = built(), Critic((1, 8, 8), 4)
        critic.load_state_dict({key: 0.1 + torch.zeros_like(value) for key, value in critic.state_dict().items()})
        train_gan(net, X[: 8 * batches], critic=critic, critic_steps=k, epochs=1, batch_size=8)
        moved.append(any(not torch.equal(value, start[key]) for key, value in net.state_dict().items()))
        critics.append(critic.state_dict())
    assert moved == [False, True, True, False]
    assert all(torch.equal(critics[2][key], critics[3][key]) for key in critics[2])  # the generator's loss is none of its own
    assert any(bool((value != 0.1).any()) for value in critics[2].values())


def test_training_brings_the_images_closer_to_the_data(generator):
    def nearest(net: Generator) -> float:
        return float((DefenseGAN(net, steps=30, restarts=2)(X) - X).square().mean())

    with torch.random.fork_rng():
        assert nearest(generator) < 0.7 * nearest(built(8, 12))


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it(classifier, generator):
    transform = DefenseGAN(generator, steps=30, restarts=2).transform()
    defended = sp.Defended(classifier, [transform], draws=2)
    naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert accuracy(defended, X) >= 0.7
        assert naive.robust_accuracy <= 0.1
        assert accuracy(defended, naive.adversarial) >= 0.45
        adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=8), sp.Linf(0.3))
    assert adaptive.robust_accuracy <= 0.3


def test_it_is_declared_random_with_bpda_identity():
    purifier = DefenseGAN(built(), steps=2, restarts=1)
    transform = purifier.transform()
    assert (transform.name, transform.backward, transform.random) == ("DefenseGAN", "identity", True)
    assert sp.Defended(sp.Model(sp.zoo.build("digits-cnn")), [transform]).draws == 10
    with torch.random.fork_rng():
        assert not torch.equal(purifier(X), purifier(X))
    assert all(p.grad is None for p in purifier.parameters())


def test_any_shape_is_made():
    for shape in [(1, 28, 28), (3, 32, 32), (1, 6, 9), (2, 4, 4)]:
        images = Generator(shape, 2, 3)(torch.zeros(2, 2))
        assert images.shape == (2, *shape)
        assert Critic(shape, 3)(images).shape == (2,)
        assert bool(((images > 0) & (images < 1)).all())


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="shape must be"):
        Generator((8, 8))
    with pytest.raises(InputError, match="steps and restarts"):
        DefenseGAN(built(), steps=0)
    with pytest.raises(InputError, match="momentum"):
        DefenseGAN(built(), momentum=1.0)
    with pytest.raises(InputError, match="makes images"):
        DefenseGAN(built())(torch.zeros(1, 1, 8, 9))
    with pytest.raises(InputError, match="makes images"):
        train_gan(built(), torch.zeros(4, 1, 8, 9))
    with pytest.raises(InputError, match="critic_steps"):
        train_gan(built(), X, critic_steps=0)
