"""The loop: anything trains in it and resumes exactly; averages, mixed precision, the best epoch; and what goes wrong."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.attacks.ascent import FGSM, PGD
from saddlepoint.defenses import Objective, Standard, fit

DIGITS = sp.data.load("digits")
SMALL = DIGITS.train.take(220)
LINF = sp.Linf(0.1)


def make_net(seed=0, norm=False, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms, drops = [nn.BatchNorm1d(16)] if norm else [], [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *norms, nn.ReLU(), *drops, nn.Linear(16, 10))


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


# ---- fit


def denoise(net):
    def loss(sample):
        (x,) = sample.tensors
        sample.memory["batches"] = sample.memory.get("batches", 0) + 1
        return (net((x + 0.1 * torch.randn_like(x)).clamp(0, 1)) - x.flatten(1)).square().mean()

    return loss


def autoencoder(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 64))


def test_fit_trains_a_denoiser():
    net = autoencoder()
    done = fit(net, (DIGITS.train.x,), denoise(net), epochs=8, learning_rate=5e-3, settings={"kind": "denoiser"})
    assert done.complete
    assert done.epochs[-1].loss < 0.5 * done.epochs[0].loss
    assert done.epochs[-1].clean_accuracy is None
    assert done.config["kind"] == "denoiser"
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("average", [None, "ema", "swa"])
@pytest.mark.parametrize("stop_at", [1, 5, 6, 10])
def test_fit_resumes_exactly(tmp_path, monkeypatch, stop_at, average):
    """Weights, batch statistics, averages, noise and memory are as if nothing had happened."""
    monkeypatch.setattr("saddlepoint.defenses.loop._CHECKPOINT_SECONDS", 0.0)
    settings = {"epochs": 4, "batch_size": 80, "schedule": "cosine", "average": average, "average_from": 0.5, "decay": 0.9}
    whole = autoencoder()
    history = fit(whole, (SMALL.x,), denoise(whole), **settings).epochs
    first, path = autoencoder(), tmp_path / "run.pt"
    inner, calls = denoise(first), itertools.count()

    def stopping(sample):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return inner(sample)

    assert not fit(first, (SMALL.x,), stopping, checkpoint=path, **settings).complete
    second = autoencoder(seed=5)
    resumed = fit(second, (SMALL.x,), denoise(second), checkpoint=path, **settings)
    assert resumed.complete
    assert same(weights(whole), weights(second))
    assert [(e.epoch, e.loss) for e in resumed.epochs] == [(e.epoch, e.loss) for e in history]


def test_a_finished_checkpoint_gives_the_result_again(tmp_path):
    for average in (None, "ema", "swa"):
        first, second, path = autoencoder(), autoencoder(3), tmp_path / f"{average}.pt"
        settings = {"epochs": 2, "average": average, "checkpoint": path}
        done = fit(first, (SMALL.x,), denoise(first), **settings)
        again = fit(second, (SMALL.x,), denoise(second), **settings)
        assert same(weights(first), weights(second))
        assert again.epochs == done.epochs


def test_fit_leaves_global_random_state():
    state = torch.get_rng_state()
    net = autoencoder()
    fit(net, (SMALL.x,), denoise(net), epochs=1, average="swa")
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_rows_of_all_tensors_with_their_positions():
    net, x = nn.Linear(1, 1), torch.arange(10.0)[:, None]
    seen = []

    def loss(sample):
        first, second = sample.tensors
        assert torch.equal(second, first * 2)
        assert torch.equal(first[:, 0].long(), sample.ids)
        seen.append((sample.ids.tolist(), sample.progress, sample.seed))
        return net(first).square().mean()

    fit(net, (x, 2 * x), loss, epochs=2, batch_size=4)
    assert [len(ids) for ids, _, _ in seen] == [4, 4, 2] * 2
    assert sorted(itertools.chain(*(ids for ids, _, _ in seen[:3]))) == list(range(10))
    assert [progress for _, progress, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert seen[0][0] != seen[3][0]
    assert len({seed for _, _, seed in seen}) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"net": lambda x: x}, "nn.Module"),
        ({"data": torch.rand(3, 1)}, "tuple"),
        ({"data": ()}, "tuple"),
        ({"data": (torch.rand(3, 1), torch.rand(2, 1))}, "rows"),
        ({"data": (torch.rand(0, 1),)}, "rows"),
        ({"average": "mean"}, "average"),
        ({"precision": "float16"}, "precision"),
        ({"decay": 1.0}, "decay"),
        ({"average_from": 1.0}, "average_from"),
        ({"net": nn.ReLU()}, "nothing to train"),
    ],
)
def test_fit_refuses(arguments, text):
    given = {"net": nn.Linear(1, 1), "data": (torch.rand(3, 1),), "loss": lambda sample: sample.tensors[0].sum(), **arguments}
    with pytest.raises(sp.InputError, match=text):
        fit(**given)


# ---- averages, the best epoch, precision


def test_ema_and_swa_are_the_means_of_the_trajectory():
    """Batches of all samples: one step an epoch, so that every epoch's weights are seen."""
    seen = []
    net = make_net()
    settings = {"epochs": 6, "batch_size": 1000, "optimizer": sgd(0.3)}
    sp.train(net, SMALL, on_epoch=lambda record: seen.append(weights(net)), **settings)
    assert same(weights(net), seen[-1])
    ema, swa = make_net(), make_net()
    sp.train(ema, SMALL, average="ema", decay=0.7, **settings)
    sp.train(swa, SMALL, average="swa", average_from=0.5, **settings)
    for name in seen[0]:
        mean = seen[0][name]
        for step in seen[1:]:
            mean = 0.7 * mean + 0.3 * step[name]
        torch.testing.assert_close(ema.state_dict()[name], mean)
        torch.testing.assert_close(swa.state_dict()[name], torch.stack([s[name] for s in seen[3:]]).mean(0))


