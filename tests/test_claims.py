"""What the introductions to the field say, shown on a small network and real digits."""

import math

import pytest
import torch

import saddlepoint as sp
from saddlepoint.defenses.transforms import BitDepth, GaussianNoise

DIGITS = sp.data.load("digits")
X, Y = DIGITS.test.take(200).x, DIGITS.test.take(200).y


@pytest.fixture(scope="module")
def model():
    return sp.train(sp.zoo.build("mlp", in_shape=(1, 8, 8)), DIGITS.train, epochs=15).model


def test_random_directions_are_mostly_safe(model):
    """Noise as large as FGSM's step, even the best of ten draws, fools a small share of what one gradient step does."""
    fgsm = sp.attack(model, X, Y, sp.attacks.FGSM(), sp.Linf(0.15)).success_rate
    for noise in (sp.attacks.UniformNoise(), sp.attacks.SignNoise(), sp.attacks.GaussianNoise()):
        tried = sp.attack(model, X, Y, sp.attacks.Restarts(noise, 10), sp.Linf(0.15)).success_rate
        assert tried < fgsm / 3


def test_untargeted_is_easier_than_targeted(model):
    untargeted = sp.attack(model, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.1)).success_rate
    targeted = sp.attack(model, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.1), sp.Targeted("random")).success_rate
    least_likely = sp.attack(model, X, Y, sp.attacks.ILLC(steps=20), sp.Linf(0.1)).success_rate
    assert least_likely < targeted < untargeted


def test_iterating_beats_one_step(model):
    rates = [
        sp.attack(model, X, Y, attack, sp.Linf(0.1)).success_rate
        for attack in (sp.attacks.FGSM(), sp.attacks.BIM(), sp.attacks.Restarts(sp.attacks.PGD(), 3))
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_attacks_in_a_ball_miss_the_closest_example(model):
    """FGSM and PGD go to where the loss is largest, at the ball's end; DeepFool and C&W stop near the boundary."""
    x, y, eps = X[:60], Y[:60], 2.0
    minimize = sp.Minimize("l2")
    closest = sp.attack(model, x, y, "minimal", minimize, budget=sp.Budget(passes=400)).distance
    attacks = (sp.attacks.FGM(), sp.attacks.PGD())
    last = [sp.attack(model, x, y, attack, sp.L2(eps), keep="last") for attack in attacks]
    deepfool = sp.attack(model, x, y, sp.attacks.DeepFool(), minimize).distance
    carlini = sp.attack(model, x, y, sp.attacks.CarliniWagnerL2(steps=150, searches=5, initial_c=0.1), minimize).distance
    fooled = (closest > 0) & torch.stack([result.success for result in last]).all(0)
    assert fooled.sum() > 40
    for result in last:
        assert (result.distance[fooled] / closest[fooled]).median() > 1.5
    assert (deepfool[fooled] / closest[fooled]).median() < 1.2
    assert (carlini[fooled] / closest[fooled]).median() < 1.05
    assert closest[fooled].std() > 0.1, "so that no one eps is the distance of all"


def test_one_step_costs_far_less_than_a_line_search(model):
    fgsm = sp.attack(model, X[:20], Y[:20], sp.attacks.FGSM(), sp.Linf(0.15))
    lbfgs = sp.attack(model, X[:20], Y[:20], sp.attacks.LBFGS(), sp.Minimize("l2"))
    assert lbfgs.success_rate == 1
    assert fgsm.queries.total.max() <= 3
    assert lbfgs.queries.total[lbfgs.having("fooled")].min() > 30 * fgsm.queries.total.max()


def test_the_saliency_map_attack_is_sparse_and_the_gradient_sign_dense(model):
    x, y = X[:60], Y[:60]
    jsma = sp.attack(model, x, y, sp.attacks.JSMA(gamma=0.5), sp.Minimize("l0"))
    fgsm = sp.attack(model, x, y, sp.attacks.FGSM(), sp.Linf(0.15), keep="last")
    fooled = jsma.having("fooled")
    assert fooled.sum() > 40
    changed = (jsma.adversarial != x).flatten(1).double().mean(1)[fooled]
    assert changed.median() < 0.15
    moved = (fgsm.adversarial != x).flatten(1).double().mean(1)
    at_an_end = ((x == 0) | (x == 1)).flatten(1).double().mean(1)  # there half of the steps lead out of the range
    assert (moved + at_an_end >= 0.9).all()
    assert moved.median() > 3 * changed.median()


def test_the_sign_lengthens_the_step_and_turns_it():
    """For n dense entries sign(g) has length sqrt(n) whatever g is, and meets g at cos = ||g||_1 / (sqrt(n) ||g||_2)."""
    torch.manual_seed(0)
    net = torch.nn.Linear(400, 2).double().requires_grad_(False)
    x = torch.rand(8, 400, dtype=torch.float64)
    model, eps = sp.Model(net, bounds=None), 0.1
    y = model.predict(x)
    sign = sp.attack(model, x, y, sp.attacks.FGSM(), sp.Linf(eps), keep="last").adversarial - x
    value = sp.attack(model, x, y, sp.attacks.FGM(), sp.L2(eps), keep="last").adversarial - x
    gradient = net.weight[1 - y] - net.weight[y]
    torch.testing.assert_close(sign.norm(dim=1), torch.full((8,), eps * math.sqrt(400)).double())
    cosine = gradient.abs().sum(1) / (math.sqrt(400) * gradient.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(sign, gradient), cosine)
    torch.testing.assert_close(torch.cosine_similarity(value, gradient), torch.ones(8).double())


def test_growth_of_a_linear_activation_is_eps_times_the_l1_norm():
    """w.(x + eps sign(w)) - w.x = eps ||w||_1 = eps m n: it grows with the dimension n while ||eta||_inf does not."""
    growth = []
    for n in (10, 100, 1000):
        net = torch.nn.Linear(n, 1).double().requires_grad_(False)
        torch.nn.init.uniform_(net.weight, -1, 1)
        x = torch.rand(1, n, dtype=torch.float64)
        label = torch.zeros(1, dtype=torch.int64)
        torch.nn.init.constant_(net.bias, -float(x @ net.weight[0]) - 1)  # f(x) = -1: class 0
        moved = sp.attack(sp.Model(net, bounds=None), x, label, sp.attacks.FGSM(), sp.Linf(0.01), keep="last").adversarial
        growth.append(float(net(moved) - net(x)))
        assert growth[-1] == pytest.approx(0.01 * float(net.weight.abs().sum()), rel=1e-6)
    assert growth[2] > 50 * growth[0]


def test_perturbations_below_the_precision_are_dropped(model):
    """On an 8-bit grid eps < 1/255 leaves nothing, and larger ones act in whole levels."""
    x = torch.round(X * 255) / 255
    below = sp.attack(model, x, Y, sp.attacks.PGD(steps=5), sp.Linf(0.9 / 255, grid=1 / 255), keep="last")
    assert torch.equal(below.adversarial, x)
    above = sp.attack(model, x, Y, sp.attacks.PGD(steps=5), sp.Linf(20.5 / 255, grid=1 / 255))
    levels = above.adversarial * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert float((levels - x * 255).abs().max()) <= 20 + 1e-3
    assert above.success_rate > 0.1


def test_rubbish_is_taken_for_digits(model):
    """From noise in the input range, a few steps give a confident digit (false positives)."""
    noise = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    goal = sp.FalsePositive(target=3, probability=0.99)
    result = sp.attack(model, noise, None, sp.attacks.PGD(steps=40), sp.Linf(0.5), goal)
    assert result.success_rate > 0.9
    confidence = model.logits(result.adversarial).softmax(1)[:, 3]
    assert bool((confidence[result.success] >= 0.99).all())


def test_confidence_and_top_k_ask_for_more(model):
    def rate(goal):
        return sp.attack(model, X, Y, sp.attacks.PGD(steps=20, loss="margin"), sp.Linf(0.12), goal).success_rate

    assert rate(sp.Untargeted(confidence=5.0)) < rate(sp.Untargeted())
    assert rate(sp.Untargeted(top_k=3)) < rate(sp.Untargeted())


def test_class_groups_ask_for_more(model):
    """Confusing 3 with 8 is no success where both are the same group."""
    grouped = sp.Untargeted(groups=(frozenset({3, 8, 9, 5}),))
    plain = sp.attack(model, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.12))
    strict = sp.attack(model, X, Y, sp.attacks.PGD(steps=20), sp.Linf(0.12), grouped)
    assert int(strict.success.sum()) < int(plain.success.sum())
    fooled = strict.having("fooled")
    members = torch.tensor([3, 8, 9, 5])
    both = torch.isin(strict.predicted[fooled], members) & torch.isin(Y[fooled], members)
    assert not bool(both.any())


