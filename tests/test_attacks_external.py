"""Other people's attacks: what they are told, what is counted, and that nothing they do breaks a contract."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from contract_support import Counting, linear, random_states, same, snapshot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import saddlepoint as sp
from saddlepoint.attacks.external import External
from saddlepoint.errors import CapabilityError, InputError

A = sp.attacks
Samples = tuple[Tensor, Tensor]
Net = Callable[[Tensor], Tensor]


def signed(net: Net, x: Tensor, y: Tensor, steps: int = 4, size: float = 0.02, targeted: bool = False) -> Tensor:
    """BIM as anybody would write it, unclipped."""
    x = x.clone()
    for _ in range(steps):
        x.requires_grad_()
        loss = cross_entropy(net(x), y, reduction="sum")
        (gradient,) = torch.autograd.grad(-loss if targeted else loss, x)
        x = (x + size * gradient.sign()).clamp(0, 1).detach()
    return x


def noisy(net: Net, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Draws from every global state."""
    shift = np.random.uniform(-1, 1) + random.uniform(-1, 1)  # noqa: NPY002  # as libraries do
    return (x + eps * torch.sign(torch.randn_like(x) + 0.01 * shift)).clamp(0, 1)


def unfooled(net: Net, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Goes on with those that are not fooled yet: batches of any size."""
    found = x.clone()
    for k in range(1, 9):
        with torch.no_grad():
            left = (net(found).argmax(1) == y).nonzero()[:, 0]
        if not len(left):
            break
        part = found[left].requires_grad_()
        cross_entropy(net(part), y[left]).backward()
        found[left] = (x[left] + k / 8 * eps * part.grad.sign()).clamp(0, 1)
    return found


def test_it_finds_what_our_own_finds(mlp: nn.Module, samples: Samples) -> None:
    """The same mathematics, so the same results; it costs more only in that nobody leaves early."""
    ours = sp.attack(sp.Model(mlp), *samples, A.BIM(steps=4, step_size=0.02), sp.Linf(0.08), keep="margin")
    theirs = sp.attack(sp.Model(mlp), *samples, External(signed), sp.Linf(0.08), keep="margin")
    assert theirs.status.tolist() == ours.status.tolist()
    torch.testing.assert_close(theirs.adversarial, ours.adversarial)
    right = ~ours.having("already_wrong")
    assert (theirs.queries.forward[right] == 1 + 4 + 1).all(), "the clean prediction, the steps, and what came back"
    assert (theirs.queries.backward[right] == 4).all()
    assert (theirs.queries.forward[~right] == 1).all()


@pytest.mark.parametrize("attack", [External(signed), External(noisy), External(unfooled)], ids=str)
@pytest.mark.parametrize("size", [5, 64])
def test_counts_are_what_the_model_sees(attack: External, size: int, mlp: nn.Module, samples: Samples) -> None:
    counting = Counting(mlp)
    model = sp.Model(counting)
    result = sp.attack(model, *samples, attack, sp.Linf(0.08), batch_size=size)
    queries = result.queries
    assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
    assert counting.backward_rows == int(queries.backward.sum()) == model.queries.backward
    assert result.having("fooled").sum() >= (0 if attack.attack is noisy else 5)


def test_rows_go_to_the_nearest_input(mlp: nn.Module, samples: Samples) -> None:
    """A sample that is fooled sooner is asked about less, and is counted so."""
    result = sp.attack(sp.Model(mlp), *samples, External(unfooled), sp.Linf(0.2), keep="margin")
    alone = sp.attack(sp.Model(mlp), *samples, External(unfooled), sp.Linf(0.2), keep="margin", batch_size=1)
    assert torch.equal(result.queries.backward, alone.queries.backward)
    assert len(set(result.queries.backward.tolist())) > 3
    torch.testing.assert_close(result.adversarial, alone.adversarial)


def test_points_on_the_way_count(mlp: nn.Module, samples: Samples) -> None:
    """What was evaluated inside the ball is found, though the library gives back the clean input."""

    def forgetful(net: Net, x: Tensor, y: Tensor) -> Tensor:
        signed(net, x, y)
        return x

    result = sp.attack(sp.Model(mlp), *samples, External(forgetful), sp.Linf(0.08))
    plain = sp.attack(sp.Model(mlp), *samples, External(partial(signed, steps=3)), sp.Linf(0.08))
    assert plain.having("fooled").sum() > 3
    assert torch.equal(result.success, plain.success)


def test_what_comes_back_is_made_feasible(mlp: nn.Module, samples: Samples) -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:7] = True
    x = torch.round(samples[0] * 255) / 255
    for threat in (sp.Linf(0.1, mask=mask, grid=1 / 255), sp.L2(0.8, mask=mask), sp.L1(2.0), sp.L0(5, mask=mask)):
        far = External(lambda net, x, y: x + torch.linspace(-3, 3, 64, dtype=x.dtype).view(1, 8, 8))
        result = sp.attack(sp.Model(mlp), x, samples[1], far, threat, keep="last")
        assert threat.contains(result.adversarial, x).all()
        assert (result.distance[~result.having("already_wrong")] > 0).all()


def test_rows_that_are_no_numbers(mlp: nn.Module, samples: Samples) -> None:
    """The input takes their place; the others are not harmed."""

    def broken(net: Net, x: Tensor, y: Tensor) -> Tensor:
        found = signed(net, x, y)
        found[::2] = torch.nan
        return found

    result = sp.attack(sp.Model(mlp), *samples, External(broken), sp.Linf(0.08))
    assert not result.having("error").any()
    assert torch.isfinite(result.adversarial).all()
    assert result.success.sum() > 5


@pytest.mark.parametrize("answer", [None, 3, "x", torch.zeros(2, 2)], ids=["None", "3", "text", "shape"])
def test_what_is_no_answer(answer: object, mlp: nn.Module, samples: Samples) -> None:
    with pytest.raises(InputError, match="must return a tensor of the inputs' shape"):
        sp.attack(sp.Model(mlp), *samples, External(lambda net, x, y: answer), sp.Linf(0.1))


# Goals, radii, access


def test_targeted(mlp: nn.Module, samples: Samples) -> None:
    goal = sp.Targeted("next")
    result = sp.attack(sp.Model(mlp), *samples, External(partial(signed, steps=20)), sp.Linf(0.4), goal)
    assert result.success.sum() > 15
    assert torch.equal(result.predicted[result.success], ((samples[1] + 1) % 10)[result.success])


def test_goals_that_cannot_be_passed_on(mlp: nn.Module, samples: Samples) -> None:
    counting = Counting(mlp)
    with pytest.raises(CapabilityError, match="untargeted only"):
        sp.attack(sp.Model(counting), *samples, External(unfooled), sp.Linf(0.1), sp.Targeted("next"))
    assert counting.calls == []
    with pytest.raises(CapabilityError, match="one target"):
        sp.attack(sp.Model(mlp), samples[0][:3], samples[1][:3], External(signed), sp.Linf(0.1), sp.Targeted({0, 1}))
    with pytest.raises(CapabilityError, match="cannot be given targets"):
        sp.attack(sp.Model(mlp), *samples, External(lambda net: lambda x, y: x), sp.Linf(0.1), sp.Targeted("next"))


def test_groups_of_classes_are_judged_here(mlp: nn.Module, samples: Samples) -> None:
    groups = sp.Untargeted(groups=({0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}))
    result = sp.attack(sp.Model(mlp), *samples, External(signed), sp.Linf(0.1), groups)
    assert result.success.any()
    assert ((result.predicted < 5) != (samples[1] < 5))[result.success].all()


@pytest.mark.parametrize("name", ["eps", "epsilon", "ε"])
def test_radii(name: str, mlp: nn.Module, samples: Samples) -> None:
    """Each sample's own, one after another; a default is the user's business."""
    told: list[tuple[float, int]] = []
    code = f"def far(net, x, y, {name}):\n    told.append(({name}, len(x)))\n    return (x + {name}).clamp(0, 1)"
    made: dict[str, Callable[..., Tensor]] = {}
    exec(code, {"told": told}, made)
    x, y = samples[0] / 2, sp.Model(mlp).predict(samples[0] / 2)
    eps = torch.tensor([0.1, 0.2, 0.3]).repeat(8)
    result = sp.attack(sp.Model(mlp), x, y, External(made["far"]), sp.Linf(eps), keep="last")
    assert [(round(radius, 6), count) for radius, count in told] == [(0.1, 8), (0.2, 8), (0.3, 8)]
    torch.testing.assert_close(result.distance, eps.double(), rtol=1e-4, atol=0)
    with pytest.raises(CapabilityError, match="needs a ball"):
        sp.attack(sp.Model(mlp), x, y, External(made["far"]), sp.Minimize("linf"))


def test_smallest_perturbation(mlp: nn.Module, samples: Samples) -> None:
    """A function without eps may be asked for it, and Bisect asks one with eps."""
    model, x, y = sp.Model(mlp), samples[0][:9], samples[1][:9]
    plain = sp.attack(model, x, y, External(partial(signed, steps=40, size=0.01)), sp.Minimize("linf"))
    assert plain.success.all()
    searched = sp.attack(model, x, y, A.Bisect(External(unfooled), 6), sp.Minimize("linf"))
    assert searched.success.all()
    right = ~plain.having("already_wrong")
    assert searched.distance[right].median() < 1.02 * plain.distance[right].median()
    assert torch.isinf(sp.attack(model, x, y, External(lambda net, x, y: x), sp.Minimize("l2")).distance[right]).all()


def test_access(mlp: nn.Module, samples: Samples) -> None:
    seen: list[Tensor] = []

    def curious(net: Net, x: Tensor, y: Tensor) -> Tensor:
        seen.append(net(x.clone().requires_grad_()))
        return x

    for access in (sp.Access.LABELS, sp.Access.SCORES, sp.Access.GRADIENTS):
        sp.attack(sp.Model(mlp, access=access), *samples, External(curious, access=access), sp.Linf(0.1))
        assert seen[-1].requires_grad == (access is sp.Access.GRADIENTS)
    labels, scores, gradients = (found.detach() for found in seen)
    torch.testing.assert_close(scores, gradients)
    assert torch.equal(labels, nn.functional.one_hot(scores.argmax(1), 10).float())
    with pytest.raises(CapabilityError):
        sp.attack(sp.Model(mlp, access=sp.Access.LABELS), *samples, External(curious, access=sp.Access.SCORES), sp.Linf(0.1))


# Budgets


@pytest.mark.parametrize("attack", [External(signed), External(noisy), External(unfooled)], ids=str)
def test_budgets_are_never_exceeded(attack: External, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:10], samples[1][:10]
    clean = sp.Model(mlp).predict(x)
    for limit in (1, 2, 3, 4, 7, 30):
        for budget in (sp.Budget(passes=limit), sp.Budget(queries=limit)):
            counting = Counting(mlp)
            result = sp.attack(sp.Model(counting), x, y, attack, sp.Linf(0.08), budget=budget, batch_size=4)
            queries = result.queries
            assert ((queries.total if budget.passes else queries.forward) <= limit).all()
            assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
            assert counting.backward_rows == int(queries.backward.sum())
            assert torch.equal(result.clean_predicted, clean)


def test_best_of_what_the_budget_allowed(mlp: nn.Module, samples: Samples) -> None:
    whole = sp.attack(sp.Model(mlp), *samples, External(signed), sp.Linf(0.08), keep="margin")
    cut = sp.attack(sp.Model(mlp), *samples, External(signed), sp.Linf(0.08), keep="margin", budget=sp.Budget(passes=8))
    shorter = sp.attack(sp.Model(mlp), *samples, External(partial(signed, steps=3)), sp.Linf(0.08), keep="margin")
    torch.testing.assert_close(cut.margin, shorter.margin)
    assert (whole.margin > cut.margin).any()


def test_budget_cannot_be_swallowed(mlp: nn.Module, samples: Samples) -> None:
    """A library that carries on after an error is refused again."""

    def stubborn(net: Net, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(20):
            with contextlib.suppress(Exception):
                net(x)
        return x

    result = sp.attack(sp.Model(mlp), *samples, External(stubborn), sp.Linf(0.1), budget=sp.Budget(queries=5))
    assert result.queries.forward.max() == 5


# Side effects and random numbers


def test_nothing_is_left_behind(cnn: nn.Module, samples: Samples) -> None:
    def careless(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        net.train()
        net.zero_grad()
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        x.requires_grad_()
        cross_entropy(net(x), y).backward()
        with torch.no_grad():
            x += eps * x.grad.sign()
            y += 1
        return x

    net: nn.Module = copy.deepcopy(cnn)
    net.train()
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.full_like(net[5].weight, 0.5)
    x, y = samples[0].clone(), samples[1].clone()
    before, states = snapshot(net), random_states()
    result = sp.attack(sp.Model(net), x, y, External(careless), sp.Linf(0.05))
    assert result.success.sum() > 3
    assert snapshot(net) == before
    assert random_states() == states
    assert torch.equal(x, samples[0])
    assert torch.equal(y, samples[1])


def test_random_numbers_come_from_the_run(mlp: nn.Module, samples: Samples) -> None:
    def draw(seed: int, **options: object) -> sp.AttackResult:
        torch.manual_seed(len(found))
        np.random.seed(len(found))  # noqa: NPY002
        random.seed(len(found))
        return sp.attack(sp.Model(mlp), *samples, External(noisy), sp.Linf(0.05), seed=seed, keep="last", **options)

    found: list[sp.AttackResult] = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            found.append(draw(seed))
    same(found[0], found[1])
    assert not torch.equal(found[0].adversarial, found[2].adversarial)


def test_restarts_and_sequences(mlp: nn.Module, samples: Samples) -> None:
    model, threat = sp.Model(mlp), sp.Linf(0.12)
    once = sp.attack(model, *samples, External(noisy), threat, keep="margin")
    often = sp.attack(model, *samples, A.Restarts(External(noisy), 5), threat, keep="margin")
    right = ~once.having("already_wrong")
    assert (often.margin[right] > once.margin[right]).float().mean() > 0.5, "other random numbers in every run"
    joint = sp.attack(model, *samples, A.Sequence(External(noisy), A.BIM(steps=4)), threat)
    alone = sp.attack(model, *samples, A.BIM(steps=4), threat)
    assert (joint.success >= alone.success).all()


def test_resume(mlp: nn.Module, samples: Samples) -> None:
    calls = iter(range(1000))

    def interrupted(net: Net, x: Tensor, y: Tensor) -> Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return signed(net, x, y)

    with pytest.raises(sp.Interrupted) as stopped:
        sp.attack(sp.Model(mlp), *samples, External(interrupted, title="signed"), sp.Linf(0.08), batch_size=5)
    done = stopped.value.result
    assert 0 < len(done) < 24
    attack = External(signed, title="signed")
    resumed = sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(0.08), batch_size=5, resume=done)
    same(sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(0.08), batch_size=5), resumed, exact=False)


# Gradients


@pytest.mark.parametrize("rows", [24, 60])
def test_gradients_are_the_networks_own(rows: int, mlp: nn.Module, samples: Samples) -> None:
    """Of any number of rows, in pieces too, once and again, and also where several samples own them."""
    net, (x, y) = copy.deepcopy(mlp).double(), samples
    y = net(x.double()).argmax(1)
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def pull(inner: Net, x: Tensor, y: Tensor) -> Tensor:
        points = x.repeat(3, 1, 1, 1)[:rows].requires_grad_()
        logits = inner(points)
        (first,) = torch.autograd.grad(logits[:, 3].sum(), points, retain_graph=True)
        (second,) = torch.autograd.grad(cross_entropy(logits, y.repeat(3)[:rows]), points)
        asked.append((points.detach(), first, second))
        return x

    counting = Counting(net)
    result = sp.attack(sp.Model(counting), x.double(), y, External(pull), sp.Linf(0.1), batch_size=24)
    ((points, first, second),) = asked
    leaf = points.requires_grad_()
    torch.testing.assert_close(first, torch.autograd.grad(net(leaf)[:, 3].sum(), leaf)[0])
    torch.testing.assert_close(second, torch.autograd.grad(cross_entropy(net(leaf), y.repeat(3)[:rows]), leaf)[0])
    assert int(result.queries.backward.sum()) == counting.backward_rows == 2 * rows


def test_vanished_gradients_are_told_from_those_that_nobody_wanted(mlp: nn.Module, samples: Samples) -> None:
    def hinge(net: Net, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        torch.relu(net(x).amax(1) - 1e6).sum().backward()  # never active: a zero cotangent
        return x.detach()

    assert not sp.attack(sp.Model(mlp), *samples, External(hinge), sp.Linf(0.1)).zero_gradients.any()
    flat = linear(torch.zeros(3, 64), torch.tensor([3.0, 2.0, 1.0]))
    y = torch.zeros(24, dtype=torch.int64)
    assert (sp.attack(sp.Model(flat), samples[0], y, External(signed), sp.Linf(0.1)).zero_gradients > 0).all()


def test_random_models(mlp: nn.Module, samples: Samples) -> None:
    """Several draws for each forward and backward pass, as for our own attacks."""
    model = sp.Defended(sp.Model(nn.Sequential(Jitter(), mlp)), [], draws=3)
    result = sp.attack(model, *samples, External(signed), sp.Linf(0.1), budget=sp.Budget(passes=40))
    right = ~result.having("already_wrong")
    assert (result.queries.forward[right] % 3 == 0).all()
    assert (result.queries.total <= 40).all()
    assert result.success.sum() > 3


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


def test_not_in_training_loops(mlp: nn.Module, samples: Samples) -> None:
    with pytest.raises(CapabilityError, match=r"sp\.attack"):
        sp.perturb(mlp, *samples, External(signed), sp.Linf(0.1))


# Recognition


def test_settings_say_what_was_run() -> None:
    attack = External(partial(signed, steps=7, size=0.5))
    settings = json.loads(json.dumps(attack.settings()))
    assert settings["name"] == "External"
    assert settings["attack"].endswith("signed(steps=7, size=0.5)")
    assert "0x" not in repr(attack)
    assert External(signed, title="BIM").settings()["attack"] == "BIM"
    assert External(signed) == External(signed) != External(noisy)


@pytest.mark.parametrize("what", [3, None, "pgd", lambda: 0, lambda x, y: x, lambda net, x, y, norm: x])
def test_what_is_no_attack(what: object) -> None:
    with pytest.raises(InputError):
        External(what)


class Fake:
    """Stands for an attack of torchattacks, which holds its network."""

    __module__ = "torchattacks.attacks.fake"

    def __init__(self, net: nn.Module, size: float = 0.1) -> None:
        self.net, self.size, self.targeted = net, size, False
        assert next(net.parameters()).device.type == "cpu"
        assert not net.training

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        if self.size < 0:
            raise ValueError("Targeted mode is not supported.")
        self.targeted = True

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return signed(self.net, x, y, size=self.size, targeted=self.targeted)


def test_torchattacks(mlp: nn.Module, samples: Samples) -> None:
    model = sp.Model(mlp)
    for made in (Fake, partial(Fake, size=0.1), lambda net: Fake(net, 0.1)):
        result = sp.attack(model, *samples, External(made), sp.Linf(0.2))
        assert result.success.sum() > 15
        result = sp.attack(model, *samples, External(made), sp.Linf(0.3), sp.Targeted("next"))
        assert result.success.sum() > 10
    with pytest.raises(InputError, match="lambda net"):
        External(Fake(nn.Linear(2, 2).eval()))
    with pytest.raises(CapabilityError, match="Targeted mode is not supported"):
        sp.attack(model, *samples, External(lambda net: Fake(net, -0.1)), sp.Linf(0.3), sp.Targeted("next"))
    with pytest.raises(CapabilityError, match=r"\[0, 1\]"):
        sp.attack(sp.Model(mlp, bounds=(-1, 1)), *samples, External(Fake), sp.L2(0.3))


class FixedEpsilonAttack:
    """Stands for Foolbox's."""

    __module__ = "foolbox.attacks.base"

    def run(self, model: object, x: Tensor, criterion: tuple[str, Tensor], *, epsilon: float) -> Tensor:
        kind, y = criterion
        assert model.bounds == (0, 1)
        return signed(model.net, x, y, size=epsilon / 4, targeted=kind == "towards")

    def __call__(self, model: object, x: Tensor, criterion: tuple[str, Tensor], *, epsilons: float) -> tuple[Tensor, ...]:
        found = self.run(model, x, criterion, epsilon=epsilons)
        return found * torch.nan, found, found.flatten(1)[:, 0] > 0


class Repeated:
    __module__ = "foolbox.attacks.base"

    def __init__(self, attack: object) -> None:
        self.attack = attack

    def __call__(self, *told: object, **more: object) -> tuple[Tensor, ...]:
        return self.attack(*told, **more)


class Minimal:
    __module__ = "foolbox.attacks.minimal"

    def run(self, model: object, x: Tensor, criterion: tuple[str, Tensor]) -> Tensor:
        return signed(model.net, x, criterion[1], size=0.01, steps=30)


def test_foolbox(mlp: nn.Module, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("foolbox")
    fake.PyTorchModel = lambda net, bounds, device: types.SimpleNamespace(net=net, bounds=bounds)
    fake.criteria = types.SimpleNamespace(
        Misclassification=lambda y: ("from", y), TargetedMisclassification=lambda y: ("towards", y)
    )
    monkeypatch.setitem(sys.modules, "foolbox", fake)
    model, ours = sp.Model(mlp), A.BIM(steps=4)
    for attack in (External(FixedEpsilonAttack()), External(Repeated(FixedEpsilonAttack()))):
        for goal in (None, sp.Targeted("next")):
            theirs = sp.attack(model, *samples, attack, sp.Linf(0.2), goal)
            assert torch.equal(theirs.success, sp.attack(model, *samples, ours, sp.Linf(0.2), goal).success)
        with pytest.raises(CapabilityError, match="needs a ball"):
            sp.attack(model, *samples, attack, sp.Minimize("linf"))
    assert sp.attack(model, *samples, External(Minimal()), sp.Minimize("linf")).success.sum() > 20
    with pytest.raises(CapabilityError, match="bounds"):
        sp.attack(sp.Model(mlp, bounds=None), *samples, External(Minimal()), sp.Minimize("linf"))


def _libraries() -> list[tuple[str, External, sp.threats.Threat]]:
    """Attacks of those that are installed and can be imported."""
    found = []
    try:
        import foolbox

        found += [
            ("Foolbox PGD", External(foolbox.attacks.LinfPGD(rel_stepsize=0.3, steps=8)), sp.Linf(0.3)),
            ("Foolbox repeated", External(foolbox.attacks.LinfPGD(rel_stepsize=0.3, steps=8).repeat(2)), sp.Linf(0.3)),
            ("Foolbox DDN", External(foolbox.attacks.DDNAttack(steps=40)), sp.Minimize("l2")),
        ]
    except ImportError:
        pass
    try:
        import torchattacks

        found.append(("torchattacks PGD", External(partial(torchattacks.PGD, eps=0.3, alpha=0.1, steps=8)), sp.Linf(0.3)))
        found.append(("torchattacks CW", External(lambda net: torchattacks.CW(net, lr=0.1, steps=30)), sp.Minimize("l2")))
    except ImportError:
        pass
    try:
        from adv_lib import attacks

        found.append(("adv_lib APGD", External(partial(attacks.apgd, norm=float("inf"), n_iter=8)), sp.Linf(0.3)))
        found.append(("adv_lib DDN", External(partial(attacks.ddn, steps=40)), sp.Minimize("l2")))
    except ImportError:
        pass
    return found


def test_the_libraries_themselves(cnn: nn.Module, samples: Samples) -> None:
    found = _libraries()
    if not found:
        pytest.skip("neither Foolbox nor torchattacks nor adversarial-library is installed")
    x, y = samples[0][:10], samples[1][:10]
    for name, attack, threat in found:
        for goal in (None, sp.Targeted("next")):
            counting = Counting(cnn)
            result = sp.attack(sp.Model(counting), x, y, attack, threat, goal)
            assert result.success.float().mean() > (0.75 if goal is None else 0.3), name
            queries = result.queries
            assert counting.forward_rows == int(queries.forward.sum() + queries.verify.sum()) + queries.probe, name
            assert counting.backward_rows == int(queries.backward.sum()), name
