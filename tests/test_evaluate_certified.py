"""Bounds and proofs within an evaluation: what they break, what they prove, and that both can't be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Counting, train
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks import BoundGuided
from saddlepoint.errors import CapabilityError, DataError, InputError, ModelError, SoundnessError
from saddlepoint.evaluate import cascade
from saddlepoint.evaluate.cascade import Plan, guided, plans, unbounded
from saddlepoint.evaluate.evaluation import FAILED, WRONG, Evaluation
from saddlepoint.verify import certify

COUNT, EPS = 30, 0.03
BUDGET = sp.Budget(seconds=20)
Samples = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def relus(digits: Samples) -> sp.Model:
    """A network so small that everything is decided."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sp.Model(train(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)), *digits))


@pytest.fixture(scope="module")
def few() -> Samples:
    split = sp.data.load("digits").test.take(COUNT)
    y = split.y.clone()
    y[::10] = (y[::10] + 3) % 10
    return split.x, y


@pytest.fixture(scope="module")
def plain(relus: sp.Model, few: Samples) -> Evaluation:
    return sp.evaluate(relus, *few, sp.Linf(EPS), "quick")


@pytest.fixture(scope="module")
def found(relus: sp.Model, few: Samples) -> Evaluation:
    return sp.evaluate(relus, *few, sp.Linf(EPS), "quick", certify=BUDGET)


