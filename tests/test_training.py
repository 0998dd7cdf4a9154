"""Training: the three forms, exact resume, early stopping, and what must stay as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import saddlepoint as sp
from saddlepoint.defenses import Batch, Objective

DIGITS = sp.data.load("digits")
SMALL = DIGITS.train.take(300)


def make_net(seed: int = 0, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 32)]
        if norm:
            layers.append(nn.BatchNorm1d(32))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        return nn.Sequential(*layers, nn.Linear(32, 10))


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def batch_of(net, split, *, progress=0.0, seed=0):
    return Batch(sp.Model(net), split.x, split.y, torch.arange(len(split)), seed, progress)


def test_standard_training_learns():
    trained = sp.train(make_net(), DIGITS.train, validation=DIGITS.test, epochs=10, learning_rate=5e-3)
    assert trained.epochs[-1].clean_accuracy > 0.9
    assert trained.epochs[-1].robust_accuracy is None
    assert [record.epoch for record in trained.epochs] == list(range(10))
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    assert trained.complete


def test_adversarial_training_gives_robustness_that_standard_training_does_not():
    attack, threat = sp.attacks.PGD(steps=5), sp.Linf(0.1)
    adversary = sp.Adversarial(attack=attack, threat=threat)
    settings = {"validation": DIGITS.test, "epochs": 12, "learning_rate": 5e-3}
    hardened = sp.train(make_net(), DIGITS.train, adversary=adversary, **settings)
    standard = sp.train(make_net(), DIGITS.train, **settings)
    undefended = sp.attack(standard.model, DIGITS.test.x, DIGITS.test.y, attack, threat).robust_accuracy
    assert hardened.epochs[-1].robust_accuracy > undefended + 0.15


def test_forms_are_the_papers_losses():
    net, attack, threat = make_net(), sp.attacks.FGSM(), sp.Linf(0.1)
    x, y = SMALL.x, SMALL.y
    adversarial = sp.perturb(net, x, y, attack, threat)
    clean_loss, adversarial_loss = cross_entropy(net(x), y), cross_entropy(net(adversarial), y)

    def loss(**settings):
        return sp.Adversarial(attack=attack, threat=threat, **settings).loss(batch_of(net, SMALL))

    torch.testing.assert_close(loss(form="replace"), adversarial_loss)
    torch.testing.assert_close(loss(form="add"), (clean_loss + adversarial_loss) / 2)
    torch.testing.assert_close(loss(form="regularize", alpha=0.3), 0.3 * clean_loss + 0.7 * adversarial_loss)


def test_regularizer_with_fgsm_is_goodfellows_equation():
    """alpha * J(x) + (1 - alpha) * J(x + eps * sign(grad_x J)), written out; its parameter gradient stops at x'."""
    net, eps = make_net(), 0.1
    x = SMALL.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net(x), SMALL.y), x)
    moved = (SMALL.x + eps * gradient.sign()).clamp(0, 1)
    written_out = 0.5 * cross_entropy(net(SMALL.x), SMALL.y) + 0.5 * cross_entropy(net(moved), SMALL.y)
    objective = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(eps), form="regularize")
    ours = objective.loss(batch_of(net, SMALL))
    torch.testing.assert_close(ours, written_out)
    for a, b in zip(
        torch.autograd.grad(ours, net.parameters()), torch.autograd.grad(written_out, net.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_danskin_the_parameter_gradient_at_the_maximiser_is_that_of_the_maximum():
    """On a linear model FGSM solves the inner maximum exactly, so finite differences of max_x' L must agree."""
    net = nn.Linear(6, 2).double()
    x, y = torch.rand(20, 6, dtype=torch.float64), torch.arange(20) % 2
    objective = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.05))
    batch = Batch(sp.Model(net, bounds=None), x, y, torch.arange(20), 0, 0.0)
    (gradient,) = torch.autograd.grad(objective.loss(batch), net.weight)
    numeric = torch.zeros_like(gradient)
    for index in np.ndindex(*gradient.shape):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                net.weight[index] += step
                values.append(float(objective.loss(batch)))
                net.weight[index] -= step
        numeric[index] = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(gradient, numeric, atol=1e-6, rtol=1e-4)


