"""`certify`: verdicts, what each stage did, folders that go on, and everything that can be wrong with model or samples."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import CapabilityError, DataError, InputError, ModelError, SoundnessError
from saddlepoint.verify import Certification, Proof

module = sys.modules["saddlepoint.verify.certify"]  # the package has a function of this name
TIME = sp.Budget(seconds=20)


def net(seed: int = 0, inputs: int = 4, hidden: int = 10) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        made[-1].bias -= made(torch.rand(200, inputs, generator=generator)).mean(0)  # type: ignore[operator]
    return made


@functools.cache
def setting() -> tuple[sp.Model, Tensor, Tensor]:
    """A network, and eight samples of which the first and the fourth are wrong."""
    model = sp.Model(net(), bounds=(0, 1))
    points = torch.rand(200, 4, generator=torch.Generator().manual_seed(1))
    best = model.logits(points).topk(2, 1).values
    x = points[(best[:, 0] - best[:, 1]).argsort()[[190, 30, 80, 100, 120, 140, 160, 199]]]  # from hard to easy
    y = model.predict(x)
    y[[0, 3]] = (y[[0, 3]] + 1) % 3
    return model, x, y


@functools.cache
def certified() -> Certification:
    model, x, y = setting()
    return sp.verify.certify(model, x, y, sp.Linf(0.04), TIME)


def same(one: Certification, other: Certification) -> bool:
    facts = [[(p.verdict, p.stage, p.bound, p.parts, p.reason) for p in found.proofs] for found in (one, other)]
    return facts[0] == facts[1] and torch.equal(one.counterexamples, other.counterexamples)


# ---- verdicts and figures


def test_verdicts_and_figures() -> None:
    model, x, y = setting()
    found = certified()
    assert found.complete
    assert len(found) == 8
    assert bool((found.robust.int() + found.falsified.int() + found.unknown.int() == 1).all())
    assert found.right.tolist() == [False, True, True, False, True, True, True, True]
    assert 0 < int(found.robust.sum()) < 6
    assert not bool(found.unknown.any())
    assert "attack" in found.stages()
    points = found.counterexamples
    assert torch.equal(points[found.robust], x[found.robust])
    assert bool((model.predict(points)[found.falsified] != y[found.falsified]).all())
    assert bool(sp.Linf(0.04).around(x, (0, 1)).contains(points).all())
    assert found.certified_accuracy == found.attacked_accuracy == float(found.robust.double().mean())
    assert bool((found.bound[found.robust] > 0).all())
    assert bool((found.bound[found.falsified] <= 0).all())
    assert found.seconds.shape == (8,)
    assert bool((found.seconds >= 0).all())


def test_stages_summary_and_figures_for_json() -> None:
    found = certified()
    stages = found.stages()
    assert stages["prediction"] == {"falsified": 2}
    assert sum(count for verdicts in stages.values() for count in verdicts.values()) == 8
    order = [module.STAGES.index(stage) for stage in stages]
    assert order == sorted(order)
    text = found.summary()
    assert "8 samples" in text
    assert "clean accuracy   75.00%" in text
    assert f"between {found.certified_accuracy:.2%} (proved)" in text
    assert "interrupted" not in text
    assert "proved robust" in repr(found)
    figures = found.to_dict()
    json.dumps(figures, allow_nan=False)
    assert figures["samples"] == len(figures["proofs"]) == 8
    assert figures["clean_accuracy"] == 0.75
    assert figures["stages"] == stages
    assert figures["threat"]["eps"] == 0.04
    assert {"verdict", "stage", "bound", "parts", "seconds", "reason", "rigorous"} == set(figures["proofs"][0])


def test_no_samples_at_all() -> None:
    model, x, y = setting()
    found = sp.verify.certify(model, x[:0], y[:0], sp.Linf(0.1))
    assert len(found) == 0
    assert math.isnan(found.certified_accuracy)
    assert "0 samples" in found.summary()
    assert "nan" not in found.summary() + repr(found)
    assert found.to_dict()["proofs"] == []
    assert found.to_dict()["certified_accuracy"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_eps_zero_is_the_prediction_itself() -> None:
    model, x, y = setting()
    found = sp.verify.certify(model, x, y, sp.Linf(0.0), TIME)
    assert torch.equal(found.robust, found.right)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_balls(norm: str) -> None:
    model, x, y = setting()
    threat = sp.L2(0.04) if norm == "l2" else sp.L1(0.04)
    found = sp.verify.certify(model, x, y, threat, sp.Budget(seconds=3))
    assert bool(threat.around(x, (0, 1)).contains(found.counterexamples).all())
    assert bool((model.predict(found.counterexamples)[found.falsified] != y[found.falsified]).all())
    assert bool((found.robust >= certified().robust).all())  # inside the box of the same size
    order = 2 if norm == "l2" else 1
    delta = torch.randn(300, 4, generator=torch.Generator().manual_seed(3))
    delta = 0.04 * delta / delta.norm(p=order, dim=1, keepdim=True)
    for place in found.robust.nonzero()[:, 0].tolist():
        assert bool((model.predict((x[place] + delta).clamp(0, 1)) == y[place]).all())


def test_masks_and_grids() -> None:
    model, x, y = setting()
    frozen = sp.verify.certify(model, x, y, sp.Linf(0.3, mask=torch.zeros(4, dtype=torch.bool)), TIME)
    assert torch.equal(frozen.robust, frozen.right)
    mask = torch.tensor([True, False, True, False])
    some = sp.verify.certify(model, x, y, sp.Linf(0.04, mask=mask), TIME)
    assert bool((some.robust >= certified().robust).all())
    assert torch.equal(some.counterexamples[:, ~mask], x[:, ~mask])
    own = torch.zeros(8, 4, dtype=torch.bool)
    own[4:] = True
    each = sp.verify.certify(model, x, y, sp.Linf(0.04, mask=own), TIME)
    assert torch.equal(each.robust[:4], each.right[:4])
    assert torch.equal(each.robust[4:], certified().robust[4:])
    on_grid = (x * 255).round() / 255
    labels = model.predict(on_grid)
    threat = sp.Linf(8 / 255, grid=1 / 255)
    found = sp.verify.certify(model, on_grid, labels, threat, sp.Budget(seconds=3))
    assert bool(threat.around(on_grid, (0, 1)).contains(found.counterexamples).all())
    assert bool((model.predict(found.counterexamples)[found.falsified] != labels[found.falsified]).all())


def test_time_that_ends_is_a_reason_and_the_bound_stays_sound() -> None:
    model, x, y = setting()
    ticks = iter(range(10**7))
    found = sp.verify.certify(model, x, y, sp.Linf(0.04), sp.Budget(seconds=0.1), clock=lambda: float(next(ticks)))
    assert bool(found.unknown.any())
    assert not bool((found.robust & ~certified().robust).any())
    assert all(proof.reason for proof in found.proofs if proof.verdict == "unknown")
    assert found.certified_accuracy <= certified().certified_accuracy <= found.attacked_accuracy
    assert "time" in found.summary()


def test_many_at_once_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting()
    monkeypatch.setattr(module, "_screened", lambda graph, inputs, y, *rest: ([""] * len(y), [-math.inf] * len(y)))
    alone = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME)
    assert torch.equal(alone.robust, certified().robust)
    for one, other in zip(alone.proofs, certified().proofs, strict=True):
        if other.stage in ("crown-ibp", "crown"):
            assert one.bound == pytest.approx(other.bound, abs=1e-5)


# ---- folders and Ctrl-C


class Interrupting:
    """A clock that is Ctrl-C after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> float:
        self.looks -= 1
        if self.looks < 0:
            raise KeyboardInterrupt
        return 0.0


