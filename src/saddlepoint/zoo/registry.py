"""The table of networks, and building one by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.zoo import networks

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


@dataclass(frozen=True)
class Entry:
    """A network of the zoo: `build(in_shape, num_classes)`, its usual input shape, what it is, where it comes from.

    Networks of `images` need inputs of shape (C, H, W); the others take any shape.
    """

    name: str
    build: Callable[[tuple[int, ...], int], nn.Module]
    in_shape: tuple[int, ...]
    summary: str
    source: str
    images: bool = True


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "softmax",
            networks.softmax,
            MNIST,
            "softmax regression",
            "Goodfellow et al. 2015, arXiv:1412.6572, section 5",
            images=False,
        ),
        Entry(
            "mlp",
            partial(networks.mlp, widths=(240, 240)),
            MNIST,
            "240-240 hidden ReLU units",
            "Goodfellow et al. 2015, arXiv:1412.6572, section 6 (the width; ReLU for maxout)",
            images=False,
        ),
        Entry(
            "mlp-500-150",
            partial(networks.mlp, widths=(500, 150)),
            MNIST,
            "500-150 hidden ReLU units",
            "Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, FC500-150-10",
            images=False,
        ),
        Entry(
            "digits-cnn",
            networks.digits_cnn,
            DIGITS,
            "two 3x3 convolutions and 128 hidden units, for 8x8 digits",
            "this project",
        ),
        Entry(
            "cnn-s",
            networks.cnn_s,
            MNIST,
            "two 5x5 convolutions with pooling and 128 hidden units",
            "after LeCun et al. 1998",
        ),
        Entry(
            "cnn-a",
            networks.cnn_a,
            MNIST,
            "two strided 4x4 convolutions and 100 hidden units",
            "Wong and Kolter 2018, arXiv:1711.00851",
        ),
        Entry(
            "lenet",
            networks.lenet,
            MNIST,
            "two 3x3 convolutions with pooling and 200 hidden units",
            "Ding et al. 2019, arXiv:1902.07623, advertorch",
        ),
        Entry(
            "smallcnn",
            networks.smallcnn,
            MNIST,
            "four 3x3 convolutions and three linear layers",
            "Carlini and Wagner 2017, arXiv:1608.04644; Zhang et al. 2019, arXiv:1901.08573",
        ),
        Entry(
            "resnet20",
            partial(networks.ResNet, n=3),
            CIFAR,
            "residual network of depth 20 with batch norm",
            "He et al. 2016, arXiv:1512.03385, section 4.2",
        ),
        Entry(
            "resnet56",
            partial(networks.ResNet, n=9),
            CIFAR,
            "residual network of depth 56 with batch norm",
            "He et al. 2016, arXiv:1512.03385, section 4.2",
        ),
        Entry(
            "preact-resnet18",
            networks.PreActResNet18,
            CIFAR,
            "wide residual network of depth 18, activated before its convolutions; usual for robust CIFAR-10",
            "He et al. 2016, arXiv:1603.05027; Rice et al. 2020, arXiv:2002.11569",
        ),
    )
}


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(ENTRIES)


def build(name: str, *, num_classes: int = 10, in_shape: tuple[int, ...] | None = None, seed: int = 0) -> nn.Module:
    """An untrained network by name, on the CPU, in training mode, with weights that depend on `seed` alone.

    in_shape: the shape of one input, by default the entry's own. The global random state is left as it was.
    Raises `UnknownNameError` for an unknown name and `InputError` for a shape that the network cannot take.
    """
    if name not in ENTRIES:
        raise UnknownNameError("network", name, ENTRIES)
    entry = ENTRIES[name]
    shape = entry.in_shape if in_shape is None else tuple(in_shape)
    if not shape or min(shape) < 1 or (entry.images and len(shape) != 3):
        wanted = "(channels, height, width)" if entry.images else "one or more sizes"
        raise InputError(f"network {name!r} needs in_shape = {wanted}, all at least 1; got {shape}")
    if num_classes < 2:
        raise InputError(f"network {name!r} needs at least 2 classes; got num_classes={num_classes}")
    # torch.manual_seed would seed the accelerators too, and fork_rng restores only what it is told to.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return entry.build(shape, num_classes)