def test_a_randomised_defense_falls_to_the_average_over_draws(model):
    """Expectation over transformation: gradients over draws break what single draws don't average out."""
    noisy = sp.Defended(model, [GaussianNoise(0.3)], draws=16)
    result = sp.attack(noisy, X[:60], Y[:60], sp.attacks.PGD(steps=20), sp.Linf(0.25))
    assert result.success_rate > 0.5


def test_masked_gradients_still_have_adversarial_examples(model):
    """Bit-depth reduction has a zero gradient: exact differentiation finds nothing, BPDA does, and the result says why."""
    exact = sp.Transform(name="rounding", apply=BitDepth(3).transform((0, 1)).apply)
    naive = sp.attack(sp.Defended(model, [exact]), X, Y, sp.attacks.BIM(), sp.Linf(0.15))
    adaptive = sp.attack(sp.Defended(model, [BitDepth(3)]), X, Y, sp.attacks.BIM(), sp.Linf(0.15))
    assert naive.success_rate == 0
    assert any("zero" in note for note in naive.notes)
    assert adaptive.success_rate > 0.5


def test_training_forms_raise_robustness():
    """Each form of adversarial training beats clean training on the attack that it trains against."""
    attack, threat = sp.attacks.FGSM(), sp.Linf(0.1)

    def robust(adversary):
        net = sp.zoo.build("mlp", in_shape=(1, 8, 8))
        trained = sp.train(net, DIGITS.train, adversary=adversary, epochs=12, batch_size=64)
        return sp.attack(trained.model, X, Y, sp.attacks.PGD(steps=20), threat).robust_accuracy

    clean = robust(None)
    for form in ("replace", "add", "regularize"):
        assert robust(sp.Adversarial(attack=attack, threat=threat, form=form)) > clean + 0.1
