"""The command line: every command on real digits, and every error as one line with status 2."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import saddlepoint as sp
from saddlepoint.cli import inputs, main

NET = """
import torch
import saddlepoint as sp
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
model = sp.Model(net, bounds=(0, 1))
number = 3
def make():
    return net
def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def call(capsys, *words: str) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_evaluate_with_effort_keeps_a_campaign_and_gates(here, capsys):
    asked = ["evaluate", "--model", "net.py:net", "--eps", "0.05", "--samples", "40", "--effort", "quick", "--out", "out"]
    status, out, _ = call(capsys, *asked)
    assert status == 0
    assert "robust accuracy" in out
    folder = here / "out" / "net-linf-0.05"
    table = sp.Campaign(folder).table()
    assert table.num_rows >= 40
    status, out, _ = call(capsys, *asked, "--at-least", "0.999", "--junit", "gate.xml")
    assert status == 1
    assert sp.Campaign(folder).table().num_rows == table.num_rows  # nothing was run again
    assert "failure" in (here / "gate.xml").read_text()
    assert json.loads((folder / "gate.json").read_text())["passed"] is False
    assert call(capsys, *asked, "--at-least", "0.01")[0] == 0
    assert tomllib.loads((folder / "config.toml").read_text())["evaluate"]["effort"] == "quick"
    for wrong in (["--at-least", "0.5"], ["--effort", "quick", "--junit", "gate.xml"]):
        status, _, err = call(capsys, "evaluate", "--model", "net.py:net", *wrong)
        assert status == 2
        assert "--effort" in err or "--at-least" in err


def test_evaluate_in_several_norms_at_once(here, capsys):
    asked = ["evaluate", "--model", "net.py:net", "--samples", "30", "--effort", "quick", "--out", "out"]
    status, _, _ = call(capsys, *asked, "--eps", "0.05,0.02,l2:0.4")
    assert status == 0
    results = json.loads((here / "out" / "results.json").read_text())
    sizes = [(each["threat"]["name"], each["threat"]["eps"]) for each in results["evaluations"]]
    assert sizes == [("Linf", 0.02), ("Linf", 0.05), ("L2", 0.4)]
    (model,) = results["models"]
    assert model["worst"]["robust_accuracy"] <= min(each["robust_accuracy"] for each in results["evaluations"])
    for wrong, told in (("l3:0.5", "l3"), ("l2:", "number"), ("", "at least one")):
        status, _, err = call(capsys, *asked, "--eps", wrong)
        assert status == 2
        assert told in err


def test_evaluate_writes_report_results_and_configuration(here, capsys):
    status, out, _ = call(
        capsys, "evaluate", "--model", "net.py:net", "--model", "net.py:make", "--eps", "0.02,1/10", "--samples", "60",
        "--attack", "fgsm", "--attack", "pgd:steps=3*2", "--out", "out",
    )  # fmt: skip
    assert status == 0
    assert "report.html" in out
    results = json.loads((here / "out" / "results.json").read_text())
    assert results["complete"] is True
    assert (here / "out" / "report.html").stat().st_size > 10_000
    config = tomllib.loads((here / "out" / "config.toml").read_text())["evaluate"]
    assert config["attack"] == ["fgsm", "pgd:steps=3*2"]
    # the same run again, from the configuration that was written
    status, _, _ = call(capsys, "evaluate", "--config", "out/config.toml", "--out", "again")
    assert status == 0
    again = json.loads((here / "again" / "results.json").read_text())
    assert [m["curves"] for m in again["models"]] == [m["curves"] for m in results["models"]]