@pytest.mark.parametrize("looks", [0, 1, 2, 3, 5])
def test_ctrl_c_keeps_what_is_finished_and_the_same_call_goes_on(
    tmp_path: Path, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 2)
    model, x, y = setting()
    first = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path, clock=Interrupting(looks))
    assert not first.complete
    assert "interrupted" in first.summary()
    finished = [proof.reason != "interrupted" for proof in first.proofs]
    assert not all(finished)
    assert sum(finished) == len(list(tmp_path.glob("0*.json")))
    if looks == 5:
        assert any(finished)
    again = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)
    assert again.complete
    assert [p.verdict for p in again.proofs] == [p.verdict for p in certified().proofs]
    asked = model.queries.forward
    third = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)
    assert same(again, third)
    assert model.queries.forward - asked <= 3 * len(x)  # the probe


def test_ctrl_c_during_the_attack_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting()
    calls = iter(range(100))
    forward = type(model).forward

    def interrupted(self: sp.Model, points: Tensor) -> Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return forward(self, points)

    model.probe(x)
    monkeypatch.setattr(type(model), "forward", interrupted)
    found = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME)
    assert not found.complete


def test_a_folder_of_another_run_or_damaged(tmp_path: Path) -> None:
    model, x, y = setting()
    first = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)
    other = sp.Model(net(5), bounds=(0, 1))
    for args, told in (
        ((other, x, y, sp.Linf(0.04), TIME), "model"),
        ((model, x.flip(0), y, sp.Linf(0.04), TIME), "data"),
        ((model, x, y, sp.Linf(0.09), TIME), "threat"),
        ((model, x, y, sp.Linf(0.04), sp.Budget(seconds=2)), "seconds"),
    ):
        with pytest.raises(DataError, match=told):
            sp.verify.certify(*args, folder=tmp_path)
    kept = tmp_path / "000002.json"
    good = kept.read_text()
    longer = good.replace('"counterexample": ', '"counterexample": [1.0], "x": ')
    changed = [
        json.dumps(json.loads(good) | other)
        for other in (
            {"verdict": "banana"}, {"stage": "banana"}, {"bound": "x"}, {"bound": -3.0, "verdict": "robust"},
            {"seconds": "1"}, {"verdict": "falsified", "counterexample": None}, {"counterexample": [1.0, 2.0]},
            {"counterexample": [math.nan] * 4}, {"run": "another"}, {"rigorous": 3}, {"parts": 0.5}, {"reason": None},
        )
    ]  # fmt: skip
    for bad in (good[:-5], "[]", '{"verdict": "robust"}', "", longer, *changed):
        kept.write_text(bad)
        with pytest.raises(DataError, match="000002"):
            sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)
    kept.unlink()
    for name in ("0x.json", "000099.json"):
        (tmp_path / name).write_text(good)
        with pytest.raises(DataError, match=name):
            sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)
        (tmp_path / name).unlink()
    assert [p.verdict for p in sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path).proofs] == [
        p.verdict for p in first.proofs
    ]
    (tmp_path / "certification.json").write_text("{")
    with pytest.raises(DataError, match="certification"):
        sp.verify.certify(model, x, y, sp.Linf(0.04), TIME, folder=tmp_path)


