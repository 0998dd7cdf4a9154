"""VNNLIB: what properties say, what is wrong with damaged ones, and verdicts that agree with the competition's."""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.errors import CapabilityError, DataError, InputError, ModelError
from saddlepoint.verify import Property, decide, parse_vnnlib, read_vnnlib


def text(inputs: int, outputs: int, *conditions: str) -> str:
    names = [f"X_{k}" for k in range(inputs)] + [f"Y_{k}" for k in range(outputs)]
    return "\n".join([*(f"(declare-const {name} Real)" for name in names), *(f"(assert {one})" for one in conditions)])


def box(*ends: tuple[float, float]) -> list[str]:
    return [f"({sign} X_{k} {end})" for k, pair in enumerate(ends) for sign, end in zip((">=", "<="), pair, strict=True)]


UNIT = box((0, 1), (-1, 1))


def said(property_: Property, x: Sequence[float], y: Sequence[float]) -> bool:
    """Whether inputs x with outputs y are unsafe."""
    point, outputs = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    return any(
        bool((case.lower <= point).all() and (point <= case.upper).all() and (case.rows @ outputs + case.constants <= 0).all())
        for case in property_.cases
    )


# ---- what properties say


@pytest.mark.parametrize(
    ("conditions", "unsafe"),
    [
        (["(<= Y_0 Y_1)"], lambda x, y: y[0] <= y[1]),
        (["(>= Y_0 Y_1)", "(>= Y_0 0.5)"], lambda x, y: y[0] >= y[1] and y[0] >= 0.5),
        (["(or (and (<= Y_0 -1)) (and (>= Y_0 1)))"], lambda x, y: y[0] <= -1 or y[0] >= 1),
        (["(or (<= Y_0 -1) (>= Y_1 1))"], lambda x, y: y[0] <= -1 or y[1] >= 1),
        (["(and (<= Y_0 1) (<= Y_1 2))"], lambda x, y: y[0] <= 1 and y[1] <= 2),
        (["(and (or (<= Y_0 0) (<= Y_1 0)) (>= Y_1 -1))"], lambda x, y: (y[0] <= 0 or y[1] <= 0) and y[1] >= -1),
        (["(or (<= Y_0 0) (<= Y_1 0))", "(or (>= Y_0 -1) (>= Y_1 1))"],
         lambda x, y: (y[0] <= 0 or y[1] <= 0) and (y[0] >= -1 or y[1] >= 1)),
        (["(or (and (<= X_0 0.5) (<= Y_0 0)) (and (>= X_0 0.5) (>= Y_0 0)))"],
         lambda x, y: (x[0] <= 0.5 and y[0] <= 0) or (x[0] >= 0.5 and y[0] >= 0)),
        (["(or (<= X_0 0.25) (>= X_0 0.75))", "(or (<= X_1 -0.5) (>= X_1 0.5))", "(<= Y_0 0)"],
         lambda x, y: (x[0] <= 0.25 or x[0] >= 0.75) and (x[1] <= -0.5 or x[1] >= 0.5) and y[0] <= 0),
        (["(<= 1e-1 Y_0)", "(>= -.5 Y_1)"], lambda x, y: y[0] >= 0.1 and y[1] <= -0.5),
        (["(<= X_0 2)", "(>= X_0 0.5)", "(<= Y_0 0)"], lambda x, y: x[0] >= 0.5 and y[0] <= 0),
        (["(or (<= X_0 0.25) (>= X_0 0.75))", "(or (and (<= X_0 0.2) (<= Y_0 0)) (and (>= X_0 0.8) (<= Y_1 0)))"],
         lambda x, y: (x[0] <= 0.2 and y[0] <= 0) or (x[0] >= 0.8 and y[1] <= 0)),
        (["(<= 0 1)", "(<= X_0 X_0)", "(or (and (>= 1 2) (<= Y_1 9)) (<= Y_0 0))"], lambda x, y: y[0] <= 0),
        (["(<= 0.5 X_0)", "(< Y_0 0)"], lambda x, y: x[0] >= 0.5 and y[0] <= 0),
    ],
)  # fmt: skip
def test_conditions_mean_what_they_say(conditions, unsafe) -> None:
    parsed = parse_vnnlib(text(2, 2, *UNIT, *conditions))
    assert (parsed.inputs, parsed.outputs) == (2, 2)
    values = (-2.0, -0.75, 0.0, 0.3, 0.6, 1.5)
    seen = set()
    for a in (0.0, 0.1, 0.3, 0.6, 0.9, 1.2):
        for b in (-0.7, 0.0, 0.7):
            for c in values:
                for d in values:
                    inside = 0 <= a <= 1 and -1 <= b <= 1
                    wanted = inside and bool(unsafe((a, b), (c, d)))
                    assert said(parsed, (a, b), (c, d)) is wanted, (a, b, c, d)
                    seen.add(wanted)
    assert seen == {True, False}


