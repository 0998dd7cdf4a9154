"""The zoo: architectures as published, deterministic initial weights, and weight files that never run code."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saddlepoint import zoo
from saddlepoint.errors import DataError, InputError, UnknownNameError

# Worked out by hand from the papers' descriptions.
PARAMETERS = {
    "softmax": 784 * 10 + 10,
    "mlp": 785 * 240 + 241 * 240 + 241 * 10,
    "mlp-500-150": 785 * 500 + 501 * 150 + 151 * 10,
    "digits-cnn": 10 * 32 + 289 * 64 + 1025 * 128 + 129 * 10,
    "cnn-s": 26 * 16 + 401 * 32 + 513 * 128 + 129 * 10,
    "cnn-a": 17 * 16 + 257 * 32 + 1569 * 100 + 101 * 10,
    "lenet": 10 * 32 + 289 * 64 + 3137 * 200 + 201 * 10,
    "smallcnn": 10 * 32 + 289 * 32 + 289 * 64 + 577 * 64 + 1025 * 200 + 201 * 200 + 201 * 10,
    "resnet20": 269_722,  # as counted in the usual re-implementations: 0.27M in table 6 of He et al.
    "resnet56": 853_018,  # 0.85M there
    "preact-resnet18": 11_172_170,  # 11.17M in the usual re-implementations
}


def test_names_are_all_counted() -> None:
    assert set(zoo.names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_network(name: str) -> None:
    net = zoo.build(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]
    entry = zoo.ENTRIES[name]
    assert entry.name == name
    assert entry.summary
    assert entry.source
    x = torch.rand(3, *entry.in_shape, generator=torch.Generator().manual_seed(0))
    logits = net.eval()(x)
    assert logits.shape == (3, 10)
    assert (logits < 0).any(), "logits, not probabilities"
    assert torch.allclose(net(x[1:2]), logits[1:2], atol=1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_other_shape_and_classes(name: str) -> None:
    net = zoo.build(name, in_shape=(2, 24, 20), num_classes=3).eval()
    assert net(torch.zeros(2, 2, 24, 20)).shape == (2, 3)


def test_tables() -> None:
    assert zoo.build("mlp", in_shape=(7,), num_classes=2)(torch.zeros(4, 7)).shape == (4, 2)


@pytest.mark.parametrize("name", ["cnn-a", "resnet20"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    one = zoo.build(name, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the global random state must be left alone"
    torch.rand(1)
    again, other = zoo.build(name, seed=5), zoo.build(name, seed=6)
    pairs = zip(one.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_default_device_is_not_used() -> None:
    with torch.device("meta"):
        net = zoo.build("cnn-a")
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownNameError, match="'resnet20'"):
        zoo.build("resnet-20")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cnn-a", {"in_shape": (28, 28)}, r"'cnn-a' needs in_shape = \(channels, height, width\).* got \(28, 28\)"),
        ("mlp", {"in_shape": ()}, "one or more sizes"),
        ("mlp", {"in_shape": (0,)}, "at least 1"),
        ("smallcnn", {"in_shape": (1, 8, 8)}, r"in_shape \(1, 8, 8\) is too small"),
        ("mlp", {"num_classes": 1}, "at least 2 classes"),
    ],
)
def test_impossible_networks(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.build(name, **options)


def test_entries_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        zoo.ENTRIES["mlp"].name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cnn-a", "0 2 5 7"),
        ("lenet", "conv1 conv2 linear1 linear2"),
        (
            "smallcnn",
            " ".join([f"feature_extractor.conv{i}" for i in range(1, 5)] + [f"classifier.fc{i}" for i in range(1, 4)]),
        ),
    ],
)
def test_layer_names_are_the_published_ones(name: str, keys: str) -> None:
    expected = [f"{key}.{kind}" for key in keys.split() for kind in ("weight", "bias")]
    assert list(zoo.build(name).state_dict()) == expected


def test_resnet_shortcut_subsamples_and_pads() -> None:
    """With the convolutions off, the first block of stage 2 is its shortcut (He et al. 2016, option A)."""
    net = zoo.build("resnet20").eval()
    block = net.get_submodule("layer2.0")
    nn.init.zeros_(block.get_submodule("bn2").weight)  # type: ignore[arg-type]
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    assert out.shape == (1, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet_averages_over_the_image() -> None:
    net = zoo.build("resnet20").eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = x
    for name in ("conv1", "bn1", "relu1", "layer1", "layer2", "layer3"):
        features = net.get_submodule(name)(features)
    assert features.shape == (2, 64, 4, 4)
    assert torch.allclose(net(x), net.get_submodule("linear")(features.flatten(2).mean(2)), atol=1e-5)


# Weights


def filled(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(value)
    return net


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    net, path = zoo.build("resnet20", seed=1), tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        zoo.save_weights(net, path)
    else:
        torch.save(net.state_dict(), path)
    other = zoo.build("resnet20", seed=2)
    assert zoo.load_weights(other, path) is other
    for (name, a), (_, b) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert os.listdir(tmp_path) == [path.name]


def test_tied_weights_are_written(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    zoo.save_weights(net, tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    zoo.load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.state_dict()["1.weight"], first.weight)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    zoo.save_weights(zoo.build("softmax"), path)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left"):
        zoo.save_weights(filled(zoo.build("softmax"), 1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end the name in \.safetensors"):
        zoo.save_weights(zoo.build("softmax"), tmp_path / "w.pt")


class Trap:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_unsafe_files_are_refused(tmp_path: Path) -> None:
    torch.save({"1.weight": Trap(tmp_path / "trace")}, tmp_path / "trap.pt")
    torch.save(zoo.build("softmax"), tmp_path / "whole.pt")
    for name in ("trap.pt", "whole.pt"):
        with pytest.raises(DataError, match=f"{name}: not safe to load") as caught:
            zoo.load_weights(zoo.build("softmax"), tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value), "torch's advice to load it anyway must not be passed on"
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": 1}, "epoch": 3}, "found a dictionary of state_dict, epoch"),
        ([1, 2], "found list"),
        ({}, "lacks 1.weight, 1.bias"),
        ({"1.weight": torch.zeros(10, 784)}, "lacks 1.bias;"),
        (
            {"1.weight": torch.zeros(10, 784), "1.bias": torch.zeros(10), "2.bias": torch.zeros(1)},
            "has surplus 2.bias",
        ),
        ({f"{i}": torch.zeros(1) for i in range(5)}, "lacks 1.weight, 1.bias and has surplus 0, 1, 2 and 2 more"),
        (
            {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)},
            r"1.weight has shape \(10, 64\), Sequential needs \(10, 784\)",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    net = filled(zoo.build("softmax"), 7)
    with pytest.raises(DataError, match=message) as caught:
        zoo.load_weights(net, tmp_path / "w.pt")
    assert "w.pt" in str(caught.value)
    assert all((tensor == 7).all() for tensor in net.state_dict().values()), "a refused file must change nothing"


def test_not_strict(tmp_path: Path) -> None:
    torch.save({"1.bias": torch.ones(10), "extra": torch.ones(1)}, tmp_path / "w.pt")
    net = zoo.load_weights(filled(zoo.build("softmax"), 7), tmp_path / "w.pt", strict=False)
    state = net.state_dict()
    assert (state["1.bias"] == 1).all()
    assert (state["1.weight"] == 7).all()
    torch.save(OrderedDict(other=torch.ones(1)), tmp_path / "w.pt")
    with pytest.raises(DataError, match="doesn't fit"):
        zoo.load_weights(net, tmp_path / "w.pt", strict=False)
    torch.save({"1.bias": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="has shape"):
        zoo.load_weights(net, tmp_path / "w.pt", strict=False)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("size", [0, 5, 300, -10])
def test_truncated_weights(tmp_path: Path, suffix: str, size: int) -> None:
    net, path = zoo.build("softmax"), tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(net.state_dict(), path)
    else:
        zoo.save_weights(net, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"w.{suffix}: (corrupt|not safe)") as caught:
        zoo.load_weights(net, path)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such weight file"):
        zoo.load_weights(zoo.build("softmax"), tmp_path / "w.pt")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(DataError, match=r"expected a \.safetensors, \.pt or \.pth file"):
        zoo.load_weights(zoo.build("softmax"), tmp_path / "w.h5")