def test_several_names_with_commas_or_repeated(here, capsys):
    """One way of saying it everywhere: `--model a,b` is `--model a --model b`, and settings keep their commas."""
    asked = ["evaluate", "--model", "net.py:net,net.py:make", "--eps", "0.1", "--samples", "10"]
    assert call(capsys, *asked, "--attack", "fgsm,pgd:steps=2,loss=margin", "--attack", "bim:steps=2", "--out", "out")[0] == 0
    results = json.loads((here / "out" / "results.json").read_text())
    assert len(results["models"]) == 2
    attacks = [cell["settings"]["attack"] for cell in results["models"][1]["cells"]]
    assert [(attack["name"], attack.get("loss")) for attack in attacks] == [
        ("FGSM", "cross_entropy"), ("PGD", "margin"), ("BIM", "cross_entropy"),
    ]  # fmt: skip
    words = ["--norm", "l2", "--samples", "5", "--attack", "fmn:steps=3", "--out", "d"]
    assert call(capsys, "distance", "--model", "net.py:net,net.py:make", *words)[0] == 0
    assert len(json.loads((here / "d" / "results.json").read_text())["models"]) == 2
    quick = ["evaluate", "--model", "net.py:net", "--eps", "0.1", "--samples", "10", "--effort", "quick", "--export", "npz"]
    assert call(capsys, *quick, "--source", "zoo:mlp,zoo:softmax", "--out", "c")[0] == 0
    (exported,) = (here / "c").glob("*/adversarial-set-npz")
    status, out, _ = call(capsys, "recheck", str(exported), "--model", "net.py:net,net.py:make")
    assert status == 0
    assert "net-2" in out or "make" in out
    status, out, _ = call(capsys, "reproduce", "R1,R2", "R3", "--list", "--json")
    assert status == 0
    assert [entry["id"] for entry in json.loads(out)["entries"]] == ["R1", "R2", "R3"]


def test_command_line_wins_over_the_file(here, capsys):
    (here / "run.toml").write_text('model = ["net.py:net"]\neps = "0.3"\nsamples = 10\nattack = ["fgsm"]\n')
    status, out, _ = call(capsys, "evaluate", "--config", "run.toml", "--eps", "0.125", "--out", "out")
    assert status == 0
    assert "0.125" in out
    assert "0.3" not in out


def test_attack_saves_what_the_library_gives(here, capsys):
    status, out, _ = call(
        capsys,
        "attack",
        "pgd:steps=5",
        "--model",
        "net.py:model",
        "--eps",
        "0.1",
        "--samples",
        "50",
        "--seed",
        "3",
        "--out",
        "out",
    )
    assert status == 0
    assert "robust accuracy" in out
    saved = sp.AttackResult.load(here / "out" / "result")
    x, y = sp.data.load("digits").test.take(50).x, sp.data.load("digits").test.take(50).y
    with torch.random.fork_rng():
        model = inputs.network("net.py:model", sp.data.load("digits"))[1]
    ours = sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.1), seed=3)
    assert torch.equal(saved.adversarial, ours.adversarial)
    # a second run does not overwrite the first
    assert call(capsys, "attack", "fgsm", "--model", "net.py:model", "--samples", "5", "--out", "out")[0] == 0
    assert (here / "out" / "result-2").is_dir()


def test_distance_writes_its_report_and_what_it_ran(here, capsys):
    status, out, _ = call(
        capsys, "distance", "--model", "net.py:net", "--model", "net.py:make", "--norm", "l2", "--samples", "40",
        "--passes", "40", "--seed", "2", "--out", "out",
    )  # fmt: skip
    assert status == 0
    assert "report.html" in out
    assert "rho" in out
    results = json.loads((here / "out" / "results.json").read_text())
    assert (results["norm"], results["complete"], len(results["models"])) == ("l2", True, 2)
    assert (here / "out" / "report.html").stat().st_size > 10_000
    config = tomllib.loads((here / "out" / "config.toml").read_text())["distance"]
    assert config["attack"] == "minimal"
    digits = sp.data.load("digits").test.take(40)
    with torch.random.fork_rng():
        model = sp.Model(inputs.network("net.py:net", sp.data.load("digits"))[1], bounds=(0, 1))
    ours = sp.distance(model, digits.x, digits.y, "l2", budget=sp.Budget(passes=40), seed=2)
    assert results["models"][0]["rho"] == pytest.approx(ours.rho)
    assert f"{ours.rho:#.3g}" in out
    # the same run again, from the configuration that was written
    assert call(capsys, "distance", "--config", "out/config.toml", "--out", "again")[0] == 0
    again = json.loads((here / "again" / "results.json").read_text())
    assert [m["curve"] for m in again["models"]] == [m["curve"] for m in results["models"]]


def test_distance_of_other_kinds(here, capsys):
    words = ["distance", "--model", "net.py:net", "--samples", "15", "--attack", "fmn:steps=20", "--norm", "l1"]
    assert call(capsys, *words, "--own-decision", "--out", "own")[0] == 0
    own = json.loads((here / "own" / "results.json").read_text())
    assert own["own_decision"] is True
    assert own["models"][0]["counts"]["wrong"] == 0
    assert own["models"][0]["attack"]["settings"]["steps"] == 20
    assert call(capsys, *words, "--targeted", "next", "--out", "next")[0] == 0
    goal = json.loads((here / "next" / "results.json").read_text())["models"][0]["attack"]["goal"]
    assert goal["targeted"] is True