def test_swa_takes_normalisation_statistics_anew():
    net = make_net(norm=True)
    sp.train(net, SMALL, average="swa", epochs=3, batch_size=220)
    hidden = net[1](SMALL.x.flatten(1))
    torch.testing.assert_close(net[2].running_mean, hidden.mean(0))
    torch.testing.assert_close(net[2].running_var, hidden.var(0))
    assert net[2].momentum == 0.1


def test_averaged_weights_are_what_is_validated():
    net = make_net()
    done = sp.train(net, SMALL, validation=DIGITS.test, average="ema", decay=0.5, epochs=3)
    assert done.epochs[-1].clean_accuracy == float((done.model.predict(DIGITS.test.x) == DIGITS.test.y).double().mean())


class Unlearning(Objective):
    """Learns for three epochs, then unlearns."""

    def loss(self, batch):
        loss = cross_entropy(batch.model.forward(batch.x), batch.y)
        return loss if batch.progress < 3 else -loss.clamp(max=20)


def test_restore_best_hands_back_the_best_epoch_without_stopping():
    net, seen = make_net(), []
    done = sp.train(
        net, DIGITS.train, adversary=Unlearning(), validation=DIGITS.test, epochs=6, learning_rate=5e-3, restore_best=True,
        on_epoch=lambda record: seen.append((record.clean_accuracy, weights(net))),
    )  # fmt: skip
    assert len(done.epochs) == 6
    best = max(range(6), key=lambda epoch: (seen[epoch][0], -epoch))
    assert best < 5
    assert same(weights(net), seen[best][1])


