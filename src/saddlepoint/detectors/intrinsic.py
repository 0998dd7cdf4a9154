"""In how many directions the data spread around an input, as its distances to its neighbours tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.layers import activations, checked_layers, hidden_layers, layers_in, squared_distances
from saddlepoint.detectors.regression import Logistic, logistic_regression
from saddlepoint.errors import InputError

_LARGEST = 1e4  # where all neighbours are equally far, the estimate would be infinite
_ROUNDING = 1e-5  # part of r_k^2 below which squared distances are rounding errors, as that to the sample itself


@final
@dataclass(eq=False, kw_only=True)
class LocalIntrinsicDimensionality(Detector):
    """Neighbours in hidden layers lie as in a space of more dimensions:

        LID_l(x) = -( 1/k sum_(i=1..k) log( r_i / r_k ) )^-1,   score(x) = b + sum_l w_l LID_l(x)

    r_1 to r_k are the distances to the k nearest of the reference, clean samples that are drawn once and kept. The weights are
    those of a logistic regression between the other clean samples and adversarial examples.

    layers: names of modules, or `LAST`; None: all hidden layers, as in the paper.
    neighbours: k, 20 in the paper (section 5).
    samples: how many clean samples the reference has (at most half of them), 100 in the paper, which draws them anew for each
        batch.

    Errors: `InputError` in fitting with fewer than 2 (neighbours + 1) clean samples.
    Source: Ma, Li, Wang, Erfani, Wijewickrema, Schoenebeck, Song, Houle & Bailey (2018), Characterizing adversarial subspaces
    using local intrinsic dimensionality, arXiv:1801.02613, equation 4, algorithm 1.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> examples = sp.attack(model, digits.train.x[:100], digits.train.y[:100], "fgsm", sp.Linf(0.2)).adversarial
    >>> detector = sp.detectors.LocalIntrinsicDimensionality().fit(model, digits.train.x[100:500], examples)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "by the distances to its neighbours, hidden layers have more dimensions around it"
    reference: ClassVar[str] = "Ma et al. 2018, arXiv:1801.02613"
    learns_attacks: ClassVar[bool] = True

    layers: tuple[str, ...] | None = None
    neighbours: int = 20
    samples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = checked_layers(self.layers)
        if self.neighbours < 2:
            raise InputError(f"neighbours must be at least 2: one has no spread of distances; got {self.neighbours}")
        if self.samples <= self.neighbours:
            raise InputError(f"samples must be more than the {self.neighbours} neighbours; got {self.samples}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        if len(clean) < 2 * (self.neighbours + 1):
            raise InputError(
                f"{self.neighbours} neighbours take at least {2 * (self.neighbours + 1)} clean samples, half of them as "
                f"reference; got {len(clean)}"
            )
        assert adversarial is not None  # fit saw to it
        layers = sorted(self.layers or hidden_layers(self.model, clean))  # as layers_in finds them
        order = torch.randperm(len(clean)).to(clean.device)
        count = min(self.samples, len(clean) // 2)
        with torch.no_grad():
            near = activations(self.model, clean[order[:count]], layers)[1]
        references = {f"reference.{layer}": f.flatten(1) for layer, f in zip(layers, near, strict=True)}
        kinds = (clean[order[count:]], adversarial)
        dimensions = [self.over(lambda x: self.dimensions(x, references), kind) for kind in kinds]
        target = torch.cat([torch.full((len(kind),), bool(i)) for i, kind in enumerate(kinds)]).to(clean.device)
        return references | logistic_regression(torch.cat(dimensions), target)._asdict()

    def forward(self, x: Tensor) -> Tensor:
        regression = Logistic(*(self.arrays[name] for name in Logistic._fields))
        return regression.log_odds(self.dimensions(x, self.arrays))

    def dimensions(self, x: Tensor, references: Mapping[str, Tensor]) -> Tensor:
        """LID (N, L) around inputs in each layer, at most 10,000."""
        layers = layers_in(references, "reference.")
        found = []
        for layer, f in zip(layers, activations(self.model, x, layers)[1], strict=True):
            distances = squared_distances(f.flatten(1), references[f"reference.{layer}"])
            nearest = distances.topk(self.neighbours, 1, largest=False).values
            farthest = nearest.amax(1, keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
            logs = (nearest / farthest).clamp(min=_ROUNDING).log() / 2
            found.append((-logs.mean(1)).clamp(min=1 / _LARGEST).reciprocal())
        return torch.stack(found, 1)