def test_comments_spacing_and_declared_order_do_not_matter() -> None:
    plain = parse_vnnlib(text(2, 2, *UNIT, "(<= Y_0 Y_1)"))
    odd = "; a (comment\n(declare-const Y_1 Real)(declare-const X_1 Real) ; )\n"
    odd += "(set-logic QF_LRA)(declare-fun X_0 () Real)\n(declare-const Y_0 Real)"
    odd += "".join(f"\n( assert\n {one} )" for one in ["(<= Y_0 Y_1)", *reversed(UNIT)]) + "(check-sat)"
    other = parse_vnnlib(odd)
    assert len(plain.cases) == len(other.cases) == 1
    for part in ("lower", "upper", "rows", "constants"):
        assert torch.equal(getattr(plain.cases[0], part), getattr(other.cases[0], part))
    assert "1 cases of 2 inputs and 2 outputs" in str(plain)


def test_cases_share_boxes_and_short_conjunctions_repeat_a_row() -> None:
    known = parse_vnnlib(text(2, 2, *UNIT, "(or (and (<= Y_0 0) (<= Y_1 0)) (and (<= Y_0 Y_1)) (and (<= X_0 0.5) (<= Y_1 3)))"))
    cases = known.to_cases((2,), torch.zeros(1))
    assert len(cases) == 3
    assert len(cases.inputs.lower) == 2
    assert cases.rows.shape == (3, 2, 2)
    outputs = torch.tensor([[1.0, -2.0]]).expand(3, -1)
    assert cases.margin(outputs).tolist() == [1.0, 3.0, -5.0]
    assert cases.sets.upper[:, 0].tolist() == [1.0, 1.0, 0.5]
    assert known.to_cases((1, 2, 1), torch.zeros(1)).inputs.lower.shape == (2, 1, 2, 1)


def test_boxes_are_rounded_outwards() -> None:
    ends = [(0.1, 0.3), (-0.3, -0.1), (1 / 3, 2 / 3), (0.5, 0.5), (1e-50, 1e-46), (0.1, 0.1)]
    known = parse_vnnlib(text(6, 1, *box(*ends), "(<= Y_0 0)"))
    wide = known.to_cases((6,), torch.zeros(1)).inputs
    assert wide.lower.dtype == torch.float32
    exact = torch.tensor(ends, dtype=torch.float64)
    assert bool((wide.lower[0].double() <= exact[:, 0]).all() and (wide.upper[0].double() >= exact[:, 1]).all())
    assert bool((wide.upper[0].double() - exact[:, 1] < 1e-7).all() and (exact[:, 0] - wide.lower[0].double() < 1e-7).all())
    assert float(wide.lower[0, 3]) == float(wide.upper[0, 3]) == 0.5  # what float32 holds stays
    same = known.to_cases((6,), torch.zeros(1, dtype=torch.float64)).inputs
    assert torch.equal(same.lower[0], exact[:, 0])
    assert torch.equal(same.upper[0], exact[:, 1])


def test_files_plain_and_compressed(tmp_path: Path) -> None:
    written = text(2, 2, *UNIT, "(<= Y_0 Y_1)")
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "a.vnnlib.gz"
    plain.write_text(written)
    packed.write_bytes(gzip.compress(written.encode()))
    for path in (plain, str(packed)):
        assert torch.equal(read_vnnlib(path).cases[0].rows, torch.tensor([[1.0, -1.0]], dtype=torch.float64))


