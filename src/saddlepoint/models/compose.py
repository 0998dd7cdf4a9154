"""Models made of models: ensembles, models behind input transformations, and models with borrowed gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.transforms import InputTransform, Transform, bound

_DRAWS = 10  # of a randomised defense, unless stated: Athalye et al. (2018) used 10 to 30


@final
class Ensemble(Classifier):
    """Several models that vote: by the weighted mean of logits, of probabilities (their logarithm), or of log-probabilities.

    An example that fools all of them often fools others too. Ensembles were fused for that in the probabilities (Liu et al.
    2017, arXiv:1611.02770), in the logits, and in the loss (Dong et al. 2018, arXiv:1710.06081). fuse="loss" gives mean
    log-probabilities, not normalised, of which an attack's loss="logit" is the mean of the members' cross-entropies.
    weights: one per model, default equal. Errors: `InputError` unless the members share bounds.
    """

    def __init__(
        self,
        models: Sequence[Classifier],
        fuse: Literal["logits", "probabilities", "loss"] = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        if not models:
            raise InputError("an ensemble needs at least one model")
        if fuse not in ("logits", "probabilities", "loss"):
            raise InputError(f'fuse must be "logits", "probabilities" or "loss"; got {fuse!r}')
        if any(model.bounds != models[0].bounds for model in models):
            raise InputError(f"the members' bounds differ: {[model.bounds for model in models]}")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not min(weights) >= 0 or not 0 < sum(weights) < math.inf:
            raise InputError(f"weights must be {len(models)} numbers >= 0, not all 0; got {weights}")
        access, draws = min(m.access for m in models), max(m.draws for m in models)
        super().__init__(models[0].bounds, access, None, draws, models[0].device)
        self.models, self.fuse = tuple(models), fuse
        self.weights = tuple(w / sum(weights) for w in weights)

    def networks(self) -> tuple[nn.Module, ...]:
        return tuple(net for model in self.models for net in model.networks())

    def forward(self, x: Tensor) -> Tensor:
        outputs = [model.forward(x) for model in self.models]
        if any(o.shape != outputs[0].shape for o in outputs):
            raise InputError(f"the members' outputs differ in shape: {[tuple(o.shape) for o in outputs]}")
        if self.fuse == "logits":
            return sum((w * o for w, o in zip(self.weights, outputs, strict=True)), torch.zeros_like(outputs[0]))
        logs = [(w, o.log_softmax(1)) for w, o in zip(self.weights, outputs, strict=True) if w]
        if self.fuse == "loss":
            return torch.stack([w * log for w, log in logs]).sum(0)
        return torch.stack([log + math.log(w) for w, log in logs]).logsumexp(0)

    def features(self, x: Tensor, layer: str) -> Tensor:
        raise InputError("an ensemble has no layers of its own: ask a member, ensemble.models[i].features(x, layer)")

    def describe(self) -> dict[str, object]:
        return {
            "name": "Ensemble",
            "fuse": self.fuse,
            "weights": self.weights,
            "models": [model.describe() for model in self.models],
        }


@final
class Defended(Classifier):
    """A model behind input transformations, which is a model again and is attacked as its transformations declare.

    transforms: applied from the first to the last: settings such as `sp.transforms.BitDepth(4)`, which take on the model's
        bounds, and functions in `sp.Transform(name=..., apply=...)`.
    draws: how many draws each gradient and judgement averages over; by default 10 if a transformation is random, else 1.
        State it where the model itself is random: `Defended(model, [], draws=10)`.
    """

    def __init__(
        self, model: Classifier, transforms: Sequence[Transform | InputTransform] = (), draws: int | None = None
    ) -> None:
        if not isinstance(model, Classifier):
            raise InputError(
                f"Defended protects an sp.Model; wrap your network: sp.Model(net, ...); got {type(model).__name__}"
            )
        if not isinstance(transforms, Sequence):
            raise InputError(f"transforms must be a list, such as [sp.transforms.Median(3)]; got {type(transforms).__name__}")
        self.model, self.transforms = model, tuple(bound(t, model.bounds) for t in transforms)
        if draws is None:
            draws = max(model.draws, _DRAWS if any(t.random for t in self.transforms) else 1)
        super().__init__(model.bounds, model.access, model.num_classes, draws, model.device)

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks() + tuple(net for transform in self.transforms for net in transform.networks)

    def _transformed(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward(self._transformed(x))

    def features(self, x: Tensor, layer: str) -> Tensor:
        with self.frozen():
            return self.model.features(self._transformed(x), layer)

    def describe(self) -> dict[str, object]:
        return {
            "name": "Defended",
            "transforms": [t.name for t in self.transforms],
            "draws": self.draws,
            "model": self.model.describe(),
        }


@final
class Borrowed(Classifier):
    """A model's outputs with the gradients of another, for attacks where the model's own mislead or don't exist.

    Every point is judged by `model`, and the way there is shown by `source`: a transfer attack that sees at each step whether
    it has arrived. A pass is one through both.
    Errors: `InputError` unless they share bounds.
    """

    def __init__(self, model: Classifier, source: Classifier) -> None:
        if model.bounds != source.bounds:
            raise InputError(f"the bounds of model and source differ: {model.bounds} and {source.bounds}")
        super().__init__(model.bounds, source.access, model.num_classes, max(model.draws, source.draws), model.device)
        self.model, self.source = model, source

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks() + self.source.networks()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = self.model.forward(x)
        if not torch.is_grad_enabled():
            return outputs
        guide = self.source.forward(x.to(self.source.device)).to(outputs.device)
        if guide.shape != outputs.shape:
            raise InputError(f"model and source differ in their outputs: {tuple(outputs.shape)} and {tuple(guide.shape)}")
        return outputs + (guide - guide.detach())

    def features(self, x: Tensor, layer: str) -> Tensor:
        return self.model.features(x, layer)

    def describe(self) -> dict[str, object]:
        return {"name": "Borrowed", "model": self.model.describe(), "source": self.source.describe()}