def test_bfloat16_learns_and_keeps_float32_weights():
    net = make_net()
    adversary = defenses.TRADES(threat=LINF, attack=PGD(steps=2))
    settings = {"epochs": 6, "learning_rate": 5e-3, "validation": DIGITS.test}
    done = sp.train(net, DIGITS.train, adversary=adversary, precision="bfloat16", channels_last=True, **settings)
    assert done.epochs[-1].clean_accuracy > 0.8
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert done.config["precision"] == "bfloat16"
    exact = make_net()
    sp.train(exact, DIGITS.train, adversary=adversary, **settings)
    assert not same(weights(net), weights(exact))


def test_channels_last_is_for_images():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(6, 1, 4, 4, 4)
    with pytest.raises(sp.InputError, match="images"):
        fit(net, (x,), lambda sample: net(sample.tensors[0]).square().mean(), channels_last=True)
    assert fit(net, (x,), lambda sample: net(sample.tensors[0]).square().mean(), epochs=1).complete


# ---- exact resume of whatever keeps something between batches


STATEFUL = {
    "free": defenses.Free(threat=LINF, repeats=2),
    "awp": defenses.AWP(defenses.TRADES(threat=LINF, attack=PGD(steps=2))),
    "fast": defenses.recipe("fast", LINF).objective,
    "parseval": defenses.Parseval(Standard(), beta=0.01, share=0.5),
    "lipschitz": defenses.LipschitzPenalty(defenses.LipschitzProjection(Standard(), 3.0), iterations=1),
    "dropout": defenses.Dropout(defenses.Mixup(defenses.LabelSmoothing(defenses.GaussianAugmentation(Standard())))),
    "several": sp.Adversarial(attack=(FGSM(), PGD(steps=2)), threat=LINF, labels="predicted", warmup=1.5),
}


class Stop(defenses.Around):
    def loss(self, batch):
        if batch.progress >= 1.4:
            raise KeyboardInterrupt
        return self.inner.loss(batch)

    def settings(self):
        return self.inner.settings()


@pytest.mark.parametrize("name", STATEFUL)
def test_every_objective_resumes_exactly(tmp_path, monkeypatch, name):
    monkeypatch.setattr("saddlepoint.defenses.loop._CHECKPOINT_SECONDS", 0.0)
    settings = {"epochs": 3, "batch_size": 80, "average": "ema", "decay": 0.8, "validation": DIGITS.test.take(40)}
    whole, second, path = make_net(norm=True), make_net(7, norm=True), tmp_path / "run.pt"
    history = sp.train(whole, SMALL, adversary=STATEFUL[name], **settings).epochs
    stopped = sp.train(make_net(norm=True), SMALL, adversary=Stop(STATEFUL[name]), checkpoint=path, **settings)
    assert not stopped.complete
    resumed = sp.train(second, SMALL, adversary=STATEFUL[name], checkpoint=path, **settings)
    assert same(weights(whole), weights(second))
    assert [(e.loss, e.robust_accuracy) for e in resumed.epochs] == [(e.loss, e.robust_accuracy) for e in history]


def test_an_interrupted_awp_step_leaves_the_weights_of_the_step_before():
    net = make_net()
    before = weights(net)

    class Broken(defenses.MinMax):
        calls = 0

        def examples(self, batch):
            return batch.x

        def loss_at(self, batch, examples):
            Broken.calls += 1
            if Broken.calls == 2:  # the weights are perturbed now
                assert not same(before, weights(net))
                raise KeyboardInterrupt
            return cross_entropy(batch.model.forward(examples), batch.y)

    done = sp.train(net, SMALL, adversary=defenses.AWP(Broken()))
    assert not done.complete
    assert same(before, weights(net))


