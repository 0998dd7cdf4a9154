"""What trains for randomised smoothing: adversarial examples of the smoothed classifier, and denoisers before a given one.

Plain noise is `GaussianAugmentation(Standard(), sigma, clip=False)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from saddlepoint.attacks.ascent import PGD
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.objectives import Batch, MinMax, check_adversary, check_number, craft, warmed
from saddlepoint.defenses.purification.purifier import Purifier, check_images, through
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.rng import Keys
from saddlepoint.threats import Threat

__all__ = ["DenoiserLoss", "SmoothAdv", "train_noise_denoiser"]

_NOISE = 0x5A10  # purpose of random numbers
_PGD = PGD(steps=4, random_start=False)
DenoiserLoss = Literal["mse", "stability"]


@final
@dataclass(frozen=True, kw_only=True)
class SmoothAdv(MinMax):
    """Adversarial training of a smoothed classifier: x' is against the mean over noise, and training is under that noise.

        x' = argmax_{x' in threat} -log( 1/m sum_i p_y(x' + sigma e_i) );   loss = 1/m sum_i L(f(x' + sigma e_i), y)

    with the same e_i ~ N(0, I), drawn for each sample and batch. Certify the result with `Smoothed(model, sigma)`.
    sigma: of the smoothing. draws: m, 1 to 8 in the paper. attack: PGD in l2 of 2 to 10 steps. threat: L2 of 0.25 to 2.
    warmup: epochs over which eps grows from 0, 10 of the paper's 150. m forward and backward passes a step. Validation is on
    clean inputs: the network alone isn't what is made robust.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits").train.take(128)
    >>> adversary = sp.defenses.SmoothAdv(threat=sp.L2(0.5), sigma=0.25, draws=2)
    >>> model = sp.train(sp.zoo.build("digits-cnn"), digits, adversary=adversary, epochs=1).model
    >>> smoothed = sp.defenses.Smoothed(model, 0.25)

    Source: Salman, Yang, Li, Zhang, Zhang, Razenshteyn & Bubeck (2019), Provably robust deep learning via adversarially trained
    smoothed classifiers, arXiv:1906.04584, eq. 5 and 6, section 2.2 and algorithm 1.
    """

    threat: Threat
    sigma: float = 0.5
    draws: int = 2
    attack: Attack | str = _PGD
    warmup: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", check_adversary(self.attack, self.threat))
        check_number(self, above=0, sigma=self.sigma)
        check_number(self, least=1, draws=self.draws)
        check_number(self, least=0, warmup=self.warmup)

    def _noise(self, batch: Batch) -> Tensor:
        """sigma e_i for each sample, (B, m, ...), the same at each call."""
        return self.sigma * batch.keys(_NOISE).normal((self.draws, *batch.x.shape[1:]), batch.x.dtype)

    def examples(self, batch: Batch) -> Tensor:
        threat = warmed(self.threat, self.warmup, batch.progress)
        return craft(batch, as_attack(self.attack), threat, source=_Mean(batch.model, self._noise(batch)))

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        noisy = (examples[:, None] + self._noise(batch)).flatten(0, 1)
        return cross_entropy(batch.model.forward(noisy), batch.y.repeat_interleave(self.draws, 0))


@final
class _Mean(Classifier):
    """Logarithms of a model's mean probabilities over noise that is given for each sample, (B, m, ...)."""

    def __init__(self, model: Classifier, noise: Tensor) -> None:
        super().__init__(model.bounds, model.access, model.num_classes, device=model.device)
        self.model, self.noise = model, noise

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.noise):
            raise InputError("SmoothAdv's attack must keep one point for each sample: take PGD without restarts")
        draws = self.noise.shape[1]
        each = self.model.forward((x[:, None] + self.noise).flatten(0, 1)).log_softmax(1)
        return each.view(len(x), draws, -1).logsumexp(1) - math.log(draws)

    def features(self, x: Tensor, layer: str) -> Tensor:
        raise InputError("a mean over noise has no layers")

    def describe(self) -> dict[str, object]:
        return {"name": "mean over noise", "model": self.model.describe()}


def train_noise_denoiser(
    net: Purifier,
    x: Tensor,
    sigma: float,
    *,
    model: Classifier | None = None,
    loss: DenoiserLoss = "mse",
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    **loop: Any,
) -> Fit:
    """Train a denoiser D on images under Gaussian noise, which is drawn anew each epoch, for denoised smoothing.

        "mse": |D(x + sigma e) - x|^2        "stability": L(f(D(x + sigma e)), argmax_c f_c(x))

    The classifier f = `model`, which "stability" needs, is given and stays as it is; its own answers are the labels. The
    certified classifier is `Smoothed(Defended(model, [net.transform()]), sigma)`. The paper's best for known classifiers begins
    with "mse" and goes on with "stability": call it twice.

    x: images (N, C, H, W) in [0, 1]. loop: settings of the training loop, such as checkpoint, seed and progress (Any since they
    are passed on). Ours is for small images; the paper's denoisers are DnCNN and MemNet.

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import Denoiser
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> denoiser = Denoiser(widths=(8, 16))
    >>> training = sp.defenses.train_noise_denoiser(denoiser, digits.train.x[:64], 0.25, epochs=1)
    >>> smoothed = sp.defenses.Smoothed(sp.Defended(model, [denoiser.transform()]), 0.25)

    Source: Salman, Sun, Yang, Kapoor & Kolter (2020), Denoised smoothing: a provable defense for pretrained classifiers,
    arXiv:2003.01908, section 3.
    """
    check_images(x)
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma must be positive and finite; got {sigma}")
    if loss not in get_args(DenoiserLoss):
        raise UnknownNameError("loss", str(loss), get_args(DenoiserLoss))
    data: tuple[Tensor, ...] = (x,)
    if loss == "stability":
        if model is None:
            raise InputError("the stability loss needs the classifier: give model=")
        data = (x, model.predict(x).cpu())

    def each(sample: Sample) -> Tensor:
        clean = sample.tensors[0]
        noise = Keys.of(sample.seed, sample.ids).absorb(_NOISE).normal(tuple(clean.shape[1:]), clean.dtype)
        denoised = net(clean + sigma * noise)
        if loss == "mse" or model is None:
            return mse_loss(denoised, clean)
        with model.frozen():
            return through(denoised, lambda point: cross_entropy(model.forward(point), sample.tensors[1]))

    return fit(
        net, data, each, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, name="denoiser",
        settings={"sigma": sigma, "loss": loss}, **loop,
    )  # fmt: skip
