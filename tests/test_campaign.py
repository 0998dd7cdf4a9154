"""Campaigns: killed at any instant they go on, nothing lost, nothing twice; what is damaged or differs is named. Exports."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import saddlepoint as sp
from saddlepoint.data.formats import read_npz_splits
from saddlepoint.defenses.transforms import BitDepth
from saddlepoint.engine.result import STATUSES, AttackResult, Queries, measure
from saddlepoint.errors import DataError, InputError, MissingExtraError, SaddlepointWarning, UnknownNameError
from saddlepoint.evaluate.campaign import Campaign, fingerprint, manifest
from saddlepoint.evaluate.export import AdversarialSet, export

MANIFEST: dict[str, Any] = {
    "model": {"fingerprint": "m"},
    "data": {"fingerprint": "d"},
    "threat": {"norm": "linf", "eps": 0.1},
    "seed": 0,
    "configuration": {"effort": "standard", "limits": {"passes": None}},
}
CONFIG = {"attack": {"name": "PGD"}, "threat": MANIFEST["threat"], "goal": {"targeted": False}, "budget": {"passes": 10}}


def found(rows: Tensor, status: str | None = None, salt: int = 0) -> AttackResult:
    """A result for the samples at these positions; each row depends on its position (and `salt`) alone."""
    count = len(rows)
    draws = torch.stack([torch.rand(8, generator=torch.Generator().manual_seed(1000 * salt + int(row))) for row in rows])
    code = STATUSES.index(sp.Status(status)) if status else None
    codes = (rows % 2 + 1 if code is None else torch.full((count,), code)).to(torch.int8)
    number = torch.arange(count)
    return AttackResult(
        adversarial=draws.view(count, 1, 2, 4), codes=codes, labels=rows % 10, targets=torch.full_like(rows, -1),
        clean_predicted=rows % 10, predicted=rows * 0 - 2 if status == "error" else (rows + 1) % 10, margin=draws[:, 0] - 0.5,
        distances=measure(draws, torch.zeros_like(draws)), distance=draws.amax(1).double(),
        queries=Queries(rows + 2, rows + 1, rows % 2, probe=3), iterations=rows + 1, zero_gradients=torch.zeros_like(rows),
        ids=100 + rows, index=number, order=number, seconds=time.perf_counter(), tau=1e-4, notes=("a note",), config=CONFIG,
    )  # fmt: skip


# what runs in other processes: a stand-in for an evaluation


def plan(parts: int) -> Iterator[tuple[str, Tensor]]:
    """Two stages of parts of four samples; the second one attacks every other sample, last ones first."""
    for rows in torch.arange(4 * parts).split(4):
        yield "first", rows
    for rows in torch.arange(0, 4 * parts, 2).flip(0).split(4):
        yield "second/hard one", rows


def note(log: Path, *words: object) -> None:
    """A line that outlives this process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, (" ".join(map(str, words)) + "\n").encode())
    os.close(handle)


def evaluate(path: Path, log: Path, parts: int, fatal: int | None = None) -> None:
    """Do what is missing. fatal: die at this one of all calls that change what is on the disk."""
    if fatal is not None:
        at_call(fatal, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with Campaign(path) as campaign:
        campaign.open(MANIFEST)
        note(log, "opened")
        for stage, rows in plan(parts):
            kept = campaign.finished(stage)
            done = set() if kept is None else set(kept.index.tolist())
            if not done >= set(rows.tolist()):
                note(log, "begin", stage, int(rows[0]))
                campaign.add(stage, found(rows), rows)
                note(log, "added", stage, int(rows[0]))
            if stage == "first" and campaign.document("after first") is None and int(rows[-1]) == 4 * parts - 1:
                campaign.record("after first", {"left": parts})
        campaign.finish()
    note(log, "end")


def at_call(number: int, do: Callable[[], None], patch: Callable[..., None] = setattr) -> list[str]:
    """`do` before the call of this number (from 0) of those that change what is on the disk. Their names, as they come."""
    seen: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == number + 1:
                do()
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        patch(os, name, wrapped(name, getattr(os, name)))
    return seen


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts processes in milliseconds, from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "PIL.Image", "pandas", "saddlepoint.evaluate.export", "pyarrow.parquet"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Campaign]:
    """Uninterrupted campaigns by the number of parts."""
    made: dict[int, Campaign] = {}

    def make(parts: int) -> Campaign:
        if parts not in made:
            folder = tmp_path_factory.mktemp("whole")
            evaluate(folder / "campaign", folder / "log", parts)
            made[parts] = Campaign(folder / "campaign")
        return made[parts]

    return make