def test_train_then_evaluate_the_weights(here, capsys):
    words = ["train", "--model", "zoo:mlp", "--epochs", "3", "--adversary", "fgsm", "--eps", "0.05", "--out", "trained"]
    assert call(capsys, *words)[0] == 0
    history = json.loads((here / "trained" / "history.json").read_text())
    assert len(history["epochs"]) == 3
    weights = here / "trained" / "weights.safetensors"
    status, out, _ = call(
        capsys, "evaluate", "--model", f"zoo:mlp+{weights}", "--samples", "50", "--attack", "fgsm", "--out", "e"
    )
    assert status == 0
    accuracy = json.loads((here / "e" / "results.json").read_text())["models"][0]["clean_accuracy"]
    assert accuracy > 0.5
    # the same command again finds its checkpoint, and has nothing left to do
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert "epoch 1" not in out


def test_train_by_the_name_of_a_defense(here, capsys):
    words = ["train", "--model", "zoo:mlp", "--epochs", "8", "--adversary", "free:repeats=4", "--eps", "0.05", "--out", "free"]
    assert call(capsys, *words)[0] == 0
    history = json.loads((here / "free" / "history.json").read_text())
    assert len(history["epochs"]) == 2  # each batch is used four times
    photographs = ["--crop", "1", "--flip", "--average", "ema", "--out", "moved"]
    assert call(capsys, *words[:4], "1", "--adversary", "trades", *words[7:9], *photographs)[0] == 0
    config = json.loads((here / "moved" / "history.json").read_text())["config"]
    assert "ema" in config["average"]
    objective = config["objective"]
    assert (objective["name"], objective["padding"], objective["flip"]) == ("CropAndFlip", 1, True)
    assert objective["inner"]["name"] == "TRADES"
    words[6] = "trades:gamma=1"
    status, _, err = call(capsys, *words[:-1], "other")
    assert status != 0
    assert "gamma" in err


def test_harden_reports_old_and_new_examples(here, capsys):
    status, out, _ = call(capsys, "harden", "--model", "net.py:net", "--eps", "0.05", "--epochs", "2", "--out", "h")
    assert status == 0
    assert len(re.findall(r"accuracy of .*%", out)) == 3
    assert (here / "h" / "weights.safetensors").exists()


def test_list_attacks_is_a_query(here, capsys):
    _, everything, _ = call(capsys, "list", "attacks")
    assert all(cls.__name__ in everything for cls in sp.attacks.find())
    _, labels, _ = call(capsys, "list", "attacks", "--access", "labels", "--norm", "l2")
    assert "UniformNoise" in labels
    assert "PGD" not in labels
    assert "SignNoise" not in labels
    _, targeted_only, _ = call(capsys, "list", "attacks", "--targeted")
    assert "OTCM" in targeted_only
    for option, minimizes in (("--minimizes", True), ("--ball-only", False)):
        _, some, _ = call(capsys, "list", "attacks", option, "--norm", "l0")
        names = {cls.__name__ for cls in sp.attacks.find(minimizes=minimizes, norm="l0")}
        assert set(re.findall(r"^(\w+) .* (?:smallest|in a ball)  +(?:iterative|one step)$", some, flags=re.M)) == names


def test_minimal_is_fitted_to_the_norm_and_the_passes(here, capsys):
    words = ["attack", "Minimal", "--model", "net.py:model", "--norm", "l2", "--eps", "1", "--passes", "100", "--samples", "30"]
    assert call(capsys, *words, "--out", "out")[0] == 0
    saved = sp.AttackResult.load(here / "out" / "result")
    assert saved.config["attack"]["name"] == "Finally"
    assert inputs.attack("minimal", sp.Norm.L2, 100) == sp.attacks.minimal("l2", 100)
    assert bool((saved.queries.total <= 100).all())
    assert bool((saved.distance[saved.success] <= 1).all())
    assert saved.success_rate > 0.5
    words = ["evaluate", "--model", "net.py:net", "--attack", "minimal", "--norm", "l0", "--eps", "2", "--samples", "10"]
    assert call(capsys, *words, "--passes", "40", "--out", "report")[0] == 0


