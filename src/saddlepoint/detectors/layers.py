"""What goes on inside a model: the activations that detectors look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.base import Classifier

LAST = "last hidden layer"
"""The name of what goes into the network's last linear layer, in place of a module's name."""

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU6, nn.Hardswish)


def activations(model: Classifier, x: Tensor, layers: Sequence[str] = (LAST,)) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, C) and what the named layers give for x (N, ...), (N, ...) each, differentiable; one forward pass.

    layers: names of modules, as in `net.named_modules()`, or `LAST`. Of one that runs several times the last output counts.
    Errors: `InputError` for models that are no networks, `UnknownNameError` for unknown layers.
    """
    modules = _modules(model)
    unknown = next((name for name in layers if name != LAST and name not in modules), None)
    if unknown is not None:
        raise UnknownNameError("layer", unknown, [*modules, LAST])
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            kept[name] = output

    with ExitStack() as hooks:
        hooks.enter_context(model.frozen())  # first, so that no other thread's pass meets the hooks
        for name in set(layers) - {LAST}:
            handle = modules[name].register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            hooks.callback(handle.remove)
        if LAST in layers:
            for module in modules.values():
                if isinstance(module, nn.Linear):
                    handle = module.register_forward_pre_hook(lambda _, inputs: keep(LAST, inputs[0]))
                    hooks.callback(handle.remove)
        logits = model.forward(x)
    missing = [name for name in layers if name not in kept]
    if missing:
        raise InputError(
            f"no output of {missing[0]!r} was seen in a forward pass; name layers of the network: {', '.join(modules)}"
        )
    return logits, [kept[name] for name in layers]


def hidden_layers(model: Classifier, x: Tensor) -> tuple[str, ...]:
    """Names of the layers that stand for a network's depths, in the order in which they run on x (N, ...).

    The activations (ReLU and the like) that are modules; where there are none, the convolutions and linear layers.
    """
    modules = _modules(model)
    order: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(model.frozen())
        for name, module in modules.items():
            handle = module.register_forward_hook(lambda _, __, ___, name=name: order.append(name))
            hooks.callback(handle.remove)
        model.forward(x[:2])
    ran = list(dict.fromkeys(order))
    chosen = [name for name in ran if isinstance(modules[name], _ACTIVATIONS)]
    chosen = chosen or [name for name in ran if isinstance(modules[name], nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)][:-1]
    if not chosen:
        raise InputError("no hidden layers were found: name them, layers=(...), as in net.named_modules()")
    return tuple(chosen)


def checked_layers(layers: object) -> tuple[str, ...] | None:
    """Names of layers as a tuple; one name may stand alone, and be a number, as in text. Errors: `InputError`."""
    named = (str(layers),) if isinstance(layers, str | int) else layers
    if named is None:
        return None
    if not isinstance(named, tuple | list) or not named or not all(isinstance(name, str) for name in named):
        raise InputError(f"layers must be names of modules, such as ('1', '3'), or None for all hidden ones; got {layers!r}")
    if len(set(named)) < len(named):
        raise InputError(f"each layer counts once; got {layers!r}")
    return tuple(named)


def layers_in(arrays: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The layers that arrays were learnt of, from the arrays' names."""
    return sorted(name.removeprefix(prefix) for name in arrays if name.startswith(prefix))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of a (N, D) and b (M, D), (N, M), differentiable also where it is 0."""
    centre = b.detach().mean(0)  # what all have in common would cost digits
    a, b = a - centre, b - centre
    return torch.addmm((a * a).sum(1)[:, None] + (b * b).sum(1), a, b.T, alpha=-2).clamp(min=0)


def _modules(model: Classifier) -> dict[str, nn.Module]:
    networks = model.networks()
    if not networks:
        raise InputError("this model has no network to look into: take a detector that asks for scores alone")
    return {name: module for net in networks for name, module in net.named_modules() if name}