def assert_same(one: Campaign, other: Campaign) -> None:
    """In everything but times."""
    assert one.table().drop_columns(["seconds"]).equals(other.table().drop_columns(["seconds"]))
    assert one.stages == other.stages
    for stage in one.stages:
        a, b = one.finished(stage), other.finished(stage)
        assert a is not None
        assert b is not None
        for name, column in a.columns().items():
            assert torch.equal(column, b.columns()[name]), name
        assert (a.tau, a.notes, a.config, a.queries.probe) == (b.tau, b.notes, b.config, b.queries.probe)
    assert one.document("after first") == other.document("after first")
    assert one.complete is other.complete is True
    for folder in ("tables", "shards", "documents"):
        assert sorted(os.listdir(one.path / folder)) == sorted(os.listdir(other.path / folder))


def assert_nothing_twice(log: Path) -> None:
    added: set[str] = set()
    for line in log.read_text().splitlines():
        event, _, what = line.partition(" ")
        assert not (event == "begin" and what in added), f"{what} was run again"
        if event == "added":
            added.add(what)


# killed


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants(
    kills: int, tmp_path: Path, processes: multiprocessing.context.ForkServerContext, whole: Callable[[int], Campaign]
) -> None:
    path, log, parts = tmp_path / "campaign", tmp_path / "log", 8
    draws = random.Random(kills)
    for _ in range(kills):
        seen = log.stat().st_size if log.exists() else 0
        process = processes.Process(target=evaluate, args=(path, log, parts))
        process.start()
        while process.is_alive() and not (log.exists() and log.stat().st_size > seen):
            time.sleep(0.001)
        process.join(draws.uniform(0, 0.05))
        process.kill()
        process.join()
    evaluate(path, log, parts)
    assert_nothing_twice(log)
    assert_same(Campaign(path), whole(parts))


