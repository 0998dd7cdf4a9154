"""Randomised smoothing: the bound, the radius, the streaming votes, published certificates, and what trains for it."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest, kstest, norm
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.defenses import GaussianAugmentation, SmoothAdv, Smoothed, defense, train_noise_denoiser
from saddlepoint.defenses.classifiers import ABSTAINS, _gaussian
from saddlepoint.defenses.noise import _Mean
from saddlepoint.defenses.objectives import Batch, Standard
from saddlepoint.defenses.purification import Purifier
from saddlepoint.errors import DataError, InputError
from saddlepoint.rng import Keys
from saddlepoint.verify import smoothing
from saddlepoint.verify.smoothing import Certificates, certified_at, certified_radius, certify, lower_confidence_bound

DIGITS = sp.data.load("digits")
TRAIN = DIGITS.train.take(1000)
X, Y = DIGITS.test.x[:60], DIGITS.test.y[:60]
PUBLISHED = Path(os.environ.get("SADDLEPOINT_DATA", "")) / "verification" / "smoothing_cohen"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class HalfSpace(nn.Module):
    """Class 1 where w x + b > 0."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        away = x.flatten(1) @ self.weight + self.bias
        return torch.stack([-away, away], 1)


class Quadrant(nn.Module):
    """Class 1 where x_0 > 0 and x_1 > 0; under noise P(1) = Phi(x_0 / sigma) Phi(x_1 / sigma)."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x.amin(1)
        return torch.stack([-inside, inside], 1)


def small(seed: int = 0) -> nn.Sequential:
    """A perceptron for digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Little(Purifier):
    """A denoiser for digits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found.view_as(x).sigmoid()


def line(sigma: float = 1.0) -> Smoothed:
    """The sign of a number; P(1) = Phi(x / sigma)."""
    return Smoothed(sp.Model(HalfSpace(torch.ones(1, dtype=torch.float64)), bounds=None), sigma)


class TestFormulas:
    def test_the_bound_is_scipys_exact_one(self) -> None:
        n, counts = 500, torch.arange(0, 501, 25)
        for alpha in (0.1, 0.001):
            found = lower_confidence_bound(counts, n, alpha)
            for k, p in zip(counts.tolist(), found.tolist(), strict=True):
                wanted = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
                assert p == pytest.approx(wanted, abs=1e-9), k
            assert found[0] == 0
            assert float(found[-1]) == pytest.approx(alpha ** (1 / n), rel=1e-12)
        assert not lower_confidence_bound(torch.tensor([], dtype=torch.int64), n, 0.1).numel()

    def test_the_radius_is_sigma_times_the_quantile(self) -> None:
        p = torch.tensor([0.0, 0.3, 0.5, 0.5001, 0.9, 0.99993092], dtype=torch.float64)
        wanted = [0.0, 0.0, 0.0, *(0.25 * norm.ppf(p[3:].numpy())).tolist()]
        assert certified_radius(p, 0.25).tolist() == pytest.approx(wanted, rel=1e-10)

    def test_the_papers_largest_radius(self) -> None:
        """Section 3.2.2: "if f returned class c_A on all 100,000 samples", alpha = 0.001, the radius is 3.8 sigma."""
        assert float(certified_radius(lower_confidence_bound(torch.tensor([100_000]), 100_000, 0.001), 1.0)) == pytest.approx(
            3.8115, abs=1e-4
        )


class TestCertificates:
    def test_half_spaces_have_the_distance_as_radius(self) -> None:
        weight = drawn(6)
        model = Smoothed(sp.Model(HalfSpace(weight, 0.2), bounds=None), 0.5)
        x = drawn(12, 6, seed=1) / 2
        away = (x @ weight + 0.2) / weight.norm()
        found = certify(model, x, (away > 0).long(), n=40_000, batch_size=4000)
        sure = ~found.abstained
        assert int(sure.sum()) >= 8
        assert torch.equal(found.prediction[sure], (away > 0).long()[sure])
        assert bool((found.radius <= away.abs() + 1e-12).all())
        near = sure & (away.abs() < 1.25)
        assert bool((found.radius[near] > away.abs()[near] - 0.03).all())
        assert int(near.sum()) >= 5

    def test_no_point_within_the_radius_has_another_class(self) -> None:
        """P is known in closed form, so the guarantee itself can be looked at."""
        sigma = 0.5
        model = Smoothed(sp.Model(Quadrant(), bounds=None), sigma)
        x = torch.tensor([[0.5, 0.9], [1.0, 0.4], [0.3, 3.0], [-0.4, 0.2], [2.0, 2.0], [0.2, 0.2]], dtype=torch.float64)
        found = certify(model, x, n=20_000, batch_size=4000)
        assert found.prediction.tolist() == [1, 1, 1, 0, 1, 0]
        angles = torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)
        circle = torch.stack([angles.cos(), angles.sin()], 1)
        for point, answer, radius in zip(x, found.prediction, found.radius, strict=True):
            chance = torch.special.ndtr((point + radius * circle) / sigma).prod(1)
            assert bool(((chance > 0.5) == bool(answer)).all())
        assert float(found.radius[2]) == pytest.approx(0.3, abs=0.02)  # there it is a half space, and the radius tight

    def test_claims_are_false_with_probability_alpha_at_most(self) -> None:
        """p is above the truth for less than a tenth of many repetitions, but not for none: the bound is exact, nearly."""
        repetitions, alpha = 4000, 0.1
        x = torch.full((repetitions, 1), 0.5, dtype=torch.float64)
        truth = norm.cdf(0.5)
        found = certify(line(), x, n0=20, n=200, alpha=alpha, batch_size=20_000)
        false = float((found.p[found.prediction == 1] > truth).double().mean())
        assert 0.06 < false < alpha + 3 * math.sqrt(alpha * (1 - alpha) / repetitions)
        bolder = lower_confidence_bound(found.estimation[:, 1], 200, 2 * alpha)
        assert float((bolder > truth).double().mean()) > alpha + 0.03  # so a wrong alpha would be seen

    def test_the_samples_that_choose_are_not_those_that_count(self) -> None:
        """At the boundary the more frequent of two classes exceeds 1/2 twice as often as a class chosen before."""
        x, alpha = torch.zeros(4000, 1, dtype=torch.float64), 0.1
        found = certify(line(), x, n0=101, n=101, alpha=alpha, batch_size=20_000)
        assert float((~found.abstained).double().mean()) < alpha + 0.015
        same = lower_confidence_bound(found.estimation.amax(1), 101, alpha)
        assert float((same > 0.5).double().mean()) > alpha + 0.03
        correlation = torch.corrcoef(torch.stack([found.selection[:, 0], found.estimation[:, 0]]).double())[0, 1]
        assert abs(float(correlation)) < 0.06

    def test_abstaining_is_never_right(self) -> None:
        prediction, y = torch.tensor([ABSTAINS, 2, 1, 0]), torch.tensor([ABSTAINS, 2, 1, 1])
        assert certified_at(0.0, prediction, torch.tensor([0.0, 0.5, 0.2, 9.0]), y).tolist() == [False, True, True, False]
        found = certify(line(), torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1]), n=1000)
        assert (found.prediction.tolist(), found.abstained.tolist()) == ([ABSTAINS, 1], [True, False])
        assert found.radius[0] == 0
        assert found.certified_accuracy([0.0, 0.5, 2.0]) == [0.5, 0.5, 0.0]

    def test_refusals_and_broken_logits_are_abstentions(self) -> None:
        x = torch.ones(3, 1, dtype=torch.float64)
        refusing = sp.Model(HalfSpace(torch.ones(1, dtype=torch.float64)), bounds=None)
        refusing.rejects = True  # so that class 1 is no class
        assert certify(Smoothed(refusing, 0.1), x, n=500).prediction.tolist() == [ABSTAINS] * 3
        assert Smoothed(refusing, 0.1).predict_or_abstain(x).tolist() == [ABSTAINS] * 3
        broken = Smoothed(sp.Model(HalfSpace(torch.full((1,), math.nan, dtype=torch.float64)), bounds=None, num_classes=2), 0.1)
        found = certify(broken, x, n=500)
        assert found.prediction.tolist() == [ABSTAINS] * 3
        assert int(found.estimation.sum()) == 0

    def test_the_curve_and_its_area(self) -> None:
        x = torch.linspace(-0.5, 2, 11, dtype=torch.float64)[:, None]
        found = certify(line(), x, torch.ones(11, dtype=torch.int64), n=2000)
        radii, shares = found.curve()
        assert bool((radii.diff() >= 0).all())
        assert found.certified_accuracy(radii.tolist()) == shares.tolist()
        area = (torch.cat([radii[:1], radii.diff()]) * shares).sum()
        assert float(area) == pytest.approx(found.mean_radius)
        document = json.loads(json.dumps(found.document()))
        assert document["prediction"] == found.prediction.tolist()
        assert (document["n"], document["alpha"], len(found)) == (2000, 0.001, 11)


class TestVotes:
    def test_the_noise_is_normal_far_out(self) -> None:
        """Beyond 3.84 sigma by the conditional distribution; finer than 23 bits."""
        noise = _gaussian(Keys.of(3, torch.arange(64)), (256, 512), torch.float32)
        tail = noise.abs()[noise.abs() > -norm.ppf(2.0**-14)].double()
        expected = noise.numel() / 2**13
        assert abs(len(tail) - expected) < 4 * math.sqrt(expected)
        assert kstest(tail.numpy(), lambda z: 1 - norm.sf(z) * 2**14).pvalue > 0.01
        assert len(tail.unique()) > 0.98 * len(tail)  # 23 bits have 512 values there
        half = (noise[:, 0, 0] == Keys.of(3, torch.arange(64)).normal((256, 512))[:, 0, 0]).double().mean()
        assert float(half) > 0.9  # the rest is `Keys.normal`
        alone = _gaussian(Keys.of(3, torch.tensor([7])), (256, 512), torch.float32)
        assert torch.equal(alone[0], noise[7])

    def test_batches_and_neighbours_change_nothing(self) -> None:
        model = Smoothed(sp.Model(sp.zoo.build("digits-cnn").double()), 0.4)
        x = X[:5].double()
        whole = certify(model, x, n0=10, n=40, batch_size=1000)
        small = certify(model, x, n0=10, n=40, batch_size=7)
        assert torch.equal(whole.estimation, small.estimation)
        assert torch.equal(whole.selection, small.selection)
        alone = certify(model, x[3:], n0=10, n=40, ids=torch.tensor([3, 4]))
        assert torch.equal(alone.estimation, whole.estimation[3:])
        again = certify(model, x, n0=10, n=40, seed=1)
        assert not torch.equal(again.estimation, whole.estimation)
        assert whole.estimation.sum(1).tolist() == [40] * 5
        assert not torch.equal(*certify(model, torch.cat([x[:1], x[:1]]), n0=10, n=40).estimation)

    @pytest.mark.parametrize(("images", "n0", "n"), [(30, 2, 5), (1, 11, 199), (3, 20, 50)])
    def test_batches_are_full(self, images: int, n0: int, n: int) -> None:
        net, sizes = HalfSpace(torch.ones(1, dtype=torch.float64)), []
        model = Smoothed(sp.Model(net, bounds=None, num_classes=2), 1.0)
        net.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
        certify(model, drawn(images, 1), n0=n0, n=n, batch_size=64)
        full, rest = divmod(images * (n0 + n), 64)
        assert sizes == [64] * full + [rest]
        assert model.queries.forward == sum(sizes)

    def test_a_random_model_inside_draws_anew_for_each_stage(self) -> None:
        def coin(x: Tensor) -> Tensor:
            heads = torch.randn(len(x), 1, dtype=x.dtype)
            return torch.cat([heads, -heads], 1)

        model = Smoothed(sp.Model(coin, bounds=None, num_classes=2), 1.0)
        before = torch.get_rng_state()
        found = certify(model, drawn(40, 1), n0=64, n=64, batch_size=64)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(found.selection, found.estimation)
        assert torch.equal(found.estimation, certify(model, drawn(40, 1), n0=64, n=64, batch_size=64).estimation)

    def test_mixed_precision(self) -> None:
        model = Smoothed(sp.Model(sp.zoo.build("digits-cnn")), 0.2)
        exact, mixed = model.vote(X[:6], 100), model.vote(X[:6], 100, precision="bfloat16")
        assert mixed.sum(1).tolist() == [100] * 6
        assert int((exact - mixed).abs().sum()) < 60

    def test_refused(self) -> None:
        model, x = line(), torch.zeros(2, 1, dtype=torch.float64)
        with pytest.raises(InputError, match="smoothed model"):
            certify(model.model, x)  # type: ignore[arg-type]
        for settings, message in (
            ({"n": 0}, "n0 and n"),
            ({"alpha": 1.0}, "alpha"),
            ({"batch_size": 0}, "batch_size"),
            ({"precision": "half"}, "precision"),
            ({"ids": torch.arange(3)}, "ids"),
            ({"y": torch.tensor([0, 2])}, "classes 0 to 1"),
            ({"y": torch.tensor([0])}, "one class per input"),
        ):
            with pytest.raises(InputError, match=message):
                certify(model, x, **settings)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="bounds"):
            certify(Smoothed(sp.Model(sp.zoo.build("digits-cnn")), 0.1), X + 1, n=10)
        with pytest.raises(InputError, match="labels"):
            certify(model, x, n=10).certified_accuracy([0.0])


class Cut(nn.Module):
    """A half space that is interrupted at a call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.left = HalfSpace(torch.ones(1, dtype=torch.float64)), at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        found: Tensor = self.inner(x)
        return found


