"""AutoAttack: the authors' parts, settings and order, one after another, and what that costs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from contract_support import Counting, Failing, linear, same
from test_linear_models import DUAL, direction, lead
from test_linear_models import problem as linear_problem
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.autoattack import AutoAttack
from saddlepoint.cli import inputs
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError, UnknownNameError

A = sp.attacks
Samples = tuple[Tensor, Tensor]
SHORT = {"steps": 3, "queries": 6}
THREATS = {"linf": sp.Linf(0.05), "l2": sp.L2(0.3), "l1": sp.L1(1.5)}  # break some of the digits, not all
TINY = {"linf": sp.Linf(1e-3), "l2": sp.L2(1e-3), "l1": sp.L1(1e-3)}
VERSIONS = ("standard", "plus", "rand")


def apgd(loss: str, runs: int, **settings: object) -> Attack:
    return A.Restarts(A.APGD(loss=loss, **settings), runs)


CE, DLR = "cross_entropy", "dlr"
FAB_T, SQUARE = A.FAB(targets=9, search=0), A.Square(steps=5000, p_init=0.8)
ONE_BALL = {"multi_eps": False}  # of set_version() only "standard" sets use_largereps, which l1 alone looks at
PUBLISHED = {  # github.com/fra31/auto-attack, autoattack.py, set_version(), at a39220048b3c
    ("standard", "linf"): (apgd(CE, 1), A.APGDT(targets=9), FAB_T, SQUARE),
    ("standard", "l2"): (apgd(CE, 1), A.APGDT(targets=9), FAB_T, SQUARE),
    ("standard", "l1"): (apgd(CE, 5), A.APGDT(targets=5), FAB_T, SQUARE),
    **{
        ("plus", norm): (
            apgd(CE, 5, **ONE_BALL),
            apgd(DLR, 5, **ONE_BALL),
            A.FAB(restarts=5, search=0),
            SQUARE,
            A.APGDT(targets=9, **ONE_BALL),
            FAB_T,
        )
        for norm in ("linf", "l2", "l1")
    },
    **{("rand", norm): (apgd(CE, 1, **ONE_BALL), apgd(DLR, 1, **ONE_BALL)) for norm in ("linf", "l2", "l1")},
}


@pytest.mark.parametrize(("version", "norm"), PUBLISHED)
def test_parts_settings_and_order(version: str, norm: str) -> None:
    assert AutoAttack(version=version).stages(norm).attacks == PUBLISHED[version, norm]


@pytest.mark.parametrize("norm", THREATS)
def test_it_is_that_sequence(norm: str, model: sp.Model, samples: Samples) -> None:
    """Point by point and pass by pass."""
    parts = A.Sequence(
        A.Restarts(A.APGD(steps=3), 5 if norm == "l1" else 1),
        A.APGDT(steps=3, targets=5 if norm == "l1" else 9),
        A.FAB(steps=3, targets=9, search=0),
        A.Square(steps=6, p_init=0.8),
    )
    runs = [sp.attack(model, *samples, attack, THREATS[norm], seed=2) for attack in (AutoAttack(**SHORT), parts)]
    same(*runs)
    for name in ("forward", "backward", "verify"):
        assert torch.equal(*(getattr(run.queries, name) for run in runs))
    assert {"fooled", "survived"} < set(runs[0].status)


def survivor(steps: int, queries: int, targets: int = 9, runs: int = 1) -> tuple[int, int]:
    """Passes of "standard": the clean prediction, then each part's steps and the looks at where its runs ended."""
    forward = 1 + runs * (steps + 1) + (targets * (steps + 1) + 1) + (2 * targets * steps + 1) + (queries + 1)
    return forward, runs * steps + 2 * targets * steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cost_of_survivors(norm: str, mlp: nn.Module, samples: Samples) -> None:
    result = sp.attack(sp.Model(mlp), *samples, AutoAttack(**SHORT), TINY[norm])
    rest = result.having("survived")
    assert rest.sum() > 10
    forward, backward = survivor(**SHORT)
    assert (result.queries.forward[rest] == forward).all()
    assert (result.queries.backward[rest] == backward).all()
    stated = AutoAttack.__doc__ or ""
    assert "{:,} forward and {:,} backward".format(*survivor(100, 5000)) in stated


def test_few_classes(digits: Samples) -> None:
    """As many targets as there are other classes, and what the losses make of one or two of them."""
    for classes in (2, 3, 5):
        x, y = (part[digits[1] < classes][:20] for part in digits)
        centres = torch.stack([digits[0][digits[1] == c].mean(0).flatten() for c in range(classes)])
        net = linear(centres, -(centres**2).sum(1) / 2)
        result = sp.attack(sp.Model(net), x, y, AutoAttack(**SHORT), TINY["linf"])
        rest = result.having("survived")
        assert rest.sum() > 10
        assert result.queries.backward[rest].unique().tolist() == [survivor(**SHORT, targets=classes - 1)[1]]


