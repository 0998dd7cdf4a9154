"""`Classifier`: the one thing that attacks, defenses, detectors and verifiers see."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from saddlepoint.errors import CapabilityError, InputError, ModelError, SaddlepointError, SaddlepointWarning, Unavailable
from saddlepoint.models.freeze import frozen
from saddlepoint.taxonomy import Access

_PROBE_SAMPLES = 8
_NOISE_FACTOR = 16  # success needs this many times the numerical noise that was seen
_SCALE_FACTOR = 1e-5  # and at least this part of the largest logit
_BATCH_DEPENDENCE = 1e-2  # differences between batch sizes above this part of the largest logit are no rounding


@dataclass(frozen=True)
class Probe:
    """What a few forward passes tell about a model before it is attacked.

    tau: the margin that a success needs, above the numerical noise between batch sizes.
    """

    tau: float
    num_classes: int
    stochastic: bool
    notes: tuple[str, ...]
    forward: int


@dataclass
class PassCount:
    """Rows that went through a model since it was made (or since `reset`)."""

    forward: int = 0
    backward: int = 0

    def reset(self) -> None:
        """Back to zero."""
        self.forward = self.backward = 0


class Classifier(ABC):
    """A classifier with what an adversary must know of it.

    bounds: (low, high) of every input feature, None if unbounded. access: what it grants. draws: how many random
    draws a gradient averages over (1 unless it is a randomised defense). queries: rows counted so far.

    rejects: whether the last column of the logits is no class: where it is the largest, the model refuses to answer.

    A subclass implements `forward` and `networks`; everything else is final.
    """

    rejects: bool = False

    def __init__(
        self,
        bounds: tuple[float, float] | None,
        access: Access,
        num_classes: int | None,
        draws: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        if bounds is not None:
            low, high = (float(end) for end in bounds)
            if not low < high:
                raise InputError(f"bounds must be (low, high) with low < high, or None; got {bounds}")
            bounds = (low, high)
        if num_classes is not None and num_classes < 2:
            raise InputError(f"num_classes must be at least 2 (a one-logit model f counts as two: 0 and f); got {num_classes}")
        if draws < 1:
            raise InputError(f"draws must be at least 1; got {draws}")
        self.bounds = bounds
        self.access = Access(access)
        self.num_classes = num_classes
        self.draws = draws
        self.queries = PassCount()
        self._device = torch.device(device if device is not None else "cpu")
        self._probed: tuple[object, Probe] | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) for inputs (N, ...) in `bounds`, differentiable where the model is. Doesn't count."""

    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks inside, which are frozen during a run."""

    @abstractmethod
    def features(self, x: Tensor, layer: str) -> Tensor:
        """The output of the inner module named `layer` for inputs (N, ...), differentiable."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What defines this model, ready for JSON."""

    @property
    @final
    def device(self) -> torch.device:
        """Where inputs must be: the device of the parameters (if there are none the stated one, default CPU)."""
        for net in self.networks():
            for parameter in net.parameters():
                return parameter.device
        return self._device

    @property
    @final
    def dtype(self) -> torch.dtype | None:
        """The parameters' floating dtype, None if there are none."""
        for net in self.networks():
            for parameter in net.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
        return None

    @final
    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Eval mode; on leaving, everything is as before (see `saddlepoint.models.freeze`)."""
        with frozen(self.networks()):
            yield

    @final
    def require(self, access: Access, who: str) -> None:
        """Raise `CapabilityError` unless this model grants `access` to `who`."""
        if self.access < access:
            raise CapabilityError(f"{who} needs {access.name.lower()}; this model grants {self.access.name.lower()} only")

    @final
    def logits(self, x: Tensor, *, batch_size: int = 256) -> Tensor:
        """Logits (N, C) without gradients, in eval mode; counted."""
        self.require(Access.SCORES, "logits()")
        return self._forward_all(x, batch_size)

    @final
    def predict(self, x: Tensor, *, batch_size: int = 256) -> Tensor:
        """Predicted classes (N,) int64; counted."""
        logits = self._forward_all(x, batch_size)
        return logits.argmax(1) if len(logits) else torch.empty(0, dtype=torch.int64, device=self.device)

    @final
    def _forward_all(self, x: Tensor, batch_size: int) -> Tensor:
        with self.frozen(), torch.no_grad():
            parts = [self.forward(part.to(self.device)) for part in torch.split(x, batch_size)] if len(x) else []
        self.queries.forward += len(x)
        return torch.cat(parts) if parts else torch.empty(0, self.num_classes or 0, dtype=x.dtype, device=self.device)

    @final
    def check_inputs(self, x: Tensor) -> None:
        """Raise `InputError` unless x (N, ...) is floating, of the model's dtype, finite and inside `bounds`."""
        if not isinstance(x, Tensor):
            raise InputError(f"x must be a torch tensor (N, ...); got {type(x).__name__}")
        if x.dim() < 2:
            raise InputError(f"x must be a batch (N, ...) of inputs; its shape is {tuple(x.shape)}")
        if not x.is_floating_point():
            raise InputError(f"x has dtype {x.dtype}; convert and scale it: x.float() / 255 for 8-bit images")
        if self.dtype is not None and x.dtype != self.dtype:
            raise InputError(f"x is {x.dtype}, but the model's parameters are {self.dtype}: use x.to({self.dtype})")
        if x.numel() == 0:
            return
        low, high = self.bounds if self.bounds is not None else (-torch.inf, torch.inf)
        bad = ~((x >= low) & (x <= high) & torch.isfinite(x))
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            value = float(x[where])
            smallest, largest = (float(v) for v in (x.nan_to_num().amin(), x.nan_to_num().amax()))
            raise InputError(
                f"x[{', '.join(map(str, where))}] = {value:g} is not inside the model's bounds {self.bounds} "
                f"(smallest {smallest:g}, largest {largest:g}): scale the inputs, or give Model(bounds=...) their true range"
            )

    @final
    def probe(self, x: Tensor) -> Probe:
        """Look at a few inputs: classes, randomness, softmax outputs, numerical noise. Once per state of the weights."""
        tensors = [t for net in self.networks() for t in (*net.parameters(), *net.buffers())]
        state = tuple((id(t), t._version) for t in tensors)
        if self._probed is None or self._probed[0] != state:
            self._probed = (state, self._probe(x[:_PROBE_SAMPLES].to(self.device)))
            for note in self._probed[1].notes:
                warnings.warn(note, SaddlepointWarning, stacklevel=4)
        return self._probed[1]

    @final
    def _probe(self, x: Tensor) -> Probe:
        with self.frozen(), torch.no_grad():
            try:
                first, again = self.forward(x), self.forward(x)
            except SaddlepointError:
                raise
            except Exception as error:  # whatever the user's network raises
                shape = tuple(x.shape)
                raise ModelError(f"the network fails on inputs of shape {shape}: {type(error).__name__}: {error}") from error
            try:
                singles = torch.cat([self.forward(one) for one in torch.split(x, 1)])
            except Unavailable:
                raise
            except Exception as error:
                raise ModelError(
                    f"the model takes {len(x)} inputs at once, but not a single one ({type(error).__name__}: {error}); batch "
                    "normalisation without running statistics, or a squeeze() that removes the batch dimension?"
                ) from error
        self.queries.forward += 3 * len(x)
        classes = first.shape[1]
        if self.num_classes is not None and classes != self.num_classes:
            raise ModelError(f"the model gives {classes} outputs, but num_classes={self.num_classes} was stated")
        self.num_classes = classes
        notes = []
        finite = torch.isfinite(first).all(1) & torch.isfinite(again).all(1) & torch.isfinite(singles).all(1)
        if not bool(finite.all()):
            notes.append(f"the model gives NaN or infinite outputs for {int((~finite).sum())} of {len(x)} clean inputs")
        precision = torch.finfo(first.dtype).eps
        first, again, singles = (t[finite].double() for t in (first, again, singles))
        scale = float(first.abs().max()) if len(first) else 1.0
        noise = float((first - singles).abs().max()) if len(first) else 0.0
        repeated = float((first - again).abs().max()) if len(first) else 0.0
        stochastic = repeated > _SCALE_FACTOR * scale  # below that tau makes up for it: sums in no fixed order on a GPU
        if stochastic:
            noise = 0.0
            if self.draws == 1:
                notes.append(
                    "two identical calls gave different outputs: the model is random. Wrap it, "
                    "sp.Defended(model, [], draws=10), so that gradients average over its randomness; a transformation of "
                    "your own says sp.Transform(..., random=True)"
                )
        elif noise > max(_BATCH_DEPENDENCE, _NOISE_FACTOR * precision) * scale:
            noise = 0.0
            notes.append(
                "an input's output depends on the batch that it is in (batch normalisation without running statistics?); "
                "re-prediction of single samples can differ"
            )
        told = self.access > Access.LABELS and len(first) > 0
        if told and bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < max(1e-4, precision)).all()):
            notes.append(
                "the outputs look like probabilities (non-negative, sum 1); attacks need logits: return them before the "
                'softmax, or say so: Model(gives="probabilities")'
            )
        elif told and 0.5 < scale <= 1 and bool((first >= 0).all()) and float(torch.minimum(first, 1 - first).mean()) < 0.1:
            notes.append("all outputs are close to 0 or 1, as after a sigmoid; attacks need logits: return them before it")
        # a constant model has no margin to measure, and a tie is no success
        tau = max(_NOISE_FACTOR * noise, _SCALE_FACTOR * scale, torch.finfo(torch.float32).tiny)
        return Probe(tau, classes, stochastic, tuple(notes), 3 * len(x))