class TestCheckpoints:
    def test_goes_on_where_it_was_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smoothing, "_SAVE_SECONDS", 0.0)
        x, y, file = drawn(5, 1), torch.ones(5, dtype=torch.int64), tmp_path / "votes.json"
        net = Cut(-1)
        model = Smoothed(sp.Model(net, bounds=None, num_classes=2), 1.0)
        whole = certify(model, x, y, n0=30, n=70, batch_size=64)
        net.left = 6  # 320 of 500 copies are done: three images
        cut = certify(model, x, y, n0=30, n=70, batch_size=64, checkpoint=file)
        assert (cut.complete, len(cut)) == (False, 3)
        assert torch.equal(cut.prediction, whole.prediction[:3])
        assert cut.certified_accuracy([0.0]) == [float((whole.prediction[:3] == 1).double().mean())]
        model.queries.reset()
        resumed = certify(model, x, y, n0=30, n=70, batch_size=50, checkpoint=file)
        assert model.queries.forward == 180
        assert torch.equal(resumed.estimation, whole.estimation)
        assert torch.equal(resumed.radius, whole.radius)
        assert resumed.complete
        again = certify(model, x, y, n0=30, n=70, checkpoint=file)
        assert model.queries.forward == 180
        assert torch.equal(again.radius, whole.radius)
        with pytest.raises(DataError, match="another run, which differs in n:"):
            certify(model, x, y, n0=30, n=80, checkpoint=file)
        with pytest.raises(DataError, match="data"):
            certify(model, x + 1, y, n0=30, n=70, checkpoint=file)
        good = json.loads(file.read_text())
        for other in ({"done": -3}, {"done": 99_999}, {"done": 20}, {"counts": [[[1e9] * 2] * 2] * 5},
                      {"counts": [[[-1, 31], [0, 70]]] * 5}, {"counts": [[[10**30, 0]] * 2] * 5}):  # fmt: skip
            file.write_text(json.dumps(good | other))
            with pytest.raises(DataError, match="damaged"):
                certify(model, x, y, n0=30, n=70, checkpoint=file)
        file.write_text(json.dumps(good))
        assert "nan" not in certify(model, x[:0], y[:0], n0=30, n=70).summary()
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(DataError, match="damaged"):
            certify(model, x, y, n0=30, n=70, checkpoint=file)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs SADDLEPOINT_DATA with the published certificates")