def test_warmup_scales_eps():
    net = make_net()
    objective = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.2), warmup=2.0)
    half = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.1))
    full = sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.2))
    torch.testing.assert_close(objective.loss(batch_of(net, SMALL, progress=1.0)), half.loss(batch_of(net, SMALL)))
    torch.testing.assert_close(objective.loss(batch_of(net, SMALL, progress=2.0)), full.loss(batch_of(net, SMALL)))


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_resume_is_exact(tmp_path, monkeypatch, stop_at):
    """Interrupted in the middle of an epoch and continued: the same weights, bit by bit, and the same history."""
    monkeypatch.setattr("saddlepoint.defenses.loop._CHECKPOINT_SECONDS", 0.0)
    settings = {
        "adversary": sp.Adversarial(attack=sp.attacks.PGD(steps=2), threat=sp.Linf(0.1), warmup=1.5),
        "validation": DIGITS.test.take(50),
        "epochs": 4,
        "batch_size": 100,
        "schedule": "cosine",
        "augment": lambda x: (x + 0.05 * torch.rand_like(x)).clamp(0, 1),
    }
    whole = make_net(norm=True, dropout=0.3)
    history = sp.train(whole, SMALL, **settings).epochs

    class Stop(Objective):
        def __init__(self, inner):
            self.inner, self.calls = inner, 0

        @property
        def adversary(self):
            return self.inner.adversary

        def loss(self, batch):
            if self.calls == stop_at:
                raise KeyboardInterrupt
            self.calls += 1
            return self.inner.loss(batch)

        def settings(self):
            return self.inner.settings()

    path = tmp_path / "run.pt"
    first = make_net(norm=True, dropout=0.3)
    stopped = sp.train(first, SMALL, checkpoint=path, **{**settings, "adversary": Stop(settings["adversary"])})
    assert not stopped.complete
    assert path.exists()
    second = make_net(seed=9, norm=True, dropout=0.3)
    resumed = sp.train(second, SMALL, checkpoint=path, **settings)
    assert resumed.complete
    assert same(weights(whole), weights(second))
    assert [(e.epoch, e.loss, e.robust_accuracy) for e in resumed.epochs] == [
        (e.epoch, e.loss, e.robust_accuracy) for e in history
    ]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    sp.train(make_net(), SMALL, epochs=1, checkpoint=path)
    with pytest.raises(sp.DataError, match="epochs"):
        sp.train(make_net(), SMALL, epochs=2, checkpoint=path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"nonsense" * 10])
