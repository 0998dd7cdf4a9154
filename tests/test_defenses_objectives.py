"""Every objective is its paper's equation, written out a second time, in float64 on tiny networks."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

import saddlepoint as sp
from saddlepoint import defenses
from saddlepoint.attacks.ascent import FGSM, ILLC, PGD
from saddlepoint.defenses import Batch, MinMax, Standard

LINF, L2 = sp.Linf(0.1), sp.L2(0.3)


def make_net(seed=0, norm=False, classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, classes)]
        return nn.Sequential(*layers).double()


def make_batch(net, *, count=9, seed=0, progress=0.0, y=None, bounds=(0.0, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (count,), generator=generator) if y is None else y
    return Batch(sp.Model(net, bounds=bounds, num_classes=4), x, labels, torch.arange(count), seed, progress)


def same_gradients(ours, written_out, net):
    torch.testing.assert_close(ours, written_out)
    parameters = list(net.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(written_out, parameters), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(1)


class Given(MinMax):
    """Examples at a known place."""

    def examples(self, batch):
        return (batch.x + 0.05).clamp(0, 1)

    def loss_at(self, batch, examples):
        return cross_entropy(batch.model.forward(examples), batch.y)


# ---- labels, mixtures of attacks, the weighted form


def test_predicted_labels_are_those_of_the_network():
    net = make_net()
    batch = make_batch(net)
    wrong = make_batch(net, y=(net(batch.x).argmax(1) + 1) % 4)  # true labels that the network never gives
    objective = sp.Adversarial(attack=FGSM(), threat=LINF, labels="predicted")
    expected = sp.perturb(batch.model, batch.x, net(batch.x).argmax(1), FGSM(), LINF)
    torch.testing.assert_close(objective.examples(wrong), expected)
    assert not torch.equal(sp.Adversarial(attack=FGSM(), threat=LINF).examples(wrong), expected)


def test_least_likely_labels_are_approached():
    net = make_net()
    batch = make_batch(net, y=None)
    right = make_batch(net, y=net(batch.x).argmax(1))
    examples = sp.Adversarial(attack=FGSM(), threat=LINF, labels="least_likely").examples(right)
    x = right.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net(x), net(x).argmin(1), reduction="sum"), x)
    torch.testing.assert_close(examples, (right.x - 0.1 * gradient.sign()).clamp(0, 1))


def test_weighted_form_is_kurakins_equation():
    net = make_net()
    batch = make_batch(net, count=10)
    objective = sp.Adversarial(attack=FGSM(), threat=LINF, form="weighted", share=0.4, weight=0.3)
    moved = sp.perturb(net, batch.x, batch.y, FGSM(), LINF)
    adversarial = cross_entropy(net(moved[:4]), batch.y[:4], reduction="sum")
    clean = cross_entropy(net(batch.x[4:]), batch.y[4:], reduction="sum")
    same_gradients(objective.loss(batch), (clean + 0.3 * adversarial) / (6 + 0.3 * 4), net)


def test_one_of_several_attacks_is_drawn_for_each_batch():
    net = make_net()
    objective = sp.Adversarial(attack=(FGSM(), ILLC(steps=2)), threat=LINF)
    seen = set()
    for seed in range(12):
        batch = make_batch(net, seed=seed)
        examples = objective.examples(batch)
        each = [sp.perturb(batch.model, batch.x, batch.y, attack, LINF, seed=seed) for attack in (FGSM(), ILLC(steps=2))]
        (which,) = [number for number, one in enumerate(each) if torch.equal(one, examples)]
        seen.add(which)
    assert seen == {0, 1}
    assert objective.adversary == (FGSM(), LINF)


@pytest.mark.parametrize("threat", [sp.Linf(0.05), sp.L2(0.2), sp.L1(0.5)])
def test_min_max_in_any_norm(threat):
    net = make_net()
    batch = make_batch(net)
    examples = sp.Adversarial(attack=PGD(steps=5), threat=threat).examples(batch)
    assert bool(threat.contains(examples, batch.x).all())
    assert cross_entropy(net(examples), batch.y) > cross_entropy(net(batch.x), batch.y)


# ---- TRADES and its relatives


def test_trades_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)
    objective = defenses.TRADES(threat=LINF, beta=2.5)
    moved = objective.examples(batch)
    p, q = softmax(net(batch.x), 1), softmax(net(moved), 1)
    written_out = -p.log().gather(1, batch.y[:, None]).mean() + 2.5 * kl(p, q).mean()
    same_gradients(objective.loss_at(batch, moved), written_out, net)


def test_trades_examples_ascend_the_divergence():
    net = make_net()
    batch = make_batch(net)
    with torch.no_grad():
        p = softmax(net(batch.x), 1)
        ours = kl(p, softmax(net(defenses.TRADES(threat=LINF, attack=PGD(steps=20)).examples(batch)), 1))
        loss = kl(p, softmax(net(sp.perturb(net, batch.x, batch.y, PGD(steps=20), LINF)), 1))
        corners = [batch.x + 0.1 * torch.tensor(c, dtype=torch.float64) for c in itertools.product((-1, 1), repeat=6)]
        best = torch.stack([kl(p, softmax(net(corner.clamp(0, 1)), 1)) for corner in corners]).amax(0)
    assert int((ours >= 0.9 * best).sum()) >= 5  # it has two maxima, on either side of x, and the start decides
    assert bool((ours <= best * 1.001).all())
    assert int((ours > loss).sum()) >= 5


def test_mart_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)
    objective = defenses.MART(threat=LINF, strength=5.0)
    moved = objective.examples(batch)
    p, q = softmax(net(batch.x), 1), softmax(net(moved), 1)
    rows = torch.arange(9)
    others = q.clone()
    others[rows, batch.y] = 0
    boosted = -q[rows, batch.y].log() - (1 - others.amax(1)).log()
    written_out = (boosted + 5 * kl(p, q) * (1 - p[rows, batch.y])).mean()
    ours = objective.loss_at(batch, moved)
    same_gradients(ours, written_out, net)


def test_marts_loss_is_finite_where_the_network_is_sure_and_wrong():
    net = nn.Linear(6, 4)
    batch = make_batch(net)
    batch = Batch(batch.model, batch.x.float() + 1, torch.zeros(9, dtype=torch.int64), batch.ids, 0, 0.0)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 300.0, 0.0, 0.0]))
    ours = defenses.MART(threat=LINF).loss_at(batch, batch.x)
    assert ours.item() == pytest.approx(600 - torch.tensor(3.0).log().item(), rel=1e-5)  # -log p_y - log(3 e^-300)


def test_hat_is_the_papers_equation():
    net, helper = make_net(), sp.Model(make_net(7))
    batch = make_batch(net)
    objective = defenses.HAT(threat=LINF, helper=helper, beta=2.5, gamma=0.5, stretch=2.0)
    moved = objective.examples(batch)
    p, q = softmax(net(batch.x), 1), softmax(net(moved), 1)
    beyond = cross_entropy(net(2 * moved - batch.x), helper.predict(moved))
    written_out = cross_entropy(net(batch.x), batch.y) + 2.5 * kl(p, q).mean() + 0.5 * beyond
    same_gradients(objective.loss_at(batch, moved), written_out, net)


def test_logit_pairing():
    net = make_net()
    batch = make_batch(net)
    objective = defenses.AdversarialLogitPairing(threat=LINF, strength=0.7)
    moved = objective.examples(batch)
    torch.testing.assert_close(moved, sp.perturb(net, batch.x, batch.y, PGD(steps=10), LINF))
    a, b = net(batch.x), net(moved)
    both = (cross_entropy(a, batch.y) + cross_entropy(b, batch.y)) / 2
    same_gradients(objective.loss_at(batch, moved), both + 0.7 * (a - b).pow(2).sum(1).mean(), net)
    z = net(batch.x)
    clean = defenses.CleanLogitPairing(strength=0.7, sigma=0.0)
    pairs = sum((z[i] - z[i + 4]).pow(2).sum() for i in range(4)) / 4
    same_gradients(clean.loss(batch), cross_entropy(z, batch.y) + 0.7 * pairs, net)
    squeezed = defenses.CleanLogitPairing(strength=0.7, sigma=0.0, partner="zero")
    z = net(batch.x)
    same_gradients(squeezed.loss(batch), cross_entropy(z, batch.y) + 0.7 * z.norm(dim=1).mean(), net)


# ---- one step


def test_fast_is_the_papers_algorithm():
    net = make_net()
    batch = make_batch(net)
    examples = defenses.Fast(threat=LINF).examples(batch)
    steps = sp.perturb(net, batch.x, batch.y, PGD(steps=1, step_size=0.125), LINF)
    torch.testing.assert_close(examples, steps)
    assert bool(LINF.contains(examples, batch.x).all())
    assert not torch.equal(examples, sp.perturb(net, batch.x, batch.y, PGD(steps=1, step_size=0.125, random_start=False), LINF))


def test_n_fgsm_is_the_papers_equation_and_leaves_the_ball():
    net = make_net()
    batch = make_batch(net, bounds=None)
    without = defenses.NFGSM(threat=LINF, noise=0.0, step=1.0).examples(batch)
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net(x), batch.y, reduction="sum"), x)
    torch.testing.assert_close(without, batch.x + 0.1 * gradient.sign())
    moved = defenses.NFGSM(threat=LINF).examples(batch) - batch.x
    assert 0.2 < float(moved.abs().max()) <= 0.3 + 1e-9  # noise up to 2 eps, a step of eps
    inside = defenses.NFGSM(threat=LINF).examples(make_batch(net))
    assert 0 <= float(inside.min()) <= float(inside.max()) <= 1
    sizes = (defenses.NFGSM(threat=L2, noise=0.0).examples(batch) - batch.x).norm(dim=1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.3))


def test_grad_align_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)
    objective = defenses.GradAlign(Standard(), LINF, 0.2)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    ours = objective.loss(batch)
    handle.remove()
    (beside,) = [x for x in seen if not torch.equal(x, batch.x)]
    assert bool(LINF.contains(beside, batch.x).all())

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(net(x), batch.y, reduction="sum"), x, create_graph=True)[0]

    a, b = gradient(batch.x), gradient(beside)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    same_gradients(ours, cross_entropy(net(batch.x), batch.y) + 0.2 * (1 - cosine).mean(), net)


def test_grad_align_vanishes_for_two_linear_classes():
    """There the gradient has one direction everywhere."""
    net = nn.Linear(6, 2).double()
    batch = make_batch(net, y=torch.arange(9) % 2)
    batch = Batch(sp.Model(net), batch.x, batch.y, batch.ids, 0, 0.0)
    ours = defenses.GradAlign(Standard(), LINF, 10.0).loss(batch)
    torch.testing.assert_close(ours, Standard().loss(batch))


def test_free_is_the_papers_algorithm():
    """Three replays of two batches, by hand: the weights' gradients at x + d, and d's own steps with the same pass."""
    net = make_net()
    objective = defenses.Free(threat=LINF, repeats=3)
    delta, memory = torch.zeros(9, 6, dtype=torch.float64), {}
    for seed, count in ((0, 9), (1, 5)):
        batch = make_batch(net, seed=seed, count=count)
        batch = Batch(batch.model, batch.x, batch.y, batch.ids, seed, 0.0, memory)
        for _ in range(objective.replays):
            loss = objective.loss(batch)
            x = (batch.x + delta[:count]).clamp(0, 1).requires_grad_()
            written_out = cross_entropy(net(x), batch.y)
            torch.testing.assert_close(loss, written_out)
            gradients = torch.autograd.grad(written_out, [x, *net.parameters()])
            net.zero_grad()
            loss.backward()
            objective.after_backward(batch)
            for parameter, gradient in zip(net.parameters(), gradients[1:], strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
            delta[:count] = (delta[:count] + 0.1 * gradients[0].sign()).clamp(-0.1, 0.1)
            torch.testing.assert_close(memory["free.delta"], delta, atol=1e-12, rtol=0)
    assert set(memory) == {"free.delta"}


# ---- other networks' examples


def test_ensemble_examples_come_from_every_source_and_the_network():
    net, sources = make_net(), (sp.Model(make_net(1)), sp.Model(make_net(2)))
    objective = defenses.EnsembleAdversarial(sources=sources, threat=LINF, alpha=0.3)
    seen = set()
    for seed in range(20):
        batch = make_batch(net, seed=seed)
        examples = objective.examples(batch)
        each = [sp.perturb(model, batch.x, batch.y, FGSM(), LINF) for model in (*sources, batch.model)]
        seen |= {number for number, one in enumerate(each) if torch.equal(one, examples)}
        clean, moved = (cross_entropy(net(x), batch.y) for x in (batch.x, examples))
        same_gradients(objective.loss_at(batch, examples), 0.3 * clean + 0.7 * moved, net)
    assert seen == {0, 1, 2}
    with pytest.raises(sp.InputError, match="static"):
        defenses.EnsembleAdversarial(sources=(sp.Model(net),), threat=LINF).loss(make_batch(net))


# ---- derivatives


def test_input_gradient_penalty_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(net(x), batch.y, reduction="sum"), x, create_graph=True)
    written_out = cross_entropy(net(batch.x), batch.y) + 3 * gradient.pow(2).sum() / 9
    same_gradients(defenses.InputGradientPenalty(Standard(), 3.0).loss(batch), written_out, net)


def test_jacobian_penalty_exactly_and_by_projections():
    net = make_net()
    batch = make_batch(net)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(batch.x)
    size = jacobian.pow(2).sum((1, 2)).mean()
    loss = cross_entropy(net(batch.x), batch.y)
    same_gradients(defenses.JacobianPenalty(Standard(), 0.5, projections=0).loss(batch), loss + 0.25 * size, net)
    many = defenses.JacobianPenalty(Standard(), 0.5, projections=300).loss(batch)
    assert (many - loss).item() == pytest.approx(0.25 * size.item(), rel=0.05)
    linear = nn.Linear(6, 4).double()
    batch = make_batch(linear)
    penalty = defenses.JacobianPenalty(Standard(), 2.0, projections=0).loss(batch) - Standard().loss(batch)
    torch.testing.assert_close(penalty, linear.weight.pow(2).sum())


def test_cure_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(net(x), batch.y, reduction="sum"), x, create_graph=True)[0]

    here = gradient(batch.x)
    there = gradient(batch.x + 0.7 * here.detach().sign() / 6**0.5)
    written_out = cross_entropy(net(batch.x), batch.y) + 4 * (there - here).pow(2).sum(1).mean()
    same_gradients(defenses.CURE(Standard(), step=0.7).loss(batch), written_out, net)
    half = defenses.CURE(Standard(), step=1.4, warmup=2.0).loss(make_batch(net, progress=1.0))
    torch.testing.assert_close(half, written_out)


# ---- labels and inputs


def test_label_smoothing_is_torchs():
    net = make_net()
    batch = make_batch(net)
    written_out = cross_entropy(net(batch.x), batch.y, label_smoothing=0.2)
    same_gradients(defenses.LabelSmoothing(Standard(), 0.2).loss(batch), written_out, net)


def test_mixup_is_the_papers_equation():
    net = make_net()
    batch = make_batch(net)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    ours = defenses.Mixup(Standard()).loss(batch)
    handle.remove()
    (mixed,) = seen
    partner, shares = [], []
    for i in range(9):  # which mixture each row is, by least squares
        for j in range(9):
            direction = batch.x[i] - batch.x[j]
            share = ((mixed[i] - batch.x[j]) @ direction / direction.square().sum()).item() if i != j else 1.0
            if torch.allclose(mixed[i], share * batch.x[i] + (1 - share) * batch.x[j]):
                partner.append(j)
                shares.append(share)
                break
    share = next(s for i, s in enumerate(shares) if partner[i] != i)
    assert sorted(partner) == list(range(9))
    assert all(s == pytest.approx(share) for i, s in enumerate(shares) if partner[i] != i)
    logs = log_softmax(net(mixed), 1)
    rows = torch.arange(9)
    written_out = -(share * logs[rows, batch.y] + (1 - share) * logs[rows, batch.y[partner]]).mean()
    same_gradients(ours, written_out, net)


class Seen(defenses.Objective):
    def loss(self, batch):
        self.x = batch.x
        return batch.x.sum()


def test_cutout_removes_one_square():
    x = torch.rand(40, 3, 12, 10) / 2 + 0.25
    net = nn.Sequential(nn.Flatten(), nn.Linear(360, 4))
    batch = Batch(sp.Model(net, num_classes=4), x, torch.zeros(40, dtype=torch.int64), torch.arange(40), 0, 0.0)
    seen = Seen()
    defenses.Cutout(seen, size=4).loss(batch)
    hole = seen.x == 0
    assert torch.equal(seen.x[~hole], x[~hole])
    assert torch.equal(hole[:, :1].expand_as(hole), hole)  # the same in every channel
    sizes = set()
    for one in hole[:, 0]:
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        assert bool(one[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (4, 4)
    assert min(sizes) < (4, 4)  # cut off at the border
    assert (2, 4) in sizes or (3, 4) in sizes


def test_crops_are_windows_of_the_image_in_zeros():
    x, net = torch.rand(300, 2, 5, 6) + 0.1, nn.Sequential(nn.Flatten(), nn.Linear(60, 4))
    batch = Batch(sp.Model(net, bounds=None), x, torch.zeros(300, dtype=torch.int64), torch.arange(300), 0, 0.0)
    seen = Seen()
    defenses.CropAndFlip(seen, padding=2).loss(batch)
    padded = torch.nn.functional.pad(batch.x, [2] * 4)
    found = set()
    for one, wide in zip(seen.x, padded, strict=True):
        windows = {(i, j): wide[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
        both = {(*at, flip): part.flip(2) if flip else part for at, part in windows.items() for flip in (False, True)}
        places = [place for place, part in both.items() if torch.equal(one, part)]
        found.update(places)
        assert len(places) == 1
    assert len(found) == 50  # everywhere, both ways
    defenses.CropAndFlip(seen, padding=0, flip=False).loss(batch)
    assert torch.equal(seen.x, batch.x)
    with pytest.raises(sp.InputError, match="needs images"):
        defenses.CropAndFlip(seen).loss(replace(batch, x=torch.rand(300, 7)))
    for padding in (-1, 1.5):
        with pytest.raises(sp.InputError, match="whole number"):
            defenses.CropAndFlip(seen, padding=padding)


def test_gaussian_augmentation_is_noise_of_that_size():
    net = make_net()
    batch = make_batch(net, count=400, bounds=None)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, args: seen.append(args[0] - batch.x))
    defenses.GaussianAugmentation(Standard(), 0.3).loss(batch)
    handle.remove()
    assert float(seen[0].std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(seen[0].mean())) < 0.03


def test_dropout_scales_the_hidden_layer_and_nothing_else():
    net = make_net().train()
    batch = make_batch(net)
    seen = []
    handles = [net[i].register_forward_hook(lambda module, args, out: seen.append((args[0], out))) for i in (0, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defenses.Dropout(Standard(), 0.5).loss(batch)
    for handle in handles:
        handle.remove()
    (first, _), (hidden, _) = seen
    assert torch.equal(first, batch.x)
    full = net[2](net[0](batch.x))
    kept = hidden != 0
    assert 0.3 < float(kept.double().mean()) < 0.7
    torch.testing.assert_close(hidden[kept], 2 * full[kept])
    torch.testing.assert_close(Standard().loss(batch), cross_entropy(net(batch.x), batch.y))  # the hooks are gone


def test_soft_labels_pass_through_the_attack():
    """Parts combine: smoothing around min-max attacks the smoothed loss."""
    net = make_net()
    batch = make_batch(net)
    labels = torch.full((9, 4), 0.05, dtype=torch.float64)
    labels[torch.arange(9), batch.y] = 0.85
    ours = defenses.LabelSmoothing(sp.Adversarial(attack=FGSM(), threat=LINF), 0.2).loss(batch)
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(labels * log_softmax(net(x), 1)).sum(), x)
    moved = (batch.x + 0.1 * gradient.sign()).clamp(0, 1)
    same_gradients(ours, -(labels * log_softmax(net(moved), 1)).sum(1).mean(), net)
    targeted = defenses.LabelSmoothing(sp.Adversarial(attack=FGSM(), threat=LINF, labels="least_likely"), 0.2)
    moved = sp.Adversarial(attack=FGSM(), threat=LINF, labels="least_likely").examples(batch)
    same_gradients(targeted.loss(batch), -(labels * log_softmax(net(moved), 1)).sum(1).mean(), net)
    with pytest.raises(sp.InputError, match="soft labels"):
        defenses.LabelSmoothing(defenses.MART(threat=LINF)).loss(batch)


# ---- the attacked weights


@pytest.mark.parametrize("norm", [False, True])
def test_awp_is_the_papers_algorithm(norm):
    net = make_net(norm=norm).train()
    batch = make_batch(net)
    inner = Given()
    objective = defenses.AWP(inner, gamma=0.02)
    other = make_net(norm=norm).train()
    other.load_state_dict(net.state_dict())
    before = {name: value.clone() for name, value in net.state_dict().items()}

    examples = inner.examples(batch)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(cross_entropy(other(examples), batch.y), matrices)
    with torch.no_grad():
        for w, g in zip(matrices, gradients, strict=True):
            w += 0.02 * w.norm() * g / g.norm()
    written_out = torch.autograd.grad(cross_entropy(other(examples), batch.y), list(other.parameters()))

    objective.loss(batch).backward()
    objective.after_backward(batch)
    for parameter, gradient in zip(net.parameters(), written_out, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])
    if norm:
        assert int(net[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1
    assert not batch.memory
    early = make_batch(net, progress=0.5)
    torch.testing.assert_close(defenses.AWP(inner, warmup=1.0).loss(early), inner.loss(early))


def test_awp_perturbs_in_mixed_precision_too():
    net = make_net().float()
    batch = make_batch(net)
    batch = Batch(batch.model, batch.x.float(), batch.y, batch.ids, 0, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        near, far = (defenses.AWP(Given(), gamma=gamma).loss(batch).item() for gamma in (0.0, 0.5))
    assert far > near + 0.1


# ---- contracts for all of them


def every_objective(threat=LINF):
    helper = sp.Model(make_net(9))
    given = {"hat": {"helper": helper}, "ensemble": {"sources": (helper,)}}
    for name in defenses.RECIPES:
        if name not in ("cutout", "crop-and-flip"):  # images only
            yield name, defenses.recipe(name, threat, **given.get(name, {})).objective


@pytest.mark.parametrize(("name", "objective"), [pytest.param(n, o, id=n) for n, o in every_objective()])
def test_every_objective(name, objective):
    """Settings are JSON; the loss doesn't touch global random state, modes or inputs; it is a differentiable scalar."""
    import json

    net = make_net(norm=True).train()
    batch = make_batch(net)
    x, state = batch.x.clone(), torch.get_rng_state()
    loss = objective.loss(batch)
    assert loss.dim() == 0
    loss.backward()
    objective.after_backward(batch)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    if name != "dropout":  # torch's own
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch.x, x)
    assert net.training
    assert json.loads(json.dumps(objective.settings()))["name"] == type(objective).__name__
    if objective.adversary is not None:
        assert objective.adversary[1] == LINF


