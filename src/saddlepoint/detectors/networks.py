"""Detectors that are networks: on the input, on an inner layer, or the classifier itself with a class more."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from saddlepoint.defenses.loop import Fit, Plan, Sample, fit
from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.layers import activations, hidden_layers
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access

_PREFIX = "network."


@dataclass(eq=False, kw_only=True)
class Trained(Detector, ABC):
    """A detector with a network of its own, whose weights are among its arrays.

    epochs, batch_size, learning_rate: of its training, by Adam.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        Plan(epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate)  # which checks them
        self._network: nn.Module | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """A network of the shapes that the arrays have, with any weights."""

    def restore(self) -> None:
        net = self.build()
        state = {name.removeprefix(_PREFIX): array for name, array in self.arrays.items() if name.startswith(_PREFIX)}
        net.load_state_dict(state, assign=True)
        self._network = net.eval().requires_grad_(False)

    def networks(self) -> tuple[nn.Module, ...]:
        return () if self._network is None else (self._network,)

    @property
    def network(self) -> nn.Module:
        """The trained network. Errors: `InputError` before `fit`."""
        if self._network is None:
            raise InputError(f"this {type(self).__name__} is not fitted: call fit(model, clean, ...) first")
        return self._network

    def weights(self) -> list[Tensor]:
        """The matrices and kernels among the arrays, from the input on: their shapes tell those of the network."""
        names = [name for name in self.arrays if name.startswith(_PREFIX) and name.endswith(".weight")]
        return [self.arrays[name] for name in sorted(names, key=lambda name: (len(name), name))]  # 10 after 9; files have none

    def trained(self, net: nn.Module, data: tuple[Tensor, ...], loss: Callable[[Sample], Tensor]) -> dict[str, Tensor]:
        """The network's weights after training by `saddlepoint.defenses.loop.fit`, as arrays."""
        net.to(self.model.device, data[0].dtype)
        return finished(net, fit(net, data, loss, name=self.name, **self.plan()))

    def plan(self) -> dict[str, Any]:
        """How the loop is to train; Any: its settings."""
        return {
            "epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate, "seed": self.seed,
            "precision": "float32", "channels_last": False,
        }  # fmt: skip


def finished(net: nn.Module, training: Fit) -> dict[str, Tensor]:
    """The weights as arrays, after a training. Errors: `KeyboardInterrupt` where Ctrl-C cut it short, for it would mislead."""
    if not training.complete:
        raise KeyboardInterrupt
    return {f"{_PREFIX}{name}": value for name, value in net.state_dict().items()}


