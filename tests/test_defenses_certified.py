"""Certified training: bounds hold, losses are the papers', gradients are right, and runs resume exactly."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.defenses import CROWNIBP, IBP, MTLIBP, SABR, Batch, ConvexDual
from saddlepoint.defenses.certified import grown, tightness
from saddlepoint.propagation.bounds import Bounded
from saddlepoint.propagation.graph import export
from saddlepoint.propagation.methods import bounds

DIGITS = sp.data.load("digits")
LINF = sp.Linf(0.1)
AT_ONCE = {"warmup": 0, "ramp": 0}
OBJECTIVES = {
    "ibp": IBP(threat=LINF, **AT_ONCE),
    "ibp, half": IBP(threat=LINF, kappa=(1.0, 0.5), **AT_ONCE),
    "crown-ibp": CROWNIBP(threat=LINF, beta=(1.0, 1.0), **AT_ONCE),
    "crown-ibp, half": CROWNIBP(threat=LINF, beta=(1.0, 0.5), kappa=(0.0, 0.2), **AT_ONCE),
    "sabr": SABR(threat=LINF, attack=sp.attacks.PGD(steps=2), **AT_ONCE),
    "mtl-ibp": MTLIBP(threat=LINF, attack=sp.attacks.PGD(steps=2), **AT_ONCE),
    "convex-dual": ConvexDual(threat=LINF, **AT_ONCE),
}


def make_net(seed=0, norm=False, dtype=torch.float64):
    """A small convolutional network for 8x8 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3, stride=2, padding=1)]
        if norm:
            layers.append(nn.BatchNorm2d(4))
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)]
        return nn.Sequential(*layers).to(dtype)


def make_batch(net, count=6, progress=10.0):
    dtype = next(net.parameters()).dtype
    x, y = DIGITS.train.x[:count].to(dtype), DIGITS.train.y[:count]
    return Batch(sp.Model(net), x, y, torch.arange(count), 0, progress)


def worst_by_hand(net, x, y, eps):
    """Intervals, with the last layer joined with the differences, layer by layer."""
    middle, radius = (
        ((x + eps).clamp(max=1) + (x - eps).clamp(min=0)) / 2,
        ((x + eps).clamp(max=1) - (x - eps).clamp(min=0)) / 2,
    )
    for layer in net[:-1]:
        match layer:
            case nn.Conv2d():
                middle = layer(middle)
                radius = conv2d(radius, layer.weight.abs(), stride=layer.stride, padding=layer.padding)
            case nn.Linear():
                middle, radius = layer(middle), radius @ layer.weight.abs().T
            case nn.ReLU():
                low, high = (middle - radius).relu(), (middle + radius).relu()
                middle, radius = (low + high) / 2, (high - low) / 2
            case nn.Flatten():
                middle, radius = middle.flatten(1), radius.flatten(1)
    w = net[-1].weight[None] - net[-1].weight[y][:, None]
    b = net[-1].bias[None] - net[-1].bias[y][:, None]
    return (w @ middle[..., None]).squeeze(2) + b + (w.abs() @ radius[..., None]).squeeze(2)