def test_proofs_without_a_word_of_what_they_prove(tmp_path: Path) -> None:
    model, x, y = setting()
    sp.verify.certify(model, x, y, sp.Linf(0.01), TIME, folder=tmp_path / "small")
    sp.verify.certify(model, x[:0], y[:0], sp.Linf(0.2), TIME, folder=tmp_path / "large")
    (tmp_path / "small" / "certification.json").unlink()
    with pytest.raises(DataError, match="no certification"):
        sp.verify.certify(model, x, y, sp.Linf(0.2), TIME, folder=tmp_path / "small")
    sp.verify.certify(model, x[:0], y[:0], sp.Linf(0.01), TIME, folder=tmp_path / "other")
    for proof in (tmp_path / "small").glob("0*.json"):
        proof.rename(tmp_path / "other" / proof.name)
    with pytest.raises(DataError, match="no proof of this run"):
        sp.verify.certify(model, x[:0], y[:0], sp.Linf(0.01), TIME, folder=tmp_path / "other")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    model, x, y = setting()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner", Path("/proc/none")):
        with pytest.raises(DataError, match="cannot write"):
            sp.verify.certify(model, x, y, sp.Linf(0.01), TIME, folder=folder)


# ---- what is wrong with models and samples


class Shaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], 1) + torch.randn(len(x), 1)


