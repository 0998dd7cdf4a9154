"""The diffusion purifier: the forward process, its exact reversal, gradients through the steps, and both attacks."""

import pytest
import torch

import saddlepoint as sp
from saddlepoint.defenses.purification import Diffusion, DiffusionPurifier, train_diffusion
from saddlepoint.errors import InputError

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.x[:40], DIGITS.test.y[:40]


@pytest.fixture(scope="module")
def classifier() -> sp.Model:
    net = sp.zoo.build("digits-cnn", seed=0)
    sp.train(net, DIGITS.train, epochs=8)
    return sp.Model(net)


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    net = built(torch.float32, (16, 32))
    train_diffusion(net, DIGITS.train.x, epochs=16, learning_rate=5e-3, schedule="linear")
    return net


def built(dtype=torch.float64, widths=(4, 8)) -> Diffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(steps=30, widths=widths).to(dtype)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def accuracy(model: sp.Model | sp.Defended, x: torch.Tensor) -> float:
    return float((model.predict(x) == Y).double().mean())


def seeing(monkeypatch: pytest.MonkeyPatch, net: Diffusion, clean: torch.Tensor) -> None:
    """The best possible prediction of the noise, which knows the clean image in [-1, 1]."""

    def noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = net.kept[t].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * clean) / (1 - kept).sqrt()

    monkeypatch.setattr(net, "noise", noise)


def test_what_is_kept_is_the_product_over_the_steps_and_little_at_the_end():
    net = built(torch.float32)
    total = 1.0
    for t in range(1, 31):
        total *= 1 - (0.1 + (20 - 0.1) * (t - 1) / 29) / 30
        assert float(net.kept[t]) == pytest.approx(total, rel=1e-5)
    assert float(net.kept[0]) == 1.0
    assert total < 1e-4
    assert float(Diffusion(steps=300, widths=(4,)).kept[-1]) == pytest.approx(4e-5, rel=0.5)  # exp(-10.05), of any T


def test_each_step_back_is_the_gaussian_posterior_where_the_noise_is_known(monkeypatch):
    net, clean, x, extra = built(), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), normal(2, 1, 4, 4, seed=2)
    seeing(monkeypatch, net, clean)
    for t in (1, 2, 17, 30):
        # the product of N(x_s; sqrt(a_s) x_0, 1 - a_s) and N(x_t; sqrt(k) x_s, 1 - k), as a density of x_s, s = t - 1
        before, keep = net.kept[t - 1], net.keep[t - 1]
        if t == 1:
            mean, variance = clean, torch.zeros(())
        else:
            precision = 1 / (1 - before) + keep / (1 - keep)
            mean, variance = (before.sqrt() * clean / (1 - before) + keep.sqrt() * x / (1 - keep)) / precision, 1 / precision
        found = net.reverse(x, t, extra)
        torch.testing.assert_close(found, mean + variance.sqrt() * extra, rtol=1e-4, atol=1e-5)


def test_with_the_noise_known_purification_gives_the_clean_image(monkeypatch):
    net, clean = built(), X[:3].double()
    seeing(monkeypatch, net, 2 * clean - 1)
    with torch.random.fork_rng():
        torch.testing.assert_close(DiffusionPurifier(net, 0.5)((clean + 0.1).clamp(0, 1)), clean, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_squared_error_of_the_noise():
    net, x, noise, t = built(), X[:4].double(), normal(4, 1, 8, 8), torch.tensor([1, 5, 20, 30])
    noisy = torch.stack([net.kept[s].sqrt() * (2 * one - 1) + (1 - net.kept[s]).sqrt() * e
                         for s, one, e in zip(t, x, noise, strict=True)])  # fmt: skip
    torch.testing.assert_close(net.loss(x, t, noise), (net.noise(noisy, t) - noise).square().mean())


def test_the_network_is_told_the_time():
    net, x = built(), normal(1, 1, 8, 8)
    assert not torch.allclose(net.noise(x, torch.tensor([1])), net.noise(x, torch.tensor([30])))


def test_the_gradient_through_the_steps_is_exact():
    purifier, x, way = DiffusionPurifier(built(), 0.1), 0.5 + 0.01 * normal(1, 1, 8, 8), normal(1, 1, 8, 8, seed=3)

    def along(size: float, point: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return (purifier(point + size * way) * normal(1, 1, 8, 8, seed=4)).sum()

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(along(0.0, point), point)
    with torch.no_grad():
        difference = (along(1e-6, x) - along(-1e-6, x)) / 2e-6
    torch.testing.assert_close((gradient * way).sum(), difference, rtol=1e-4, atol=1e-6)


def test_training_predicts_noise(diffusion):
    x, t = X, torch.arange(40) % 30 + 1
    noise = normal(40, 1, 8, 8).float()
    with torch.no_grad():
        assert float(diffusion.loss(x, t, noise)) < 0.25  # 1 for a prediction of 0


def test_it_repairs_what_was_made_for_the_bare_model_and_falls_to_what_was_made_for_it(classifier, diffusion):
    defended = sp.Defended(classifier, [DiffusionPurifier(diffusion, 0.1).transform()], draws=2)
    naive = sp.attack(classifier, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.25))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert accuracy(defended, X) >= 0.85
        assert naive.robust_accuracy <= 0.1
        assert accuracy(defended, naive.adversarial) >= 0.5
        adaptive = sp.attack(defended, X, Y, sp.attacks.PGD(steps=15), sp.Linf(0.25))
    assert adaptive.robust_accuracy <= 0.2


@pytest.mark.parametrize("backward", ["exact", "identity"])
def test_it_is_declared_random_with_the_chosen_gradient(backward):
    purifier = DiffusionPurifier(built(torch.float32), 0.1, backward)
    transform = purifier.transform()
    assert (transform.name, transform.backward, transform.random) == ("DiffusionPurifier", backward, True)
    x = X[:2].clone().requires_grad_()
    with torch.random.fork_rng():
        (gradient,) = torch.autograd.grad(transform(x).sum(), x)
    assert bool((gradient == 1).all()) == (backward == "identity")


def test_the_start_is_a_share_of_the_steps_and_at_least_one():
    assert [DiffusionPurifier(built(), share).start for share in (1e-3, 0.1, 0.5, 1.0)] == [1, 3, 15, 30]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="at least 21"):
        Diffusion(steps=20)
    with pytest.raises(InputError, match="strength"):
        DiffusionPurifier(built(), 0.0)
    with pytest.raises(InputError, match="backward"):
        DiffusionPurifier(built(), 0.1, "bpda")
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        train_diffusion(built(), 2 * X - 1, epochs=1)