@final
class Standardised(nn.Module):
    """(x - mean) / std with one mean and one standard deviation for all features, so that any layer's scale is learnt from."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()) if mean is None else mean)
        self.register_buffer("std", torch.ones(()) if std is None else std)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        return (x - self.mean) / self.std


def standardised(x: Tensor) -> Standardised:
    """The layer for features x (N, ...)."""
    return Standardised(x.mean(), x.std().clamp(min=1e-6))


def perceptron(widths: tuple[int, ...], scale: Standardised | None = None) -> nn.Sequential:
    """Fully connected, from features (N, ...) of widths[0] numbers to (N, widths[-1]), with GELU between."""
    layers: list[nn.Module] = [scale or Standardised(), nn.Flatten()]
    for inside, outside in pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def convolutional(channels: int, width: int, scale: Standardised | None = None) -> nn.Sequential:
    """Three convolutions, 3x3, of `width`, 2 `width` and 2 `width` channels, the last two halving; from (N, C, H, W) to (N, 1).

    A mean over what is left of the image precedes the last, linear layer, so images of any size will do.
    """
    return nn.Sequential(
        scale or Standardised(),
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 1),
    )  # fmt: skip


@dataclass(eq=False, kw_only=True)
class _Binary(Trained, ABC):
    """A network that tells clean from adversarial by what it sees of an input: the score is its logit.

    width: channels of the first convolution; where no images are seen, hidden units are 8 times as many.
    dynamic: eps of the l-inf adversary that the training meets, in the inputs' units; 0 for none but the given examples. In
    each batch, clean inputs become examples against classifier and detector by 10 steps

        x <- clip(x + eps / 5 [(1 - sigma) sgn grad J_classifier(x, y) + sigma sgn grad J_detector(x, 1)])

    with sigma drawn from [0, 1] for each input (Metzen et al. 2017, equation 3 and section 3.4).
    """

    learns_attacks: ClassVar[bool] = True

    width: int = 32
    dynamic: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise InputError(f"width must be at least 1; got {self.width}")
        if not self.dynamic >= 0:
            raise InputError(f"dynamic is the eps of an adversary, at least 0; got {self.dynamic}")

    def build(self) -> nn.Module:
        first = self.weights()[0]
        if first.dim() == 4:
            return convolutional(first.shape[1], first.shape[0])
        return perceptron((first.shape[1], first.shape[0], 1))

    def distinguishing(
        self, sees: Callable[[Tensor], Tensor], clean: Tensor, labels: Tensor, adversarial: Tensor | None
    ) -> dict[str, Tensor]:
        """The weights of a network that tells sees(clean) from sees(adversarial), both kinds counting the same."""
        assert adversarial is not None  # fit sees to it
        seen = self.over(sees, clean[:1000])
        scale = standardised(seen)
        wide = seen.shape[1:].numel()
        images = seen.dim() == 4
        net = convolutional(seen.shape[1], self.width, scale) if images else perceptron((wide, 8 * self.width, 1), scale)
        x = torch.cat([clean, adversarial])
        bad = torch.cat([torch.zeros(len(clean)), torch.ones(len(adversarial))]).to(x)
        classes = torch.cat([labels, labels.new_zeros(len(adversarial))])

        def loss(sample: Sample) -> Tensor:
            inputs, wanted, y = sample.tensors
            if self.dynamic:
                good = wanted == 0
                made = self._examples(lambda given: net(sees(given))[:, 0], inputs[good], y[good])
                inputs, wanted = torch.cat([inputs, made]), torch.cat([wanted, wanted.new_ones(len(made))])
            with torch.no_grad():
                features = sees(inputs)
            return binary_cross_entropy_with_logits(net(features)[:, 0], wanted, pos_weight=balance)

        balance = x.new_tensor(len(clean) / (len(adversarial) + (len(clean) if self.dynamic else 0)))
        return self.trained(net, (x, bad, classes), loss)

    def _examples(self, logit: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Adversarial inputs against classifier and detector, with the mixtures of their gradients drawn."""
        if not len(x):
            return x
        sigma = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device, dtype=x.dtype)
        low, high = self.model.bounds or (-torch.inf, torch.inf)
        point = x
        for _ in range(10):
            point = point.detach().requires_grad_()
            (to_fool,) = torch.autograd.grad(cross_entropy(self.model.forward(point), y, reduction="sum"), point)
            (to_hide,) = torch.autograd.grad(softplus(-logit(point)).sum(), point)
            moved = point.detach() + self.dynamic / 5 * ((1 - sigma) * to_fool.sign() + sigma * to_hide.sign())
            point = moved.clamp(x - self.dynamic, x + self.dynamic).clamp(low, high)
        return point.detach()