def test_other_lists(here, capsys):
    assert "digits" in call(capsys, "list", "data")[1]
    assert "resnet20" in call(capsys, "list", "networks")[1]
    assert "dlr" in call(capsys, "list", "losses")[1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("attack pdg --model net.py:net", "'PGD'"),
        ("attack pgd:step=3 --model net.py:net", "'steps'"),
        ("attack pgd:steps=many --model net.py:net", "many"),
        ("attack pgd:schedule=cosin --model net.py:net", "'cosine'"),
        ("attack pgd*x --model net.py:net", "restarts"),
        ("attack fgsm*3 --model net.py:net", "random start"),
        ("attack fgsm --model net.py:nett", "'net'"),
        ("attack fgsm --model net.py:number", "int"),
        ("attack fgsm --model net.py:broken", "no weights here"),
        ("attack fgsm --model nothing.py:net", "nothing.py"),
        ("attack fgsm --model net", "FILE.py:NAME"),
        ("attack fgsm --model zoo:resnet21", "'resnet20'"),
        ("attack fgsm --model zoo:mlp+bad.pt", "bad.pt"),
        ("attack fgsm --model zoo:mlp+evil.pt", "evil.pt"),
        ("attack fgsm --model syntax.py:net", "SyntaxError"),
        ("attack fgsm --model net.py:net --data digit", "'digits'"),
        ("attack fgsm --model net.py:net --eps big", "8/255"),
        ("attack fgsm --model net.py:net --eps 0.1,0.2", "one eps"),
        ("attack fgsm --model net.py:net --eps -1", "eps"),
        ("attack fgsm --model net.py:net --norm l2", "linf"),
        ("attack fgsm --model net.py:net --targeted nearest", "next"),
        ("attack fgsm --model net.py:net --targeted 12", "0 to 9"),
        ("attack fgsm --model net.py:model --mean 0.5", "--mean"),
        ("attack fgsm --model net.py:net --mean 1,2", "channel"),
        ("distance --model net.py:net --attack pgd", "DDN"),
        ("distance --model net.py:net --attack ddm", "'DDN'"),
        ("distance --model net.py:net --attack minimal*3", "--passes"),
        ("attack minimal:passes=10 --model net.py:net", "--passes"),
        ("train --model net.py:net --adversary minimal", "such as pgd"),
        ("distance --model net.py:net --attack ddn --norm linf", "l2"),
        ("distance --model net.py:net --targeted all", "one target"),
        ("distance --model net.py:net --config typo.toml", "'samples'"),
        ("evaluate --model net.py:net --config missing.toml", "missing.toml"),
        ("evaluate --model net.py:net --config bad.toml", "bad.toml"),
        ("evaluate --model net.py:net --config typo.toml", "'samples'"),
        ("list attacks --access label", "'labels'"),
        ("attack fgsm --model net.py:net --device gpu0", "gpu0"),
        ("attack fgsm --model net.py:net --device cuda", "cuda"),
        ("attack net.py:Nothing --model net.py:net", "Nothing"),
        ("attack net.py:number --model net.py:net", "no attack"),
        ("attack fgsm --model narrow.py:net", "fails on inputs"),
        ("train --model net.py:net --adversary pgd --eps 0.1,0.2", "one eps"),
    ],
)
def test_errors_are_one_line_and_status_2(here, capsys, words, text):
    (here / "bad.pt").write_bytes(b"nothing")
    torch.save({"weights": Path("pickled")}, here / "evil.pt")
    (here / "syntax.py").write_text("net = (")
    (here / "bad.toml").write_text("= 3")
    (here / "typo.toml").write_text("sample = 3")
    (here / "narrow.py").write_text("import torch; net = torch.nn.Linear(3, 2)")
    status, _, err = call(capsys, *words.split())
    assert status == 2
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_usage_errors_have_status_2(here, capsys):
    assert call(capsys, "evaluate")[0] == 2
    assert call(capsys, "attack", "fgsm", "--model", "net.py:net", "--norm", "l3")[0] == 2
    assert call(capsys, "nonsense")[0] == 2


def test_debug_shows_the_traceback(here, capsys):
    status, _, err = call(capsys, "attack", "pdg", "--model", "net.py:net", "--debug")
    assert status == 2
    assert "Traceback" in err