def test_killed_between_any_two_writes(
    tmp_path: Path,
    processes: multiprocessing.context.ForkServerContext,
    whole: Callable[[int], Campaign],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        calls = at_call(-1, lambda: None, patched.setattr)
        evaluate(tmp_path / "counted", tmp_path / "log", 1)
    assert calls.count("replace") == 2 * 2 + 3  # two parts, the manifest and two documents
    for fatal in range(len(calls)):
        path, log = tmp_path / f"{fatal}", tmp_path / f"{fatal}.log"
        process = processes.Process(target=evaluate, args=(path, log, 1, fatal))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        before = {part.stage for part in Campaign(path).parts()}
        evaluate(path, log, 1)
        assert before <= {part.stage for part in Campaign(path).parts()}
        assert_nothing_twice(log)
        assert_same(Campaign(path), whole(1))


def test_leftovers_of_a_killed_run_are_ignored_and_removed(tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(torch.arange(3)), torch.arange(3))
    leftovers = [
        tmp_path / "tables" / ".000002-a.parquet-abc.tmp",
        tmp_path / "shards" / ".000002-a.safetensors-abc.tmp",
        tmp_path / "shards" / "000002-a.safetensors",
        tmp_path / "documents" / ".x.json-abc.tmp",
        tmp_path / ".manifest.json-abc.tmp",
    ]
    foreign = [tmp_path / "report.html", tmp_path / ".mine.tmp", tmp_path / "shards" / "mine.safetensors"]
    for file in leftovers + foreign:
        file.write_bytes(b"half a fi")
    kept = campaign.finished("a")
    assert kept is not None
    assert len(kept) == campaign.table().num_rows == 3
    with Campaign(tmp_path) as again:
        again.open(MANIFEST)
    assert not any(file.exists() for file in leftovers)
    assert all(file.exists() for file in foreign)


def test_attacks_resumed_in_parts(mlp: nn.Module, samples: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """Real results: what comes back is what was found, and an evaluation in two goes ends as one in one go."""
    x, y = samples
    attack, threat = sp.attacks.PGD(steps=5), sp.Linf(0.1)

    def run(path: Path, parts: int) -> Campaign:
        model = sp.Model(mlp)
        model.probe(x)  # on the same inputs whatever is left to do, since the margin that a success needs comes from it
        campaign = Campaign(path)
        with campaign:
            campaign.open(manifest(model, x, y, threat, seed=1, configuration={"attack": attack.settings()}))
            kept = campaign.finished("pgd")
            done = [] if kept is None else kept.index.tolist()
            for rows in list(torch.arange(len(x)).split(8))[len(done) // 8 : parts]:
                result = sp.attack(model, x[rows], y[rows], attack, threat, seed=1, ids=rows)
                campaign.add("pgd", result, rows)
        return campaign

    one = run(tmp_path / "one", 3)
    run(tmp_path / "two", 2)
    two = run(tmp_path / "two", 3)
    assert one.table().drop_columns(["seconds"]).equals(two.table().drop_columns(["seconds"]))
    kept, direct = two.finished("pgd"), sp.attack(sp.Model(mlp), x, y, attack, threat, seed=1)
    assert kept is not None
    assert torch.equal(kept.adversarial, direct.adversarial)
    assert torch.equal(kept.index, torch.arange(len(x)))
    assert kept.robust_accuracy == direct.robust_accuracy
    assert kept.summary().splitlines()[:8] == direct.summary().splitlines()[:8]


# the table and the results


def test_table(tmp_path: Path) -> None:
    first, second = torch.tensor([4, 2]), torch.tensor([3, 0, 1])
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("late", found(second, salt=1), second)
        campaign.add("b", found(first), first)
        campaign.add("b", found(second), second)
        campaign.add("b", found(torch.tensor([9])), torch.tensor([9]))
    table = campaign.table().to_pydict()
    assert campaign.stages == ("late", "b")
    assert table["stage"] == ["late"] * 3 + ["b"] * 6
    assert table["row"] == [0, 1, 3, 0, 1, 2, 3, 4, 9]
    assert table["sample"] == [100 + row for row in table["row"]]
    wanted = found(torch.tensor(table["row"][3:]))
    columns = {
        "label": wanted.labels, "clean_predicted": wanted.clean_predicted, "predicted": wanted.predicted,
        "margin": wanted.margin, "distance": wanted.distance, **wanted.distances, "forward": wanted.queries.forward,
        "backward": wanted.queries.backward, "verify": wanted.queries.verify, "iterations": wanted.iterations,
    }  # fmt: skip
    for name, column in columns.items():
        assert table[name][3:] == column.tolist(), name
    assert table["status"][3:] == wanted.status.tolist()
    assert set(table) == {"sample", "row", "stage", "status", "seconds", *columns}
    late = campaign.finished("late")
    assert late is not None
    assert sum(table["seconds"][:3]) == pytest.approx(late.seconds)


def test_an_empty_campaign(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    assert campaign.table().num_rows == 0
    assert "margin" in campaign.table().column_names
    assert campaign.finished("a") is None
    assert campaign.document("a") is None
    assert not campaign.complete
    with pytest.raises(DataError, match="is no campaign"):
        _ = campaign.manifest


def test_results_that_share_memory_can_be_kept(tmp_path: Path) -> None:
    rows = torch.arange(3)
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        shared = torch.randn(6, 1, 2, 4)
        result = found(rows)
        object.__setattr__(result, "adversarial", shared[::2].transpose(2, 3))
        object.__setattr__(result, "predicted", result.labels)
        campaign.add("a", result, rows)
    kept = campaign.finished("a")
    assert kept is not None
    assert torch.equal(kept.adversarial, shared[::2].transpose(2, 3))


def test_add_refuses(tmp_path: Path) -> None:
    rows = torch.arange(3)
    campaign = Campaign(tmp_path)
    with pytest.raises(InputError, match="open for reading only"):
        campaign.add("a", found(rows), rows)
    with campaign:
        campaign.open(MANIFEST)
        for bad in (rows[:2], torch.tensor([0, 1, 1]), rows[:, None]):
            with pytest.raises(InputError, match="3 different positions"):
                campaign.add("a", found(rows), bad)
        campaign.add("a", found(rows), rows)
        with pytest.raises(InputError, match="1 samples of 'a' were added before, the first at position 2"):
            campaign.add("a", found(rows), rows + 2)
        campaign.add("b", found(rows), rows)
        with pytest.raises(InputError, match="needs a name"):
            campaign.add("", found(rows), rows)
    with Campaign(tmp_path) as again:
        again.open(MANIFEST)
        with pytest.raises(InputError, match="were added before"):
            again.add("a", found(rows), rows)


def test_documents(tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        with pytest.raises(InputError, match="open for reading only"):
            campaign.record("a", {})
        campaign.open(MANIFEST)
        for name in ("a", "linf/8", "..", "."):
            campaign.record(name, {"name": "old"})
            campaign.record(name, {"name": name, "values": [1, None]})
        assert not campaign.complete
        campaign.finish()
    for name in ("a", "linf/8", "..", "."):
        assert Campaign(tmp_path).document(name) == {"name": name, "values": [1, None]}
    assert Campaign(tmp_path).complete
    (tmp_path / "documents" / "a.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"documents/a\.json is damaged"):
        campaign.document("a")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"saddlepoint\[campaigns\]"):
        Campaign(tmp_path)


# what may not change


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"fingerprint": "n"}}, "\n  the model's weights or layers differ"),
        ({"model": {"name": "other"}}, 'model.name: null before, "other" now'),
        ({"data": {"fingerprint": "e"}}, "\n  the samples or labels differ"),
        ({"configuration": {"sources": ["f"]}}, "\n  the models whose gradients may be borrowed differ"),
        ({"configuration": {"plans": [{"name": "PGD"}]}}, "\n  the cascade's attacks differ"),
        ({"threat": {"norm": "linf", "eps": 0.2}}, "threat.eps: 0.1 before, 0.2 now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"configuration": {"effort": "quick", "limits": {"passes": 5}}}, "configuration.limits.passes: null before, 5 now"),
        ({"extra": "x" * 100}, 'extra: null before, "x'),
    ],
)
def test_another_run_is_refused(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.record("anything", {})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="was begun with something else") as caught:
        Campaign(tmp_path).open({**MANIFEST, **changed})
    assert told in str(caught.value)
    assert "model" in told or "model" not in str(caught.value)
    assert max(map(len, str(caught.value).splitlines()[1:])) < 120
    assert (tmp_path / "manifest.json").read_bytes() == before
    with Campaign(tmp_path) as campaign:  # the one that was refused let go of it
        campaign.open(MANIFEST)


def test_a_campaign_that_keeps_nothing_may_begin_anew(tmp_path: Path) -> None:
    """As after a run that failed at once, with the wrong data say."""
    for seed in (0, 1):
        with Campaign(tmp_path) as campaign:
            campaign.open({**MANIFEST, "seed": seed})
    assert Campaign(tmp_path).manifest["seed"] == 1


def test_manifest_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JSON"):
        Campaign(tmp_path).open({**MANIFEST, "model": object()})


def test_other_versions_only_warn(tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        assert campaign.manifest["versions"]["torch"] == torch.__version__
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["versions"]["torch"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with Campaign(tmp_path) as campaign, pytest.warns(SaddlepointWarning, match=r'torch: "1\.0" before'):
        campaign.open(MANIFEST)


def net(activation: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), activation or nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def test_fingerprint_tells_models_apart() -> None:
    changed = net()
    with torch.no_grad():
        weight = changed[4].weight
        weight[2, 71] = torch.nextafter(weight[2, 71], torch.tensor(9.0))
    moved = net()
    moved[1].running_mean[1] += 1e-3
    models = [
        sp.Model(net()), sp.Model(changed), sp.Model(moved), sp.Model(net(nn.Tanh())), sp.Model(net().double()),
        sp.Model(net(), bounds=(-1, 1)), sp.Model(net(), mean=0.5), sp.Model(net(), std=0.5),
        sp.Defended(sp.Model(net()), [BitDepth(4)]), sp.Defended(sp.Model(net()), [BitDepth(5)]),
        sp.Ensemble([sp.Model(net()), sp.Model(net(nn.Tanh()))]), sp.Ensemble([sp.Model(net())]),
    ]  # fmt: skip
    prints = [fingerprint(model) for model in models]
    assert len(set(prints)) == len(models)
    assert fingerprint(sp.Model(net())) == prints[0]
    assert all(len(each) == 64 for each in prints)


def test_fingerprint_survives_use() -> None:
    class Held(nn.Module):
        def __init__(self, held: object) -> None:
            super().__init__()
            self.held = held

        def extra_repr(self) -> str:
            return str(self.held)  # with its address

    for model in (sp.Model(net()), sp.Defended(sp.Model(net()), [BitDepth(4)]), sp.Ensemble([sp.Model(net())])):
        before = fingerprint(model)
        model.probe(torch.rand(4, 1, 8, 8))
        assert fingerprint(model) == before
    one, other = object(), object()  # so that the addresses differ
    assert str(one) != str(other)
    assert fingerprint(sp.Model(Held(one))) == fingerprint(sp.Model(Held(other)))


def test_manifest_tells_what_matters(tmp_path: Path) -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    model = sp.Model(net())

    def of(**changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "model": model,
            "x": x,
            "y": y,
            "threat": sp.Linf(0.1),
            "seed": 0,
            "configuration": {"effort": "quick"},
        } | changes
        return manifest(settings.pop("model"), settings.pop("x"), settings.pop("y"), settings.pop("threat"), **settings)

    with Campaign(tmp_path) as campaign:
        campaign.open(of())
        campaign.record("anything", {})
    for told, changes in {
        "the model's weights or layers differ": {"model": sp.Model(net(nn.Tanh()))},
        "the samples or labels differ": {"x": x.flip(0)},
        "threat.eps: ": {"threat": sp.Linf(0.2)},
        "seed: ": {"seed": 1},
        "configuration.effort: ": {"configuration": {"effort": "standard"}},
    }.items():
        with pytest.raises(InputError) as caught:
            Campaign(tmp_path).open(of(**changes))
        assert f"\n  {told}" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 2
    model.probe(x)
    with Campaign(tmp_path) as campaign:
        campaign.open(of())


# two processes


def hold(path: Path, ready: Path) -> None:
    campaign = Campaign(path)
    campaign.open(MANIFEST)
    ready.touch()
    signal.pause()


def test_two_processes(tmp_path: Path, processes: multiprocessing.context.ForkServerContext) -> None:
    path, ready = tmp_path / "campaign", tmp_path / "ready"
    process = processes.Process(target=hold, args=(path, ready))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.005)
    for _ in range(2):
        with pytest.raises(InputError, match=f"in use by process {process.pid}:"):
            Campaign(path).open(MANIFEST)
    assert Campaign(path).manifest["seed"] == 0  # reading goes on
    process.kill()
    process.join()
    with Campaign(path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(torch.arange(2)), torch.arange(2))


def test_twice_in_one_process(tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            Campaign(tmp_path).open(MANIFEST)
        with pytest.raises(InputError, match="in use"):
            campaign.open(MANIFEST)
        campaign.add("a", found(torch.arange(2)), torch.arange(2))  # still its own
    dropped = Campaign(tmp_path)
    dropped.open(MANIFEST)
    del dropped
    with Campaign(tmp_path) as again:
        again.open(MANIFEST)


# full disks and damaged files


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", range(6))  # a shard and a table: synchronise, rename, synchronise the folder
def test_full_disk(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(8)
    campaign = Campaign(tmp_path)
    with campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(rows[:3]), rows[:3])
        with monkeypatch.context() as patched:
            at_call(call, full, patched.setattr)
            with pytest.raises(DataError, match=r"No space left.*samples: a 3\); make room and run the same again"):
                campaign.add("a", found(rows[3:]), rows[3:])
        committed = call == 5  # the table has its name already
        files = [*tmp_path.glob("tables/*"), *tmp_path.glob("shards/*"), *tmp_path.glob("*/.*")]
        assert len(files) == 2 * (1 + committed)
        assert campaign.table().num_rows == (8 if committed else 3)
        if committed:
            with pytest.raises(InputError, match="added before"):
                campaign.add("a", found(rows[3:]), rows[3:])
        else:
            campaign.add("a", found(rows[3:]), rows[3:])
    assert campaign.table()["row"].to_pylist() == rows.tolist()


def test_full_disk_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *args: full())
        with pytest.raises(DataError, match=r"cannot write .*manifest.json: No space left.*none so far"):
            Campaign(tmp_path).open(MANIFEST)
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *args: full())
            with pytest.raises(DataError, match="No space left"):
                campaign.record("a", {})
        assert campaign.document("a") is None
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="cannot write"):
        Campaign(file).open(MANIFEST)


