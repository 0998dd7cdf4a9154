"""DeepFool, SuperDeepFool and SparseFool against their papers' equations, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from contract_support import linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.deepfool import DeepFool, SparseFool, SuperDeepFool
from saddlepoint.errors import InputError

DIMENSION = 12
Step = Callable[[Tensor, float], Tensor]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(DIMENSION, 16), nn.Tanh(), nn.Linear(16, 14)).double()
        for parameter in net.parameters():
            parameter.data *= 2.5
        return net.eval()


@pytest.fixture(scope="module")
def samples(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(16, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, net(x).argmax(1)


def logits_and_jacobian(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return net(x[None])[0].detach(), torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x)


def nearest_boundary(z: Tensor, jacobian: Tensor, y: int, tau: float, norm: str, others: list[int]) -> tuple[Tensor, float]:
    """w of the nearest linearised boundary, and |f|. Where f = tau, success begins."""
    dual = {"l2": 2, "linf": 1, "l1": math.inf}[norm]
    best: tuple[float, Tensor, float] | None = None
    for k in others:
        w, f = jacobian[k] - jacobian[y], abs(float(z[k] - z[y]) - tau)
        distance = f / float(w.norm(p=dual))
        if best is None or distance < best[0]:
            best = distance, w, f
    assert best is not None
    return best[1], best[2]


def paper_step(w: Tensor, f: float, norm: str) -> Tensor:
    if norm == "l2":
        return f / float(w.norm()) ** 2 * w
    return f / float(w.abs().sum()) * w.sign()


def filled(w: Tensor, f: float, x: Tensor, norm: str) -> Tensor:
    """The smallest move inside [0, 1] that gains f, by bisection on its level."""
    room = torch.where(w > 0, 1 - x, x)
    low, high = 0.0, 1e6
    for _ in range(200):
        level = (low + high) / 2
        size = torch.minimum(room, level * (w.abs() if norm == "l2" else torch.ones_like(w)))
        low, high = (level, high) if float((w.abs() * size).sum()) < f else (low, level)
    return torch.minimum(room, low * (w.abs() if norm == "l2" else torch.ones_like(w))) * w.sign()


def size_of(move: Tensor, norm: str) -> float:
    return float({"l2": move.norm(), "linf": move.abs().max(), "l1": move.abs().sum()}[norm])


def reference(
    net: nn.Module, x: Tensor, y: int, tau: float, norm: str, *, classes: int = 10, clip: bool = False, steps: int = 50
) -> tuple[Tensor, int]:
    """Algorithm 2 for one sample, with the overshoot in every step, as x + (1 + eta) sum r has it."""
    point = x.clone()
    for step in range(steps + 1):
        z, jacobian = logits_and_jacobian(net, point)
        rivals = [k for k in z.argsort(descending=True).tolist() if k != y]
        if float(z[rivals[0]] - z[y]) >= tau:
            return point, step
        w, f = nearest_boundary(z, jacobian, y, tau, norm, rivals[: classes - 1])
        r = paper_step(w, f, norm)
        if clip:
            inside = filled(w, f, point, norm)
            r = inside if size_of(inside, norm) <= 0.02 * size_of(point - x, norm) else r
        point = point + 1.02 * r
        point = point.clamp(0, 1) if clip else point
    raise AssertionError("no boundary was crossed")


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [4, 14])
def test_deepfool_is_the_papers_formula_without_a_box(
    norm: str, classes: int, net: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    result = sp.attack(sp.Model(net, bounds=None), x, y, DeepFool(classes=classes), sp.Minimize(norm))
    assert result.status.tolist() == ["fooled"] * len(x)
    for i in range(len(x)):
        expected, steps = reference(net, x[i], int(y[i]), result.tau, norm, classes=classes)
        torch.testing.assert_close(result.adversarial[i], expected, rtol=1e-9, atol=1e-9)
        assert result.queries.backward[i] == steps * (classes - 1), "as many gradients as classes to go to"
        assert result.queries.forward[i] == 2 * steps + 1
    assert result.queries.backward.unique().numel() > 1, "every sample stops by itself"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_at_the_ends_of_the_range(norm: str, net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x = torch.round(samples[0] * 3) / 3  # a third of the features lies at an end
    y = net(x).argmax(1)
    result = sp.attack(sp.Model(net), x, y, DeepFool(classes=14), sp.Minimize(norm))
    assert result.success.all()
    assert ((result.adversarial == 0) | (result.adversarial == 1)).float().mean() > 0.08
    for i in range(len(x)):
        expected, _ = reference(net, x[i], int(y[i]), result.tau, norm, classes=14, clip=True)
        torch.testing.assert_close(result.adversarial[i], expected, rtol=1e-6, atol=1e-6)


def test_deepfool_on_a_binary_linear_model() -> None:
    """r = -f w / ||w||^2 and -f sign(w) / ||w||_1, up to the overshoot, in one step."""
    w, b = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    model, x = sp.Model(linear(w, b), bounds=None), torch.tensor([[1.0, 0.2, 5.0]], dtype=torch.float64)
    f = float(x @ w.T + b)
    expected = {"l2": -f * w / 25, "linf": -f * w.sign() / 7, "l1": torch.tensor([[0, f / 4, 0]], dtype=torch.float64)}
    for norm, r in expected.items():
        result = sp.attack(model, x, torch.tensor([1]), DeepFool(), sp.Minimize(norm))
        torch.testing.assert_close(result.adversarial - x, 1.02 * r, rtol=1e-4, atol=1e-12)
        assert result.queries.backward.tolist() == [1]


def test_deepfool_towards_a_target_takes_one_gradient(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    model = sp.Model(net, bounds=None)
    result = sp.attack(model, x, y, DeepFool(), sp.Minimize("l2"), sp.Targeted("next"))
    assert result.success.float().mean() > 0.8
    assert (result.queries.backward <= result.iterations).all()
    target = (y + 1) % 14
    z, jacobian = logits_and_jacobian(net, x[0])
    rival = int(z.index_fill(0, target[:1], -math.inf).argmax())
    w, f = nearest_boundary(z, jacobian, rival, result.tau, "l2", [int(target[0])])
    seen: list[Tensor] = []
    attack = DeepFool(steps=1)
    sp.attack(
        model, x[:1], y[:1], attack, sp.Minimize("l2"), sp.Targeted("next"),
        callback=lambda record: seen.append(record.points),
    )  # fmt: skip
    torch.testing.assert_close(seen[0][0], x[0] + 1.02 * paper_step(w, f, "l2"), rtol=1e-9, atol=1e-9)


def test_confidence_is_reached(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    for attack in (DeepFool(), SuperDeepFool()):
        result = sp.attack(sp.Model(net, bounds=None), *samples, attack, sp.Minimize("l2"), sp.Untargeted(confidence=1.0))
        plain = sp.attack(sp.Model(net, bounds=None), *samples, attack, sp.Minimize("l2"))
        z = net(result.adversarial).detach()
        others = z.scatter(1, samples[1][:, None], -math.inf).max(1).values
        assert result.success.all()
        assert (others - z.gather(1, samples[1][:, None])[:, 0] >= 1.0).all()
        assert (result.distance > plain.distance).all()


def projected(net: nn.Module, x: Tensor, x_i: Tensor, point: Tensor, y: int) -> Tensor:
    """x_i + <point - x, w> w / ||w||^2 with w the gradient of z_k - z_y at the point, k its likeliest class but y."""
    z, jacobian = logits_and_jacobian(net, point)
    k = int(z.index_fill(0, torch.tensor([y]), -math.inf).argmax())
    w = jacobian[k] - jacobian[y]
    return x_i + float((point - x) @ w) / float(w @ w) * w


def crosses(net: nn.Module, point: Tensor, y: int, tau: float) -> bool:
    z = net(point[None])[0].detach()
    return float(z.index_fill(0, torch.tensor([y]), -math.inf).max() - z[y]) >= tau


@pytest.mark.parametrize(("m", "n"), [(None, 1), (1, 1), (2, 3)])
def test_superdeepfool_is_the_papers_iteration(m: int | None, n: int, net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    attack = SuperDeepFool(deepfool_steps=m, projections=n, search=0, classes=14)
    seen: list[Tensor] = []
    for i in range(8):
        seen.clear()
        result = sp.attack(
            sp.Model(net, bounds=None), x[i : i + 1], y[i : i + 1], attack, sp.Minimize("l2"), keep="last",
            callback=lambda record: seen.append(record.points[0]),
        )  # fmt: skip
        point = x[i]
        for _ in range(20):
            start = point
            for _ in range(m or 50):
                z, jacobian = logits_and_jacobian(net, point)
                w, f = nearest_boundary(z, jacobian, int(y[i]), result.tau, "l2", [k for k in range(14) if k != int(y[i])])
                point = point + 1.02 * paper_step(w, f, "l2")
                if crosses(net, point, int(y[i]), result.tau):
                    break
            for repeat in range(n):
                point = projected(net, x[i], start if repeat == 0 else point, point, int(y[i]))
                if n > 1 and repeat + 1 < n:
                    start = point
            if crosses(net, point, int(y[i]), result.tau):
                break
        torch.testing.assert_close(seen[-1], point, rtol=1e-7, atol=1e-7)
        assert result.success.all()


class Ball(nn.Module):
    """Class 1 outside a sphere of radius 2, class 0 inside."""

    def forward(self, x: Tensor) -> Tensor:
        f = (x.flatten(1) ** 2 * torch.linspace(0.3, 3, x.shape[1], dtype=x.dtype)).sum(1) - 4
        return torch.stack([torch.zeros_like(f), f], 1)


def test_superdeepfool_stands_on_the_boundary_at_a_right_angle() -> None:
    x = 0.7 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[Ball()(x)[:, 1] < -1]
    y = torch.zeros(len(x), dtype=torch.int64)
    model = sp.Model(Ball(), bounds=None)
    near, nearer = (sp.attack(model, x, y, attack, sp.Minimize("l2")) for attack in (DeepFool(), SuperDeepFool()))
    assert nearer.success.all()
    assert (nearer.distance <= near.distance * (1 + 1e-9)).float().mean() > 0.9
    assert nearer.distance.mean() < 0.97 * near.distance.mean()

    def cosine(result: sp.AttackResult) -> Tensor:
        normal = result.adversarial * torch.linspace(0.3, 3, 6, dtype=torch.float64)
        return nn.functional.cosine_similarity(result.adversarial - x, normal)

    assert cosine(nearer).mean() > cosine(near).mean()
    assert cosine(nearer).min() > 0.8


def test_search_takes_back_the_overshoot() -> None:
    w, b = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    model, x = sp.Model(linear(w, b), bounds=None), torch.tensor([[1.0, 0.2, 5.0]], dtype=torch.float64)
    exact = float(x @ w.T + b) / 5
    for search, factor in ((0, 1.02), (3, 1.02), (12, 1.0005)):
        result = sp.attack(model, x, torch.tensor([1]), SuperDeepFool(search=search), sp.Minimize("l2"))
        assert exact < float(result.distance) <= exact * factor * 1.0001  # tau
        assert int(result.queries.forward) <= 6 + search


def test_search_halves_what_is_open_each_time() -> None:
    x = 0.7 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[Ball()(x)[:, 1] < -1]
    y, model = torch.zeros(len(x), dtype=torch.int64), sp.Model(Ball(), bounds=None)
    whole, rough, fine = (
        sp.attack(model, x, y, SuperDeepFool(search=search), sp.Minimize("l2")).distance for search in (0, 12, 40)
    )
    assert (whole - fine > 0.1 * fine).any(), "there is something to search"
    assert (rough - fine <= whole / 2**12 * 1.001).all()


@pytest.mark.parametrize("pushing", [1.0, 3.0])
def test_sparsefool_is_the_papers_iteration(pushing: float, net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    for i in range(8):
        seen: list[Tensor] = []
        result = sp.attack(
            sp.Model(net), x[i : i + 1], y[i : i + 1], SparseFool(pushing=pushing, classes=14), sp.Minimize("l1"), keep="last",
            callback=lambda record, seen=seen: seen.append(record.points[0]),
        )  # fmt: skip
        label, tau, start = int(y[i]), result.tau, x[i]
        for _ in range(20):
            edge = start
            for _ in range(50):
                z, jacobian = logits_and_jacobian(net, edge)
                w, f = nearest_boundary(z, jacobian, label, tau, "l2", [k for k in range(14) if k != label])
                inside = filled(w, f, edge, "l2")
                short = size_of(inside, "l2") <= 0.02 * size_of(edge - x[i], "l2")
                edge = (edge + (inside if short else paper_step(w, f, "l2"))).clamp(0, 1)
                if crosses(net, (start + 1.02 * (edge - start)).clamp(0, 1), label, tau):
                    break
            z, jacobian = logits_and_jacobian(net, edge)
            k = int(z.index_fill(0, torch.tensor([label]), -math.inf).argmax())
            w = jacobian[k] - jacobian[label]
            left = pushing * float((edge - start) @ w)
            for j in w.abs().argsort(descending=True).tolist():  # algorithm 1: the steepest feature first, each to its end
                room = float(1 - start[j] if w[j] > 0 else start[j])
                size = min(room, left / float(w[j].abs()))
                left -= size * float(w[j].abs())
                start = start.index_put((torch.tensor(j),), start[j] + size * w[j].sign())
            tried = (x[i] + 1.02 * (start - x[i])).clamp(0, 1)
            if crosses(net, tried, label, tau):
                break
        torch.testing.assert_close(seen[-1], tried, rtol=1e-6, atol=1e-6)
        assert result.success.all()


def test_sparsefool_moves_few_features(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    sparse = sp.attack(sp.Model(net), *samples, SparseFool(), sp.Minimize("l0"))
    dense = sp.attack(sp.Model(net), *samples, DeepFool(), sp.Minimize("l2"))
    assert sparse.success.all()
    assert sparse.distances["l0"].mean() < 0.7 * dense.distances["l0"].mean()


@pytest.mark.parametrize("attack", [DeepFool(), SuperDeepFool(), SparseFool()], ids=lambda attack: type(attack).__name__)
def test_results_do_not_depend_on_the_company(attack: sp.engine.Attack, net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    norm = "l1" if isinstance(attack, SparseFool) else "l2"
    x, y = samples
    model = sp.Model(net)
    whole = sp.attack(model, x, y, attack, sp.Minimize(norm), batch_size=5)
    for i in range(0, len(x), 4):
        alone = sp.attack(model, x[i : i + 1], y[i : i + 1], attack, sp.Minimize(norm))
        torch.testing.assert_close(alone.adversarial[0], whole.adversarial[i], rtol=1e-9, atol=1e-9)
        assert alone.iterations[0] == whole.iterations[i]
        assert alone.queries.total[0] == whole.queries.total[i]


@pytest.mark.parametrize("attack", [DeepFool(), SuperDeepFool(), SparseFool()], ids=lambda attack: type(attack).__name__)
def test_a_flat_model_ends_it_at_once(attack: sp.engine.Attack) -> None:
    model = sp.Model(linear(torch.zeros(3, 5), torch.tensor([2.0, 1.0, 0.0])))
    result = sp.attack(model, torch.rand(4, 5), torch.zeros(4, dtype=torch.int64), attack, sp.Minimize("l1"))
    assert result.status.tolist() == ["survived"] * 4
    assert (result.iterations == 1).all()


def test_goals_of_other_kinds(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    group = sp.Untargeted(groups=(frozenset(range(5)), frozenset(range(5, 9))))
    for goal in (
        group,
        sp.Untargeted(top_k=3),
        sp.Targeted({1, 3, 7}),
        sp.Targeted(5, top_k=2),
        sp.FalsePositive(target=2, probability=0.4),
    ):
        for attack in (DeepFool(), SuperDeepFool(), SparseFool()):
            norm = "l1" if isinstance(attack, SparseFool) else "l2"
            result = sp.attack(sp.Model(net), x, y, attack, sp.Minimize(norm), goal)
            assert result.success.float().mean() > 0.6, (goal, attack)


def test_in_training_loops(net: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    for attack in (DeepFool(steps=8), SuperDeepFool(steps=8, search=3)):
        assert (net(sp.perturb(net, x, y, attack, sp.L2(3.0))).argmax(1) != y).float().mean() > 0.8


@pytest.mark.parametrize(
    ("attack", "settings", "word"),
    [
        (DeepFool, {"steps": 0}, "steps"),
        (DeepFool, {"classes": 1}, "classes"),
        (DeepFool, {"overshoot": -0.1}, "overshoot"),
        (SuperDeepFool, {"deepfool_steps": 0}, "deepfool_steps"),
        (SuperDeepFool, {"projections": 0}, "projections"),
        (SuperDeepFool, {"search": -1}, "search"),
        (SparseFool, {"pushing": 0.5}, "pushing"),
    ],
)
def test_bad_hyperparameters(attack: type, settings: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        attack(**settings)