def test_ibp_is_the_equation():
    net = make_net()
    batch = make_batch(net)
    worst = cross_entropy(worst_by_hand(net, batch.x, batch.y, 0.1), batch.y)
    clean = cross_entropy(net(batch.x), batch.y)
    torch.testing.assert_close(OBJECTIVES["ibp"].loss(batch), worst)
    torch.testing.assert_close(OBJECTIVES["ibp, half"].loss(batch), (worst + clean) / 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    """Of smooth parts only: at a kink of |w| or of a ReLU's sign both sides differ."""
    net, objective = make_net(1), OBJECTIVES[name]
    batch = make_batch(net)
    if name in ("sabr", "mtl-ibp"):  # their examples move with the weights, which Danskin's gradient leaves out
        still = sp.attacks.PGD(steps=1, step_size=1e-12, random_start=False)
        objective = type(objective)(threat=LINF, attack=still, **AT_ONCE)
    objective.loss(batch).backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-7, -2e-7):
                parameter += step * direction
                values.append(objective.loss(batch).item())
            parameter += 1e-7 * direction
        expected = float((parameter.grad * direction).sum())
        assert (values[0] - values[1]) / 2e-7 == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["ibp", "crown-ibp", "convex-dual"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_loss_bounds_that_of_every_point(name, norm):
    net = make_net(2, norm).eval()
    batch = make_batch(net, 10)
    bound = OBJECTIVES[name].loss(batch).item()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        inside = (batch.x + 0.1 * torch.randn(batch.x.shape, generator=generator).sign()).clamp(0, 1)
        assert cross_entropy(net(inside), batch.y).item() <= bound
    attacked = sp.perturb(net, batch.x, batch.y, sp.attacks.PGD(steps=20), LINF)
    assert cross_entropy(net(attacked), batch.y).item() <= bound


def test_tighter_methods_give_smaller_losses():
    batch = make_batch(make_net(3), 10)
    losses = {name: OBJECTIVES[name].loss(batch).item() for name in OBJECTIVES}
    attacked = defenses.Adversarial(attack=sp.attacks.PGD(steps=5), threat=LINF).loss(batch).item()
    assert attacked < losses["crown-ibp"] < losses["ibp"]
    assert attacked < losses["sabr"] < losses["ibp"]
    assert attacked < losses["mtl-ibp"] < losses["ibp"]
    assert attacked < losses["convex-dual"] < losses["ibp"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_eps_it_is_plain_cross_entropy(name):
    net = make_net()
    batch = make_batch(net)
    clean = cross_entropy(net(batch.x), batch.y)
    kind = type(OBJECTIVES[name])
    torch.testing.assert_close(kind(threat=sp.Linf(0.0), **AT_ONCE).loss(batch), clean, rtol=0, atol=0)
    torch.testing.assert_close(kind(threat=LINF, warmup=11).loss(batch), clean, rtol=0, atol=0)
    tiny = kind(threat=sp.Linf(1e-9), regularizer=0, **AT_ONCE).loss(batch)
    torch.testing.assert_close(tiny, clean, rtol=0, atol=1e-6)


def test_eps_grows_as_a_power_and_then_linearly():
    assert grown(0) == 0
    assert grown(1) == pytest.approx(1)
    assert grown(0.2) / grown(0.1) == pytest.approx(16)
    assert grown(0.9) - grown(0.8) == pytest.approx(grown(0.4) - grown(0.3))
    left, right = ((grown(0.25 + step) - grown(0.25)) / step for step in (-1e-6, 1e-6))
    assert left == pytest.approx(right, rel=1e-4)
    objective = IBP(threat=LINF, warmup=2, ramp=4)
    assert [objective.share(progress) for progress in (0, 2, 4, 6, 9)] == [0, 0, grown(0.5), 1, 1]


def test_weights_move_with_eps():
    net = make_net()
    halfway = make_batch(net, progress=0.5)
    settings = {"threat": LINF, "warmup": 0, "ramp": 1, "regularizer": 0}
    share = grown(0.5)
    reached = sp.Linf(0.1 * share)
    worst = IBP(threat=reached, **AT_ONCE).loss(halfway)
    clean = cross_entropy(net(halfway.x), halfway.y)
    kappa = 1 - 0.5 * share
    torch.testing.assert_close(IBP(kappa=(1.0, 0.5), **settings).loss(halfway), kappa * clean + (1 - kappa) * worst)
    ends = (CROWNIBP(threat=reached, beta=(b, b), **AT_ONCE).loss(halfway).item() for b in (1.0, 0.0))
    linear, intervals = ends
    between = CROWNIBP(beta=(1.0, 0.0), **settings).loss(halfway).item()
    assert linear < between < intervals == pytest.approx(worst.item())


def test_sabr_with_the_whole_size_is_ibp_and_its_boxes_stay_in_the_ball():
    batch = make_batch(make_net(4))
    whole = SABR(threat=LINF, size=1.0, **AT_ONCE).loss(batch)
    torch.testing.assert_close(whole, OBJECTIVES["ibp"].loss(batch))
    sizes = [SABR(threat=LINF, size=size, **AT_ONCE).loss(batch).item() for size in (0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes)


def test_mtl_ibp_is_the_mixture():
    batch = make_batch(make_net(4))
    attack = sp.attacks.PGD(steps=3)
    ends = [MTLIBP(threat=LINF, alpha=alpha, attack=attack, **AT_ONCE).loss(batch) for alpha in (0.0, 1.0)]
    torch.testing.assert_close(ends[1], OBJECTIVES["ibp"].loss(batch))
    torch.testing.assert_close(ends[0], defenses.Adversarial(attack=attack, threat=LINF).loss(batch))
    mixed = MTLIBP(threat=LINF, alpha=0.3, attack=attack, **AT_ONCE).loss(batch)
    torch.testing.assert_close(mixed, 0.7 * ends[0] + 0.3 * ends[1])


# ---- the dual


def test_the_dual_is_the_closed_form_of_one_hidden_layer():
    """J(c) = -nu_1^T b_1 - nu_2^T b_2 - x^T nu_0 - eps |nu_0|_1 + sum over crossing i of l_i max(nu_i, 0), written out."""
    torch.manual_seed(5)
    first, last = nn.Linear(6, 9).double(), nn.Linear(9, 4).double()
    x, eps, row = torch.rand(6, dtype=torch.float64), 0.3, torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    middle, spread = first(x), eps * first.weight.abs().sum(1)
    low, high = middle - spread, middle + spread
    crossing = (low < 0) & (high > 0)
    assert 0 < int(crossing.sum()) < 9
    d = torch.where(crossing, high / (high - low), (low >= 0).double())
    back = last.weight.T @ row  # what the papers call -nu_hat; the objective is to bound row^T z from below
    nu = d * back
    pulled = first.weight.T @ nu
    # where back < 0 the upper line is used, which lies higher by -d l
    closed = row @ last.bias + nu @ first.bias + pulled @ x - eps * pulled.abs().sum()
    closed = closed - (torch.where(crossing, low, 0) * (nu.clamp(max=0))).sum()
    net = nn.Sequential(first, nn.ReLU(), last)
    graph = export(sp.Model(net, bounds=None), x[None]).graph()
    ours = defenses.dual_bounds(graph, (x - eps)[None], (x + eps)[None], row[None, None])
    torch.testing.assert_close(ours[0, 0], closed)
    corners = torch.tensor(list(itertools.product((-eps, eps), repeat=6)), dtype=torch.float64)
    assert ours.item() <= (net(x + corners) @ row).min().item()


def test_the_dual_bounds_deeper_networks_and_takes_hidden_layers_from_itself():
    net = make_net(6)
    x, y = DIGITS.test.x[:8].double(), DIGITS.test.y[:8]
    graph = export(sp.Model(net), x).graph()
    lower, upper = (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1)
    rows = torch.eye(10, dtype=torch.float64)[y][:, None] - torch.eye(10, dtype=torch.float64)
    dual = defenses.dual_bounds(graph, lower, upper, rows)
    intervals = bounds(graph, lower, upper, rows, "ibp")
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        point = lower + (upper - lower) * torch.rand(x.shape, generator=generator, dtype=torch.float64).round()
        assert bool(((rows @ net(point)[..., None]).squeeze(2) >= dual - 1e-9).all())
    assert float((dual - intervals).mean()) > 0
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)).double()
    with pytest.raises(sp.InputError, match="tanh"):
        defenses.dual_bounds(export(sp.Model(smooth), x).graph(), lower, upper, rows)


# ---- initialisation and regularisers


def test_initialisation_keeps_boxes_as_wide_as_they_were():
    wide = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400))
    state = torch.get_rng_state()
    defenses.interval_initialize(wide, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in wide[::2]:
        assert layer.weight.detach().abs().sum(1).mean().item() == pytest.approx(2, rel=0.02)
        assert not layer.bias.any()
    again = nn.Sequential(nn.Linear(400, 400))
    defenses.interval_initialize(again, seed=3)
    assert torch.equal(again[0].weight, wide[0].weight)
    with pytest.raises(sp.InputError, match="no linear"):
        defenses.interval_initialize(nn.ReLU())


def test_regularisers_are_small_for_tight_boxes_and_balanced_signs():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).double()
    defenses.interval_initialize(net)
    x = torch.randn(32, 1, 8, 8, dtype=torch.float64)
    graph = export(sp.Model(net, bounds=None), x).graph(gradients=True)
    tight = tightness(Bounded.of(graph, x - 1e-6, x + 1e-6))
    with torch.no_grad():
        net[1].weight *= 10
    wide = tightness(Bounded.of(graph, x - 1e-6, x + 1e-6))
    wide.backward()
    assert (net[1].weight.grad * net[1].weight).sum().item() > 0  # smaller weights, narrower boxes
    with torch.no_grad():
        net[1].bias += 100
    one_sided = tightness(Bounded.of(graph, x - 1e-6, x + 1e-6))
    assert tight.item() == pytest.approx(0, abs=0.1)
    assert wide.item() == pytest.approx(0.9, abs=0.05)  # (tau - 1 / 20) / tau
    assert one_sided.item() == pytest.approx(2.9, abs=0.05)


