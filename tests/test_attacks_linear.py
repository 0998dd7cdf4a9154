"""The closed form for linear models against linear and quadratic programmes and brute force; Hot/Cold against its paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from contract_support import linear
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.deepfool import DeepFool
from saddlepoint.attacks.linear import HotCold, LinearClosedForm
from saddlepoint.errors import InputError

DIMENSION, CLASSES = 8, 5
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def regression() -> Problem:
    """Weights and bias of a softmax regression, inputs that often lie at the ends of [0, 1], predicted classes."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(CLASSES, DIMENSION, generator=generator, dtype=torch.float64)
    x = torch.rand(60, DIMENSION, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.4, x.round(), x)
    bias = -(x @ weight.T).mean(0)
    z = x @ weight.T + bias
    top = z.topk(2).values
    x = x[top[:, 0] - top[:, 1] > 0.7][:14]
    assert len(x) == 14
    return weight, bias, x, (x @ weight.T + bias).argmax(1)


def optimum(a: np.ndarray, b: np.ndarray, x: np.ndarray, norm: str) -> float:
    """min ||d|| with a @ d >= b (rows of hyperplanes) and x + d in [0, 1]; inf where there is none."""
    n = len(x)
    box = list(zip(-x, 1 - x, strict=True))
    if norm == "linf":  # d and t >= |d_i|
        eye, one = np.eye(n), np.ones((n, 1))
        rows = np.block([[-a, np.zeros((len(a), 1))], [eye, -one], [-eye, -one]])
        found = linprog(np.r_[np.zeros(n), 1], rows, np.r_[-b, np.zeros(2 * n)], bounds=[*box, (0, None)])
        return found.fun if found.success else np.inf
    if norm == "l1":  # d = u - v
        rows = np.hstack([-a, a])
        found = linprog(np.ones(2 * n), rows, -b, bounds=[(0, h) for _, h in box] + [(0, -low) for low, _ in box])
        return found.fun if found.success else np.inf
    if norm == "l2":
        constraint = {"type": "ineq", "fun": lambda d: a @ d - b, "jac": lambda d: a}
        start = np.where(a[0] > 0, 1 - x, -x)
        found = minimize(
            lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=box, constraints=constraint, method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        return float(np.sqrt(found.fun)) if (a @ found.x >= b - 1e-7).all() else np.inf
    gains = np.where(a > 0, a * (1 - x), -a * x)  # l0, one hyperplane: every set of features, each at its end
    for size in range(n + 1):
        if any(gains[0, list(chosen)].sum() >= b[0] for chosen in itertools.combinations(range(n), size)):
            return size
    return np.inf


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_softmax_regression_in_the_box(norm: str, regression: Problem) -> None:
    weight, bias, x, y = regression
    result = sp.attack(sp.Model(linear(weight, bias)), x, y, LinearClosedForm(), sp.Minimize(norm))
    z = x @ weight.T + bias
    free = []
    for i in range(len(x)):
        others = [k for k in range(CLASSES) if k != int(y[i])]
        planes = [((weight[k] - weight[y[i]])[None].numpy(), (z[i, y[i]] - z[i, k] + result.tau)[None].numpy()) for k in others]
        best = min(optimum(a, b, x[i].numpy(), norm) for a, b in planes)
        assert result.success[i]
        assert float(result.distance[i]) == pytest.approx(best, rel=2e-4, abs=1e-9)
        dual = {"linf": 1, "l2": 2, "l1": np.inf, "l0": np.inf}[norm]
        free.append(min(b[0] / np.linalg.norm(a[0], dual) for a, b in planes))
    if norm in ("linf", "l2", "l1"):
        assert (result.distance.numpy() > 1.01 * np.array(free)).sum() >= 2, "the box is felt"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targets_of_a_softmax_regression(norm: str, regression: Problem) -> None:
    """The target has to beat all rivals. Where the point reaches them all, it is the optimum of the whole programme."""
    weight, bias, x, y = regression
    model, target = sp.Model(linear(weight, bias)), (y + 1) % CLASSES
    result = sp.attack(model, x, y, LinearClosedForm(steps=2), sp.Minimize(norm), sp.Targeted("next"))
    exact = 0
    z = x @ weight.T + bias
    for i in range(len(x)):
        rivals = [j for j in range(CLASSES) if j != int(target[i])]
        a = (weight[target[i]] - weight[rivals]).numpy()
        best = optimum(a, (z[i, rivals] - z[i, target[i]] + result.tau).numpy(), x[i].numpy(), norm)
        if result.success[i]:
            exact += 1
            assert float(result.distance[i]) == pytest.approx(best, rel=2e-4)
    assert exact >= 5


def test_passes_and_binary_models() -> None:
    """One forward pass, classes - 1 backward ones, and looks. Without a box in l-infinity the step is FGSM's."""
    weight, bias = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = sp.Model(linear(weight, bias), bounds=None)
    y = model.predict(x)
    result = sp.attack(model, x, y, LinearClosedForm(), sp.Minimize("linf"))
    f = (x @ weight.T + bias)[:, 0]
    torch.testing.assert_close(result.distance, f.abs() / 3.5, rtol=1e-3, atol=1e-4)
    step = sp.attack(model, x, y, sp.attacks.FGSM(loss="margin"), sp.Linf(result.distance * 1.001), keep="last")
    torch.testing.assert_close(result.adversarial, step.adversarial, rtol=0, atol=0.0011 * float(result.distance.max()))
    assert (result.queries.backward == 1).all()
    assert (result.queries.forward <= 5).all()


def test_hyperplanes_out_of_reach_are_left_alone() -> None:
    """From the corner 0 nothing leads to class 1, which needs smaller features; class 2 is further away, but there."""
    weight = torch.tensor([[1.0, 1.0], [-5.0, -5.0], [2.0, 3.0]], dtype=torch.float64)
    bias = torch.tensor([4.0, 3.9, 3.0], dtype=torch.float64)
    for norm, distance in (("linf", 1 / 3), ("l2", 1 / 5**0.5), ("l1", 0.5), ("l0", 1.0)):
        model, x = sp.Model(linear(weight, bias)), torch.zeros(1, 2, dtype=torch.float64)
        result = sp.attack(model, x, torch.tensor([0]), LinearClosedForm(), sp.Minimize(norm))
        assert result.predicted.tolist() == [2]
        assert float(result.distance) == pytest.approx(distance, rel=1e-3)


def test_many_classes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 12, generator=generator), torch.rand(10, 12, generator=generator)
    model = sp.Model(linear(weight, torch.zeros(40)))
    y = model.predict(x)
    whole = sp.attack(model, x, y, LinearClosedForm(), sp.Minimize("l2"))
    monkeypatch.setattr("saddlepoint.attacks.linear._ELEMENTS", 50)
    pieces = sp.attack(model, x, y, LinearClosedForm(), sp.Minimize("l2"), batch_size=3)
    torch.testing.assert_close(pieces.distance, whole.distance, rtol=1e-4, atol=1e-6)
    assert (whole.queries.backward == 39).all()
    near = sp.attack(model, x, y, DeepFool(classes=40), sp.Minimize("l2"))
    assert (whole.distance <= near.distance * 1.0001).all(), "no other way is shorter"


