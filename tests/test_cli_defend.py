"""`saddlepoint defend` from the command line: what it writes and says, how it goes on, and its errors, one line each."""

import json
import re
import shlex
import tomllib

import pytest
import torch
from test_cli import call

import saddlepoint as sp
from saddlepoint.cli.options import each
from saddlepoint.evaluate import tournament

NET = """
import torch, saddlepoint as sp
def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
table = sp.defenses.Smoothed(sp.Model(make()), 0.1)
"""
ASK = [
    "defend",
    "--data",
    "digits",
    "--eps",
    "0.1",
    "--epochs",
    "1",
    "--samples",
    "30",
    "--effort",
    "quick",
    "--out",
    "out",
    "--no-independent",
]
ZOO, OWN = ("--model", "zoo:digits-cnn"), ("--model", "net.py:make")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_defend_writes_a_report_and_the_winner(here, capsys):
    status, out, err = call(
        capsys, *ASK, *ZOO, "--defense", "pgd-training:steps=2,alpha=0.1,bit-depth:bits=2", "--json", "f.json"
    )
    assert (status, err) == (0, "")
    assert "trained anew from the architecture of digits-cnn" in out
    document = json.loads((here / "out" / "results.json").read_text())
    assert [model["name"] for model in document["models"]] == [
        "undefended",
        "pgd-training:steps=2,alpha=0.1",
        "bit-depth:bits=2",
    ]
    assert document["complete"]
    assert document["command"].startswith("saddlepoint defend")
    figures = json.loads((here / "f.json").read_text())
    assert figures["models"] == document["models"]
    assert (here / "out" / "figures" / "defenses.png").exists()
    best = document["models"][[model["name"] for model in document["models"]].index(document["winner"])]
    net = sp.zoo.load_weights(sp.zoo.build("digits-cnn"), here / "out" / "winner.safetensors")
    test = sp.data.load("digits").test.take(30)
    model = sp.defenses.defense(best["name"]).protect(sp.Model(net), (1, 8, 8)) if ":" in best["name"] else sp.Model(net)
    assert float((model.predict(test.x) == test.y).double().mean()) == pytest.approx(best["clean_accuracy"])
    # the command in the report evaluates it
    page = (here / "out" / "report.html").read_text()
    again = re.search(r"<pre>saddlepoint (evaluate.*?)</pre>", page)
    assert (again is None) == best["name"].startswith("bit-depth")
    if again is not None:
        status, said, err = call(capsys, *shlex.split(again[1]), "--samples", "30", "--out", "again")
        assert (status, err) == (0, "")
        assert f"clean accuracy   {best['clean_accuracy']:.2%}" in said
    # the same command reads what is there
    checkpoints = {path: path.stat().st_mtime_ns for path in (here / "out" / "networks").glob("*/checkpoint.pt")}
    assert len(checkpoints) == 2
    assert call(capsys, "defend", "--config", "out/config.toml")[0] == 0
    assert all(path.stat().st_mtime_ns == then for path, then in checkpoints.items())
    assert json.loads((here / "out" / "results.json").read_text())["winner"] == document["winner"]


def test_ctrl_c_leaves_a_report_and_says_how_to_go_on(here, capsys, monkeypatch):
    real, calls = tournament.evaluate, []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(tournament, "evaluate", stops)
    words = [*ASK, *OWN, "--defense", "median", "--defense", "bit-depth"]
    status, out, _ = call(capsys, *words)
    assert status == 130
    assert "the same command goes on" in out
    document = json.loads((here / "out" / "results.json").read_text())
    assert not document["complete"]
    assert [model["name"] for model in document["models"]] == ["undefended"]
    assert "Not complete" in (here / "out" / "report.html").read_text()
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert len(json.loads((here / "out" / "results.json").read_text())["models"]) == 3
    assert "from net import make" in (here / "out" / "report.html").read_text()


def test_from_weights_begins_with_them(here, capsys):
    net = sp.train(sp.zoo.build("digits-cnn"), sp.data.load("digits").train, epochs=1).model.net
    sp.zoo.save_weights(net, here / "own.safetensors")
    status, out, _ = call(
        capsys, *ASK, "--model", "zoo:digits-cnn+own.safetensors", "--defense", "bit-depth:bits=8", "--from-weights"
    )
    assert status == 0
    assert "begins with the weights of own" in out
    best = sp.zoo.load_weights(sp.zoo.build("digits-cnn"), here / "out" / "winner.safetensors")
    for name, value in best.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_config_repeats_the_run(here, capsys):
    (here / "run.toml").write_text(
        '[defend]\nmodel = "net.py:make"\ndefense = ["median"]\nepochs = 1\nsamples = 20\neffort = "quick"\n'
    )
    status, _, err = call(capsys, "defend", "--config", "run.toml", "--out", "out")
    assert (status, err) == (0, "")
    written = tomllib.loads((here / "out" / "config.toml").read_text())["defend"]
    assert (written["defense"], written["epochs"], written["eps"]) == (["median"], 1, "0.1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*OWN, "--defense", "pdg-training"], "pgd-training"),
        ([*OWN, "--defense", "trades:gamma=1"], "gamma"),
        ([*OWN, "--defense", "trades+mart"], "joins trades and mart"),
        ([*OWN, "--eps", "0.1,0.2"], "one eps"),
        ([*OWN, "--eps", "8"], "eps"),
        (["--model", "net.py:table"], "single network"),
        (["--model", "zoo:digit-cnn"], "digits-cnn"),
        ([*OWN, "--data", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(here, capsys, words, says):
    status, _, err = call(capsys, *ASK, *words)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (here / "out" / "networks").exists()


def test_lists_with_settings():
    assert each(["trades:beta=1,steps=3,jpeg", "pgd-training:steps=4, alpha=2+jpeg:quality=5,median"]) == [
        "trades:beta=1,steps=3",
        "jpeg",
        "pgd-training:steps=4,alpha=2+jpeg:quality=5",
        "median",
    ]