def test_regularisers_look_at_relus_alone():
    def of(*layers: nn.Module) -> float:
        net = nn.Sequential(nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.LazyLinear(10)).double()
        x = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        net(x)
        defenses.interval_initialize(net)
        graph = export(sp.Model(net, bounds=None), x).graph(gradients=True)
        return tightness(Bounded.of(graph, x - 1e-6, x + 1e-6)).item()

    assert of(nn.MaxPool2d(2)) == pytest.approx(of(), abs=1e-6)


# ---- batch normalisation


def test_batch_normalisation_takes_the_clean_batchs_statistics():
    net = make_net(7, norm=True).train()
    batch = make_batch(net, 16)
    before = net[1].running_mean.clone()
    loss = OBJECTIVES["ibp"].loss(batch)
    loss.backward()
    assert not torch.equal(net[1].running_mean, before)
    assert all(bool(torch.isfinite(p.grad).all()) and bool(p.grad.any()) for p in net[1].parameters())
    with torch.no_grad():
        hidden = net[0](batch.x)
        mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
        factor = net[1].weight / (variance + net[1].eps).sqrt()
        folded = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1).double(), *net[2:])
        folded[0].weight.copy_(net[0].weight * factor[:, None, None, None])
        folded[0].bias.copy_((net[0].bias - mean) * factor + net[1].bias)
    torch.testing.assert_close(loss, cross_entropy(worst_by_hand(folded, batch.x, batch.y, 0.1), batch.y))
    tiny = IBP(threat=sp.Linf(1e-10), **AT_ONCE).loss(batch)
    torch.testing.assert_close(tiny, cross_entropy(net(batch.x), batch.y), rtol=0, atol=1e-7)