class Sorting(nn.Module):
    """With a layer whose operator has no known bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(4, 4), Odd(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x)))


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, dim=1).values


def test_wrong_samples_and_threats() -> None:
    model, x, y = setting()
    for args, told in (
        ((x, y[:3], sp.Linf(0.1)), "shape"),
        ((x + 3, y, sp.Linf(0.1)), "bounds|outside|range"),
        ((x * math.nan, y, sp.Linf(0.1)), "nan is not inside"),
        ((x, y, 0.1), "ball of stated size"),
        ((x, y, sp.Linf(math.inf)), "ball of stated size"),
        ((x, y, sp.L0(2)), "l-infinity"),
        ((x, y + 3, sp.Linf(0.1)), "class|label|y "),
        ((x, y - 5, sp.Linf(0.1)), "class|label|y "),
        ((x, y.double(), sp.Linf(0.1)), "int|class|label|dtype"),
        ((x, y.tolist(), sp.Linf(0.1)), "tensor of integer classes"),
        ((x[:, :3], y, sp.Linf(0.1)), "inputs of shape"),
        ((x, y, sp.Linf(0.1), 5), "seconds="),
        ((x, y, sp.Linf(0.1), sp.Budget(queries=10)), "seconds="),
        ((x, y, sp.Linf(0.1), sp.Budget(seconds=1, passes=10)), "seconds="),
    ):
        with pytest.raises(InputError, match=told):
            sp.verify.certify(model, *args)
    with pytest.raises(InputError, match=r"sp\.Model"):
        sp.verify.certify(net(), x, y, sp.Linf(0.1))  # type: ignore[arg-type]


def test_models_of_which_nothing_can_be_proved() -> None:
    _, x, y = setting()
    with pytest.raises(CapabilityError, match="no bound holds"):
        sp.verify.certify(sp.Model(Shaky(), bounds=(0, 1)), x, y, sp.Linf(0.1))
    labels = sp.Model(lambda points: net()(points).argmax(1), gives="labels", num_classes=3, bounds=(0, 1))
    with pytest.raises(CapabilityError, match="certify"):
        sp.verify.certify(labels, x, y, sp.Linf(0.1))
    sorting = sp.Model(Sorting(), bounds=(0, 1))
    with pytest.raises(ModelError, match=r"sort.*odd|odd.*sort"):
        sp.verify.certify(sorting, x, sorting.predict(x), sp.Linf(1e-6))


def test_nothing_is_said_of_random_models() -> None:
    _, x, y = setting()
    with pytest.raises(CapabilityError, match="random"):
        sp.verify.bounds(sp.Model(Shaky()), x, x)
    with pytest.raises(CapabilityError, match="random"):
        sp.verify.nearest(sp.Model(Shaky()), x, y)


def test_what_bounds_refuse() -> None:
    model, x, _ = setting()
    for args, told in (
        ((x.numpy(), x.numpy()), "lower must be a floating tensor"),
        (([0], [1]), "lower must be a floating tensor"),
        ((x.long(), x.long()), "int64"),
        ((x, 0.1), "upper must be a floating tensor"),
        ((x.double(), x.double()), "float64"),
        ((x, x.double()), "upper is torch.float64"),
        ((x[:, :3], x[:, :3]), "inputs of shape"),
        ((x, x, "crown"), "method="),
        ((x[0], x[0]), "batch"),
        ((sp.verify.Box(x, x), x), "upper"),
        ((x,), "upper"),
    ):
        with pytest.raises(InputError, match=told):
            sp.verify.bounds(model, *args)


def test_probabilities_that_the_model_says_are_some() -> None:
    _, x, _ = setting()
    model = sp.Model(nn.Sequential(net(), nn.Softmax(1)), bounds=(0, 1), gives="probabilities")
    found = sp.verify.certify(model, x, model.predict(x), sp.Linf(0.001), TIME)
    assert bool(found.robust.any())


def test_half_precision_takes_rigour() -> None:
    _, x, _ = setting()
    half = sp.Model(net().to(torch.bfloat16), bounds=None)
    x = x.to(torch.bfloat16)
    y = half.predict(x)
    with pytest.raises(CapabilityError, match="rigorous"):
        sp.verify.certify(half, x, y, sp.Linf(0.01))
    assert all(proof.rigorous for proof in sp.verify.certify(half, x, y, sp.Linf(0.01), TIME, rigorous=True).proofs if
               proof.verdict == "robust")  # fmt: skip


def test_one_output_is_a_score_of_two_classes() -> None:
    """sign(w x + b) within an l-infinity ball: robust where |w x + b| > eps ||w||_1."""
    _, x, _ = setting()
    line = nn.Linear(4, 1)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 1.0]]))
        line.bias.fill_(-0.2)
        truth = line(x)[:, 0].abs() > 0.04 * 4.5
    model = sp.Model(line, bounds=None)
    found = sp.verify.certify(model, x, model.predict(x), sp.Linf(0.04), TIME)
    assert torch.equal(found.robust, truth)
    assert torch.equal(found.falsified, ~truth)


@pytest.mark.filterwarnings("ignore::saddlepoint.errors.SaddlepointWarning")
def test_weights_that_are_not_numbers_prove_nothing() -> None:
    _, x, y = setting()
    for value in (math.nan, math.inf):
        broken = net()
        with torch.no_grad():
            broken[2].weight[3, 3] = value  # type: ignore[index]
        with pytest.raises(ModelError, match="weight holds NaN or infinite values"):
            sp.verify.certify(sp.Model(broken, bounds=(0, 1)), x, y, sp.Linf(0.01), sp.Budget(seconds=1))


def test_memory_that_runs_out_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting()
    truth = certified()
    proved = [place for place in range(8) if truth.robust[place]]
    calls, whole = iter(range(100)), module.prove

    def all_too_much(*args: object) -> object:
        raise MemoryError

    def scarce(*args: object, **settings: object) -> Proof:
        number = next(calls)
        if number == 0:
            raise torch.OutOfMemoryError("no room for 3 GiB")
        if number == 1:
            raise MemoryError
        return whole(*args, **settings)

    monkeypatch.setattr(module, "_screened", all_too_much)
    monkeypatch.setattr(module, "prove", scarce)
    found = sp.verify.certify(model, x, y, sp.Linf(0.04), TIME)
    assert int(found.unknown.sum()) == 2
    reasons = [proof.reason for proof in found.proofs if proof.verdict == "unknown"]
    assert all("out of memory" in reason for reason in reasons)
    assert "3 GiB" in reasons[0]
    assert int(found.robust.sum()) >= len(proved) - 2
    assert "out of memory" in found.summary()


def test_a_proof_that_its_own_counterexample_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting()
    right = certified().robust.nonzero()[:1, 0]
    monkeypatch.setattr(module, "_screened", lambda *a: ([""], [-math.inf]))
    monkeypatch.setattr(module, "prove", lambda *a, **k: Proof("falsified", "corners", -1.0, x[int(right)], 0, 0.0))
    with pytest.raises(SoundnessError, match="counterexample"):
        sp.verify.certify(model, x[right], y[right], sp.Linf(0.04), TIME)


def test_the_model_is_left_as_it_was() -> None:
    model = sp.Model(net().train(), bounds=(0, 1))
    _, x, y = setting()
    before = [(p.clone(), p.requires_grad) for p in model.net.parameters()]  # type: ignore[union-attr]
    state = torch.random.get_rng_state()
    sp.verify.certify(model, x, y, sp.Linf(0.05), TIME)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.net.training  # type: ignore[union-attr]
    for (value, needed), now in zip(before, model.net.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(value, now)
        assert now.requires_grad == needed
        assert now.grad is None


def test_normalised_double_and_unbounded_models() -> None:
    _, x, y = setting()
    truth = certified()
    double = sp.Model(net().double(), bounds=(0, 1))
    found = sp.verify.certify(double, x.double(), y, sp.Linf(0.04), TIME)
    assert torch.equal(found.robust, truth.robust)
    shifted = net()
    with torch.no_grad():
        shifted[0].bias += 0.5 * shifted[0].weight.sum(1)  # type: ignore[operator, union-attr]
        shifted[0].weight *= 0.25  # type: ignore[operator, union-attr]
    scaled = sp.Model(shifted, bounds=(0, 1), mean=0.5, std=0.25)
    found = sp.verify.certify(scaled, x, y, sp.Linf(0.04), TIME)
    assert torch.equal(found.robust, truth.robust)
    free = sp.verify.certify(sp.Model(net(), bounds=None), x, y, sp.Linf(0.04), TIME)
    assert bool((free.robust <= truth.robust).all())  # its sets are larger