@pytest.mark.parametrize(("name", "objective"), [pytest.param(n, o, id=n) for n, o in every_objective()])
def test_every_objective_in_mixed_precision(name, objective):
    """What lies outside of a loss runs without it, and meets what the loss has kept."""
    net = make_net(norm=True).float().train()
    batch = make_batch(net)
    batch = Batch(batch.model, batch.x.float(), batch.y, batch.ids, 0, 0.0)
    for source in [getattr(objective, "helper", None), *getattr(objective, "sources", ())]:
        if source is not None:
            source.networks()[0].float()
    for _ in range(2):
        with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16):
            loss = objective.loss(batch)
        loss.backward()
        objective.after_backward(batch)
        objective.after_step(batch)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    nested = [list(value.values()) if isinstance(value, dict) else [value] for value in batch.memory.values()]
    kept = {t.dtype for values in nested for t in values if isinstance(t, torch.Tensor)}
    assert kept <= {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: defenses.TRADES(threat=LINF, beta=-1), "beta"),
        (lambda: defenses.TRADES(threat=LINF, warmup=float("nan")), "warmup"),
        (lambda: defenses.MART(threat=LINF, strength=-1), "strength"),
        (lambda: defenses.HAT(threat=LINF, helper=make_net()), "sp.Model"),
        (lambda: defenses.HAT(threat=LINF, helper=sp.Model(make_net()), stretch=0.5), "stretch"),
        (lambda: defenses.CleanLogitPairing(partner="none"), "partner"),
        (lambda: defenses.Fast(threat=LINF, step=0), "step"),
        (lambda: defenses.Fast(threat=sp.Linf(0.0)), "eps"),
        (lambda: defenses.NFGSM(threat=sp.Linf([0.1, 0.2])), "one eps"),
        (lambda: defenses.Free(threat=LINF, repeats=0), "repeats"),
        (lambda: defenses.Free(threat=sp.L0(3)), "l0"),
        (lambda: defenses.GradAlign(LINF, LINF), "objective"),
        (lambda: defenses.StopAtCollapse(Standard(), LINF, action="go"), "action"),
        (lambda: defenses.StopAtCollapse(Standard(), LINF, drop=0), "drop"),
        (lambda: defenses.EnsembleAdversarial(sources=(), threat=LINF), "sources"),
        (lambda: defenses.JacobianPenalty(Standard(), projections=-1), "projections"),
        (lambda: defenses.CURE(Standard(), step=0), "step"),
        (lambda: defenses.AWP(Standard()), "examples"),
        (lambda: defenses.WeightPenalty(Standard(), power=0.5), "power"),
        (lambda: defenses.Parseval(Standard(), beta=2), "beta"),
        (lambda: defenses.LipschitzProjection(Standard(), 0), "bound"),
        (lambda: defenses.Mixup(Standard(), 0), "alpha"),
        (lambda: defenses.Cutout(Standard(), 0), "size"),
        (lambda: defenses.Dropout(Standard(), 1), "rate"),
        (lambda: defenses.Tempered(temperature=0), "temperature"),
        (lambda: sp.Adversarial(attack=FGSM(), threat=LINF, labels="guess"), "labels"),
        (lambda: sp.Adversarial(attack=(), threat=LINF), "empty"),
        (lambda: sp.Adversarial(attack=FGSM(), threat=LINF, form="weighted", share=1, weight=0), "nothing"),
        (lambda: defenses.recipe("trade", LINF), "trades"),
        (lambda: defenses.recipe("trades", LINF, gamma=1), "gamma"),
        (lambda: defenses.recipe("hat", LINF), "helper"),
        (lambda: defenses.recipe("standard", LINF, beta=1), "beta"),
    ],
)
def test_bad_settings(build, text):
    with pytest.raises(sp.InputError, match=text):
        build()
