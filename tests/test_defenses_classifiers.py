"""Classifiers meant to be robust by their form: what their papers say, and what attacks leave of them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.gaussian_process.kernels import RBF as Kernel  # noqa: N811  # another RBF is tested
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.defenses.classifiers import (
    ABSTAINS,
    RBF,
    GaussianProcessHead,
    GradientMasked,
    NearestNeighbours,
    PrototypeLoss,
    Prototypes,
    Smoothed,
)
from saddlepoint.defenses.objectives import Batch
from saddlepoint.errors import InputError
from saddlepoint.evaluate.campaign import fingerprint

DIGITS = sp.data.load("digits")
TRAIN = DIGITS.train.take(900)
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]
THREAT = sp.Linf(0.15)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(width: int = 32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, width))


@pytest.fixture(scope="module")
def model() -> sp.Model:
    return sp.train(sp.zoo.build("digits-cnn"), TRAIN, epochs=8, batch_size=64).model


def right(model: sp.Classifier, x: Tensor = X, y: Tensor = Y) -> float:
    return float((model.predict(x) == y).double().mean())


class TestRBF:
    def test_by_its_equation(self) -> None:
        net, x = RBF(6, 3).double(), drawn(5, 2, 3)
        with torch.no_grad():
            net.centres.copy_(drawn(3, 6, seed=1))
            net.rates.copy_(drawn(3, 6, seed=2) - 2)
        beta = net.rates.exp()
        away = torch.stack([(beta[c] * (x.flatten(1) - net.centres[c]) ** 2).sum(1) for c in range(3)], 1)
        torch.testing.assert_close(net.probabilities(x), torch.exp(-away))
        p = torch.exp(-away)
        torch.testing.assert_close(net(x), torch.log(p / (1 - p)))
        assert torch.autograd.gradcheck(net, x.requires_grad_())

    def test_begins_where_the_data_are(self) -> None:
        net = RBF(64, 10).begin(TRAIN.x, TRAIN.y)
        for label in (0, 7):
            own = TRAIN.x[TRAIN.y == label].flatten(1)
            torch.testing.assert_close(net.centres[label].detach(), own.mean(0))
            away = -net.probabilities(own)[:, label].detach().log()
            assert float(away.mean()) == pytest.approx(np.log(2), rel=1e-4)
        with pytest.raises(InputError, match="class 10"):
            RBF(64, 11).begin(TRAIN.x, TRAIN.y)

    def test_is_trained_and_unsure_of_rubbish(self) -> None:
        """Goodfellow et al.: wrong with little confidence, where a linear softmax is wrong with much."""
        net = RBF(64, 10).begin(TRAIN.x, TRAIN.y)
        trained = sp.train(net, TRAIN, epochs=10, learning_rate=0.02).model
        assert right(trained) > 0.9
        rubbish = drawn(500, 1, 8, 8, dtype=torch.float32)
        assert float((net.probabilities(rubbish).amax(1) > 0.5).double().mean()) == 0
        linear = sp.train(sp.zoo.build("softmax", in_shape=(1, 8, 8)), TRAIN, epochs=10, learning_rate=0.02).model
        assert float((linear.logits(rubbish).softmax(1).amax(1) > 0.5).double().mean()) > 0.5
        broken = sp.attack(trained, X, Y, sp.attacks.PGD(steps=20), THREAT)
        fooled = broken.having("fooled")
        sure = net.probabilities(broken.adversarial[fooled]).amax(1).detach().mean()
        assert float(sure) < float(net.probabilities(X).amax(1).detach().mean())
        assert float(net(net.centres[:1]).detach().amax()) < np.inf

    def test_refused(self) -> None:
        for bad in ((0, 3), (4, 1)):
            with pytest.raises(InputError, match="features"):
                RBF(*bad)


class TestPrototypes:
    def test_cross_entropy_is_the_papers(self) -> None:
        net = Prototypes(nn.Flatten(), 6, 3, per_class=2, gamma=0.7).double()
        x, y = drawn(5, 2, 3), torch.tensor([0, 1, 2, 1, 0])
        points = net.prototypes.detach()
        shares = torch.zeros(5, 3, dtype=torch.float64)
        for n in range(5):
            for c in range(3):
                shares[n, c] = sum(float(torch.exp(-0.7 * (x[n].flatten() - points[c, j]).square().sum())) for j in range(2))
        wanted = -torch.log(shares[torch.arange(5), y] / shares.sum(1)).mean()
        torch.testing.assert_close(functional.cross_entropy(net(x), y), wanted)
        assert torch.equal(net.prototypes, Prototypes(nn.Flatten(), 6, 3, per_class=2).double().prototypes)

    def test_prototype_loss_by_its_equation(self) -> None:
        net = Prototypes(nn.Flatten(), 6, 3, gamma=0.7).double()
        x, y = drawn(5, 6), torch.tensor([0, 1, 2, 1, 0])
        loss = PrototypeLoss(weight=0.1, gamma=0.7).loss(Batch(sp.Model(net, bounds=None), x, y, torch.arange(5), 0, 0.0))
        pull = (x - net.prototypes[y, 0]).square().sum(1).mean()
        torch.testing.assert_close(loss, functional.cross_entropy(net(x), y) + 0.1 * pull)
        assert json.loads(json.dumps(PrototypeLoss().settings()))["weight"] == 0.01

    def test_is_trained_closer_by_its_loss(self) -> None:
        away = {}
        for name, objective in (("plain", None), ("pulled", PrototypeLoss(weight=0.1))):
            net = Prototypes(features(), 32, 10)
            trained = sp.train(net, TRAIN, adversary=objective, epochs=4).model
            assert right(trained) > 0.8
            own = net.features(TRAIN.x) - net.prototypes[TRAIN.y, 0]
            away[name] = float(own.square().sum(1).mean().detach())
        assert away["pulled"] < 0.7 * away["plain"]

    def test_refused(self) -> None:
        for bad in ({"width": 0}, {"num_classes": 1}, {"per_class": 0}, {"gamma": 0.0}):
            with pytest.raises(InputError, match="width and per_class"):
                Prototypes(nn.Flatten(), **({"width": 3, "num_classes": 3} | bad))
        for bad in ({"weight": -1.0}, {"gamma": 0.0}):
            with pytest.raises(InputError, match="weight"):
                PrototypeLoss(**bad)


class TestGaussianProcess:
    def test_fourier_features_are_the_kernel(self) -> None:
        x = drawn(6, 4)
        phi = GaussianProcessHead(nn.Flatten(), 4, 3, fourier=40_000, scale=1.5).double().fourier(x)
        np.testing.assert_allclose((phi @ phi.T).numpy(), Kernel(1.5)(x.numpy()), atol=0.03)

    def test_posterior_by_its_equation(self) -> None:
        net = GaussianProcessHead(nn.Flatten(), 4, 3, fourier=7, ridge=0.5).double()
        with torch.no_grad():
            net.beta.copy_(drawn(3, 7, seed=1))
        known, x = drawn(20, 4, seed=2), drawn(5, 4, seed=3)
        means = net.fourier(x) @ net.beta.T
        torch.testing.assert_close(net(x), means)
        with pytest.raises(InputError, match="fit"):
            net.variance(x)
        assert net.fit(known, batch_size=6) is net
        net.eval()
        shares = (net.fourier(known) @ net.beta.T).softmax(1).detach()
        for c in range(3):
            precision = 0.5 * torch.eye(7, dtype=torch.float64)
            for phi, p in zip(net.fourier(known), shares[:, c], strict=True):
                precision += p * (1 - p) * torch.outer(phi, phi)
            variance = torch.stack([phi @ torch.linalg.solve(precision, phi) for phi in net.fourier(x)])
            torch.testing.assert_close(net.variance(x)[:, c], variance)
            torch.testing.assert_close(net(x)[:, c], means[:, c] / (1 + torch.pi * variance / 8) ** 0.5)
        torch.testing.assert_close(net.train()(x), means)

    def test_knows_where_there_was_no_data(self) -> None:
        net = GaussianProcessHead(nn.Flatten(), 64, 10, fourier=256, scale=4.0)
        trained = sp.train(net, TRAIN, epochs=15, learning_rate=0.02).model
        net.fit(TRAIN.x)
        assert right(trained) > 0.85
        assert float(net.variance(1 - X).mean()) > 2 * float(net.variance(X).mean())
        again = GaussianProcessHead(nn.Flatten(), 64, 10, fourier=256, scale=4.0, seed=1)
        again.load_state_dict(net.state_dict())
        assert torch.equal(again.eval()(X), net.eval()(X))
        assert fingerprint(sp.Model(again)) == fingerprint(sp.Model(net))
        assert sp.attack(trained, X, Y, sp.attacks.PGD(steps=20), THREAT).robust_accuracy < 0.5

    def test_refused(self) -> None:
        for bad in ({"width": 0}, {"num_classes": 1}, {"fourier": 0}, {"scale": 0.0}, {"ridge": 0.0}):
            with pytest.raises(InputError, match="width and fourier"):
                GaussianProcessHead(nn.Flatten(), **({"width": 3, "num_classes": 3} | bad))


LAYERS = ("1", "4")


@pytest.fixture(scope="module")
def neighbours(model: sp.Model) -> NearestNeighbours:
    return NearestNeighbours(model, LAYERS, TRAIN.x[:600], TRAIN.y[:600], k=15)


class TestNeighbours:
    def test_votes_are_scikit_learns(self, model: sp.Model, neighbours: NearestNeighbours) -> None:
        votes = np.zeros((len(X), 10))
        for layer in LAYERS:
            known, found = (model.features(x, layer).flatten(1).detach().numpy() for x in (TRAIN.x[:600], X))
            known, found = known - known.mean(0), found - known.mean(0)
            nearest = NearestNeighbors(n_neighbors=15, metric="cosine").fit(known).kneighbors(found, return_distance=False)
            for row, indices in enumerate(nearest):
                votes[row] += np.bincount(TRAIN.y[indices].numpy(), minlength=10)
        shares = torch.from_numpy(np.maximum(votes / 30, 0.5 / 30)).log().float()
        torch.testing.assert_close(neighbours.logits(X), shares)
        assert right(neighbours) > 0.9

    def test_soft_votes_lead_where_the_network_does_not(self, neighbours: NearestNeighbours, model: sp.Model) -> None:
        naive = sp.attack(model, X, Y, sp.attacks.PGD(steps=20), THREAT, keep="margin").adversarial
        found = sp.attack(neighbours, X, Y, sp.attacks.PGD(steps=20), THREAT)
        assert found.robust_accuracy < right(neighbours, naive) - 0.1
        deep = NearestNeighbours(model, ["6"], TRAIN.x[:600], TRAIN.y[:600], k=15)
        assert right(deep) > 0.9
        assert sp.attack(deep, X, Y, sp.attacks.PGD(steps=20), THREAT).robust_accuracy < 0.5

    def test_soft_votes_have_the_gradient_that_they_claim(self, neighbours: NearestNeighbours) -> None:
        bank = copy.deepcopy(neighbours.banks[1]).double()
        found = drawn(3, bank.known.shape[1])
        assert torch.allclose(bank.soft(found).sum(1), torch.ones(3, dtype=torch.float64))
        reach = bank._away(found).kthvalue(15).values[:, None]  # which is held fixed

        def soft(points: Tensor) -> Tensor:
            return (-bank._away(points) / (bank.temper * reach)).softmax(1) @ bank.labels

        points = found.clone().requires_grad_()
        (own,) = torch.autograd.grad(bank.soft(points)[:, 3].sum(), points)
        aside = 1e-6 * drawn(*found.shape, seed=1)
        change = (soft(found + aside) - soft(found - aside))[:, 3].sum()
        assert float(change) == pytest.approx(float(2 * (own * aside).sum()), rel=1e-4)

    def test_credibility_is_conformal(self, neighbours: NearestNeighbours) -> None:
        with pytest.raises(InputError, match="calibrate"):
            neighbours.credibility(X)
        x, y = DIGITS.test.x[60:260], DIGITS.test.y[60:260]
        neighbours.calibrate(x, y)
        found = neighbours.credibility(x)
        own = found.gather(1, y[:, None])[:, 0]
        assert float((own <= 0.1).double().mean()) <= 0.1 + 1e-9  # so it is for the calibration's own samples
        assert bool(((found >= 0) & (found <= 1)).all())
        noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        assert float(neighbours.credibility(noise).amax(1).mean()) < 0.5 * float(found.amax(1).mean())

    def test_describes_itself_and_is_refused(self, model: sp.Model, neighbours: NearestNeighbours) -> None:
        assert json.loads(json.dumps(neighbours.describe()))["k"] == 15
        other = NearestNeighbours(model, LAYERS, TRAIN.x[300:900], TRAIN.y[300:900], k=15)
        assert fingerprint(other) != fingerprint(neighbours)
        assert neighbours.features(X, "1").shape == model.features(X, "1").shape
        x, y = TRAIN.x[:20], TRAIN.y[:20]
        for layers, labels, settings, message in (
            ("1", y, {}, "module"), ([], y, {}, "module"), (["1"], y, {"k": 21}, "k must"), (["1"], y, {"k": 0}, "k must"),
            (["1"], y, {"k": 3, "temper": 0.0}, "temper"), (["1"], y[:5], {"k": 3}, "one class"),
            (["nowhere"], y, {"k": 3}, "nowhere"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=message):
                NearestNeighbours(model, layers, x, labels, **settings)


class Step(nn.Module):
    """Class 1 where the first feature is above 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], x[:, 0]], 1)