@final
@dataclass(eq=False, kw_only=True)
class InputNetwork(_Binary):
    """A binary classifier of inputs, trained on clean and adversarial ones: score(x) = d(x), the logit of "adversarial".

    Images are seen by three small convolutions, other inputs by a hidden layer. epochs, batch_size, learning_rate: of the
    training. width, dynamic: see `LayerNetwork`. It knows the attacks that it was shown, and others as far as they are alike.

    Source: Gong, Wang & Ku (2017), Adversarial and clean data are not twins, arXiv:1704.04960, section 3.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> noisy = (digits.train.x[:100] + 0.3).clamp(max=1)
    >>> detector = sp.detectors.InputNetwork(epochs=1).fit(model, digits.train, noisy)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "a network that was trained to tell adversarial inputs from clean ones"
    reference: ClassVar[str] = "Gong, Wang & Ku 2017, arXiv:1704.04960"
    access: ClassVar[Access] = Access.LABELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dynamic:
            self.access = Access.GRADIENTS  # type: ignore[misc]  # a class's, but here it depends on a setting

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return self.distinguishing(lambda x: x, clean, labels, adversarial)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.network(x)[:, 0]
        return score


@final
@dataclass(eq=False, kw_only=True)
class LayerNetwork(_Binary):
    """A binary classifier of what an inner layer h gives, the classifier staying as it is: score(x) = d(h(x)), a logit.

    layer: name of a module, as in `net.named_modules()`; default the one in the middle of `hidden_layers`. Maps (C, H, W) are
    seen by three small convolutions, other activations by a hidden layer. epochs, batch_size, learning_rate: of the training;
    the paper has 20 epochs of Adam with 1e-4. width: channels of the first convolution; 8 times as many hidden units.
    dynamic: 0, or the eps in the inputs' units of an l-inf adversary against classifier and detector that the training meets
    as well: in each batch, clean inputs become its examples by 10 steps

        x <- clip(x + eps / 5 [(1 - sigma) sgn grad J_classifier(x, y) + sigma sgn grad J_detector(x, 1)])

    with sigma drawn from [0, 1] for each. Without it, that adversary is hardly detected.

    Errors: `UnknownNameError` for a layer that isn't there; `InputError` for models that are no networks.
    Source: Metzen et al. (2017), On detecting adversarial perturbations, arXiv:1702.04267, sections 3.1, 3.3 and 3.4.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> noisy = (digits.train.x[:100] + 0.3).clamp(max=1)
    >>> detector = sp.detectors.LayerNetwork(epochs=1).fit(model, digits.train, noisy)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "a network on an inner layer that was trained to tell adversarial inputs from clean ones"
    reference: ClassVar[str] = "Metzen et al. 2017, arXiv:1702.04267"

    layer: str | None = None

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        layer = None if self.layer is None else str(self.layer)  # in text, a number is one
        if layer is None:
            layers = hidden_layers(self.model, clean)
            layer = layers[len(layers) // 2]
        learnt = self.distinguishing(lambda x: self._inside(x, layer), clean, labels, adversarial)
        return learnt | {"layer": torch.tensor(list(layer.encode()), dtype=torch.uint8)}

    @property
    def chosen(self) -> str:
        """The layer's name. Errors: `KeyError` before `fit`."""
        return bytes(self.arrays["layer"].tolist()).decode()

    def _inside(self, x: Tensor, layer: str) -> Tensor:
        return activations(self.model, x, (layer,))[1][0]

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.network(self._inside(x, self.chosen))[:, 0]
        return score


@final
@dataclass(eq=False, kw_only=True)
class ExtraClass(Trained):
    """The classifier with a class more, adversarial: score(x) = z'_(K+1)(x) - log sum_(i <= K) exp z'_i(x), its log-odds.

    z' are the logits of a copy of the classifier whose last linear layer is one row longer, trained from its weights on clean
    inputs with their labels and on adversarial ones with the label K + 1. The model itself stays as it is. The paper trains
    anew, which takes longer. epochs, batch_size, learning_rate: of the training.

    Errors: `InputError` where the model is no network, or its logits don't come from a last linear layer.
    Source: Grosse et al. (2017), On the (statistical) detection of adversarial examples, arXiv:1702.06280, section 6.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> noisy = (digits.train.x[:100] + 0.3).clamp(max=1)
    >>> detector = sp.detectors.ExtraClass(epochs=1).fit(model, digits.train, noisy)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "the classifier, trained on with one class more for adversarial inputs"
    reference: ClassVar[str] = "Grosse et al. 2017, arXiv:1702.06280"
    learns_attacks: ClassVar[bool] = True

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        assert adversarial is not None  # fit sees to it
        wide = copy.deepcopy(self.model)
        classes = _widened(wide, clean[:2])
        net = nn.ModuleList(wide.networks()).requires_grad_()
        data = torch.cat([clean, adversarial]), torch.cat([labels, labels.new_full((len(adversarial),), classes)])
        return self.trained(net, data, lambda sample: cross_entropy(wide.forward(sample.tensors[0]), sample.tensors[1]))

    def build(self) -> nn.Module:
        self._wide = copy.deepcopy(self.model)
        nets = nn.ModuleList(self._wide.networks())
        for name, module in nets.named_modules():
            if isinstance(module, nn.Linear):
                _lengthen(module, len(self.arrays[f"{_PREFIX}{name}.weight"]))
        return nets

    def forward(self, x: Tensor) -> Tensor:
        logits = self._wide.forward(x)
        return logits[:, -1] - logits[:, :-1].logsumexp(1)


def _widened(model: Classifier, x: Tensor) -> int:
    """Give the model one more logit, in place; how many there were. Errors: `InputError` where that can't be done."""
    last: list[nn.Linear] = []
    handles = [
        module.register_forward_hook(lambda ran, *_: last.append(ran))
        for net in model.networks()
        for module in net.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            before = model.forward(x)
    finally:
        for handle in handles:
            handle.remove()
    classes = before.shape[1]
    problem = InputError("the logits must come from a last linear layer (nn.Linear) of the network, to which a class is added")
    if not last or last[-1].out_features != classes:
        raise problem
    _lengthen(last[-1], classes + 1)
    try:
        with torch.no_grad():
            after = model.forward(x)
    except Exception as error:  # whatever the user's network raises where its last layer has another width
        raise problem from error
    if after.shape[1] != classes + 1 or not torch.allclose(after[:, :classes], before, rtol=1e-3, atol=1e-3):
        raise problem
    return classes


def _lengthen(linear: nn.Linear, rows: int) -> None:
    """Let the layer have so many outputs, in place, the new ones with weights of 0."""
    extra = rows - linear.out_features
    if extra:
        for name in ("weight", "bias"):
            old = getattr(linear, name)
            if old is not None:
                setattr(linear, name, nn.Parameter(torch.cat([old.detach(), old.new_zeros(extra, *old.shape[1:])])))
        linear.out_features = rows
