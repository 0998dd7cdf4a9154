"""MagNet's detectors: an autoencoder that was trained on clean images makes something else of adversarial ones."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from saddlepoint.defenses.purification.autoencoder import MNIST, Autoencoder, train_autoencoder
from saddlepoint.detectors.networks import Trained, finished
from saddlepoint.errors import InputError
from saddlepoint.models.torch_model import Model
from saddlepoint.taxonomy import Access


@dataclass(eq=False, kw_only=True)
class _Reforming(Trained, ABC):
    """A detector with MagNet's autoencoder, which sees inputs brought from the model's range to [0, 1]."""

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-2
    structure: tuple[int | Literal["pool"], ...] = MNIST
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.structure = tuple(self.structure)
        if not self.noise >= 0:
            raise InputError(f"noise must be >= 0; got {self.noise}")
        with torch.device("meta"):  # no memory, no random numbers
            Autoencoder(structure=self.structure)  # which checks it

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        images = self._unit(clean)
        if images.dim() != 4:
            raise InputError(f"{type(self).__name__} is for images (N, C, H, W); the inputs' shape is {tuple(clean.shape)}")
        net = Autoencoder(clean.shape[1], self.structure).to(clean.device, clean.dtype)
        return finished(net, train_autoencoder(net, images, noise=self.noise, **self.plan()))

    def build(self) -> nn.Module:
        return Autoencoder(self.weights()[0].shape[1], self.structure)

    @property
    def autoencoder(self) -> Autoencoder:
        """The trained autoencoder, which is a reformer as well: `sp.Defended(model, [detector.autoencoder.transform()])`."""
        return cast(Autoencoder, self.network)

    def _unit(self, x: Tensor) -> Tensor:
        """Inputs brought from the model's range to [0, 1]; as they are where it has none."""
        low, high = self.model.bounds or (0.0, 1.0)
        return (x - low) / (high - low)


@final
@dataclass(eq=False, kw_only=True)
class ReconstructionError(_Reforming):
    """The autoencoder can't restore what it never saw: score(x) = mean |x - ae(x)|^p over features.

    p: 1 or 2; the paper has a detector of each for MNIST. structure: of the autoencoder ae, (3, "pool", 3) or (3,) for MNIST,
    (32,) for CIFAR-10 in the paper. noise: that it learns to remove, 0.1 for MNIST and 0.025 for CIFAR-10. Inputs are brought
    from the model's range to [0, 1] first. epochs, batch_size and learning_rate are 100, 256 and 1e-3 in the
    paper, with which few images teach nothing. The classifier isn't asked.

    Errors: `InputError` for other inputs than images (N, C, H, W); a `SaddlepointWarning` where the autoencoder learnt little.
    Source: Meng & Chen (2017), MagNet, arXiv:1705.09064, section 4.2 and equation 5.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.ReconstructionError(structure=(16,), epochs=4).fit(model, digits.train)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "an autoencoder of clean images can't restore it"
    reference: ClassVar[str] = "Meng & Chen 2017, arXiv:1705.09064"
    access: ClassVar[Access] = Access.LABELS

    p: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p < 1:
            raise InputError(f"p must be at least 1; got {self.p}")

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.reconstruction_error(self._unit(x), self.p)


@final
@dataclass(eq=False, kw_only=True)
class ReconstructionDivergence(_Reforming):
    """Restored by the autoencoder, the input would be another class: score(x) = JSD(P, Q).

    P = softmax(z(x) / T) and Q = softmax(z(ae(x)) / T), of which JSD is the divergence of Jensen and Shannon. temperature: T,
    10 and 40 in the paper, where logits are large. structure, noise, epochs, batch_size, learning_rate: see
    `ReconstructionError`.

    Errors: `InputError` for other inputs than images (N, C, H, W), and unless T > 0.
    Source: Meng & Chen (2017), MagNet, arXiv:1705.09064, section 4.4.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.ReconstructionDivergence(structure=(16,), epochs=4).fit(model, digits.train)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "restored by an autoencoder, it would be another class"
    reference: ClassVar[str] = "Meng & Chen 2017, arXiv:1705.09064"
    access: ClassVar[Access] = Access.SCORES

    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive; got {self.temperature}")

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.model.bounds or (0.0, 1.0)
        of_unit_range = Model(lambda images: self.model.forward(low + (high - low) * images), bounds=None)
        return self.autoencoder.divergence(of_unit_range, self._unit(x), self.temperature)