def cut(content: bytes) -> bytes:
    return content[:-1]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def nothing(content: bytes) -> bytes:
    return b""


def flip(content: bytes) -> bytes:
    place = len(content) - 5
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, half, nothing, flip, None], ids=lambda d: d.__name__ if d else "missing")
@pytest.mark.parametrize("kind", ["shard", "table"])
def test_damaged_files_are_named(kind: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    first, second = torch.arange(3), torch.arange(3, 6)
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(first), first)
        campaign.add("a", found(second), second)
    part = campaign.parts()[1]
    file: Path = getattr(part, kind)
    if damage is not None:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    if kind == "table" and damage is None:  # then the part was never finished
        assert campaign.table().num_rows == 3
    else:
        with pytest.raises(DataError) as caught:
            campaign.finished("a")
        assert str(caught.value).startswith(str(file))
        assert f"delete {part.table}, and the next run does its samples of 'a' again" in str(caught.value)
        if kind == "table":
            with pytest.raises(DataError, match="is damaged or missing"):
                campaign.table()
            with pytest.raises(DataError, match="is damaged or missing"):
                Campaign(tmp_path).open(MANIFEST)
        part.table.unlink()  # as it says
    with Campaign(tmp_path) as again:
        again.open(MANIFEST)
        kept = again.finished("a")
        assert kept is not None
        assert kept.index.tolist() == first.tolist()
        again.add("a", found(second), second)
    assert again.table()["row"].to_pylist() == list(range(6))


