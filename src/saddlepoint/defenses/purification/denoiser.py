"""HGD: a U-Net that takes the adversarial noise away, guided by what the classifier makes of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.purification.purifier import Purifier, check_images, through
from saddlepoint.defenses.purification.unet import UNet
from saddlepoint.engine import Attack
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat

Guide = Literal["pixel", "feature", "logit", "class"]


@final
class Denoiser(Purifier):
    """The denoising U-Net (DUNET): x_hat = x - dx, where dx(x) is the noise that a U-Net sees in x; clipped to [0, 1].

    channels: of the images. widths: of the U-Net's blocks from the finest to the coarsest, each of `depth` convolutions. The
    paper's has widths 64, 128, 256, 256, 256; the default is for images of 28 x 28. Its last layer begins at 0, so that an
    untrained denoiser is the identity.

    It is differentiable, and so attacked exactly: an adversary who knows it breaks it (Athalye & Carlini 2018,
    arXiv:1804.03286).

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import Denoiser, adversarial_pairs, train_denoiser
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> part = digits.train.take(64)
    >>> pairs = adversarial_pairs(model, part.x, part.y, [("fgsm", sp.Linf(0.1))])
    >>> denoiser = Denoiser(widths=(8, 16))
    >>> training = train_denoiser(denoiser, *pairs, model=model, guide="logit", epochs=1)
    >>> sp.Defended(model, [denoiser.transform()]).predict(digits.test.x).shape
    torch.Size([500])

    Source: Liao et al. 2018, Defense against adversarial attacks using high-level representation guided denoiser,
    arXiv:1712.02976, section 3.
    """

    def __init__(self, channels: int = 1, widths: Sequence[int] = (16, 32, 64), depth: int = 2) -> None:
        super().__init__()
        self.noise = UNet(channels, widths, depth=depth)
        nn.init.zeros_(self.noise.last.weight)
        assert self.noise.last.bias is not None
        nn.init.zeros_(self.noise.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x - dx(x)."""
        noise: Tensor = self.noise(x)
        return (x - noise).clamp(0, 1)


def guided_loss(
    purified: Tensor, clean: Tensor, guide: Guide, model: Classifier | None = None, layer: str = "", y: Tensor | None = None
) -> Tensor:
    """How far x_hat = `purified` is from x = `clean`, as `guide` says; a mean over the batch and over what is compared.

    "pixel": |x_hat - x| (eq. 4). "feature": |f(x_hat) - f(x)| in the output of the model's `layer` (FGD). "logit": the same in
    the logits (LGD, eq. 5). "class": the cross-entropy of f(x_hat) with the labels y (CGD). The model is a constant: its
    parameters get no gradient.
    """
    if guide not in get_args(Guide):
        raise UnknownNameError("guide", guide, get_args(Guide))
    if guide == "pixel":
        return functional.l1_loss(purified, clean)
    if model is None:
        raise InputError(f"the {guide} guide needs the classifier: give model=")
    with model.frozen():
        match guide:
            case "feature":
                if not layer:
                    raise InputError("the feature guide needs the name of a layer: give layer=")
                with torch.no_grad():
                    wanted = model.features(clean, layer)
                return through(purified, lambda x: functional.l1_loss(model.features(x, layer), wanted))
            case "logit":
                with torch.no_grad():
                    wanted = model.forward(clean)
                return through(purified, lambda x: functional.l1_loss(model.forward(x), wanted))
            case _:
                if y is None:
                    raise InputError("the class guide needs labels: give y=")
                return through(purified, lambda x: functional.cross_entropy(model.forward(x), y))


def adversarial_pairs(
    model: Classifier, x: Tensor, y: Tensor, adversaries: Sequence[tuple[Attack | str, Threat]], *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A denoiser's training data: adversarial inputs, the clean ones that they came from, and labels, each (M N, ...).

    adversaries: M attacks, each with its threat; the paper's were one step and several, eps from 1/255 to 16/255.
    """
    if not adversaries:
        raise InputError("a denoiser is trained on adversarial images: give one attack at least, with its threat")
    made = [run_attack(model, x, y, attack, threat, seed=seed).adversarial for attack, threat in adversaries]
    return torch.cat(made), x.repeat(len(made), *[1] * (x.dim() - 1)), y.repeat(len(made))


def train_denoiser(
    net: Denoiser,
    adversarial: Tensor,
    clean: Tensor,
    y: Tensor | None = None,
    *,
    model: Classifier | None = None,
    guide: Guide = "logit",
    layer: str = "",
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    **loop: Any,
) -> Fit:
    """Train a denoiser on pairs of adversarial and clean images, each (N, C, H, W) in [0, 1]; clean ones stay as they are.

    Each batch holds the adversarial images and their clean ones in equal parts (our choice), so that the denoiser learns to
    leave clean images alone. model: the classifier to protect, not needed for guide="pixel". layer: of its features. y: labels
    (N,), for guide="class". loop: settings of the training loop, such as checkpoint, seed and progress (Any since they are
    passed on).

    Defaults: the paper's 20 to 30 epochs of Adam with learning rate 0.001, which it lowers on the way.
    """
    for name, images in (("adversarial", adversarial), ("clean", clean)):
        check_images(images, name)
    if adversarial.shape != clean.shape:
        raise InputError(f"each adversarial image needs its clean one; got {adversarial.shape} and {clean.shape}")
    if y is None:
        y = torch.zeros(len(clean), dtype=torch.int64)
        if guide == "class":
            raise InputError("the class guide needs labels: give y=")
    elif model is not None:
        y = check_labels(y, len(clean), model.probe(clean).num_classes)

    def loss(sample: Sample) -> Tensor:
        before, after, classes = sample.tensors
        wanted = torch.cat([after, after])
        return guided_loss(net(torch.cat([before, after])), wanted, guide, model, layer, torch.cat([classes, classes]))

    return fit(
        net, (adversarial, clean, y), loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        name="denoiser", settings={"guide": guide, "layer": layer}, **loop,
    )  # fmt: skip
