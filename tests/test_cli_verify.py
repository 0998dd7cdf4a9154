"""`saddlepoint verify` from the command line: samples within a threat, properties of ONNX files, and errors of one line."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import saddlepoint as sp
from saddlepoint.cli import main
from saddlepoint.cli import verify as command

NET = """
import torch
import saddlepoint as sp
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10))
labels = sp.Model(lambda x: net(x).argmax(1), gives="labels", num_classes=10, bounds=(0, 1))
"""
ASK = ("verify", "--model", "net.py:net", "--samples", "6", "--budget", "20")
PROPERTY = """
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
(assert (>= X_0 -1))
(assert (<= X_0 1))
(assert (>= X_1 -1))
(assert (<= X_1 1))
(assert (>= Y_0 LIMIT))
"""
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    for name, limit in (("holds", "2.01"), ("fails", "1.9")):
        (tmp_path / f"{name}.vnnlib").write_text(PROPERTY.replace("LIMIT", limit))
    return tmp_path


@pytest.fixture
def call(here: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def network(here: Path) -> Path:
    """x -> (|x_0| + |x_1|, 0) as an ONNX file."""
    onnx = pytest.importorskip("onnx")
    first = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32).T
    second = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=np.float32).T
    make = onnx.helper
    graph = make.make_graph(
        [
            make.make_node("MatMul", ["x", "a"], ["h"]),
            make.make_node("Relu", ["h"], ["r"]),
            make.make_node("MatMul", ["r", "b"], ["y"]),
        ],
        "absolute",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.numpy_helper.from_array(first, "a"), onnx.numpy_helper.from_array(second, "b")],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)])
    made.ir_version = 8
    path = here / "net.onnx"
    onnx.save(made, path)
    return path


def test_samples_within_a_threat(here: Path, call: Call) -> None:
    status, out, _ = call(*ASK, "--eps", "2/255", "--json", "found.json", "--out", "kept")
    assert status == 0
    assert "Verification of 6 samples" in out
    assert "robust accuracy" in out
    found = json.loads((here / "found.json").read_text())
    assert (found["samples"], found["data"], found["complete"]) == (6, "digits", True)
    assert found["threat"]["eps"] == pytest.approx(2 / 255)
    assert len(found["proofs"]) == 6
    assert 0 <= found["certified_accuracy"] <= found["attacked_accuracy"] <= found["clean_accuracy"] <= 1
    for proof in found["proofs"]:
        assert proof["verdict"] in ("robust", "falsified", "unknown")
        assert proof["stage"] in found["stages"]
        assert proof["bound"] is None or (proof["bound"] > 0) == (proof["verdict"] == "robust")  # what isn't finite is null
    assert len(list((here / "kept").glob("0*.json"))) == 6
    config = tomllib.loads((here / "kept" / "config.toml").read_text())["verify"]
    assert config["eps"] == "2/255"
    # the same command finds everything done, also by its configuration
    status, again, _ = call(*ASK, "--eps", "2/255", "--out", "kept")
    assert status == 0
    assert again.splitlines()[-3:] == out.splitlines()[-3:]
    assert call("verify", "--config", "kept/config.toml")[0] == 0
    status, _, err = call(*ASK, "--eps", "3/255", "--out", "kept")
    assert status == 2
    assert "threat" in err


@pytest.mark.parametrize(("norm", "name"), [("l2", "L2"), ("l1", "L1")])
def test_other_norms(here: Path, call: Call, norm: str, name: str) -> None:
    status, _, _ = call(*ASK, "--norm", norm, "--eps", "0.05", "--json", "found.json")
    assert status == 0
    found = json.loads((here / "found.json").read_text())
    assert found["threat"]["name"] == name


@pytest.mark.parametrize(("name", "verdict"), [("holds", "robust"), ("fails", "falsified")])
@pytest.mark.parametrize("packed", [False, True])
def test_properties_of_onnx_files(here: Path, call: Call, network: Path, name: str, verdict: str, packed: bool) -> None:
    files = [network, here / f"{name}.vnnlib"]
    if packed:
        for place, path in enumerate(files):
            files[place] = path.with_name(path.name + ".gz")
            files[place].write_bytes(gzip.compress(path.read_bytes()))
    status, out, _ = call(
        "verify", "--onnx", str(files[0]), "--vnnlib", str(files[1]), "--budget", "20", "--json", "found.json"
    )
    assert status == 0
    assert verdict in out
    assert "1 cases of 2 inputs and 2 outputs" in out
    found = json.loads((here / "found.json").read_text())
    assert found["verdict"] == verdict
    assert set(found) == {"verdict", "stage", "bound", "parts", "seconds", "reason", "rigorous", "counterexample"}
    if verdict == "falsified":
        assert sum(abs(each) for each in found["counterexample"]) >= 1.9
        assert max(abs(each) for each in found["counterexample"]) <= 1
    else:
        assert found["counterexample"] is None
        assert found["bound"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--onnx net.onnx", "--vnnlib"),
        ("--vnnlib holds.vnnlib", "--onnx"),
        ("", "--model"),
        ("--model net.py:net --onnx net.onnx --vnnlib holds.vnnlib --eps 0.1", "either"),
        ("--model net.py:net", "--eps"),
        ("--model net.py:net --eps 0.1,0.2", "one --eps"),
        ("--model net.py:net --eps 0.1,l2:0.5", "one --eps"),
        ("--model net.py:net --eps big", "8/255"),
        ("--model net.py:net --eps -1", "eps"),
        ("--model net.py:net --eps 3 --norm l0", "l-infinity"),
        ("--model net.py:labels --eps 0.1", "certify"),
        ("--model net.py:nett --eps 0.1", "'net'"),
        ("--model net.py:net --eps 0.1 --data digit", "'digits'"),
        ("--onnx missing.onnx --vnnlib holds.vnnlib", "missing.onnx"),
        ("--onnx net.onnx --vnnlib missing.vnnlib", "missing.vnnlib"),
        ("--onnx net.onnx --vnnlib cut.vnnlib", "cut.vnnlib"),
        ("--onnx net.onnx --vnnlib cut.vnnlib.gz", "cut.vnnlib.gz"),
        ("--onnx holds.vnnlib --vnnlib holds.vnnlib", "holds.vnnlib"),
        ("--onnx net.onnx --vnnlib three.vnnlib", "3 inputs"),
        ("--onnx net.onnx --vnnlib wide.vnnlib", "3 outputs"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --eps 0.1", "--eps means nothing"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --norm linf", "--norm means nothing"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --out kept", "--out means nothing"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --samples 7", "--samples means nothing"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --data digits", "--data means nothing"),
        ("--model net.py:net --sigma 0.1 --rigorous", "--rigorous means nothing"),
        ("--model net.py:net --sigma 0.1 --norm l2", "--norm means nothing"),
        ("--model net.py:net --eps 0.1 --votes 10", "--votes means nothing"),
        ("--model net.py:net --eps 0.1 --out net.py/kept", "cannot write"),
        ("--model net.py:net --sigma 0.1 --out net.py", "cannot write"),
        ("--onnx net.onnx --vnnlib holds.vnnlib --json missing/../net.py/x.json", "net.py"),
    ],
)
def test_errors_are_one_line_and_status_2(here: Path, call: Call, network: Path, words: str, told: str) -> None:
    text = PROPERTY.replace("LIMIT", "1")
    (here / "cut.vnnlib").write_text(text[:-4])
    (here / "cut.vnnlib.gz").write_bytes(gzip.compress(text.encode())[:-9])
    (here / "three.vnnlib").write_text(text + "(declare-const X_2 Real)(assert (<= X_2 1))(assert (>= X_2 0))")
    (here / "wide.vnnlib").write_text(text + "(declare-const Y_2 Real)")
    status, _, err = call("verify", *words.split())
    assert status == 2
    assert told in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_usage_errors_and_help(call: Call) -> None:
    assert call("verify", "--model", "net.py:net", "--eps", "0.1", "--budget", "0")[0] == 2
    assert call("verify", "--model", "net.py:net", "--eps", "0.1", "--norm", "l3")[0] == 2
    status, out, _ = call("verify", "--help")
    assert status == 0
    assert "--vnnlib" in out


def test_no_time_is_unknown_and_no_error(here: Path, call: Call, network: Path) -> None:
    status, out, _ = call(
        "verify", "--onnx", "net.onnx", "--vnnlib", "holds.vnnlib", "--budget", "0.001", "--json", "found.json"
    )
    assert status == 0
    found = json.loads((here / "found.json").read_text())
    assert found["verdict"] in ("robust", "unknown")
    if found["verdict"] == "unknown":
        assert "time" in out
        assert found["reason"]


def test_ctrl_c_keeps_what_is_finished(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **settings: object) -> sp.verify.Certification:
        looks = iter(range(3))

        def clock() -> float:
            if next(looks, None) is None:
                raise KeyboardInterrupt
            return 0.0

        return sp.verify.certify(*args, **settings, clock=clock)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(command, "certify", interrupted)
        status, out, _ = call(*ASK, "--eps", "4/255", "--out", "kept", "--json", "found.json")
    assert status == 130
    assert "interrupted" in out
    assert json.loads((here / "found.json").read_text())["complete"] is False
    assert call(*ASK, "--eps", "4/255", "--out", "kept")[0] == 0


def test_votes_under_noise(here: Path, call: Call) -> None:
    ask = ("verify", "--model", "net.py:net", "--samples", "6", "--sigma", "0.25", "--votes", "300", "--alpha", "0.01")
    status, out, _ = call(*ask, "--eps", "0,0.1,1/5", "--out", "votes", "--json", "votes.json")
    assert status == 0
    found = json.loads((here / "votes.json").read_text())
    assert found["n"] == 300
    assert found["alpha"] == 0.01
    assert len(found["radius"]) == 6
    right = [p == y for p, y in zip(found["prediction"], found["label"], strict=True)]
    for radius in (0, 0.1, 0.2):
        share = sum(r and size >= radius for r, size in zip(right, found["radius"], strict=True)) / 6
        line = next(line for line in out.splitlines() if line.startswith(f"  within l2 {radius:<9.4g}"))
        assert f"{share:.2%}" in line
    kept = json.loads((here / "votes" / "votes.json").read_text())
    assert call(*ask, "--out", "votes", "--json", "again.json")[0] == 0
    assert json.loads((here / "votes" / "votes.json").read_text())["counts"] == kept["counts"]
    assert json.loads((here / "again.json").read_text())["radius"] == found["radius"]
    assert call(*ask, "--out", "votes", "--seed", "1")[0] == 2  # another run's votes


def test_votes_are_for_models(here: Path, call: Call) -> None:
    status, _, error = call("verify", "--onnx", "net.onnx", "--vnnlib", "holds.vnnlib", "--sigma", "0.25")
    assert status == 2
    assert "--sigma" in error
