"""The guided denoiser: its four losses, what they leave alone, and both attacks on it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.defenses.purification import Denoiser, UNet, adversarial_pairs, guided_loss, train_denoiser
from saddlepoint.errors import InputError, UnknownNameError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]
THREAT = sp.Linf(0.2)


@pytest.fixture(scope="module")
def classifier() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def pairs(classifier) -> tuple[torch.Tensor, ...]:
    part = DIGITS.train.take(600)
    return adversarial_pairs(classifier, part.x, part.y, [("fgsm", THREAT), (sp.attacks.PGD(steps=5), THREAT)])


def built(dtype=torch.float32, **settings) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(**{"widths": (8, 16), **settings}).to(dtype)


def accuracy(model: sp.Model | sp.Defended, x: torch.Tensor) -> float:
    return float((model.predict(x) == Y).double().mean())


def tiny() -> sp.Model:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)).double())


def test_the_losses_and_their_gradients_are_the_papers():
    model, net = tiny(), built(torch.float64)
    nn.init.normal_(net.noise.last.weight, generator=torch.Generator().manual_seed(0))
    clean, y = X[:6].double(), Y[:6]
    adversarial = (clean + 0.1).clamp(0, 1)
    features = model.net[:2]
    expected = {
        "pixel": lambda out: (out - clean).abs().mean(),
        "feature": lambda out: (features(out) - features(clean)).abs().mean(),
        "logit": lambda out: (model.net(out) - model.net(clean)).abs().mean(),
        "class": lambda out: functional.nll_loss(model.net(out).log_softmax(1), y),
    }
    net.eval()
    for guide, formula in expected.items():
        grads = []
        for found in (guided_loss(net(adversarial), clean, guide, model, "1", y), formula(net(adversarial))):
            grads.append(torch.autograd.grad(found, list(net.parameters())))
            torch.testing.assert_close(found, formula(net(adversarial)))
        torch.testing.assert_close(grads[0], grads[1])
    assert all(p.grad is None for p in model.net.parameters())


def test_an_untrained_denoiser_is_the_identity():
    torch.testing.assert_close(built()(X), X, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (28, 28)])
def test_a_unet_takes_images_of_any_size(size):
    net = UNet(3, (4, 6, 8), depth=1)
    assert net(torch.rand(2, 3, *size)).shape == (2, 3, *size)
    assert UNet(3, (4,), depth=3)(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_training_touches_neither_the_guide_nor_the_random_state(classifier, pairs):
    weights = {key: value.clone() for key, value in classifier.net.state_dict().items()}
    state = torch.get_rng_state()
    net = built()
    training = train_denoiser(net, *(t[:128] for t in pairs), model=classifier, guide="class", epochs=1)
    assert training.complete
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, classifier.net.state_dict()[key]) for key, value in weights.items())
    assert all(p.grad is None for p in classifier.net.parameters())
    assert not torch.equal(net(X), X)


def test_pairs_are_examples_of_their_clean_images_within_the_threat(classifier, pairs):
    adversarial, clean, y = pairs
    assert len(adversarial) == len(clean) == len(y) == 1200
    torch.testing.assert_close(clean[600:], DIGITS.train.x[:600], rtol=0, atol=0)
    assert float((adversarial - clean).abs().max()) <= 0.2 + 1e-6
    wrong = (classifier.predict(adversarial) != y).double().view(2, 600).mean(1)
    assert bool((wrong > 0.5).all())


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it(classifier, pairs):
    denoiser = built(widths=(16, 32))
    train_denoiser(denoiser, *pairs, model=classifier, guide="logit", epochs=5, learning_rate=5e-3, schedule="linear")
    defended = sp.Defended(classifier, [denoiser.transform()])
    naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), THREAT)
    adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=20), THREAT)
    assert accuracy(defended, X) >= 0.9
    assert naive.robust_accuracy <= 0.1
    assert accuracy(defended, naive.adversarial) >= 0.7
    assert adaptive.robust_accuracy <= 0.3


def test_it_is_declared_exact_and_not_random():
    transform = built().transform()
    assert (transform.name, transform.backward, transform.random) == ("Denoiser", "exact", False)


def test_bad_input_is_refused(classifier):
    net, clean = built(), X[:4]
    with pytest.raises(UnknownNameError, match="guide"):
        guided_loss(clean, clean, "logits", classifier)
    with pytest.raises(InputError, match="needs the classifier"):
        guided_loss(clean, clean, "logit")
    with pytest.raises(InputError, match="name of a layer"):
        guided_loss(clean, clean, "feature", classifier)
    with pytest.raises(InputError, match="needs labels"):
        guided_loss(clean, clean, "class", classifier)
    with pytest.raises(InputError, match="needs labels"):
        train_denoiser(net, clean, clean, model=classifier, guide="class")
    with pytest.raises(InputError, match="its clean one"):
        train_denoiser(net, clean, X[:3], model=classifier)
    with pytest.raises(InputError, match="classes 0 to 9"):
        train_denoiser(net, clean, clean, torch.full((4,), 10), model=classifier, guide="class")
    with pytest.raises(InputError, match="one attack at least"):
        adversarial_pairs(classifier, clean, Y[:4], [])
    with pytest.raises(InputError, match="widths"):
        Denoiser(widths=())
