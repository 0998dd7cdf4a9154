"""`Model`: a network, or whatever else classifies, as the system under attack."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from saddlepoint.errors import CapabilityError, InputError, ModelError, UnknownNameError
from saddlepoint.models.adapt import GIVES, Gives, adapt, labels_only, log_probabilities, one_hot
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access

Outputs = str | int | Callable[[Any], Tensor]  # Any: what a user's network returns is the user's own type
_ROUNDING = 1e-6  # of probabilities, by which servers exceed 1
Statistics = float | Sequence[float] | Tensor


class Labelled(Protocol):
    """Inputs (N, ...) with their classes (N,), such as `sp.data.load("digits").test`."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...


@final
class Model(Classifier):
    """A classifier made from whatever classifies.

    net: an `nn.Module` or a callable, (N, ...) -> (N, C) logits; (N,) or (N, 1) is taken as one logit f and becomes (0, f).
        Or a fitted scikit-learn, XGBoost or LightGBM classifier, a Keras model, or the path of an .onnx file: those know what
        they give, and where there is a closed form they have gradients.
    bounds: range of the inputs, in the units in which perturbations are measured; None if unbounded.
    mean, std: normalisation applied before the network, a number or one per channel (dimension 1 of the inputs).
    num_classes: checked if given, otherwise found out; needed where only labels are given.
    access: what an adversary may use of it; default parameters, or what there is. More than there is is an error.
    device: move the inputs there; by default where the parameters are. A network elsewhere is an error.
    outputs: where the logits are if the network doesn't return a tensor: a key, an attribute, an index or a function.
        Without it, `.logits`, `["logits"]` and a tuple's first entry are recognised.
    gives: what comes out: "logits", "probabilities" (their logarithms serve as logits) or "labels" (N,).
    inputs: what a callable takes, "torch" or "numpy"; with numpy there are no gradients.

    The network runs in eval mode and is handed back exactly as it was. Labels come as rows of 0 with a 1 for the label.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> model.predict(torch.zeros(2, 4)).shape
    torch.Size([2])
    >>> oracle = sp.Model(lambda x: x.sum(1) > 2, gives="labels", inputs="numpy", num_classes=2)
    >>> oracle.access.name, oracle.predict(torch.ones(2, 4)).tolist()
    ('LABELS', [1, 1])
    """

    def __init__(
        self,
        net: object,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        mean: Statistics | None = None,
        std: Statistics | None = None,
        num_classes: int | None = None,
        access: Access | None = None,
        device: torch.device | str | None = None,
        outputs: Outputs | None = None,
        *,
        gives: Gives | None = None,
        inputs: Literal["torch", "numpy"] = "torch",
    ) -> None:
        if isinstance(net, Classifier):
            raise InputError("net is a Saddlepoint model already; use it as it is")
        if gives is not None and gives not in GIVES:
            raise UnknownNameError("kind of output", gives, GIVES)
        if inputs not in ("torch", "numpy"):
            raise UnknownNameError("kind of input", inputs, ("torch", "numpy"))
        found = adapt(net)
        found = found if gives is None else replace(found, gives=gives)
        most = min(found.access, Access.SCORES if inputs == "numpy" else Access.PARAMETERS)
        most = min(most, Access.LABELS) if found.gives == "labels" else most
        if access is not None and access > most:
            raise CapabilityError(f"this {type(net).__name__} can grant {most.name.lower()} at most, not {access.name.lower()}")
        classes = found.num_classes if num_classes is None else num_classes
        super().__init__(bounds, most if access is None else access, classes, device=device)
        if found.gives == "labels" and classes is None:
            raise InputError("labels alone don't tell how many classes there are: give Model(num_classes=...)")
        self.net = found.call
        self._call: Callable[[Any], Any] = found.call  # which takes an array where `inputs` says so
        self._gives, self._numpy = found.gives, inputs == "numpy"
        self._name = found.name or type(net).__name__
        self._mean, self._std = self._statistics("mean", mean), self._statistics("std", std)
        if self._std is not None and not bool((self._std > 0).all()):
            raise InputError(f"std must be positive; got {std}")
        self._outputs = outputs
        self._normalisers: dict[tuple[torch.dtype, torch.device, int], tuple[Tensor, Tensor]] = {}
        if device is not None and isinstance(net, str | os.PathLike) and isinstance(self.net, nn.Module):
            self.net.to(device)
        if device is not None and isinstance(self.net, nn.Module) and torch.device(device).type != self.device.type:
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

    def raw(self, x: Tensor) -> Tensor:
        """The network's own outputs for inputs (N, ...), such as probabilities or a single score. Doesn't count."""
        asked = self._normalise(x)
        return self._adapt(self._call(asked.detach().cpu().numpy() if self._numpy else asked))

    def forward(self, x: Tensor) -> Tensor:
        logits = self._read(self.raw(x), x)
        return labels_only(logits) if self.access <= Access.LABELS and self._gives != "labels" else logits

    def _read(self, found: Tensor, x: Tensor) -> Tensor:
        """Logits (N, C) from what came out."""
        shape = tuple(found.shape)
        if self._gives == "labels":
            return self._from_labels(found, x)
        if found.dim() == 1:
            found = found[:, None]
        if found.dim() != 2 or len(found) != len(x) or not found.is_floating_point():
            raise ModelError(
                f"for inputs of shape {tuple(x.shape)} the network must give floating {self._gives} of shape ({len(x)}, C); it "
                f"gives {found.dtype} {shape}"
            )
        if self._gives == "probabilities":
            found = torch.cat([1 - found, found], 1) if found.shape[1] == 1 else found
            # no value is known while torch.export traces
            if not torch.compiler.is_compiling() and not bool(((found >= 0) & (found <= 1 + _ROUNDING) | found.isnan()).all()):
                raise ModelError('gives="probabilities" was stated, but the outputs are not all in [0, 1]')
            return log_probabilities(found)
        return torch.cat([torch.zeros_like(found), found], 1) if found.shape[1] == 1 else found

    def _from_labels(self, found: Tensor, x: Tensor) -> Tensor:
        classes = self.num_classes
        if classes is None or found.shape != (len(x),) or found.is_complex():
            raise ModelError(f"labels must have shape ({len(x)},), one for each input; got {tuple(found.shape)}")
        labels = found.long()
        if bool((labels != found).any()) or bool(((labels < 0) | (labels >= classes)).any()):
            raise ModelError(f"labels must be whole numbers from 0 to {classes - 1}; got {sorted(set(found.tolist()))[:10]}")
        return one_hot(labels, classes, x.dtype)

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
        if self._numpy and isinstance(raw, np.ndarray | list):
            raw = torch.as_tensor(np.asarray(raw), device=self.device)
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
            if type(raw).__module__ == "numpy":
                raise ModelError(
                    "the function returned a NumPy array: for functions of arrays write "
                    'Model(function, inputs="numpy", gives="logits"), or gives="probabilities", or "labels"'
                )
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
            "name": self._name,
            "bounds": self.bounds,
            "mean": numbers(self._mean),
            "std": numbers(self._std),
            "num_classes": self.num_classes,
            "access": self.access.name.lower(),
            "gives": self._gives,
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
