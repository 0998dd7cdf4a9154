"""The saliency map attack against its papers' algorithms, one sample at a time and with a look at every pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract_support import Counting, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks import saliency
from saddlepoint.attacks.saliency import JSMA, best_features, best_pairs
from saddlepoint.errors import CapabilityError, InputError

DIMENSION, CLASSES = 20, 5
Maps = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(DIMENSION, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
        for parameter in net.parameters():
            parameter.data *= 2
        return net.eval()


@pytest.fixture(scope="module")
def samples(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(12, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, net(x).argmax(1)


def best_of_all(a: Tensor, c: Tensor) -> float:
    """The largest (a_p + a_q)(c_p + c_q) over all pairs with both sums positive."""
    up, down = a[:, None] + a, c[:, None] + c
    score = torch.where((up > 0) & (down > 0) & ~torch.eye(len(a), dtype=torch.bool), up * down, torch.zeros_like(up))
    return float(score.max())


def maps(kind: str, generator: torch.Generator) -> Maps:
    shape = (40, 31)
    a, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    match kind:
        case "ties":
            return (2 * a).round(), (2 * c).round()
        case "opposed":  # every feature matters
            return a, 0.6 - a
        case "the same":  # as with softmax
            return a, a.clone()
        case "hopeless":
            return a, -a.abs().amax() - c.abs()
        case "few":
            out = torch.rand(shape, generator=generator) < 0.9
            return a.masked_fill(out, -torch.inf), c.masked_fill(out, -torch.inf)
        case _:
            return a, c


@pytest.mark.parametrize("elements", [2**23, 100])
@pytest.mark.parametrize("kind", ["random", "ties", "opposed", "the same", "hopeless", "few"])
def test_best_pairs_are_the_best_of_all(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "_ELEMENTS", elements)
    a, c = maps(kind, torch.Generator().manual_seed(7))
    pairs, worth = best_pairs(a, c)
    assert (worth > 0).any() == (kind != "hopeless")
    for row in range(len(a)):
        p, q = pairs[row].tolist()
        assert float(worth[row]) == best_of_all(a[row], c[row]), "in the arithmetic of the tensors, exactly"
        if worth[row] > 0:
            assert p != q
            assert float((a[row, p] + a[row, q]) * (c[row, p] + c[row, q])) == float(worth[row])


def test_best_features_are_the_best_of_all() -> None:
    a, c = maps("random", torch.Generator().manual_seed(7))
    features, worth = best_features(a, c)
    expected = torch.where((a > 0) & (c > 0), a * c, torch.zeros_like(a))
    assert torch.equal(worth, expected.max(1).values)
    assert torch.equal(a.gather(1, features) * c.gather(1, features), worth[:, None])


def derivatives(net: nn.Module, x: Tensor, kind: str) -> Tensor:
    """dF_c / dx_j, (C, D)."""
    outputs = (lambda v: net(v)) if kind == "logits" else (lambda v: net(v).softmax(-1))
    return torch.autograd.functional.jacobian(outputs, x)


def salient(alpha: Tensor, beta: Tensor, domain: Tensor, theta: float, pairs: bool) -> tuple[float, list[int]]:
    """The paper's saliency map and search, over all pairs."""
    sign, best, chosen = (1 if theta > 0 else -1), 0.0, []
    for p in domain.nonzero()[:, 0].tolist():
        for q in domain.nonzero()[:, 0].tolist() if pairs else [p]:
            if p > q or (pairs and p == q):
                continue
            members = [p, q] if pairs else [p]
            a, b = float(alpha[members].sum()), float(beta[members].sum())
            if sign * a > 0 and sign * b < 0 and -a * b > best:
                best, chosen = -a * b, members
    return best, chosen


def paper(net: nn.Module, x: Tensor, target: int, tau: float, attack: JSMA) -> tuple[Tensor, bool]:
    """Algorithms 2 and 3 of Papernot et al. for one sample."""
    x, theta = x.clone(), attack.theta
    domain = x < 0.99 if theta > 0 else x > 0.01
    budget = int(attack.gamma * len(x) + 1e-9) // (2 if attack.pairs else 1)
    for step in range(budget + 1):
        z = net(x).detach()
        if float(z[target] - z.index_fill(0, torch.tensor(target), -torch.inf).max()) >= tau:
            return x, True
        gradients = derivatives(net, x, attack.jacobian)
        alpha = gradients[target]
        _, chosen = salient(alpha, gradients.sum(0) - alpha, domain, theta, attack.pairs)
        if not chosen or step == budget:
            return x, False
        x[chosen] = (x[chosen] + theta).clamp(0, 1)
        domain &= (x < 0.99) if theta > 0 else (x > 0.01)
    return x, False