def test_ctrl_c_while_writing_loses_no_checkpoint(tmp_path, monkeypatch):
    path, written = tmp_path / "run.pt", torch.save

    def interrupted(document, target):
        written(document, target)
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert not sp.train(make_net(), SMALL, epochs=3, checkpoint=path).complete
    monkeypatch.undo()
    net, whole = make_net(3), make_net()
    sp.train(whole, SMALL, epochs=3)
    sp.train(net, SMALL, epochs=3, checkpoint=path)
    assert same(weights(net), weights(whole))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    settings = {"epochs": 2, "checkpoint": path}
    net = make_net()
    written = torch.save

    def full(document, target):
        if path.exists():
            target.write_bytes(b"half")
            raise RuntimeError("no space left on device")
        written(document, target)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(sp.DataError, match="no space"):
        sp.train(net, SMALL, **settings)
    monkeypatch.undo()
    whole = make_net()
    sp.train(whole, SMALL, epochs=2)
    sp.train(net, SMALL, **settings)
    assert same(weights(net), weights(whole))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


# ---- steps


def test_free_makes_its_replays_and_smaller_last_batches():
    net, steps = make_net(), []

    class Counted(defenses.Around):
        def after_step(self, batch):
            steps.append((len(batch.x), batch.progress))
            self.inner.after_step(batch)

        def loss(self, batch):
            return self.inner.loss(batch)

    sp.train(net, SMALL, adversary=Counted(defenses.Free(threat=LINF, repeats=3)), epochs=1, batch_size=150)
    assert [count for count, _ in steps] == [150] * 3 + [70] * 3
    assert [progress for _, progress in steps] == pytest.approx([i / 6 for i in range(6)])


def test_stop_at_collapse_puts_the_last_good_weights_back():
    net, seen = make_net(), []
    threat = sp.Linf(0.05)
    adversary = defenses.StopAtCollapse(Unlearning(), threat, drop=0.2)
    done = sp.train(
        net, DIGITS.train, adversary=adversary, epochs=30, learning_rate=1e-2, on_epoch=lambda record: seen.append(weights(net))
    )
    assert 4 <= len(done.epochs) < 30
    assert done.complete
    assert same(seen[-1], seen[-2])  # the last epoch's own weights were given up
    assert same(weights(net), seen[-2])
    robust = sp.attack(done.model, DIGITS.train.x[:200], DIGITS.train.y[:200], PGD(steps=5), threat).robust_accuracy
    assert robust > 0.3


def test_collapse_can_be_warned_of():
    adversary = defenses.StopAtCollapse(Unlearning(), sp.Linf(0.05), drop=0.2, action="warn")
    with pytest.warns(sp.SaddlepointWarning, match="catastrophic overfitting in epoch"):
        done = sp.train(make_net(), DIGITS.train, adversary=adversary, epochs=8, learning_rate=1e-2)
    assert len(done.epochs) == 8


def test_no_collapse_no_stop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = defenses.recipe("fast", LINF)
        done = sp.train(
            make_net(),
            DIGITS.train,
            adversary=recipe.objective,
            epochs=6,
            validation=DIGITS.test,
            learning_rate=1e-2,
            **recipe.train,
        )
    assert len(done.epochs) == 6
    assert done.epochs[-1].robust_accuracy > 0.3


# ---- weights


def test_weight_penalty_is_a_sum_over_matrices():
    net = make_net(norm=True)
    batch = defenses.Batch(sp.Model(net, num_classes=10), SMALL.x, SMALL.y, torch.arange(220), 0, 0.0)
    net.eval()
    for power in (1.0, 2.0, 3.0):
        extra = defenses.WeightPenalty(Standard(), 0.1, power).loss(batch) - Standard().loss(batch)
        written_out = 0.1 * sum(net[i].weight.abs().pow(power).sum() for i in (1, 4))
        torch.testing.assert_close(extra, written_out, rtol=1e-4, atol=1e-5)