@pytest.mark.parametrize("norm", THREATS)
def test_closed_form(norm: str) -> None:
    """On a linear model with the box inactive the smallest perturbation is known."""
    weight, bias, x, y, _ = linear_problem(3)
    distance = lead(weight, bias, x, y) / direction(weight, y).norm(p=DUAL[sp.Norm(norm)], dim=1)
    model, ball = sp.Model(linear(weight, bias), bounds=None), type(THREATS[norm])
    attack = AutoAttack(steps=25, queries=6)
    assert (sp.attack(model, x, y, attack, ball(1.03 * distance)).status == "fooled").all()
    assert (sp.attack(model, x, y, attack, ball(0.99 * distance)).status == "survived").all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("norm", THREATS)
def test_counts_batches_and_budgets(version: str, norm: str, mlp: nn.Module, samples: Samples) -> None:
    """The contract tests take the standard version; these are the others too."""
    x, y = samples[0][:8], samples[1][:8]
    attack, counting = AutoAttack(version=version, steps=2, queries=3), Counting(mlp)
    whole = sp.attack(sp.Model(counting), x, y, attack, THREATS[norm])
    assert counting.forward_rows == int(whole.queries.forward.sum() + whole.queries.verify.sum()) + whole.queries.probe
    assert counting.backward_rows == int(whole.queries.backward.sum())
    parted = sp.attack(sp.Model(mlp), x, y, attack, THREATS[norm], batch_size=3)
    assert parted.status.tolist() == whole.status.tolist()
    torch.testing.assert_close(parted.distance, whole.distance, rtol=1e-4, atol=1e-4)
    short = replace(attack, steps=8 if version == "rand" else 1)  # the budgets end it at its beginning and later on
    for limit in (12, 34):
        cut = sp.attack(sp.Model(mlp), x, y, short, TINY[norm], budget=sp.Budget(passes=limit))
        assert limit - sum(short.cost(10)) < cut.queries.total.max() <= limit  # what pays for no step is left


def test_resume(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][:12].double(), samples[1][:12]
    net, arguments = copy.deepcopy(mlp).double(), (x, y, AutoAttack(**SHORT), THREATS["linf"])
    with pytest.raises(sp.Interrupted) as stopped:
        sp.attack(sp.Model(Failing(net, KeyboardInterrupt(), after=60)), *arguments, batch_size=4)
    done = stopped.value.result
    assert 0 < len(done) < len(x)
    lasting = sp.Model(Failing(net, KeyboardInterrupt(), after=-1))
    whole = sp.attack(lasting, *arguments, batch_size=4)
    resumed = sp.attack(lasting, *arguments, batch_size=4, resume=done)
    same(whole, resumed, exact=False)
    assert torch.equal(whole.queries.forward, resumed.queries.forward)


class Noisy(nn.Module):
    """The network behind normal noise on its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.02 * torch.randn_like(x))


def test_rand_averages_over_the_draws_of_the_model(mlp: nn.Module, samples: Samples) -> None:
    counting = Counting(Noisy(mlp))
    model = sp.Defended(sp.Model(counting), [], draws=20)
    result = sp.attack(model, *samples, AutoAttack(version="rand", steps=4), THREATS["linf"])
    rest = result.having("survived")
    assert {"fooled", "survived"} < set(result.status)
    assert (result.queries.backward[rest] == 20 * 2 * 4).all()
    assert (result.queries.forward[rest] == 20 * (1 + 2 * 5)).all()
    assert counting.backward_rows == int(result.queries.backward.sum())


def test_names_and_errors() -> None:
    assert A.get("auto-attack") is AutoAttack
    assert inputs.attack("autoattack:version=plus,steps=3") == AutoAttack(version="plus", steps=3)
    assert AutoAttack(version="rand").settings() == {"name": "AutoAttack", "version": "rand", "steps": 100, "queries": 5000}
    for version in VERSIONS:
        assert eval(repr(AutoAttack(version=version))) == AutoAttack(version=version)  # the repr is Python, that is tested
    with pytest.raises(UnknownNameError, match="standard"):
        AutoAttack(version="fast")  # type: ignore[arg-type]
    for name in SHORT:
        with pytest.raises(InputError, match=name):
            AutoAttack(**{name: 0})
    with pytest.raises(sp.CapabilityError, match="l0"):
        sp.attack(sp.Model(nn.Linear(4, 3)), torch.rand(2, 4), torch.tensor([0, 1]), AutoAttack(), sp.L0(2))