@pytest.mark.parametrize("theta", [1.0, -1.0, 0.4])
@pytest.mark.parametrize("jacobian", ["logits", "softmax"])
@pytest.mark.parametrize("pairs", [True, False])
def test_jsma_is_the_papers_algorithm(
    theta: float, jacobian: str, pairs: bool, net: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    attack = JSMA(theta=theta, jacobian=jacobian, pairs=pairs, gamma=0.6)
    result = sp.attack(sp.Model(net), x, y, attack, sp.Minimize("l0"), sp.Targeted("next"))
    for i in range(len(x)):
        expected, reached = paper(net, x[i], int(y[i] + 1) % CLASSES, result.tau, attack)
        assert bool(result.success[i]) == reached
        if reached:
            torch.testing.assert_close(result.adversarial[i], expected, rtol=0, atol=1e-12)
    assert result.success.float().mean() > 0.2
    limit = int(0.6 * DIMENSION)
    assert (result.distance[result.success] <= limit).all()


def maximal(net: nn.Module, x: Tensor, label: int, tau: float, attack: JSMA) -> tuple[Tensor, bool]:
    """M-JSMA of Wiyatno & Xu for one sample: all classes, both directions, no way back."""
    x, moved = x.clone(), torch.zeros(len(x))
    budget = int(attack.gamma * len(x) + 1e-9) // 2
    for step in range(budget + 1):
        z = net(x).detach()
        if float(z.index_fill(0, torch.tensor(label), -torch.inf).max() - z[label]) >= tau:
            return x, True
        gradients, best, change = derivatives(net, x, attack.jacobian), 0.0, ([], 0.0)
        for t in range(CLASSES):
            alpha = gradients[t] * (-1 if t == label else 1)
            beta = (gradients.sum(0) - gradients[t]) * (-1 if t == label else 1)
            for way in (1.0, -1.0):
                domain = (x < 0.99) & (moved >= 0) if way > 0 else (x > 0.01) & (moved <= 0)
                worth, chosen = salient(alpha, beta, domain, way, True)
                if worth > best:
                    best, change = worth, (chosen, way)
        if not change[0] or step == budget:
            return x, False
        x[change[0]] = (x[change[0]] + change[1] * abs(attack.theta)).clamp(0, 1)
        moved[change[0]] = change[1]
    return x, False


@pytest.mark.parametrize("theta", [1.0, 0.4])
@pytest.mark.parametrize("jacobian", ["logits", "softmax"])
def test_maximal_is_the_papers_algorithm(theta: float, jacobian: str, net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    attack = JSMA(theta=theta, jacobian=jacobian, untargeted="maximal", gamma=0.6)
    result = sp.attack(sp.Model(net), x, y, attack, sp.Minimize("l0"))
    found = [maximal(net, x[i], int(y[i]), result.tau, attack) for i in range(6)]
    assert result.success[:6].tolist() == [reached for _, reached in found]
    assert result.success.any()
    for i, (expected, reached) in enumerate(found):
        if reached:
            torch.testing.assert_close(result.adversarial[i], expected, rtol=0, atol=1e-12)
    moved = (result.adversarial - x)[result.success]
    assert (moved > 0).any()
    assert (moved < 0).any()


def test_maximal_never_goes_back(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    points = [samples[0]]
    attack = JSMA(theta=0.3, untargeted="maximal", gamma=1.0)
    sp.attack(
        sp.Model(net), *samples, attack, sp.Minimize("l0"), sp.Untargeted(confidence=50.0),
        callback=lambda record: points.append(record.points) if len(record.points) == len(samples[0]) else None,
    )  # fmt: skip
    ways = torch.stack([later - earlier for earlier, later in itertools.pairwise(points)]).sign()
    assert len(ways) > 5
    assert not ((ways > 0).any(0) & (ways < 0).any(0)).any()
    assert (ways.abs().sum(0) > 1).any(), "though features move more than once"


def test_non_targeted_turns_the_roles_round(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    for theta in (1.0, -1.0):
        points: list[Tensor] = []
        attack = JSMA(theta=theta, untargeted="non-targeted", steps=1)
        sp.attack(
            sp.Model(net), x, y, attack, sp.Minimize("l0"),
            callback=lambda record, points=points: points.append(record.points),
        )  # fmt: skip
        for i in range(len(x)):
            gradients = derivatives(net, x[i], "logits")
            alpha = -gradients[y[i]]
            domain = x[i] < 0.99 if theta > 0 else x[i] > 0.01
            _, chosen = salient(alpha, -(gradients.sum(0) + alpha), domain, theta, True)
            assert (points[0][i] != x[i]).nonzero()[:, 0].tolist() == sorted(chosen)


@pytest.mark.parametrize(
    ("settings", "goal", "gradients"),
    [
        ({"jacobian": "softmax"}, sp.Targeted("next"), 1),
        ({"jacobian": "logits"}, sp.Targeted("next"), 2),
        ({"jacobian": "softmax"}, None, 1),
        ({"untargeted": "maximal"}, None, CLASSES),
    ],
)
def test_passes(
    settings: dict[str, str], goal: sp.Targeted | None, gradients: int, net: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    counting = Counting(net)
    result = sp.attack(sp.Model(counting), *samples, JSMA(gamma=0.4, **settings), sp.Minimize("l0"), goal)
    assert torch.equal(result.queries.backward, gradients * result.iterations)
    assert counting.backward_rows == int(result.queries.backward.sum())
    assert JSMA(**settings).cost(CLASSES)[1] >= gradients


def test_features_at_their_ends_and_masked_ones_stay(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples[0].clone(), samples[1]
    x[:, ::4] = 0.996
    y = net(x).argmax(1)
    mask = torch.ones(DIMENSION, dtype=torch.bool)
    mask[1::4] = False
    result = sp.attack(sp.Model(net), x, y, JSMA(gamma=1.0), sp.Minimize("l0", mask=mask), keep="last")
    changed = result.adversarial != x
    assert changed.any()
    assert not changed[:, ::4].any(), "no room upwards is no feature to spend"
    assert not changed[:, 1::4].any()
    assert torch.isin(result.adversarial[changed], torch.tensor(1.0, dtype=torch.float64)).all()


def test_the_ball_ends_it(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    result = sp.attack(sp.Model(net), *samples, JSMA(gamma=0.1), sp.L0(4), sp.Targeted("next"))
    assert (result.distance == 4).any(), "the ball, not gamma, says how many"
    assert (result.distance <= 4).all()
    assert (result.iterations <= 3).all(), "two pairs fit, and a third shows that it is too many"
    assert result.having("survived").any()


def test_saturated_probabilities_hide_the_gradient(samples: tuple[Tensor, Tensor]) -> None:
    """As on a distilled network: softmax derivatives vanish, logits' don't (Carlini & Wagner 2017, section V)."""
    x = samples[0].float()
    scaled = linear(2000 * torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(2)), torch.zeros(3))
    y = scaled(x).argmax(1)
    goal = sp.Targeted("next")
    hidden = sp.attack(sp.Model(scaled), x, y, JSMA(jacobian="softmax", gamma=1.0), sp.Minimize("l0"), goal)
    seen = sp.attack(sp.Model(scaled), x, y, JSMA(jacobian="logits", gamma=1.0), sp.Minimize("l0"), goal)
    assert hidden.success.sum() <= 2
    assert (hidden.zero_gradients > 0).sum() >= 8
    assert seen.success.float().mean() > 0.6


def test_two_classes_and_one_logit() -> None:
    w = torch.linspace(-1, 1, 10)[None]
    for weight, bias in ((w, torch.zeros(1)), (torch.cat([0 * w, w]), torch.zeros(2)), (torch.cat([w, 2 * w]), torch.zeros(2))):
        x = torch.full((1, 10), 0.5)
        x[0, -1] = 0.6
        model = sp.Model(linear(weight, bias))
        y = model.predict(x)
        result = sp.attack(model, x, y, JSMA(gamma=1.0, theta=-1.0), sp.Minimize("l0"))
        assert result.success.all()
        assert (result.adversarial != x).nonzero()[:, 1].tolist() == [8, 9], "the two steepest features"


def test_needs_bounds_and_good_settings(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(CapabilityError, match="bounds"):
        sp.attack(sp.Model(net, bounds=None), *samples, JSMA(), sp.Minimize("l0"))
    for name, value in (
        ("theta", 0.0), ("theta", 1.5), ("gamma", 0.0), ("gamma", 1.1), ("jacobian", "probits"), ("untargeted", "random"),
        ("steps", 0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            JSMA(**{name: value})


def test_in_training_loops(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    counting = Counting(net)
    adversarial = sp.perturb(counting, x, y, JSMA(gamma=1.0, jacobian="softmax"), sp.L0(DIMENSION))
    assert (net(adversarial).argmax(1) != y).float().mean() > 0.8
    assert counting.forward_rows <= len(x) * (DIMENSION // 2 + 1), "samples with an end cost nothing more"