def test_parseval_converges_to_orthonormal_rows():
    net = sp.zoo.build("digits-cnn")
    batch = defenses.Batch(sp.Model(net), SMALL.x, SMALL.y, torch.arange(220), 0, 0.0)
    objective = defenses.Parseval(Standard(), beta=0.3)
    for _ in range(700):
        objective.after_step(batch)
    first, second = net[5].weight, net[7].weight
    torch.testing.assert_close(second @ second.T, torch.eye(10), atol=1e-3, rtol=0)
    torch.testing.assert_close(first @ first.T, torch.eye(128), atol=1e-3, rtol=0)
    kernel = net[0].weight.flatten(1) * 3  # 9 overlapping pixels
    torch.testing.assert_close(kernel.T @ kernel, torch.eye(9), atol=1e-3, rtol=0)
    x = torch.randn(500, 1, 8, 8)
    assert float((net[0](x) - net[0](0 * x)).detach().flatten(1).norm(dim=1).div(x.flatten(1).norm(dim=1)).max()) <= 1 + 1e-4


def test_parsevals_step_descends_its_regulariser():
    net = make_net()
    batch = defenses.Batch(sp.Model(net), SMALL.x, SMALL.y, torch.arange(220), 0, 0.0)
    w = net[-1].weight.detach().clone().requires_grad_()
    regulariser = (w @ w.T - torch.eye(10)).square().sum() * 0.01 / 4
    (gradient,) = torch.autograd.grad(regulariser, w)
    defenses.Parseval(Standard(), beta=0.01).after_step(batch)
    torch.testing.assert_close(net[-1].weight.detach(), (w - gradient).detach())


def operator_norm(layer, shape):
    columns = torch.eye(int(torch.tensor(shape).prod())).view(-1, *shape)
    image = (layer(columns) - layer(torch.zeros(1, *shape))).flatten(1)
    return float(torch.linalg.matrix_norm(image.detach(), 2))


def test_spectral_bounds_hold_and_are_exact_for_linear_layers():
    net = sp.zoo.build("digits-cnn")
    batch = defenses.Batch(sp.Model(net, num_classes=10), SMALL.x, SMALL.y, torch.arange(220), 0, 0.0)
    extra = defenses.LipschitzPenalty(Standard(), 1.0, iterations=300).loss(batch) - Standard().loss(batch)
    linear = [torch.linalg.matrix_norm(net[i].weight, 2).item() for i in (5, 7)]
    bounds = [3 * torch.linalg.matrix_norm(net[0].weight.flatten(1), 2).item()]
    bounds += [2 * torch.linalg.matrix_norm(net[2].weight.flatten(1), 2).item()]  # stride 2: 2 x 2 patches share a pixel
    assert extra.item() == pytest.approx(linear[0] * linear[1] * bounds[0] * bounds[1], rel=1e-3)
    assert operator_norm(net[0], (1, 8, 8)) <= bounds[0]
    assert operator_norm(net[2], (32, 8, 8)) <= bounds[1]


def test_lipschitz_projection_bounds_every_layer():
    net = make_net()
    objective = defenses.LipschitzProjection(defenses.LipschitzPenalty(Standard(), 1e-3), 0.8, iterations=20)
    sp.train(net, SMALL, adversary=objective, epochs=8, learning_rate=2e-2)
    for layer in (net[1], net[-1]):
        assert 0.7 < torch.linalg.matrix_norm(layer.weight, 2).item() < 0.8 * 1.01


# ---- distillation and static examples


def test_distillation_trains_both_at_the_temperature(tmp_path):
    teacher, student = make_net(1), make_net(2)
    settings = {"epochs": 12, "learning_rate": 2e-2, "validation": DIGITS.test}
    path = tmp_path / "student.pt"
    done = defenses.distill(teacher, student, DIGITS.train, temperature=20, checkpoint=path, **settings)
    assert done.model.net is student
    assert done.epochs[-1].clean_accuracy > 0.85
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student.pt", "student.pt.teacher"]
    plain = make_net(2)
    sp.train(plain, DIGITS.train, **settings)
    with torch.no_grad():
        sizes = [float(net(DIGITS.test.x).softmax(1).amax(1).median()) for net in (student, plain)]
        spread = [float(net(DIGITS.test.x).std(1).mean()) for net in (student, plain)]
    assert spread[0] > 2 * spread[1]  # logits as large as the temperature makes them
    assert sizes[0] >= sizes[1]
    again = defenses.distill(teacher, make_net(2), DIGITS.train, temperature=20, teach=False, **settings)
    assert same(weights(again.model.net), weights(student))


