"""`Model`: a PyTorch network, or any callable on tensors, as the system under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError, ModelError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access

Outputs = str | int | Callable[[Any], Tensor]  # Any: what a user's network returns is the user's own type
Statistics = float | Sequence[float] | Tensor


class Labelled(Protocol):
    """Inputs (N, ...) with their classes (N,), such as `sp.data.load("digits").test`."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...


@final
class Model(Classifier):
    """A classifier made from a network that gives logits.

    net: an `nn.Module` or a callable, (N, ...) -> (N, C) logits; (N,) or (N, 1) is taken as one logit f and becomes (0, f).
    bounds: range of the inputs, in the units in which perturbations are measured; None if unbounded.
    mean, std: normalisation applied before the network, a number or one per channel (dimension 1 of the inputs).
    num_classes: checked if given, otherwise found out.
    access: what an adversary may use of it.
    device: move the inputs there; by default where the parameters are. A network elsewhere is an error.
    outputs: where the logits are if the network doesn't return a tensor: a key, an attribute, an index or a function.
        Without it, `.logits`, `["logits"]` and a tuple's first entry are recognised.

    The network runs in eval mode and is handed back exactly as it was.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> model.predict(torch.zeros(2, 4)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        net: Callable[[Tensor], Any],
        bounds: tuple[float, float] | None = (0.0, 1.0),
        mean: Statistics | None = None,
        std: Statistics | None = None,
        num_classes: int | None = None,
        access: Access = Access.GRADIENTS,
        device: torch.device | str | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        if isinstance(net, Classifier):
            raise InputError("net is a Saddlepoint model already; use it as it is")
        if not callable(net):
            raise InputError(f"net must be an nn.Module or a callable on tensors; got {type(net).__name__}")
        super().__init__(bounds, access, num_classes, device=device)
        self.net = net
        self._mean, self._std = self._statistics("mean", mean), self._statistics("std", std)
        if self._std is not None and not bool((self._std > 0).all()):
            raise InputError(f"std must be positive; got {std}")
        self._outputs = outputs
        self._normalisers: dict[tuple[torch.dtype, torch.device, int], tuple[Tensor, Tensor]] = {}
        if device is not None and isinstance(net, nn.Module) and torch.device(device).type != self.device.type:
            raise InputError(f"the network is on {self.device}, but device={device!r}: call net.to({str(device)!r}) first")

    @staticmethod
    def _statistics(name: str, value: Statistics | None) -> Tensor | None:
        if value is None:
            return None
        tensor = torch.as_tensor(value, dtype=torch.float64)
        if tensor.dim() > 1 or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} must be a finite number or one per channel; got {value}")
        return tensor

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.net,) if isinstance(self.net, nn.Module) else ()

    def forward(self, x: Tensor) -> Tensor:
        logits = self._adapt(self.net(self._normalise(x)))
        if logits.dim() == 1:
            logits = logits[:, None]
        if logits.dim() != 2 or len(logits) != len(x) or not logits.is_floating_point():
            raise ModelError(
                f"for inputs of shape {tuple(x.shape)} the network must give floating logits of shape ({len(x)}, C); it gives "
                f"{logits.dtype} {tuple(logits.shape)}"
            )
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits

    def _normalise(self, x: Tensor) -> Tensor:
        if self._mean is None and self._std is None:
            return x
        key = (x.dtype, x.device, x.dim())
        if key not in self._normalisers:
            self._normalisers[key] = self._broadcastable(x)
        mean, std = self._normalisers[key]
        return (x - mean) / std

    def _broadcastable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 2:
            raise InputError(f"x must be a batch (N, ...) of inputs; its shape is {tuple(x.shape)}")
        mean = self._mean if self._mean is not None else torch.zeros(())
        std = self._std if self._std is not None else torch.ones(())
        for name, value in (("mean", mean), ("std", std)):
            if value.dim() and len(value) not in (1, x.shape[1]):
                raise InputError(
                    f"{name} has {len(value)} values, but inputs of shape {tuple(x.shape)} have {x.shape[1]} channels"
                )
        shape = (-1, *([1] * (x.dim() - 2)))
        with torch.inference_mode(False):  # what is kept for later calls must be fit for gradients
            return mean.to(x.device, x.dtype).view(shape), std.to(x.device, x.dtype).view(shape)

    def _adapt(self, raw: Any) -> Tensor:  # Any: see Outputs
        found = raw
        match self._outputs:
            case None:
                if isinstance(raw, Mapping) and "logits" in raw:
                    found = raw["logits"]
                elif hasattr(raw, "logits"):
                    found = raw.logits
                elif isinstance(raw, tuple | list) and raw:
                    found = raw[0]
            case str() as name:
                found = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
            case int() as index:
                found = raw[index] if isinstance(raw, tuple | list | Tensor) and -len(raw) <= index < len(raw) else None
            case function:
                found = function(raw)
        if not isinstance(found, Tensor):
            names = f" with keys {sorted(map(str, raw))}" if isinstance(raw, Mapping) else ""
            raise ModelError(
                f"the network returned {type(raw).__name__}{names}, in which no logits were found: say where they are, "
                "Model(net, outputs=key, attribute, index or function)"
            )
        return found

    def features(self, x: Tensor, layer: str) -> Tensor:
        if not isinstance(self.net, nn.Module):
            raise InputError("features() needs an nn.Module; this model is a plain callable")
        modules = dict(self.net.named_modules())
        if layer not in modules or not layer:
            raise UnknownNameError("layer", layer, [name for name in modules if name])
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            kept.append(output)

        with self.frozen():  # first, so that no other thread's pass meets the hook
            handle = modules[layer].register_forward_hook(keep)
            try:
                self.forward(x)
            finally:
                handle.remove()
        self.queries.forward += len(x)
        if not kept:
            raise ModelError(f"layer {layer!r} did not run in a forward pass")
        if not isinstance(kept[-1], Tensor):
            raise ModelError(f"layer {layer!r} gives a {type(kept[-1]).__name__}, not a tensor: ask a layer inside it")
        return kept[-1]

    def describe(self) -> dict[str, object]:
        def numbers(value: Tensor | None) -> object:
            return None if value is None else value.tolist()

        count = sum(p.numel() for net in self.networks() for p in net.parameters())
        return {
            "name": type(self.net).__name__,
            "bounds": self.bounds,
            "mean": numbers(self._mean),
            "std": numbers(self._std),
            "num_classes": self.num_classes,
            "access": self.access.name.lower(),
            "parameters": count,
        }

    def check(self, data: Labelled | tuple[Tensor, Tensor], accuracy: float, *, tolerance: float = 0.01) -> float:
        """The clean accuracy on labelled data; `ModelError` if it is not within `tolerance` of the stated `accuracy`.

        A wrong mean, std or channel order shows here rather than as a model that seems easy to attack.
        """
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy is a share in [0, 1]; got {accuracy}")
        x, y = data if isinstance(data, tuple) else (data.x, data.y)
        if not len(x) or y.shape != (len(x),):
            raise InputError(f"check() needs inputs and one label each; the shapes are {tuple(x.shape)} and {tuple(y.shape)}")
        measured = float((self.predict(x).cpu() == y.cpu()).double().mean())
        if abs(measured - accuracy) > tolerance:
            raise ModelError(
                f"clean accuracy is {measured:.2%}, but {accuracy:.2%} was stated: are bounds={self.bounds}, mean, std, the "
                "channel order and the labels those of the training?"
            )
        return measured