class TestSmoothed:
    def test_votes_are_the_normal_distribution(self) -> None:
        model = Smoothed(sp.Model(Step(), bounds=None), sigma=0.5, votes=20_000)
        x = torch.tensor([[0.3], [-0.2], [0.0]])
        wanted = torch.special.ndtr(x[:, 0] / 0.5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            shares = model.forward(x).exp()
        torch.testing.assert_close(shares[:, 1], wanted, atol=0.02, rtol=0)
        counts = model.vote(x, 20_000)
        assert counts.sum(1).tolist() == [20_000] * 3
        torch.testing.assert_close(counts[:, 1] / 20_000, wanted, atol=0.02, rtol=0)
        assert torch.equal(counts, model.vote(x, 20_000, batch_size=256))

    def test_the_gradient_is_that_of_mean_probabilities(self) -> None:
        model = Smoothed(sp.Model(nn.Linear(3, 2).double(), bounds=None), sigma=0.5, votes=7)
        x = drawn(4, 3).requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            (found,) = torch.autograd.grad(model.forward(x)[:, 1].sum(), x)
            torch.manual_seed(0)
            noise = 0.5 * torch.randn(28, 3, dtype=torch.float64)
        soft = model.model.forward(x.repeat_interleave(7, 0) + noise).softmax(1).view(4, 7, 2).mean(1).log()
        torch.testing.assert_close(found, torch.autograd.grad(soft[:, 1].sum(), x)[0])

    def test_prediction_or_abstention_is_the_papers(self) -> None:
        model = Smoothed(sp.Model(Step(), bounds=None), sigma=0.5)
        x = torch.linspace(-0.5, 0.5, 21)[:, None]
        state = torch.get_rng_state()
        found, counts = model.predict_or_abstain(x, 200, alpha=0.05, seed=4), model.vote(x, 200, seed=4)
        assert torch.equal(torch.get_rng_state(), state)
        for row, (answer, (zero, one)) in enumerate(zip(found.tolist(), counts.tolist(), strict=True)):
            sure = binomtest(max(zero, one), zero + one, 0.5).pvalue <= 0.05
            assert answer == (int(one > zero) if sure else ABSTAINS), row
        assert found[10] == ABSTAINS
        assert (found[0], found[-1]) == (0, 1)

    def test_is_attacked_and_evaluated_as_a_random_model(self, model: sp.Model) -> None:
        smoothed = Smoothed(model, 0.1, votes=10)
        assert smoothed.probe(X).stochastic
        assert smoothed.probe(X).notes == ()
        assert right(smoothed) > 0.8
        found = sp.attack(smoothed, X[:20], Y[:20], sp.attacks.PGD(steps=10), THREAT)
        assert found.robust_accuracy < 0.6
        assert torch.equal(found.adversarial, sp.attack(smoothed, X[:20], Y[:20], sp.attacks.PGD(steps=10), THREAT).adversarial)
        assert json.loads(json.dumps(smoothed.describe()))["sigma"] == 0.1

    def test_refused(self, model: sp.Model) -> None:
        for settings, message in (({"sigma": 0.0}, "sigma"), ({"sigma": 1.0, "votes": 0}, "votes")):
            with pytest.raises(InputError, match=message):
                Smoothed(model, **settings)
        with pytest.raises(InputError, match="samples"):
            Smoothed(model, 1.0).predict_or_abstain(X, 0)
        with pytest.raises(InputError, match="layers"):
            Smoothed(model, 1.0).features(X, "1")


@pytest.mark.parametrize("kind", ["vanished", "shattered"])
def test_masked_gradients_hide_nothing(model: sp.Model, kind: str) -> None:
    """Attacks by gradients find them robust; the network inside shows the way, and search without gradients finds one."""
    masked = sp.Model(GradientMasked(model.net, kind))
    x, y = X[:40], Y[:40]
    assert right(masked, x, y) > 0.9
    fooled_by_gradients = sp.attack(masked, x, y, sp.attacks.PGD(steps=20, loss="margin"), THREAT).robust_accuracy
    honest = sp.attack(model, x, y, sp.attacks.PGD(steps=20, loss="margin"), THREAT)
    assert fooled_by_gradients > honest.robust_accuracy + 0.25
    transferred = right(masked, honest.adversarial, y)
    assert transferred < fooled_by_gradients - 0.2
    searched = sp.attack(masked, x, y, sp.attacks.Square(steps=500), THREAT).robust_accuracy
    assert searched < fooled_by_gradients - 0.1
    if kind == "vanished":
        evaluation = sp.evaluate(masked, x, y, THREAT, "quick", sources=[model])
        assert any("gradients vanished" in note for note in evaluation.notes)
        assert evaluation.robust_accuracy < honest.robust_accuracy + 0.1
    else:
        assert sp.diagnose(masked, x[:16], y[:16], THREAT, sources=[model]).masked


def test_masks_are_refused() -> None:
    with pytest.raises(InputError, match="kind"):
        GradientMasked(nn.Flatten(), "hidden")  # type: ignore[arg-type]