class Wall(nn.Module):
    """Class 0, but for a corner of the box around 0.5, where a ReLU wakes up; it takes as many features as it is given."""

    def __init__(self, features: int = 64, eps: float = EPS) -> None:
        super().__init__()
        self.features, self.sum, self.out = nn.Flatten(), nn.Linear(features, 1), nn.Linear(1, 2)
        with torch.no_grad():
            self.sum.weight.copy_(torch.tensor([1.0, -1.0]).repeat(features // 2)[None])
            self.sum.bias.fill_(-0.9 * eps * features)
            self.out.weight.copy_(torch.tensor([[0.0], [100.0]]))
            self.out.bias.copy_(torch.tensor([2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.sum(self.features(x))))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] + 0.1 * torch.randn(len(x), 10)


class Single(nn.Module):
    """One number for each input on the way, without a dimension of features."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1) - 0.5
        return torch.stack([mean, -mean], 1)


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * x.flatten(1).sort(1).values[:, :10]


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations that are short: the cheap attacks, and no look at signs of masking."""
    monkeypatch.setattr(cascade, "plans", lambda *given: plans(given[0], "quick", given[2]))
    monkeypatch.setattr(cascade._Cascade, "signs", lambda run: [])


def walled() -> tuple[sp.Model, Tensor, Tensor]:
    return sp.Model(Wall()), torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)


# The ladder that bounds guide


@pytest.mark.usefixtures("trusting")
def test_the_guided_ladder_breaks_what_no_gradient_does() -> None:
    model, x, y = walled()
    evaluation = sp.evaluate(model, x, y, sp.Linf(EPS))
    (stage,) = (stage for stage in evaluation.stages if stage.name == "guided")
    assert stage.heavy
    assert len(stage.broke) == 4
    assert evaluation.robust_accuracy == 0
    quick = sp.evaluate(model, x, y, sp.Linf(EPS), "quick")
    assert quick.robust_accuracy == 1
    blind = sp.evaluate(sp.Model(Wall(), access=sp.Access.SCORES), x, y, sp.Linf(EPS), "quick")
    assert "guided" not in [stage.name for stage in (*quick.stages, *blind.stages)]


def test_who_is_guided(relus: sp.Model, few: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = guided(relus, sp.Norm.LINF, "standard")
    assert plan.share is not None
    assert plan.share < 1
    assert guided(relus, sp.Norm.L2, "thorough")[0].share == 1
    assert guided(relus, sp.Norm.LINF, "quick") == guided(relus, sp.Norm.L0, "standard") == ()
    assert guided(sp.Model(relus.net, access=sp.Access.GRADIENTS), sp.Norm.LINF, "standard") == ()
    assert plan.name not in [one.name for one in plans(sp.Norm.LINF, "standard", relus.access)]
    assert unbounded(plan, few[0][:1]) == ""
    (unread,) = guided(sp.Model(Sorting()), sp.Norm.LINF, "standard")
    assert "sort" in unbounded(unread, few[0][:1])
    (vector,) = guided(sp.Model(Single()), sp.Norm.LINF, "standard")
    unbounded(vector, few[0][:1])  # whatever it says, it raises nothing
    noisy = Plan("guided", "", BoundGuided(sp.Model(Noisy())))
    with pytest.warns(sp.SaddlepointWarning, match="random"):
        why = unbounded(noisy, few[0][:1])
    assert "random" in why
    # 12 neurons that see 64 features, these again as a vector, and themselves
    monkeypatch.setattr(cascade, "_READ", 12 * (64 + 64 + 12))
    assert unbounded(plan, few[0][:1]) == ""
    monkeypatch.setattr(cascade, "_READ", 12 * (64 + 64 + 12) - 1)
    assert "coefficients a sample" in unbounded(plan, few[0][:1])


@pytest.mark.usefixtures("trusting")
def test_what_is_left_out_is_noted_where_effort_is_thorough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = walled()
    monkeypatch.setattr(cascade, "_READ", 1)
    for effort, noted in (("standard", False), ("thorough", True)):
        evaluation = sp.evaluate(model, x, y, sp.Linf(EPS), effort)  # type: ignore[call-overload]
        assert evaluation.robust_accuracy == 1
        assert any("guided: left out" in note for note in evaluation.notes) == noted


def test_passes_are_counted(few: Samples, relus: sp.Model) -> None:
    """Also the one that reads the network."""
    counting = Counting(relus.net)
    model = sp.Model(counting)
    evaluation = sp.evaluate(model, *few, sp.Linf(EPS))
    assert "guided" in [stage.name for stage in evaluation.stages]
    spent = evaluation.queries
    assert sum(counting.calls) == model.queries.forward
    assert abs(model.queries.forward - int(spent.forward.sum() + spent.verify.sum()) - spent.probe) <= 1


# Proofs


def test_everything_is_decided(found: Evaluation, plain: Evaluation, relus: sp.Model, few: Samples) -> None:
    assert found.complete
    assert torch.equal(found.certified, found.stands)
    assert 0 < found.interval.certified == found.interval.attacked < found.clean_accuracy
    assert 0 < found.interval.low < found.interval.certified
    apart = certify(relus, *few, sp.Linf(EPS), BUDGET)
    assert torch.equal(apart.robust, found.certified)
    assert not found.undecided.any()
    assert f"{found.interval.certified:.2%} at least" in found.summary()
    assert "0 undecided" in found.summary()
    assert "no proof was looked for" in plain.summary()
    assert found.to_dict()["proofs"]["certified"] == int(found.stands.sum())
    assert plain.to_dict()["proofs"] is None
    json.dumps(found.to_dict())
    part = found.group(torch.arange(5))
    assert torch.equal(part.certified, found.certified[:5])
    generator = torch.Generator().manual_seed(0)  # nothing that is proved falls to noise
    noise = EPS * (2 * torch.randint(0, 2, (200, *found.x.shape), generator=generator) - 1)
    for one in found.certified.nonzero()[:, 0].tolist():
        assert (relus.predict((found.x[one] + noise[:, one]).clamp(0, 1)) == found.y[one]).all()


@pytest.mark.usefixtures("trusting")
def test_a_counterexample_is_a_stage_of_its_own() -> None:
    model, x, y = walled()
    evaluation = sp.evaluate(model, x, y, sp.Linf(EPS), "quick", certify=BUDGET)
    stage = evaluation.stages[-1]
    assert stage.name == "verifier"
    assert len(stage.broke) == 4
    assert evaluation.robust_accuracy == evaluation.interval.certified == 0
    assert (model.predict(evaluation.adversarial) == 1).all()
    assert (sp.Linf(EPS).distance(evaluation.adversarial, x) <= EPS).all()
    assert "0.00% at least; 0 undecided" in evaluation.summary()
    both = sp.evaluate(model, x, y, [sp.Linf(EPS), sp.L2(0.01)], "quick", certify=BUDGET)
    assert both.parts[1].interval.certified == 1
    assert both.interval.certified == 0


def test_what_time_leaves_is_undecided(relus: sp.Model, few: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = sp.evaluate(relus, *few, sp.Linf(EPS), "quick", certify=sp.Budget(seconds=1e-9))
    assert evaluation.interval.certified == evaluation.interval.low == 0
    assert torch.equal(evaluation.undecided, evaluation.stands)
    assert "0.00% at least; " in evaluation.summary()
    real = cascade.verify

    def stopped(*given: Any, **settings: Any) -> Any:
        done = real(*given, **settings)
        return replace(done, complete=False) if len(done) else done

    monkeypatch.setattr(cascade, "verify", stopped)
    assert not sp.evaluate(relus, *few, sp.Linf(EPS), "quick", certify=BUDGET).complete


def test_proofs_made_apart_are_joined(plain: Evaluation, found: Evaluation, relus: sp.Model, few: Samples) -> None:
    x, y = few
    proofs = certify(relus, x, y, sp.Linf(EPS), BUDGET)
    joined = plain.with_proofs(proofs)
    assert torch.equal(joined.certified, found.certified)
    assert joined.proving == pytest.approx(float(proofs.seconds.sum()))
    assert joined.with_proofs(proofs).interval == joined.interval
    assert not plain.certified.any()
    for other in (
        certify(relus, x, y, sp.Linf(EPS / 2), BUDGET),
        replace(proofs, y=y.roll(1)),
        replace(proofs, x=x.flip(0)),
        replace(proofs, x=x[:3], y=y[:3], proofs=proofs.proofs[:3]),
    ):
        with pytest.raises(InputError, match="these are proofs"):
            plain.with_proofs(other)
    # what an attack has broken or the model gets wrong can't be proved; what isn't finite isn't counted
    one = proofs.robust.nonzero()[0]
    for code in (0, WRONG):
        with pytest.raises(SoundnessError, match=rf"samples {int(one)} have a proof"):
            replace(plain, broken_by=plain.broken_by.index_fill(0, one, code)).with_proofs(proofs)
    fails = replace(plain, broken_by=plain.broken_by.index_fill(0, one, FAILED)).with_proofs(proofs)
    assert int(fails.certified.sum()) == int(joined.certified.sum()) - 1
    model, x, y = walled()
    noted = sp.evaluate(model, x, y, sp.Linf(EPS), "quick").with_proofs(certify(model, x, y, sp.Linf(EPS), BUDGET))
    assert "counterexamples for 4 samples that stand" in noted.notes[-1]


def test_a_proof_that_is_wrong_is_found_out(relus: sp.Model, few: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs come before the smallest perturbations, which contradict them."""
    real = cascade.verify

    def lying(model: Any, x: Tensor, y: Tensor, *given: Any, **settings: Any) -> Any:
        done = real(model, x, y, *given, **settings)
        return replace(done, proofs=tuple(replace(proof, verdict="robust") for proof in done.proofs))

    monkeypatch.setattr(cascade, "verify", lying)
    monkeypatch.setattr(cascade, "plans", lambda *given: plans(*given)[:1])
    monkeypatch.setattr(cascade, "finishing", lambda *given: ())
    monkeypatch.setattr(cascade, "escalation", lambda *given: ())
    monkeypatch.setattr(cascade.Sprint, "iterations", 0)
    with pytest.raises(SoundnessError, match="have a proof"):
        sp.evaluate(relus, *few, sp.Linf(0.2), "quick", certify=BUDGET, curve=True)


def test_what_cannot_be_certified_is_refused_before_any_attack(relus: sp.Model, few: Samples) -> None:
    threat = sp.Linf(EPS)

    def refused(error: type[Exception], match: str, model: sp.Model = relus, **settings: Any) -> None:
        before = model.queries.forward
        with pytest.raises(error, match=match):
            sp.evaluate(model, *few, **{"threat": threat, "certify": BUDGET} | settings)
        assert model.queries.forward - before < 100

    for bad in (20, sp.Budget(passes=3), sp.Budget(), sp.Budget(seconds=1, queries=2)):
        refused(InputError, r"Budget\(seconds=", certify=bad)
    refused(CapabilityError, "l-infinity, l2 and l1", threat=sp.L0(3))
    refused(CapabilityError, "parameters", model=sp.Model(relus.net, access=sp.Access.GRADIENTS))
    refused(ModelError, "sort", model=sp.Model(Sorting()))
    with pytest.warns(sp.SaddlepointWarning, match="random"):
        refused(CapabilityError, "random", model=sp.Model(Noisy()))


def test_a_campaign_keeps_proofs(
    relus: sp.Model, few: Samples, found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, threat = sp.Model(relus.net), tmp_path / "campaign", sp.Linf(EPS)
    sp.evaluate(model, *few, threat, "quick", campaign=folder)  # proofs may come later
    first = sp.evaluate(model, *few, threat, "quick", campaign=folder, certify=BUDGET)
    assert torch.equal(first.certified, found.certified)
    kept = sorted((folder / "proofs-20s").glob("[0-9]*.json"))
    assert len(kept) == int(found.stands.sum() + sum(len(stage.broke) for stage in found.stages if stage.name == "verifier"))
    kept[0].unlink()  # as if it had been stopped before
    proved = []

    def watched(*given: Any, **settings: Any) -> Any:
        proved.append(given)
        return real(*given, **settings)

    from saddlepoint.verify import certify as module  # the function; its module has the same name

    real = module.__globals__["_through"]
    monkeypatch.setitem(module.__globals__, "_through", watched)
    again = sp.evaluate(sp.Model(relus.net), *few, threat, "quick", campaign=folder, certify=BUDGET)
    assert [len(given[4]) for given in proved] == [1]  # the samples that are left
    assert torch.equal(again.certified, found.certified)
    assert json.loads((folder / "documents" / "evaluation.json").read_text())["proofs"]["certified"] == int(found.stands.sum())
    kept[0].write_text("{")
    with pytest.raises(DataError, match="damaged"):
        sp.evaluate(sp.Model(relus.net), *few, threat, "quick", campaign=folder, certify=BUDGET)


def test_the_command_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saddlepoint.cli import main

    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    asked = ["evaluate", "--model", "net.py:net", "--eps", "0.01", "--samples", "20", "--out", "out", "--certify"]
    assert main([*asked, "20", "--effort", "quick", "--json", "figures.json"]) == 0
    assert "at least" in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["evaluations"]
    assert figures["proofs"]["certified"] + figures["proofs"]["undecided"] == round(20 * figures["robust_accuracy"])
    (page,) = (path.read_text() for path in (tmp_path / "out").glob("*.html"))
    assert f"{figures['proofs']['certified']} proven" in page
    assert main([*asked, "20"]) == 2
    assert "--effort" in capsys.readouterr().err
    assert main([*asked, "0", "--effort", "quick"]) == 2
    assert main([*asked, "20", "--effort", "quick", "--dry-run"]) == 0
    assert "20 s more for each" in capsys.readouterr().out