def test_groups_and_sets_of_classes(regression: Problem) -> None:
    """The nearest wanted class, and of its hyperplanes the furthest."""
    weight, bias, x, _ = regression
    model, z = sp.Model(linear(weight, bias), bounds=None), x @ weight.T + bias
    y = z.argmax(1)
    group = sp.Untargeted(groups=(frozenset({0, 1}), frozenset({2, 3})))
    members = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3], 4: [4]}
    result = sp.attack(model, x, y, LinearClosedForm(steps=2), sp.Minimize("l2"), group)
    for i in range(len(x)):
        mine = members[int(y[i])]
        distance = min(
            max(float((z[i, j] - z[i, k]).clamp(min=0) / (weight[k] - weight[j]).norm()) for j in mine)
            for k in range(CLASSES)
            if k not in mine
        )
        if result.success[i]:
            assert float(result.distance[i]) == pytest.approx(distance, rel=1e-3)
    assert result.success.float().mean() > 0.5
    for goal in (sp.Untargeted(top_k=2), sp.FalsePositive(target=1, probability=0.4), sp.Untargeted(confidence=0.5)):
        assert sp.attack(model, x, y, LinearClosedForm(), sp.Minimize("l2"), goal).success.float().mean() > 0.5


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(DIMENSION, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
        for parameter in net.parameters():
            parameter.data *= 3
        return net.eval()


@pytest.fixture(scope="module")
def samples(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(16, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, net(x).argmax(1)


def direction(net: nn.Module, x: Tensor, hot: int, cold: int, norm: str) -> Tensor:
    """eta of section 4.2: back-propagate the vector with |h_hot| and -|h_cold|, h the logits less their mean."""
    leaf = x.clone().requires_grad_()
    z = net(leaf[None])[0]
    h = (z - z.mean()).detach()
    (eta,) = torch.autograd.grad(h[hot].abs() * z[hot] - h[cold].abs() * z[cold], leaf)
    return eta.sign() if norm == "linf" else eta / eta.norm()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("hot", [1, 3])
def test_hot_cold_is_the_papers_direction_and_smallest_step(
    norm: str, hot: int, net: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    result = sp.attack(sp.Model(net), x, y, HotCold(hot=hot, steps=24), sp.Minimize(norm))
    assert result.success.float().mean() > 0.5
    share = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
    for i in result.success.nonzero()[:, 0].tolist():
        ranked = [k for k in net(x[i]).argsort(descending=True).tolist() if k != int(y[i])]
        eta = direction(net, x[i], ranked[hot - 1], int(y[i]), norm)
        t = float(((result.adversarial[i] - x[i]) / eta).max())  # features at their ends went less far
        torch.testing.assert_close(result.adversarial[i], (x[i] + t * eta).clamp(0, 1), rtol=0, atol=1e-9)
        on_the_way = (x[i] + share * t * eta).clamp(0, 1)
        fooled = net(on_the_way).argmax(1) != y[i]
        assert not fooled[: int(0.45 * len(share))].all()
        assert not fooled[-2], "a little less does not do"


def test_hot_cold_heads_for_the_target(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    result = sp.attack(sp.Model(net, bounds=None), x, y, HotCold(), sp.Minimize("l2"), sp.Targeted("next"))
    for i in result.success.nonzero()[:, 0].tolist():
        eta = direction(net, x[i], int(y[i] + 1) % CLASSES, int(y[i]), "l2")
        moved = result.adversarial[i] - x[i]
        assert float(nn.functional.cosine_similarity(moved, eta, 0)) == pytest.approx(1, abs=1e-6)
    assert result.success.sum() >= 4


def test_hot_cold_ignores_a_common_shift(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    class Below(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x) - 50

    plain, below = (sp.attack(sp.Model(m), *samples, HotCold(), sp.Minimize("l2")) for m in (net, Below()))
    assert plain.success.tolist() == below.success.tolist()
    found = plain.success
    torch.testing.assert_close(plain.distance[found], below.distance[found], rtol=1e-2, atol=1e-6)


def test_a_flat_model_ends_both_at_once() -> None:
    model = sp.Model(linear(torch.zeros(3, 5), torch.tensor([2.0, 1.0, 0.0])))
    x, y = torch.rand(4, 5), torch.zeros(4, dtype=torch.int64)
    flat = sp.attack(model, x, y, HotCold(), sp.Minimize("l2"))
    assert (flat.iterations == 1).all()
    assert torch.isfinite(sp.attack(model, x, y, LinearClosedForm(), sp.Minimize("l2")).adversarial).all()


def test_in_training_loops(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    for attack in (LinearClosedForm(), HotCold()):
        assert torch.isfinite(sp.perturb(net, x, y, attack, sp.L2(3.0))).all()


def test_bad_hyperparameters() -> None:
    for cls, settings in (
        (LinearClosedForm, {"steps": 0}),
        (LinearClosedForm, {"overshoot": 0.0}),
        (HotCold, {"hot": 0}),
        (HotCold, {"steps": 0}),
    ):
        with pytest.raises(InputError, match=next(iter(settings))):
            cls(**settings)