# ---- in the loop


def trained(objective, net=None, **settings):
    net = make_net(8, dtype=torch.float32) if net is None else net
    return sp.train(net, DIGITS.train.take(128), adversary=objective, **({"epochs": 2, "batch_size": 64} | settings))


def test_training_proves_what_plain_training_does_not_and_pgd_agrees():
    x, y, threat = DIGITS.test.x, DIGITS.test.y, sp.Linf(0.05)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    defenses.interval_initialize(net)
    settings = {"epochs": 10, "learning_rate": 5e-3}
    plain = sp.train(make_net(9, dtype=torch.float32), DIGITS.train, **settings).model
    model = sp.train(net, DIGITS.train, adversary=IBP(threat=threat, warmup=1, ramp=5), **settings).model
    before, after = (defenses.lowest_margins(one, x, y, threat) > 0 for one in (plain, model))
    tighter = defenses.lowest_margins(model, x, y, threat, "crown-ibp") > 0
    attacked = sp.attack(model, x, y, sp.attacks.PGD(steps=10), threat)
    assert float(before.float().mean()) < 0.3
    assert float(after.float().mean()) > 0.6
    assert not bool((after & ~attacked.robust).any())
    assert not bool((tighter & ~attacked.robust).any())
    assert bool((model.predict(x)[after] == y[after]).all())


