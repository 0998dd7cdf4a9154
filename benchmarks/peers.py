"""PGD in the l-infinity ball by the libraries beside which we measure, all behind one signature."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 10  # of every network measured here; only ART asks


@dataclass(frozen=True)
class Setting:
    """PGD with a random start: eps and step in input units, inputs in [0, 1]."""

    eps: float
    step: float
    steps: int
    batch: int


Attack = Callable[[nn.Module, Tensor, Tensor, Setting, int], Tensor]
"""(network, x, y, setting, seed) -> adversarial inputs; one batch, unless the library cuts batches itself."""


@dataclass(frozen=True)
class Peer:
    """A library: its name and version, and its PGD or what went wrong on importing it."""

    name: str
    version: str
    attack: Attack | None
    error: str = ""


def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # ART draws from the global state


def foolbox(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
    import foolbox as fb

    _seeded(seed)
    model = fb.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = fb.attacks.LinfPGD(abs_stepsize=setting.step, steps=setting.steps, random_start=True)
    return attack(model, x, y, epsilons=setting.eps)[1]


def torchattacks(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
    import torchattacks as ta

    _seeded(seed)
    return ta.PGD(net, eps=setting.eps, alpha=setting.step, steps=setting.steps, random_start=True)(x, y)


def art(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    _seeded(seed)
    model = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        model, norm=np.inf, eps=setting.eps, eps_step=setting.step, max_iter=setting.steps, num_random_init=1,
        batch_size=setting.batch, verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def adversarial_library(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
    from adv_lib.attacks import pgd_linf

    _seeded(seed)
    return pgd_linf(net, x, y, setting.eps, steps=setting.steps, absolute_step_size=setting.step)


_PEERS: tuple[tuple[str, str, str, Attack], ...] = (
    ("Foolbox", "foolbox", "foolbox", foolbox),
    ("torchattacks", "torchattacks", "torchattacks", torchattacks),
    ("ART", "adversarial-robustness-toolbox", "art", art),
    ("adversarial-library", "adv-lib", "adv_lib.attacks", adversarial_library),
)


def installed() -> list[Peer]:
    """The peers that are installed. One that cannot be imported is listed with its error."""
    # torchattacks and adversarial-library import these for models and plots that aren't used here
    for name in ("torchvision", "torchvision.models", "visdom"):
        sys.modules.setdefault(name, types.ModuleType(name))
    found = []
    for name, package, module, attack in _PEERS:
        try:
            release = version(package)
        except PackageNotFoundError:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's error is a result
            found.append(Peer(name, release, None, f"{type(error).__name__}: {error}"))
        else:
            found.append(Peer(name, release, attack))
    return found