def test_every_flipped_byte_of_a_table_column_is_noticed(tmp_path: Path) -> None:
    """The data pages come before the footer, which starts where the file's last eight bytes say."""
    rows = torch.arange(3)
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(rows), rows)
    (part,) = campaign.parts()
    content, wanted = part.table.read_bytes(), campaign.table()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    unnoticed = 0
    for place in range(4, footer, 7):
        part.table.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert campaign.table().equals(wanted)  # a byte that means nothing to the reader
            unnoticed += 1
        except DataError:
            continue
    assert unnoticed < (footer // 7) // 2


def test_damaged_manifest(tmp_path: Path) -> None:
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)
        campaign.add("a", found(torch.arange(2)), torch.arange(2))
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content[:40])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Campaign(tmp_path).open(MANIFEST)
    path.write_text('{"format": 2}')
    with pytest.raises(DataError, match=r"format 2.*update"):
        Campaign(tmp_path).open(MANIFEST)
    path.unlink()
    with pytest.raises(DataError, match="results but no manifest"):
        Campaign(tmp_path).open(MANIFEST)
    path.write_bytes(content)
    with Campaign(tmp_path) as campaign:
        campaign.open(MANIFEST)


# exports


def images(count: int = 12, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, channels, 5, 4), generator=generator).float() / 255
    moved = (x + 0.1 * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    return x, moved, torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_rounds_and_says_by_how_much(channels: int, tmp_path: Path) -> None:
    x, adversarial, y = images(channels=channels)
    done = export(x, adversarial, y, tmp_path / "set")
    back, clean = AdversarialSet(tmp_path / "set"), AdversarialSet(tmp_path / "set", original=True)
    read, labels = next(iter(DataLoader(back, batch_size=len(back))))
    assert torch.equal(labels, y)
    assert torch.equal(read, torch.round(adversarial.double() * 255).float() / 255)
    assert torch.equal(torch.stack([image for image, _ in clean]), x)
    assert done.moved == float((read.double() - adversarial.double()).abs().max())
    assert 0.4 / 255 < done.moved <= 0.5 / 255 + 1e-7
    assert done.linf_written == pytest.approx(float((read - x).abs().max()))
    assert done.linf == pytest.approx(float((adversarial - x).abs().max()))
    assert f"{done.moved:.3g}" in done.summary()
    assert "left the ball" in done.summary()
    names = sorted(os.listdir(tmp_path / "set" / "adversarial"))
    assert names[0] == "00.png"
    assert names[11] == "11.png"
    with Image.open(tmp_path / "set" / "adversarial" / names[11]) as image:
        assert np.array_equal(np.atleast_3d(np.asarray(image)), torch.round(255 * adversarial[11]).permute(1, 2, 0).numpy())
    document = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert document["moved"] == done.moved
    assert document["labels"] == y.tolist()


def test_png_in_other_bounds_stays_inside(tmp_path: Path) -> None:
    x, adversarial, y = images()
    low, high = -2.1, 2.6
    scaled = [((high - low) * each + low).clamp(low, high) for each in (x, adversarial)]
    export(*scaled, y, tmp_path / "set", bounds=(low, high))
    read = torch.stack([image for image, _ in AdversarialSet(tmp_path / "set")])
    sp.Model(nn.Flatten(), bounds=(low, high)).check_inputs(read)
    assert float((read - scaled[1]).abs().max()) <= 0.5 / 255 * (high - low) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_npz_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    x, adversarial, y = images()
    done = export(x.to(dtype), adversarial.to(dtype), y, tmp_path / "set", "npz")
    assert done.moved == 0
    assert "exactly" in done.summary()
    for original, wanted in ((False, adversarial), (True, x)):
        read = AdversarialSet(tmp_path / "set", original=original)
        assert torch.equal(torch.stack([image for image, _ in read]), wanted.to(dtype).to(read[0][0].dtype))
        assert [label for _, label in read] == y.tolist()
    _, split = read_npz_splits(tmp_path / "set" / "samples.npz")  # as `--data set/samples.npz` reads it
    assert torch.equal(split.x, adversarial.to(dtype).float())


def test_tables_export_as_npz(tmp_path: Path) -> None:
    x = torch.randn(3, 7)
    export(x, x + 1, torch.arange(3), tmp_path / "set", "npz")
    assert torch.equal(AdversarialSet(tmp_path / "set")[-1][0], x[2] + 1)
    with pytest.raises(IndexError):
        AdversarialSet(tmp_path / "set")[3]


def test_reevaluation_on_another_model(mlp: nn.Module, cnn: nn.Module, samples: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = samples
    result = sp.attack(sp.Model(mlp), x, y, sp.attacks.PGD(steps=10), sp.Linf(0.2))
    export(x, result.adversarial, y, tmp_path / "set", "npz")
    ((read, labels),) = DataLoader(AdversarialSet(tmp_path / "set"), batch_size=len(x))
    accuracy = {name: float((sp.Model(net).predict(read) == labels).double().mean()) for name, net in (("m", mlp), ("c", cnn))}
    assert accuracy["m"] == result.robust_accuracy
    assert accuracy["c"] > accuracy["m"]  # they were made for the other one


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_set_knows_where_its_samples_stood(kind: Any, tmp_path: Path) -> None:
    x, adversarial, y = images()
    rows = torch.tensor([7, 2, 30])
    export(x[:3], adversarial[:3], y[:3], tmp_path / "set", kind, samples=rows)
    assert AdversarialSet(tmp_path / "set").samples == (7, 2, 30)
    export(x, adversarial, y, tmp_path / "other", kind)
    assert AdversarialSet(tmp_path / "other").samples is None
    manifest = tmp_path / "other" / "manifest.json"
    before = json.loads(manifest.read_text())
    del before["samples"]  # as sets were written before
    manifest.write_text(json.dumps(before))
    assert AdversarialSet(tmp_path / "other").samples is None
    for wrong in (rows[:2], rows.float(), rows[:, None]):
        with pytest.raises(InputError, match="samples must be"):
            export(x[:3], adversarial[:3], y[:3], tmp_path / "no", kind, samples=wrong)


def test_export_refuses(tmp_path: Path) -> None:
    x, adversarial, y = images()
    folder = tmp_path / "set"
    for arguments, told in (
        ((x, adversarial[:3], y), "same shape"),
        ((x, adversarial, y[:3]), "labels"),
        ((x.flatten(1), adversarial.flatten(1), y), 'kind="npz"'),
        ((x[:, :2], adversarial[:, :2], y), "1 or 3 channels"),
        ((x, adversarial + 0.5, y), "bounds"),
        ((x, adversarial * torch.nan, y), "bounds"),
    ):
        with pytest.raises(InputError, match=told):
            export(*arguments, folder)
    with pytest.raises(UnknownNameError):
        export(x, adversarial, y, folder, "jpg")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    export(x, adversarial, y, folder)
    with pytest.raises(InputError, match="exists already"):
        export(x, adversarial, y, folder)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_export_appears_complete_or_not_at_all(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, adversarial, y = images()
    with monkeypatch.context() as patched:
        calls = at_call(-1, full, patched.setattr)
        export(x, adversarial, y, tmp_path / "whole", kind)
    for call in range(len(calls)):
        with monkeypatch.context() as patched:
            at_call(call, full, patched.setattr)
            with pytest.raises(DataError, match="No space left"):
                export(x, adversarial, y, tmp_path / "set", kind)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_damaged_sets_are_named(tmp_path: Path) -> None:
    x, adversarial, y = images()
    export(x, adversarial, y, tmp_path / "png")
    export(x, adversarial, y, tmp_path / "npz", "npz")
    victim = tmp_path / "png" / "adversarial" / "03.png"
    victim.write_bytes(victim.read_bytes()[:50])
    assert AdversarialSet(tmp_path / "png")[2][1] == int(y[2])
    with pytest.raises(DataError, match=r"03\.png"):
        AdversarialSet(tmp_path / "png")[3]
    Image.new("RGB", (2, 2)).save(victim)
    with pytest.raises(DataError, match=r"03\.png.*shape"):
        AdversarialSet(tmp_path / "png")[3]
    arrays = tmp_path / "npz" / "samples.npz"
    np.savez(arrays, x=np.zeros((2, 2)))
    with pytest.raises(DataError, match="of the shape that"):
        AdversarialSet(tmp_path / "npz")
    arrays.write_bytes(b"PK")
    with pytest.raises(DataError, match="npz"):
        AdversarialSet(tmp_path / "npz")
    with pytest.raises(DataError, match=r"export\(\) wrote"):
        AdversarialSet(tmp_path)