@pytest.mark.parametrize("name", ["ibp", "sabr"])
def test_resume_is_exact(name, tmp_path):
    path, settings = tmp_path / "run.pt", {"warmup": 0.5, "ramp": 2.0}
    objective = type(OBJECTIVES[name])(threat=LINF, **settings)
    whole = make_net(8, norm=True, dtype=torch.float32)
    trained(objective, whole, epochs=3)
    parts = make_net(8, norm=True, dtype=torch.float32)

    def interrupt(record):
        if record.epoch == 0:
            raise KeyboardInterrupt

    assert not trained(objective, parts, epochs=3, checkpoint=path, on_epoch=interrupt).complete
    fresh = make_net(3, norm=True, dtype=torch.float32)
    assert trained(objective, fresh, epochs=3, checkpoint=path).complete
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), whole.state_dict().values(), strict=True))


def test_gradients_are_clipped():
    net = make_net()
    batch = make_batch(net)
    objective = IBP(threat=LINF, clip=1e-3, **AT_ONCE)
    objective.loss(batch).backward()
    objective.after_backward(batch)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_step_leaves_no_trace_and_a_network_can_be_forgotten():
    net = make_net(norm=True).train()
    state = torch.get_rng_state()
    OBJECTIVES["ibp"].loss(make_batch(net)).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert not net[1]._forward_pre_hooks
    assert all(p.requires_grad for p in net.parameters())
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_a_layer_that_was_exchanged_is_seen():
    net = make_net()
    first = OBJECTIVES["ibp"].loss(make_batch(net)).item()
    net[-1] = nn.Linear(12, 10).double()
    batch = make_batch(net)
    worst = cross_entropy(worst_by_hand(net, batch.x, batch.y, 0.1), batch.y)
    torch.testing.assert_close(OBJECTIVES["ibp"].loss(batch), worst)
    assert worst.item() != first


# ---- bad input


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: IBP(threat=sp.L2(0.5)), "l-infinity"),
        (lambda: IBP(threat=sp.L2(0.5)), "Lipschitz"),
        (lambda: SABR(threat=sp.Linf([0.1, 0.2])), "one eps"),
        (lambda: IBP(threat=sp.Minimize("linf")), "one eps"),
        (lambda: IBP(threat=LINF, ramp=-1), "ramp"),
        (lambda: IBP(threat=LINF, warmup=float("nan")), "warmup"),
        (lambda: IBP(threat=LINF, kappa=(1.0, 2.0)), "kappa"),
        (lambda: IBP(threat=LINF, kappa=0.5), "start, end"),
        (lambda: IBP(threat=LINF, clip=0), "clip"),
        (lambda: CROWNIBP(threat=LINF, beta=(-1.0, 0.0)), "beta"),
        (lambda: SABR(threat=LINF, size=0), "size"),
        (lambda: SABR(threat=LINF, attack=sp.attacks.JSMA()), "SABR"),
        (lambda: MTLIBP(threat=LINF, alpha=1.5), "alpha"),
        (lambda: defenses.recipe("ibp", sp.L2(1.0)), "l-infinity"),
    ],
)
def test_bad_settings(build, text):
    with pytest.raises(sp.InputError, match=text):
        build()


def test_eps_is_needed():
    with pytest.raises(TypeError, match="threat"):
        IBP()


def test_soft_labels_are_refused():
    with pytest.raises(sp.InputError, match="soft labels"):
        trained(defenses.LabelSmoothing(OBJECTIVES["ibp"]))


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(1).values


def test_an_operator_without_bounds_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Sorted())
    with pytest.raises(sp.ModelError, match="sort"):
        trained(OBJECTIVES["ibp"], net)