def test_the_tempered_loss_is_the_papers_equation():
    net, teacher = make_net(), make_net(1)
    batch = defenses.Batch(sp.Model(net), SMALL.x, SMALL.y, torch.arange(220), 0, 0.0)
    target = (teacher(SMALL.x) / 5).softmax(1)
    written_out = -(target * (net(SMALL.x) / 5).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(defenses.Tempered(temperature=5.0, teacher=sp.Model(teacher)).loss(batch), written_out)
    torch.testing.assert_close(defenses.Tempered(temperature=5.0).loss(batch), cross_entropy(net(SMALL.x) / 5, SMALL.y))


def test_a_network_is_not_its_own_teacher():
    net = make_net()
    with pytest.raises(sp.InputError, match="two networks"):
        defenses.distill(net, sp.Model(net), SMALL)


def test_static_examples_are_added_with_their_labels():
    model = sp.train(make_net(), SMALL, epochs=3).model
    both = defenses.static_augmentation(model, SMALL, FGSM(), LINF)
    assert torch.equal(both.x[:220], SMALL.x)
    assert torch.equal(both.y, torch.cat([SMALL.y, SMALL.y]))
    assert torch.equal(both.x[220:], both.crafted.adversarial)
    assert sp.train(make_net(), both, epochs=1).complete


# ---- clear errors


def test_a_net_that_returns_probabilities_is_refused():
    net = nn.Sequential(make_net(), nn.Softmax(1))
    with pytest.raises(sp.ModelError, match="before the softmax"):
        sp.train(net, SMALL, epochs=1)


@pytest.mark.parametrize("threat", [sp.Linf(8), sp.Linf(1.0), sp.L2(8), sp.L1(64)])
def test_eps_of_the_wrong_scale_is_refused(threat):
    with pytest.raises(sp.InputError, match="8 / 255"):
        sp.train(make_net(), SMALL, adversary=defenses.TRADES(threat=threat), epochs=1)


def test_a_range_in_other_units_is_allowed():
    x, adversary = SMALL.x * 255, defenses.TRADES(threat=sp.Linf(8), attack=PGD(steps=1))
    assert sp.train(make_net(), (x, SMALL.y), adversary=adversary, epochs=1, bounds=(0, 255)).complete


def test_labels_out_of_range():
    with pytest.raises(sp.InputError, match=r"data: y\[0\] = 12"):
        sp.train(make_net(), (SMALL.x, torch.full((220,), 12)), epochs=1)


def test_restore_best_needs_validation():
    with pytest.raises(sp.InputError, match="validation"):
        sp.train(make_net(), SMALL, restore_best=True)


@pytest.mark.parametrize(
    ("adversary", "text"),
    [
        (defenses.recipe("trades", LINF), r"recipe\.objective"),
        (defenses.TRADES, "must be an objective"),
        ("trades", "must be an objective"),
    ],
)
def test_what_is_no_objective(adversary, text):
    with pytest.raises(sp.InputError, match=text):
        sp.train(make_net(), SMALL, adversary=adversary, epochs=1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda net, x, y: cross_entropy(net(x), y, reduction="none"),
        lambda net, x, y: cross_entropy(net(x), y).detach(),
        lambda net, x, y: 1.0,
    ],
    ids=["many", "detached", "float"],
)
def test_a_loss_that_cannot_be_descended(loss):
    net = make_net()
    with pytest.raises(sp.InputError, match="one number"):
        fit(net, (SMALL.x, SMALL.y), lambda sample: loss(net, *sample.tensors), epochs=1)