class TestPublished:
    """Per-image certificates that Cohen et al. published with their code, 500 images each (427 of ImageNet at 0.25).

    alpha is 0.001 in the paper, but 0.01 in all of these files except CIFAR-10's at 0.12: their largest radii are no others'.
    """

    RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    TABLE = (  # as the repository has them, to two digits
        ("cifar10_sigma_0.25", RADII[:5], (0.75, 0.60, 0.43, 0.27, 0)),
        ("cifar10_sigma_0.50", RADII, (0.65, 0.55, 0.41, 0.32, 0.23, 0.15, 0.09, 0)),
        ("cifar10_sigma_1.00", RADII, (0.47, 0.39, 0.34, 0.28, 0.22, 0.17, 0.14, 0.10)),
        ("imagenet_sigma_0.25", (0.5,), (0.49,)),
        ("imagenet_sigma_0.50", (1.0, 1.5), (0.37, 0.29)),
        ("imagenet_sigma_1.00", (2.0, 2.5, 3.0), (0.19, 0.15, 0.12)),
    )

    @staticmethod
    def read(name: str) -> list[dict[str, str]]:
        head, *rows = gzip.decompress((PUBLISHED / f"{name}.tsv.gz").read_bytes()).decode().split("\n")
        return [dict(zip(head.split("\t"), row.split("\t"), strict=True)) for row in rows if row]

    @pytest.mark.parametrize(("name", "radii", "wanted"), TABLE, ids=[row[0] for row in TABLE])
    def test_the_table(self, name: str, radii: tuple[float, ...], wanted: tuple[float, ...]) -> None:
        rows = self.read(name)
        prediction, y = (torch.tensor([int(row[key]) for row in rows]) for key in ("predict", "label"))
        radius = torch.tensor([float(row["radius"]) for row in rows], dtype=torch.float64)
        found = [float(certified_at(each, prediction, radius, y).double().mean()) for each in radii]
        assert [round(each, 2) for each in found] == list(wanted)
        assert certified_at(0.0, prediction, radius, y).tolist() == [row["correct"] == "1" for row in rows]

    @pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.tsv.gz")), ids=lambda path: path.name)
    def test_our_formula_gives_the_published_radii(self, path: Path) -> None:
        """Each is sigma Phi^-1(bound) of a whole number of 100,000 votes; those near the top are far apart."""
        name = path.name.removesuffix(".tsv.gz")
        sigma, rows = float(name.rpartition("_")[2]), self.read(name)
        possible = {}
        for alpha in (0.01, 0.001):
            p = lower_confidence_bound(torch.arange(49_000, 100_001), 100_000, alpha)
            possible[alpha] = {f"{radius:.3}" for radius in certified_radius(p, sigma).tolist() if radius > 0}
        published = {f"{float(row['radius']):.3}" for row in rows if row["predict"] != "-1"}
        alpha, other = (0.001, 0.01) if name == "cifar10_sigma_0.12" else (0.01, 0.001)
        assert published <= possible[alpha]
        assert not published <= possible[other]
        if name != "cifar10_sigma_1.00":  # where no image got all the votes
            assert max(map(float, published)) == max(map(float, possible[alpha]))
        assert all(row["radius"] == "0.0" and row["correct"] == "0" for row in rows if row["predict"] == "-1")