def test_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "run.pt"
    sp.train(make_net(), SMALL, epochs=1, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(sp.DataError, match=r"run\.pt"):
        sp.train(make_net(), SMALL, epochs=1, checkpoint=path)


def test_a_pickle_is_not_executed(tmp_path):
    path = tmp_path / "run.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"config": Evil()}, path)
    with pytest.raises(sp.DataError):
        sp.train(make_net(), SMALL, epochs=1, checkpoint=path)
    assert not (tmp_path / "executed").exists()


def test_patience_stops_and_restores_the_best_weights():
    best = {}

    class Decaying(Objective):
        """Learns for two epochs, then unlearns."""

        def loss(self, batch):
            loss = cross_entropy(batch.model.forward(batch.x), batch.y)
            return loss if batch.progress < 2 else -loss.clamp(max=20)

        def settings(self):
            return {"name": "Decaying"}

    net = make_net()

    def note(record):
        best[record.epoch] = (record.clean_accuracy, weights(net))

    trained = sp.train(
        net, SMALL, adversary=Decaying(), validation=DIGITS.test, epochs=30, patience=2, learning_rate=5e-3, on_epoch=note
    )
    assert len(trained.epochs) < 30
    top = max(best, key=lambda epoch: (best[epoch][0], -epoch))
    assert len(trained.epochs) == top + 3
    assert same(weights(net), best[top][1])


def test_global_random_state_is_kept_and_does_not_matter():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = make_net(dropout=0.5)
    sp.train(first, SMALL, epochs=1)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(3)
    second = make_net(dropout=0.5)
    sp.train(second, SMALL, epochs=1)
    assert same(weights(first), weights(second))
    third = make_net(dropout=0.5)
    sp.train(third, SMALL, epochs=1, seed=1)
    assert not same(weights(first), weights(third))


def test_network_is_left_in_eval_mode_without_gradients():
    net = make_net()
    sp.train(net, SMALL, epochs=1)
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


def test_a_models_normalisation_takes_part():
    plain, scaled = make_net(), make_net()
    sp.train(sp.Model(scaled, mean=0.5, std=0.25), SMALL, epochs=1)
    sp.train(plain, sp.data.Split((SMALL.x - 0.5) / 0.25, SMALL.y), epochs=1, bounds=None)
    for a, b in zip(weights(plain), weights(scaled), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_batch_norm_statistics_come_from_training_batches_alone():
    """The inner attack must not move running statistics, in either mode."""
    for mode in ("eval", "train"):
        net = make_net(norm=True)
        seen = []
        handle = net[2].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(module.training))
        before = copy.deepcopy(net[2])
        objective = sp.Adversarial(attack=sp.attacks.PGD(steps=3), threat=sp.Linf(0.1), mode=mode)
        net.train()
        objective.loss(batch_of(net, SMALL))
        handle.remove()
        assert net[2].num_batches_tracked == before.num_batches_tracked + 1
        assert seen == [mode == "train"] * 3 + [True]


def test_schedules():
    for schedule, last in (("constant", 1.0), ("linear", 1 / 6), ("cosine", (1 + math.cos(math.pi * 5 / 6)) / 2)):
        trained = sp.train(make_net(), SMALL, epochs=2, batch_size=100, schedule=schedule, learning_rate=0.5e-3)
        assert trained.epochs[-1].learning_rate == pytest.approx(0.5e-3 * last)


def test_users_optimizer_is_used():
    net = make_net()
    before = weights(net)
    sp.train(net, SMALL, epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-9))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"schedule": "cosinus"}, "schedule"),
        ({"patience": 3}, "validation"),
        ({"data": (torch.rand(4, 64), torch.tensor([0, 1, 2]))}, "shape"),
        ({"data": (torch.rand(4, 64) + 1, torch.zeros(4, dtype=torch.int64))}, "bounds"),
        ({"data": [1, 2]}, "perturb"),
        ({"data": (torch.rand(0, 64), torch.zeros(0, dtype=torch.int64))}, "no samples"),
    ],
)
def test_bad_arguments(arguments, text):
    arguments = {"data": SMALL, **arguments}
    with pytest.raises(sp.InputError, match=text):
        sp.train(make_net(), arguments.pop("data"), **arguments)


def test_nan_loss_is_an_error():
    with pytest.raises(sp.ModelError, match="learning rate"):
        sp.train(make_net(), SMALL, epochs=3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30))


def test_adversary_is_checked_when_it_is_made():
    with pytest.raises(sp.CapabilityError):
        sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.L2(0.1))
    with pytest.raises(sp.InputError, match="form"):
        sp.Adversarial(attack=sp.attacks.FGSM(), threat=sp.Linf(0.1), form="mix")


def test_harden_tells_old_examples_from_new_ones():
    """Static retraining fits the old examples; a new attack on the new network still succeeds more often."""
    standard = sp.train(make_net(), DIGITS.train, epochs=8, learning_rate=5e-3).model
    before = weights(standard.networks()[0])
    outcome = sp.harden(standard, DIGITS.train, DIGITS.test, sp.attacks.FGSM(), sp.Linf(0.15), epochs=8, learning_rate=5e-3)
    assert same(before, weights(standard.networks()[0]))
    assert outcome.old_examples_accuracy > outcome.before.robust_accuracy + 0.2
    assert outcome.old_examples_accuracy > outcome.after.robust_accuracy
    assert 0 < outcome.crafted <= len(DIGITS.train)
