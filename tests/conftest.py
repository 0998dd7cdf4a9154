"""Models that train in a second, shared by all tests."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp

sys.path.insert(0, str(Path(__file__).parent / "contracts"))

from contract_support import train


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not walk through it in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Training inputs (N, 1, 8, 8) and labels."""
    data = sp.data.load("digits")
    assert data.train is not None
    return data.train.x, data.train.y


@pytest.fixture(scope="session")
def samples() -> tuple[Tensor, Tensor]:
    """24 test digits. Four labels are wrong, so that some samples are misclassified from the beginning."""
    split = sp.data.load("digits").test.take(24)
    y = split.y.clone()
    y[::6] = (y[::6] + 3) % 10
    return split.x, y


@pytest.fixture(scope="session")
def mlp(digits: tuple[Tensor, Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), *digits)


@pytest.fixture(scope="session")
def cnn(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """With batch normalisation and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        return train(net, digits[0][:400], digits[1][:400], epochs=30)


@pytest.fixture(scope="session")
def model(mlp: nn.Module) -> sp.Model:
    return sp.Model(mlp)