def batch(model: sp.Model, x: Tensor = X[:16], y: Tensor = Y[:16]) -> Batch:
    return Batch(model, x, y, torch.arange(len(x)), seed=3, progress=0.5)


class TestTraining:
    def test_smoothadvs_examples_ascend_the_mean_under_their_noise(self) -> None:
        model = sp.train(small(), TRAIN, epochs=5).model
        objective = SmoothAdv(threat=sp.L2(0.8), sigma=0.3, draws=3)
        given = batch(model)
        noise = objective._noise(given)
        assert noise.shape == (16, 3, 1, 8, 8)
        assert float(noise.std()) == pytest.approx(0.3, abs=0.02)
        examples = objective.examples(given)
        assert float((examples - given.x).flatten(1).norm(dim=1).max()) <= 0.8 + 1e-5
        assert 0 <= float(examples.min()) <= float(examples.max()) <= 1

        def against(x: Tensor) -> Tensor:
            shares = torch.stack([model.forward(x + noise[:, draw]).softmax(1) for draw in range(3)]).mean(0)
            return -shares.gather(1, given.y[:, None])[:, 0].log()

        assert bool((against(examples) > against(given.x)).all())
        torch.testing.assert_close(_Mean(model, noise).forward(examples).gather(1, given.y[:, None])[:, 0], -against(examples))
        losses = [nn.functional.cross_entropy(model.forward(examples + noise[:, draw]), given.y) for draw in range(3)]
        torch.testing.assert_close(objective.loss_at(given, examples), torch.stack(losses).mean())
        assert not torch.equal(noise[:, 0], noise[:, 1])

    def test_its_gradient_is_that_of_the_smoothed_classifier(self) -> None:
        """The mean over many draws has the derivative of log Phi(x / sigma)-like closed form; here for a logistic model."""
        model = sp.Model(HalfSpace(torch.ones(1, dtype=torch.float64)), bounds=None)
        noise = 0.7 * drawn(1, 200_000, 1)
        x = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(_Mean(model, noise).forward(x)[0, 1], x)
        at = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
        weight = torch.exp(-(at**2) / 2)
        share = torch.sigmoid(2 * (0.4 + 0.7 * at))
        wanted = (weight * 2 * share * (1 - share)).sum() / (weight * share).sum()
        assert float(found) == pytest.approx(float(wanted), rel=0.01)

    def test_noise_in_training_makes_certificates_larger(self) -> None:
        sigma, found = 0.4, {}
        adversaries = {"clean": None, "noise": GaussianAugmentation(Standard(), sigma, clip=False),
                       "smoothadv": SmoothAdv(threat=sp.L2(0.5), sigma=sigma, attack=sp.attacks.PGD(steps=2))}  # fmt: skip
        for name, adversary in adversaries.items():
            model = sp.train(small(), TRAIN, adversary=adversary, epochs=12, batch_size=64, learning_rate=3e-3).model
            found[name] = certify(Smoothed(model, sigma), X, Y, n=500, batch_size=2000)
        assert found["noise"].mean_radius > found["clean"].mean_radius + 0.05
        assert found["smoothadv"].mean_radius > found["noise"].mean_radius - 0.03
        assert found["smoothadv"].certified_accuracy([0.0])[0] > 0.7

    def test_augmentation_is_clipped_unless_told(self) -> None:
        seen: list[Tensor] = []

        class Looks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(x)
                return x.flatten(1)[:, :10]

        model = sp.Model(Looks())
        for clip in (True, False):
            GaussianAugmentation(Standard(), 0.5, clip=clip).loss(batch(model))
        assert torch.equal(seen[0], seen[1].clamp(0, 1))
        assert float(seen[1].min()) < -0.5

    def test_denoisers(self) -> None:
        sigma = 0.4
        model = sp.train(small(), TRAIN, epochs=20, batch_size=64, learning_rate=3e-3).model
        weights = [parameter.clone() for parameter in model.net.parameters()]  # type: ignore[union-attr]
        bare = certify(Smoothed(model, sigma), X, Y, n=500, batch_size=2000)
        noisy = X + sigma * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
        denoiser, radii, errors = Little(), [], []
        for loss in ("mse", "stability"):
            train_noise_denoiser(denoiser, TRAIN.x, sigma, model=model, loss=loss, epochs=20, learning_rate=3e-3)  # type: ignore[arg-type]
            smoothed = Smoothed(sp.Defended(model, [denoiser.transform()]), sigma)
            radii.append(certify(smoothed, X, Y, n=500, batch_size=2000).mean_radius)
            with torch.no_grad():
                errors.append(float((denoiser(noisy) - X).square().mean()))
        assert errors[0] < 0.5 * float((noisy.clamp(0, 1) - X).square().mean())
        assert min(radii) > bare.mean_radius + 0.03
        assert all(torch.equal(a, b) for a, b in zip(weights, model.net.parameters(), strict=True))  # type: ignore[union-attr]

    def test_by_name(self) -> None:
        given = defense("gaussian-augmentation:sigma=0.25,clip=false+smoothing:sigma=0.25")
        assert given.recipe(sp.L2(0.5)).objective == GaussianAugmentation(Standard(), 0.25, clip=False)
        protected = given.protect(sp.Model(sp.zoo.build("digits-cnn")), (1, 8, 8))
        assert isinstance(protected, Smoothed)
        assert isinstance(certify(protected, X[:2], n=10), Certificates)
        assert defense("smoothadv:sigma=0.25").recipe(sp.L2(0.5)).objective == SmoothAdv(threat=sp.L2(0.5), sigma=0.25)

    def test_refused(self) -> None:
        for settings, message in (({"sigma": 0}, "sigma"), ({"draws": 0}, "draws"), ({"warmup": -1}, "warmup")):
            with pytest.raises(InputError, match=message):
                SmoothAdv(threat=sp.L2(0.5), **settings)  # type: ignore[arg-type]
        for given, message in (
            ({"sigma": 0.0}, "sigma"),
            ({"sigma": 0.1, "loss": "l1"}, "loss"),
            ({"sigma": 0.1, "loss": "stability"}, "model="),
        ):
            with pytest.raises(InputError, match=message):
                train_noise_denoiser(Little(), X, **given)  # type: ignore[arg-type]
