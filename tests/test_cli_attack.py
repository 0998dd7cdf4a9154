"""`saddlepoint attack` on models of every form: budgets hold to the query, stopped runs go on, and no password is written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import Server, predictions, row_by_row
from safetensors.torch import save_file
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.cli import inputs, main
from saddlepoint.taxonomy import Access

pytest.importorskip("httpx2")
NET = """
from pathlib import Path
import torch
from safetensors.torch import load_file
import saddlepoint as sp

net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
net.load_state_dict(load_file(Path(__file__).parent / "weights.safetensors"))
own = sp.Model(net, access=sp.Access.LABELS)
def make(width=3):
    return net
def classify(x):
    return net(x)
def wants_numpy(x):
    return net(torch.from_numpy(x)).numpy()
numpy_labels = sp.Model(lambda x: wants_numpy(x).argmax(1), gives="labels", inputs="numpy", num_classes=10)
class Asked:
    def __call__(self, x):
        return net(x)
asked = Asked()
class Stops(torch.nn.Module):
    calls = 0
    def forward(self, x):
        Stops.calls += 1
        if Stops.calls == 300 and not Path("stopped").exists():
            Path("stopped").touch()
            raise KeyboardInterrupt
        return net(x)
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp: nn.Module) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    save_file(mlp.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


@pytest.fixture
def call(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def attacked(count: int, net: nn.Module, *arguments: Any, **settings: Any) -> sp.AttackResult:
    """The same with the library, here."""
    split = sp.data.load("digits").test.take(count)
    return sp.attack(sp.Model(row_by_row(net)), split.x, split.y, *arguments, **settings)


def assert_same(one: sp.AttackResult, other: sp.AttackResult) -> None:
    assert torch.equal(one.adversarial, other.adversarial)
    assert torch.equal(one.queries.forward, other.queries.forward)
    assert one.status.tolist() == other.status.tolist()


def labels_of(net: nn.Module) -> Callable[[Tensor], Any]:
    return lambda rows: {"predictions": row_by_row(net)(rows).argmax(1).tolist()}


def first_two_fail(number: int, seen: int) -> str | None:
    return {2: "429", 5: "drop"}.get(number)


HOP = ["attack", "hopskipjump", "--norm", "l2", "--eps", "smallest"]


def test_an_endpoint_that_gives_labels(here, call, mlp, monkeypatch):
    monkeypatch.setenv("TOKEN", "hush")
    with Server(labels_of(mlp), first_two_fail) as server:
        status, out, _ = call(
            *HOP, "--url", server.url + "?key=$TOKEN", "--gives", "labels", "--header", "Authorization: Bearer $TOKEN",
            "--queries", "120", "--samples", "12", "--batch-rows", "16", "--concurrency", "2", "--out", "out",
        )  # fmt: skip
        assert status == 0
        result = sp.AttackResult.load(here / "out" / "result")
        assert int(result.queries.forward.max()) == 120
        queries = result.queries
        assert server.computed == int(queries.forward.sum() + queries.verify.sum()) + queries.probe
        assert max(server.sizes) == 16
        assert {headers["authorization"] for _, headers in server.asked} == {"Bearer hush"}
    assert f"{server.computed:,} rows answered" in out
    results = json.loads((here / "out" / "result" / "results.json").read_text())
    assert results["traffic"]["answered"] == server.computed
    assert results["traffic"]["retried"] == 2
    assert results["complete"] is True
    assert (here / "out" / "result" / "report.html").stat().st_size > 10_000
    assert "half within" in out
    for path in (here / "out").rglob("*.*"):
        assert b"hush" not in path.read_bytes(), path
    ours = attacked(12, mlp, sp.attacks.HopSkipJump(), sp.Minimize("l2"), budget=sp.Budget(queries=120))
    assert_same(result, ours)


def test_an_endpoint_that_gives_scores(here, call, mlp):
    with Server(predictions(mlp)) as server:
        words = ["attack", "square", "--url", server.url, "--eps", "0.1", "--queries", "60", "--samples", "20", "--out", "out"]
        status, out, _ = call(*words, "--classes", "10")
        assert status == 0
    result = sp.AttackResult.load(here / "out" / "result")
    assert_same(result, attacked(20, mlp, "square", sp.Linf(0.1), budget=sp.Budget(queries=60)))
    (told,) = json.loads((here / "out" / "result" / "results.json").read_text())["attacks"]
    curve = sp.query_curve(result)
    assert [point["fooled"] for point in told["points"]] == [curve.fooled(q) for q in curve.at]
    assert curve.summary() in out
    assert not (here / "out" / "result" / "trace.safetensors").exists()


def test_an_endpoint_that_refuses_keeps_what_is_finished(here, call, mlp):
    """And the command that is printed then completes it to what an uninterrupted run gives."""
    words = [*HOP, "--gives", "labels", "--queries", "60", "--samples", "12", "--batch-size", "3", "--out", "out"]
    with Server(labels_of(mlp), lambda number, seen: "401" if number >= 200 else None) as server:
        status, out, err = call(*words, "--url", server.url)
        assert status == 2
        assert "401" in err
        assert len(err.strip().splitlines()) == 1
    part = sp.AttackResult.load(here / "out" / "result")
    assert 0 < len(part) < 12
    assert f"{len(part)} of 12 samples are finished" in out
    results = json.loads((here / "out" / "result" / "results.json").read_text())
    assert results["complete"] is False
    again = shlex.split(out.partition("go on with: ")[2].splitlines()[0])
    assert again[-2:] == ["--resume", "out/result"]
    with Server(labels_of(mlp), port=server.port):
        assert call(*again[1:])[0] == 0
    trace = sp.Trace()
    budget = sp.Budget(queries=60)
    ours = attacked(12, mlp, sp.attacks.HopSkipJump(), sp.Minimize("l2"), budget=budget, callback=trace)
    assert_same(sp.AttackResult.load(here / "out" / "result-2"), ours)
    (told,) = json.loads((here / "out" / "result-2" / "results.json").read_text())["attacks"]
    points = sp.query_curve(ours, trace).to_dict()["points"]
    assert told["points"] == json.loads(json.dumps(points).replace("Infinity", "null"))


def test_an_endpoint_that_answers_nothing(here, call, mlp):
    with Server(labels_of(mlp), lambda number, seen: "401" if number >= 60 else None) as server:
        status, out, err = call(*HOP, "--url", server.url, "--gives", "labels", "--samples", "5", "--out", "out")
        assert status == 2
        assert "401" in err
        assert "nothing is kept" in out
    assert not (here / "out").exists()


def test_ctrl_c_and_on(here, call, mlp):
    words = ["attack", "square", "--model", "net.py:Stops", "--queries", "80", "--samples", "40", "--batch-size", "8"]
    status, out, _ = call(*words, "--out", "out")
    assert status == 130
    assert 0 < len(sp.AttackResult.load(here / "out" / "result")) < 40
    again = shlex.split(out.partition("go on with: ")[2].splitlines()[0])
    assert call(*again[1:])[0] == 0
    result = sp.AttackResult.load(here / "out" / "result-2")
    assert len(result) == 40
    assert bool((result.queries.forward <= 80).all())
    status, _, err = call(*again[1:], "--eps", "0.2")
    assert status == 2
    assert "differs" in err


@pytest.mark.parametrize("name", ["net", "make", "classify", "asked"])
def test_models_of_a_file(here, call, mlp, name):
    assert call("attack", "pgd:steps=3", "--model", f"net.py:{name}", "--samples", "10", "--out", "out")[0] == 0
    result = sp.AttackResult.load(here / "out" / "result")
    split = sp.data.load("digits").test.take(10)
    assert torch.equal(
        result.adversarial, sp.attack(sp.Model(mlp), split.x, split.y, sp.attacks.PGD(steps=3), sp.Linf(0.1)).adversarial
    )
    assert not (here / "out" / "result" / "report.html").exists()  # gradients without a limit of queries: nothing to count


@pytest.mark.parametrize("words", [["net.py:numpy_labels"], ["net.py:own"], ["net.py:net", "--access", "labels"]])
def test_models_that_give_labels_only(here, call, words):
    _, model = inputs.model(words[0], sp.data.load("digits"), access=words[-1] if len(words) > 1 else None)
    assert model.access == Access.LABELS
    asked = ["--model", *words, "--samples", "6", "--queries", "40", "--out", "out"]
    assert call(*HOP, *asked)[0] == 0
    assert (here / "out" / "result" / "report.html").exists()
    status, _, err = call("attack", "square", *asked)
    assert status == 2
    assert "grants labels only" in err


def test_estimators_and_onnx_files(here, call):
    pytest.importorskip("sklearn")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    (here / "est.py").write_text(
        "import saddlepoint as sp\n"
        "from sklearn.linear_model import LogisticRegression\nfrom sklearn.ensemble import RandomForestClassifier\n"
        "train = sp.data.load('digits').train\nx, y = train.x.flatten(1).numpy(), train.y.numpy()\n"
        "linear = LogisticRegression(max_iter=2000).fit(x, y)\n"
        "forest = RandomForestClassifier(5, random_state=0).fit(x, y)\n"
    )
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(sp.data.load("digits").test.x[:10].flatten(1).T.contiguous().numpy(), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    (here / "dot.onnx").write_bytes(proto.SerializeToString())
    for model, attack, counted in (
        ("est.py:linear", "fgsm", False),
        ("dot.onnx", "fgsm", False),
        ("est.py:forest", "square:steps=20", True),
    ):
        status, _, err = call("attack", attack, "--model", model, "--samples", "8", "--out", f"out/{model[-5:]}")
        assert status == 0, err
        assert (here / "out" / model[-5:] / "result" / "report.html").exists() == counted
    status, _, err = call("attack", "fgsm", "--model", "est.py:forest", "--samples", "8")
    assert status == 2
    assert "scores only" in err


def test_minimal_is_fitted_to_the_queries(here, call):
    words = ["attack", "minimal", "--model", "net.py:net", "--norm", "l2", "--eps", "smallest", "--samples", "6"]
    status, out, _ = call(*words, "--queries", "30", "--out", "out")
    assert status == 0
    result = sp.AttackResult.load(here / "out" / "result")
    assert result.config["attack"] == json.loads(json.dumps(sp.attacks.minimal("l2", 60).settings()))
    assert int(result.queries.forward.max()) <= 30
    assert result.config["threat"]["eps"] is None
    assert "within Minimize(l2)" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("square", "either --model or --url"),
        ("square --model net.py:net --url http://localhost", "either --model or --url"),
        ("square --model net.py:net --gives labels", "--gives is for models behind --url"),
        ("square --url http://localhost --mean 0.5", "--mean is for --model"),
        ("square --url http://localhost --access labels", "--access is for --model"),
        ("square --url ftp://localhost", "http"),
        ("square --model net.py:own --access scores", "--access"),
        ("pgd --model net.py:net --access scores", "grants scores only"),
        ("pgd --model net.py:net --eps smallest", "ball of stated size"),
        ("hopskipjump --model net.py:net --norm l2 --eps smallest --targeted all", "one target"),
        ("square --model net.py:net --resume nowhere", "nowhere"),
        ("square --model net.py:net --eps 0.1,0.2", "one eps"),
        ("square --model nothing.onnx", "nothing.onnx"),
        ("square --model net.py:wants_numpy --samples 3", "fails on inputs"),
        ("minimal*3 --model net.py:net", "--passes"),
    ],
)
def test_errors_of_an_endpoint_or_a_model_are_one_line(here, call, words, text):
    status, _, err = call("attack", *words.split())
    assert status == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1
    assert not (here / "reports").exists()
