"""What the classifier knows of an input is decoded to an input again; of an adversarial one it knows something else."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from saddlepoint.defenses.loop import Sample
from saddlepoint.detectors.layers import LAST, activations
from saddlepoint.detectors.networks import Standardised, Trained, perceptron, standardised
from saddlepoint.errors import InputError, UnknownNameError

Error = Literal["l1", "l2"]


@dataclass(eq=False, kw_only=True)
class _Decoding(Trained, ABC):
    """A decoder's reconstruction r(x), trained by the squared error; the score is how far it is from x.

    error: "l1", the mean of |x - r(x)| over features, or "l2", the mean of its square.
    """

    error: Error = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error not in get_args(Error):
            raise UnknownNameError("error", self.error, get_args(Error))

    def decoded(
        self, net: nn.Module, clean: Tensor, known: Tensor, labels: Tensor, decode: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The weights of a network with which decode(known, labels) reconstructs the clean inputs."""

        def loss(sample: Sample) -> Tensor:
            x, given, y = sample.tensors
            return mse_loss(decode(given, y), x.flatten(1))

        return self.trained(net, (clean, known, labels), loss)

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the last hidden layer, flattened (N, H)."""
        logits, (hidden,) = activations(self.model, x, (LAST,))
        return logits, hidden.flatten(1)

    def _error(self, x: Tensor, reconstructed: Tensor) -> Tensor:
        away = (x.flatten(1) - reconstructed).abs()
        return (away if self.error == "l1" else away.square()).mean(1)


@final
@dataclass(eq=False, kw_only=True)
class LogitsDecoder(_Decoding):
    """From its logits, an adversarial input is reconstructed as something else: score(x) = mean |x - r(z(x), h(x))|.

    The decoder r sees the logits z and the last hidden layer h through a bottleneck of few numbers, which leave room for the
    class and little more: r = W3 GELU(W2 GELU(W1 (z, h))). The paper trains it together with the classifier; here the
    classifier is given and stays as it is. bottleneck: 10 and hidden: 256 in the paper. error: "l1" in the paper, or "l2".
    epochs: 20, batch_size: 128, learning_rate: 1e-3 in the paper.

    Errors: `InputError` unless bottleneck and hidden are at least 1; where the network has no linear layer.
    Source: Hendrycks & Gimpel (2017), Early methods for detecting adversarial images, arXiv:1608.00530, the section on
    reconstructions.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> sp.detectors.LogitsDecoder(epochs=1).fit(model, digits.train).score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "what logits and last hidden layer are decoded to is another input"
    reference: ClassVar[str] = "Hendrycks & Gimpel 2017, arXiv:1608.00530"

    epochs: int = 20
    batch_size: int = 128
    bottleneck: int = 10
    hidden: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1 or self.hidden < 1:
            raise InputError(f"bottleneck and hidden must be at least 1; got {self.bottleneck} and {self.hidden}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        known = self.over(self._known, clean)
        net = perceptron((known.shape[1], self.bottleneck, self.hidden, clean[0].numel()), standardised(known))
        return self.decoded(net, clean, known, labels, lambda given, _: net(given))

    def build(self) -> nn.Module:
        weights = self.weights()
        return perceptron((weights[0].shape[1], *(len(weight) for weight in weights)))

    def _known(self, x: Tensor) -> Tensor:
        return torch.cat(self._hidden(x), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._error(x, self.network(self._known(x)))


@final
class _ClassDecoder(nn.Module):
    """Features (N, H) to a code of `size` numbers for each class, of which only the given class's is decoded."""

    def __init__(self, features: int, codes: int, size: int, widths: tuple[int, ...], scale: Standardised) -> None:
        super().__init__()
        self.size = size
        self.scale = scale
        self.code = nn.Linear(features, codes)
        self.decoder = perceptron((codes, *widths))

    def forward(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """Reconstructions (N, D) of inputs of these classes (N,)."""
        codes = self.code(self.scale(hidden)).unflatten(1, (-1, self.size))
        chosen = classes[:, None] == torch.arange(codes.shape[1], device=classes.device)
        reconstructed: Tensor = self.decoder((codes * chosen[:, :, None]).flatten(1))
        return reconstructed


@final
@dataclass(eq=False, kw_only=True)
class ClassReconstruction(_Decoding):
    """Reconstructed as one of the class k that is predicted, it looks different: score(x) = mean (x - r(c_k(h(x))))^2.

    c_k are a few linear functions of the last hidden layer h for each class. Only those of one class go into the decoder r, of
    the label in training, so that what it makes of an input is of the class that they stand for. The paper has this for
    networks in whose last layer each class has neurons of its own, and trains both together; here the classifier is given.
    size: numbers for each class. hidden: widths of the decoder, 512 and 1024 in the paper. error: "l2" in the paper, or "l1".
    epochs, batch_size, learning_rate: of the training.

    Errors: `InputError` unless size and widths are at least 1; where the network has no linear layer.
    Source: Frosst, Sabour & Hinton (2018), DARCCC: detecting adversaries by reconstruction from class conditional capsules,
    arXiv:1811.06969, section 2.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> sp.detectors.ClassReconstruction(epochs=1).fit(model, digits.train).score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "reconstructed as one of the predicted class, it is another input"
    reference: ClassVar[str] = "Frosst, Sabour & Hinton 2018, arXiv:1811.06969"

    error: Error = "l2"
    size: int = 16
    hidden: tuple[int, ...] = (512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hidden = tuple(self.hidden)
        if min(self.size, *self.hidden, 1) < 1:
            raise InputError(f"size and the widths in hidden must be at least 1; got {self.size} and {self.hidden}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        known = self.over(lambda x: self._hidden(x)[1], clean)
        classes = self.model.forward(clean[:2]).shape[1]
        widths = (*self.hidden, clean[0].numel())
        net = _ClassDecoder(known.shape[1], self.size * classes, self.size, widths, standardised(known))
        return self.decoded(net, clean, known, labels, net)

    def build(self) -> nn.Module:
        code, *rest = self.weights()
        return _ClassDecoder(code.shape[1], len(code), self.size, tuple(len(weight) for weight in rest), Standardised())

    def forward(self, x: Tensor) -> Tensor:
        logits, hidden = self._hidden(x)
        return self._error(x, self.network(hidden, logits.argmax(1)))
