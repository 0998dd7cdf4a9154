"""MagNet's autoencoder: its layers, its loss, its detectors' scores, and both attacks on it."""

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.defenses.purification import CIFAR, MNIST_DETECTOR, Autoencoder, Purifier, train_autoencoder
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]


@pytest.fixture(scope="module")
def classifier() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def reformer() -> Autoencoder:
    net = built(1, (16,))
    train_autoencoder(net, DIGITS.train.x, epochs=40, batch_size=64, learning_rate=1e-2)
    return net


def built(channels=1, structure=(3, "pool", 3), dtype=torch.float32) -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(channels, structure).to(dtype)


def accuracy(model: sp.Model | sp.Defended, x: torch.Tensor) -> float:
    return float((model.predict(x) == Y).double().mean())


def test_the_layers_are_those_of_the_papers_table_for_mnist():
    net, x = built(dtype=torch.float64), X[:3].double()
    w = list(net.parameters())  # weight and bias of five convolutions
    assert [tuple(v.shape[:2]) for v in w[::2]] == [(3, 1), (3, 3), (3, 3), (3, 3), (1, 3)]
    h = functional.conv2d(x, w[0], w[1], padding=1).sigmoid()
    h = h.view(3, 3, 4, 2, 4, 2).mean((3, 5))
    h = functional.conv2d(h, w[2], w[3], padding=1).sigmoid()
    h = functional.conv2d(h, w[4], w[5], padding=1).sigmoid()
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = functional.conv2d(h, w[6], w[7], padding=1).sigmoid()
    torch.testing.assert_close(net(x), functional.conv2d(h, w[8], w[9], padding=1).sigmoid())


@pytest.mark.parametrize(
    ("channels", "structure", "convolutions"), [(1, MNIST_DETECTOR, 3), (3, CIFAR, 3), (3, (4, "pool"), 3)]
)
def test_any_structure_keeps_the_shape_and_range(channels, structure, convolutions):
    net = built(channels, structure)
    x = torch.rand(2, channels, 6, 4, generator=torch.Generator().manual_seed(0))
    out = net(x)
    assert out.shape == x.shape
    assert bool(((out > 0) & (out < 1)).all())
    assert len(list(net.parameters())) == 2 * convolutions


def test_the_loss_is_the_mean_squared_error_from_the_clean_image():
    net, x = built(dtype=torch.float64), X[:4].double()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = net.loss(x, 0.3)
        torch.manual_seed(5)
        corrupted = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    torch.testing.assert_close(found, (net(corrupted) - x).square().mean())


def test_reconstruction_errors_are_means_of_powers():
    net, x = built(dtype=torch.float64), X[:4].double()
    for p in (1, 2):
        expected = torch.stack([((one - net(one[None])[0]).abs() ** p).mean() for one in x])
        torch.testing.assert_close(net.reconstruction_error(x, p), expected)


def test_the_divergence_is_scipys(classifier):
    net, x = built(), X[:5]
    with torch.no_grad():
        found = net.divergence(classifier, x, temperature=10.0)
        p, q = ((classifier.forward(inputs) / 10).softmax(1).double().numpy() for inputs in (x, net(x)))
    expected = torch.as_tensor(jensenshannon(p, q, axis=1) ** 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:the autoencoder has hardly learnt")
def test_training_lowers_the_error_and_is_decided_by_the_seed():
    runs = []
    for seed in (0, 0, 1):
        net = built()
        before = float(net.loss(X, 0.0).detach())
        training = train_autoencoder(net, DIGITS.train.x[:256], epochs=5, batch_size=64, learning_rate=1e-2, seed=seed)
        assert training.complete
        assert float(net.loss(X, 0.0).detach()) < before
        runs.append(net.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert any(not torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it(classifier, reformer):
    defended, threat = sp.Defended(classifier, [reformer.transform()]), sp.Linf(0.25)
    naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), threat)
    adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=20), threat)
    assert accuracy(defended, X) >= 0.9
    assert naive.robust_accuracy <= 0.1
    assert accuracy(defended, naive.adversarial) >= 0.6
    assert adaptive.robust_accuracy <= 0.2


def test_examples_reconstruct_worse_than_clean_images(classifier, reformer):
    adversarial = sp.attack(classifier, X, Y, sp.attacks.FGSM(), sp.Linf(0.25)).adversarial
    with torch.no_grad():
        clean, attacked = (reformer.reconstruction_error(inputs) for inputs in (X, adversarial))
    assert float((attacked[:, None] > clean).double().mean()) > 0.95  # the area under the ROC curve


def test_it_is_declared_exact_and_not_random(reformer):
    transform = reformer.transform()
    assert isinstance(reformer, Purifier)
    assert (transform.name, transform.backward, transform.random) == ("Autoencoder", "exact", False)
    defended = sp.Defended(sp.Model(sp.zoo.build("digits-cnn")), [transform])
    assert defended.draws == 1
    assert reformer in defended.networks()


@pytest.mark.parametrize("structure", [(), (0,), (3, "max"), (2.5,)])
def test_other_structures_are_refused(structure):
    with pytest.raises(InputError, match="structure"):
        Autoencoder(1, structure)


def test_bad_input_is_refused():
    net = built()
    with pytest.raises(InputError, match="multiples of 2"):
        net(torch.zeros(1, 1, 7, 8))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        train_autoencoder(net, 255 * X, epochs=1)
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        train_autoencoder(net, X.flatten(1), epochs=1)
    with pytest.raises(InputError, match="noise"):
        train_autoencoder(net, X, epochs=1, noise=-1.0)
    with pytest.raises(InputError, match="temperature"):
        net.divergence(sp.Model(sp.zoo.build("digits-cnn")), X, 0.0)
    with pytest.raises(InputError, match="p must"):
        net.reconstruction_error(X, 0)


def test_one_that_learnt_nothing_warns():
    with pytest.warns(sp.SaddlepointWarning, match="hardly learnt"):
        train_autoencoder(Autoencoder(channels=1), DIGITS.train.x[:256], epochs=1)
