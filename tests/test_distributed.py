"""Training in two processes: the same weights as in one, one checkpoint, exact resume, and errors that all of them raise."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import SAME, everywhere_alike, trained

import saddlepoint as sp
from saddlepoint.defenses.distributed import Processes, processes


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes on this machine found."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("distributed")
    program = [sys.executable, str(Path(__file__).with_name("distributed_worker.py")), str(folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):  # as a launcher does, without the seconds that one takes
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        said = {**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(program, env={**os.environ, **said}, stderr=subprocess.PIPE, text=True))
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stderr.close()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_give_the_weights_of_one(both, name):
    alone = SAME[name]()
    for one, other in zip(alone.model.networks()[0].state_dict().values(), both[0][name].values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for record, figures in zip(alone.epochs, both[0][f"{name}: epochs"], strict=True):
        assert record.loss == pytest.approx(figures[0], rel=1e-4)
        assert (record.clean_accuracy, record.robust_accuracy) == figures[1:]


@pytest.mark.parametrize("name", [*SAME, *everywhere_alike(), "whole"])
def test_the_processes_hold_the_same_network(both, name):
    for one, other in zip(*(found[name].values() for found in both), strict=True):
        assert torch.equal(one, other)
    assert both[0].get(f"{name}: epochs") == both[1].get(f"{name}: epochs")


def test_resume_is_exact_with_what_each_process_remembers(both):
    for found in both:
        for one, other in zip(found["whole"].values(), found["resumed"].values(), strict=True):
            assert torch.equal(one, other)


def test_only_the_main_process_reports(both):
    assert [found["shown"] for found in both] == [[0, 1], []]


def test_errors_are_raised_by_all(both):
    for found in both:
        assert found["other data"].startswith("InputError: the processes were asked for different runs; they differ in: ")
        assert "it takes its share of each batch by itself" in found["other data"]
        assert found["nan"].startswith("ModelError: the training loss is ")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_the_batch(count):
    index = torch.arange(7)
    shares = [Processes(count, rank).share(index) for rank in range(count)]
    assert torch.equal(torch.cat(shares).sort().values, index)
    assert torch.equal(Processes(count, count - 1).share(index[: count - 1 or 1]), index[: count - 1 or 1])


def test_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    trained(None, checkpoint=tmp_path / "run.pt")
    document = torch.load(tmp_path / "run.pt", weights_only=True)
    document["config"]["processes"] = 2
    torch.save(document, tmp_path / "run.pt")
    with pytest.raises(sp.errors.DataError, match="differs in: processes"):
        trained(None, checkpoint=tmp_path / "run.pt")


def launched(monkeypatch, accelerate) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "accelerate", accelerate)


def test_missing_accelerate_names_the_extra(monkeypatch):
    launched(monkeypatch, None)
    with pytest.raises(sp.errors.MissingExtraError, match=r"saddlepoint\[distributed\]"):
        trained(None)


def test_accelerate_that_was_set_up_otherwise_is_refused(monkeypatch):
    state = SimpleNamespace(num_processes=1, device="cpu", process_index=0)
    launched(monkeypatch, SimpleNamespace(PartialState=lambda **_: state))
    with pytest.raises(sp.errors.InputError, match="2 processes were launched, but accelerate was set up for 1"):
        trained(None)
    state.num_processes, state.device = 2, "cuda:1"
    with pytest.raises(sp.errors.InputError, match="the network is on cpu, but this process has cuda:1"):
        trained(None)


def test_alone_there_is_one_process():
    assert processes() == Processes(1, 0)
    assert processes().main