# ---- what is wrong


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (text(2, 2, *UNIT, "(<= Y_0 Y_1)")[:-1], "not closed"),
        (text(2, 2, *UNIT, "(<= Y_0 Y_1)") + ")", "not opened"),
        (text(2, 2, *UNIT, "(<= Y_2 0)"), "Y_2 is not declared"),
        (text(2, 2, *UNIT, "(<= X_2 0)", "(<= Y_0 0)"), "X_2 is not declared"),
        (text(2, 2, *UNIT), "no condition on outputs"),
        (text(2, 2, *UNIT, "(or (<= X_0 0.5) (<= Y_0 0))"), "no condition on outputs"),
        (text(2, 2, *UNIT[:3], "(<= Y_0 0)"), "X_1 has no lower or no upper end"),
        (text(2, 2, *box((1, 0), (0, 1)), "(<= Y_0 0)"), "X_0 has a lower end above"),
        (text(2, 2, *box((0, "nan"), (0, 1)), "(<= Y_0 0)"), "'nan' is neither"),
        (text(2, 2, *box((0, "inf"), (0, 1)), "(<= Y_0 0)"), "'inf' is neither"),
        (text(2, 2, *UNIT, "(<= Y_0 nan)"), "nan"),
        (text(2, 0, *UNIT, "(<= Y_0 0)"), "declared"),
        (text(0, 2, "(<= Y_0 0)"), "declared"),
        ("", "declared"),
        (text(2, 2, *UNIT, "(<= Y_0 Z_1)"), "'Z_1' is neither"),
        (text(2, 2, *UNIT, "(<= Y_0 1,5)"), "'1,5' is neither"),
        (text(2, 2, *UNIT, "(<= Y_0 X_1)"), "neither a box"),
        (text(2, 2, *UNIT, "(<= X_0 X_1)", "(<= Y_0 0)"), "neither a box"),
        (text(2, 2, *UNIT, "(>= 0 1)", "(<= Y_0 0)"), "numbers alone is false"),
        (text(2, 2, *UNIT, "(<= Y_0 Y_0)"), "no condition on outputs"),
        (text(2, 2, *UNIT, "(or (<= X_0 -1) (<= X_1 -2))", "(<= Y_0 0)"), "X_1 has a lower end above"),
        (text(2, 2, *UNIT, "(<= (* 2 Y_0) 1)"), "only variables and numbers"),
        (text(2, 2, *UNIT, "(= Y_0 1)"), "expected or, and"),
        (text(2, 2, *UNIT, "(not (<= Y_0 1))"), "expected or, and"),
        (text(2, 2, *UNIT, "(<= Y_0)"), "expected or, and"),
        (text(2, 2, *UNIT, "(or)"), "expected or, and"),
        (text(2, 2, *UNIT, "(and)"), "expected or, and"),
        (text(2, 2, *UNIT, "(<= Y_0 0)") + "(declare-fun X_0 (Real) Real)", "expected a declaration"),
        (text(2, 2, *UNIT, "(<= Y_0 0)") + "nonsense", "expected a declaration"),
    ],
)
def test_errors_say_what_is_wrong(written: str, told: str) -> None:
    with pytest.raises(DataError, match=told.replace("(", r"\(")):
        parse_vnnlib(written)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(text(2, 2, *UNIT, "(<= Y_0 Y_1)").encode())
    broken = bytearray(packed)
    broken[15] ^= 255
    for name, content in (
        ("cut.vnnlib.gz", packed[:-12]), ("none.vnnlib.gz", b"plain"), ("empty.vnnlib.gz", b""), ("bytes.vnnlib", b"\xff\xfe("),
        ("damaged.vnnlib.gz", bytes(broken)), ("cut.vnnlib", b"(declare-const X_0"),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_vnnlib(path)
    for path in (tmp_path / "missing.vnnlib", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_vnnlib(path)


# ---- verdicts


class Absolute(nn.Module):
    """x -> (|x_0| + |x_1|, x_0 - x_1)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([(x.relu() + (-x).relu()).sum(1, keepdim=True), x[:, :1] - x[:, 1:]], 1)


@pytest.mark.parametrize(
    ("conditions", "verdict"),
    [
        (["(<= Y_0 -0.001)"], "robust"),
        (["(<= Y_0 0.001)"], "falsified"),
        (["(>= Y_0 2.001)"], "robust"),
        (["(>= Y_0 1.999)"], "falsified"),
        (["(<= Y_0 1)", "(>= Y_1 1.01)"], "robust"),  # together impossible, each one alone not
        (["(<= Y_0 1)", "(>= Y_1 0.99)"], "falsified"),
        (["(or (<= Y_0 -0.1) (>= Y_1 2.01))"], "robust"),
        (["(or (<= Y_0 -0.1) (>= Y_1 1.9))"], "falsified"),
        (["(or (and (<= X_0 0.25) (>= Y_1 1.3)) (and (>= X_0 0.75) (<= Y_1 -0.3)))"], "robust"),
        (["(or (and (<= X_0 0.25) (>= Y_1 1.3)) (and (>= X_0 0.75) (<= Y_1 -0.2)))"], "falsified"),
    ],
)
def test_decide_in_closed_form(conditions: list[str], verdict: str) -> None:
    known = parse_vnnlib(text(2, 2, *UNIT, *conditions))
    model = sp.Model(Absolute(), bounds=None)
    proof = decide(model, known, sp.Budget(seconds=20))
    assert proof.verdict == verdict, proof
    if verdict == "falsified":
        assert proof.counterexample is not None
        point = proof.counterexample
        assert said(known, point.tolist(), model.logits(point[None])[0].tolist())
    else:
        assert proof.counterexample is None
        assert proof.bound > 0
    shaped = decide(model, known, sp.Budget(seconds=20), shape=(1, 2, 1))
    assert shaped.verdict == verdict


def onnx_file(path: Path, weight: list[list[float]], *ends: str) -> Path:
    """x times weight, and what follows, as an ONNX file."""
    onnx = pytest.importorskip("onnx")
    make, kind, names = onnx.helper, onnx.TensorProto.FLOAT, ["h", *(f"v{k}" for k in range(len(ends)))]
    nodes = [make.make_node("MatMul", ["x", "w"], ["h"])]
    nodes += [make.make_node(end, [names[k]], [names[k + 1]]) for k, end in enumerate(ends)]
    inputs, outputs = (
        [make.make_tensor_value_info(n, kind, [1, s])] for n, s in (("x", len(weight)), (names[-1], len(weight[0])))
    )
    constants = [onnx.numpy_helper.from_array(np.array(weight, dtype=np.float32), "w")]
    made = make.make_model(make.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[make.make_opsetid("", 17)])
    made.ir_version = 8
    onnx.save(made, path)
    return path


def test_properties_are_about_what_a_file_gives_in_the_end(tmp_path: Path) -> None:
    """sigmoid(0.5) = 0.622, which its logit 0.5 doesn't tell."""
    path = onnx_file(tmp_path / "s.onnx", [[1.0, -1.0]], "Sigmoid")
    for limit, verdict in ((0.6, "falsified"), (0.63, "robust")):
        known = parse_vnnlib(text(1, 2, *box((0, 0.5)), f"(>= Y_0 {limit})"))
        for model in (path, str(path), sp.Model(sp.models.read_graph(path), bounds=None)):
            assert decide(model, known, sp.Budget(seconds=20)).verdict == verdict
        with pytest.raises(InputError, match="the file itself"):
            decide(sp.Model(path, bounds=None), known)
    soft = onnx_file(tmp_path / "t.onnx", [[1.0, 0.0]], "Softmax")
    assert decide(soft, parse_vnnlib(text(1, 2, *box((0, 1)), "(>= Y_0 0.8)")), sp.Budget(seconds=20)).verdict == "robust"


def test_properties_of_single_outputs_and_of_probabilities(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "one.onnx", [[1.0], [2.0]])
    single = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        single.weight.copy_(torch.tensor([[1.0, 2.0]]))
    for limit, verdict in ((2.9, "falsified"), (3.1, "robust")):
        known = parse_vnnlib(text(2, 1, *UNIT, f"(>= Y_0 {limit})"))
        for model in (path, sp.Model(single, bounds=None), sp.Model(lambda x: single(x)[:, 0], bounds=None)):
            assert decide(model, known, sp.Budget(seconds=20)).verdict == verdict
    odds = sp.Model(nn.Sequential(single, nn.Sigmoid()), bounds=None, gives="probabilities")
    assert decide(odds, parse_vnnlib(text(2, 1, *UNIT, "(<= Y_0 0.04)")), sp.Budget(seconds=20)).verdict == "robust"
    with pytest.raises(CapabilityError, match="parameters"):
        decide(sp.Model(single, bounds=None, access=sp.Access.SCORES), known)
    with pytest.raises(InputError, match=r"sp\.Model"):
        decide(single, known)  # type: ignore[arg-type]


def test_rigour_keeps_the_numbers_of_the_file() -> None:
    """x + 4.5e-8 reaches 0.50000004, which float32 would take for 0.50000006."""
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1)
        net.bias.fill_(4.5e-8)
    known = parse_vnnlib(text(1, 1, *box((0, 0.5)), "(>= Y_0 0.50000004)"))
    assert decide(sp.Model(net, bounds=None), known, sp.Budget(seconds=2), rigorous=True).verdict != "robust"
    known = parse_vnnlib(text(1, 1, *box((0, 0.5)), "(>= Y_0 0.50000005)"))
    assert decide(sp.Model(net, bounds=None), known, sp.Budget(seconds=2), rigorous=True).verdict == "robust"


def test_budgets_of_decide_are_seconds() -> None:
    with pytest.raises(InputError, match="seconds="):
        decide(sp.Model(Absolute(), bounds=None), parse_vnnlib(text(2, 2, *UNIT, "(<= Y_0 0)")), sp.Budget(queries=3))


def test_decide_of_other_numbers_of_inputs_or_outputs() -> None:
    model = sp.Model(Absolute(), bounds=None)
    with pytest.raises(InputError, match="3 outputs"):
        decide(model, parse_vnnlib(text(2, 3, *UNIT, "(<= Y_0 0)")))
    with pytest.raises(DataError, match="3 inputs"):
        decide(model, parse_vnnlib(text(3, 2, *box((0, 1), (0, 1), (0, 1)), "(<= Y_0 0)")), shape=(2,))
    with pytest.raises(DataError, match="nowhere"):
        decide(model, "nowhere.vnnlib")
    linear = sp.Model(nn.Linear(2, 2), bounds=None)
    with pytest.raises(ModelError, match="shape="):
        decide(linear, parse_vnnlib(text(3, 2, *box((0, 1), (0, 1), (0, 1)), "(<= Y_0 0)")))


def test_no_time_is_unknown() -> None:
    known = parse_vnnlib(text(2, 2, *UNIT, "(<= Y_0 1)", "(>= Y_1 1.01)"))
    ticks = iter(range(10**6))
    proof = decide(sp.Model(Absolute(), bounds=None), known, sp.Budget(seconds=1), clock=lambda: float(next(ticks)))
    assert proof.verdict == "unknown"
    assert "time" in proof.reason


# ---- the competition's files

DATA = Path(os.environ.get("SADDLEPOINT_DATA", "missing")) / "verification"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the competition's files aren't here (SADDLEPOINT_DATA)")
WORDS = {"sat": "falsified", "unsat": "robust"}


def instances(benchmark: str) -> list[dict[str, str]]:
    with (DATA / "ground_truth.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]


def files(row: dict[str, str]) -> tuple[Path, Path]:
    folder = DATA / row["benchmark"]
    return folder / "onnx" / f"{row['onnx']}.gz", folder / "vnnlib" / f"{row['vnnlib']}.gz"


@needs_data
@pytest.mark.parametrize(
    "benchmark",
    ["acasxu", "cifar10_resnet", "collins_rul_cnn", "eran", "mnist_fc", "oval21", "reach_prob_density", "rl_benchmarks",
     "sri_resnet_a", "verivital", "vit"],
)  # fmt: skip
def test_files_of_every_benchmark_are_read(benchmark: str) -> None:
    known = read_vnnlib(files(instances(benchmark)[0])[1])
    assert known.cases
    assert all(bool((case.lower <= case.upper).all()) for case in known.cases)
    assert {case.rows.shape[1] for case in known.cases} == {known.outputs}


@needs_data
@pytest.mark.parametrize(
    ("benchmark", "places"),
    [("mnist_fc", (0, 1, 2)), ("acasxu", (0,)), ("rl_benchmarks", (0, 1)), ("reach_prob_density", (30,)), ("verivital", (0,))],
)
def test_quick_instances_agree_with_the_competition(benchmark: str, places: tuple[int, ...]) -> None:
    pytest.importorskip("onnx")
    for row in (instances(benchmark)[place] for place in places):
        network, property_ = files(row)
        model = sp.Model(network, bounds=None)
        proof = decide(model, property_, sp.Budget(seconds=60))
        assert proof.verdict == WORDS[row["truth"]], (row, proof)
        if proof.counterexample is not None:
            cases = read_vnnlib(property_).to_cases(tuple(proof.counterexample.shape), torch.zeros(1))
            outputs = model.forward(proof.counterexample[None]).expand(len(cases), -1)
            inside = (cases.sets.lower <= proof.counterexample) & (proof.counterexample <= cases.sets.upper)
            assert bool((inside.flatten(1).all(1) & (cases.margin(outputs) <= 0)).any())


@needs_data
def test_mnist_instances_with_counterexamples_fall_to_the_corners() -> None:
    pytest.importorskip("onnx")
    found = [row for row in instances("mnist_fc") if row["truth"] == "sat"]
    assert len(found) == 18
    models: dict[Path, sp.Model] = {}
    for row in found:
        network, property_ = files(row)
        model = models.setdefault(network, sp.Model(network, bounds=None))
        proof = decide(model, property_, sp.Budget(seconds=60))
        assert (proof.verdict, proof.stage) == ("falsified", "corners"), row