def test_inputs_outside_the_bounds_are_one_line(here, capsys):
    (here / "narrow.py").write_text(NET.replace("bounds=(0, 1)", "bounds=(0, 0.5)"))
    status, _, err = call(capsys, "attack", "fgsm", "--model", "narrow.py:model")
    assert status == 2
    assert "bounds" in err


def test_an_attack_of_ones_own_file(here, capsys):
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nimport saddlepoint as sp\n"
        "from saddlepoint.attacks.ascent import Recipe, SteepestAscent\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(SteepestAscent):\n    steps: int = 2\n"
        "    declaration = sp.attacks.BIM.declaration\n"
        "    def recipe(self):\n        return Recipe(steps=self.steps)\n"
    )
    status, out, _ = call(capsys, "attack", "mine.py:Mine:steps=3", "--model", "net.py:net", "--samples", "20", "--out", "o")
    assert status == 0
    assert "Mine within Linf(0.1)" in out


def test_ctrl_c_keeps_what_is_finished(here, capsys):
    (here / "slow.py").write_text(
        NET
        + """
class Stops(torch.nn.Module):
    calls = 0
    def forward(self, x):
        Stops.calls += 1
        if Stops.calls == 41:
            raise KeyboardInterrupt
        return net(x)
stops = Stops()
"""
    )
    status, _out, _ = call(
        capsys, "evaluate", "--model", "slow.py:stops", "--eps", "0.05,0.1,0.2", "--attack", "fgsm", "--attack", "pgd:steps=20",
        "--samples", "50", "--out", "out",
    )  # fmt: skip
    assert status == 130
    results = json.loads((here / "out" / "results.json").read_text())
    assert results["complete"] is False
    assert 1 <= len(results["models"][0]["cells"]) < 6


def test_ctrl_c_during_distance_keeps_the_finished_samples(here, capsys):
    (here / "slow.py").write_text(
        NET
        + """
class Stops(torch.nn.Module):
    calls = 0
    stops = 60
    def forward(self, x):
        Stops.calls += 1
        if Stops.calls == self.stops:
            raise KeyboardInterrupt
        return net(x)
late = Stops()
early = Stops()
early.stops = 3
"""
    )
    words = ["distance", "--samples", "30", "--passes", "40", "--batch-size", "8"]
    status, out, _ = call(capsys, *words, "--own-decision", "--model", "slow.py:late", "--model", "net.py:net", "--out", "out")
    assert status == 130
    assert "interrupted" in out
    results = json.loads((here / "out" / "results.json").read_text())
    assert results["complete"] is False
    assert 0 < sum(results["models"][0]["counts"].values()) < 30
    status, _, err = call(capsys, *words, "--model", "slow.py:early", "--out", "nothing")
    assert status == 2
    assert "nothing to report" in err
    assert not (here / "nothing").exists()


def test_demo_runs_end_to_end(here, capsys, monkeypatch):
    """The whole job, with shorter training."""
    import saddlepoint.cli.demo as demo

    monkeypatch.setattr(demo, "train", lambda *args, **kw: sp.train(*args, **{**kw, "epochs": min(kw["epochs"], 8)}))
    status, out, _ = call(capsys, "demo", "--out", "d")
    assert status == 0
    assert "report.html" in out
    results = json.loads((here / "d" / "results.json").read_text())
    assert [m["name"] for m in results["models"]] == ["undefended", "hardened"]


def test_ctrl_c_during_a_training_tells_no_story_of_a_half_trained_network(here, capsys, monkeypatch):
    import saddlepoint.cli.demo as demo
    import saddlepoint.defenses.hardening as hardening

    def interrupted(*args, **settings):
        def stop(record):
            raise KeyboardInterrupt

        return sp.train(*args, **{**settings, "epochs": 2, "on_epoch": stop})

    monkeypatch.setattr(demo, "train", interrupted)
    assert call(capsys, "demo", "--out", "d")[0] == 130
    assert not (here / "d").exists()
    monkeypatch.setattr(hardening, "train", interrupted)
    assert call(capsys, "harden", "--model", "net.py:net", "--epochs", "2", "--out", "h")[0] == 130
    assert not (here / "h").exists()


def test_module_and_help_start_without_heavy_imports():
    """`saddlepoint --help` does not wait for matplotlib or scikit-learn."""
    code = (
        "import sys; from saddlepoint.cli import main; main(['--help']); "
        "print([m for m in ('matplotlib', 'sklearn', 'jinja2', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"
