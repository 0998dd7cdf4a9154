"""Purification: it repairs what was made for the bare network, and falls to an adversary who knows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from saddlepoint.attacks import BIM, FGSM, PGD
from saddlepoint.attacks.facade import attack
from saddlepoint.data import Split
from saddlepoint.defenses.loop import Fit
from saddlepoint.defenses.purification import (
    Autoencoder,
    Critic,
    DefenseGAN,
    Denoiser,
    Generator,
    Guide,
    PixelCNN,
    PixelDefend,
    Purifier,
    adversarial_pairs,
    p_values,
    train_autoencoder,
    train_denoiser,
    train_gan,
    train_pixelcnn,
)
from saddlepoint.detectors import roc_auc
from saddlepoint.engine import Attack
from saddlepoint.models import Defended, Model
from saddlepoint.models.base import Classifier
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.reproduce.frame import Context, Figure, entry
from saddlepoint.reproduce.least import QUICKLY
from saddlepoint.reproduce.masking import CNN, EPS, undefended_network
from saddlepoint.reproduce.measures import error
from saddlepoint.threats import Linf, Minimize, Threat

_QUICK = 0.2  # part of the images that are seen in training
IMAGENET = "of ImageNet, eps 16/255"
Net = TypeVar("Net", bound=nn.Module)


def _built(context: Context, build: Callable[[], Net]) -> Net:
    """A network with weights drawn by the context's seed."""
    with global_random_state_kept():
        torch.manual_seed(context.seed)
        return build()


def _seen(context: Context, split: Split, images: int) -> int:
    """In how many epochs of a split so many images are seen, fewer in quick versions."""
    return max(1, round((_QUICK if context.quick else 1.0) * images / len(split)))


def _finished(training: Fit) -> None:
    if not training.complete:
        raise KeyboardInterrupt  # figures of a half-trained purifier would mislead


def _accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    return float((model.predict(x) == y).double().mean())


def _defended(model: Model, purifier: Purifier, draws: int = 1) -> Defended:
    return Defended(model, [purifier.transform()], draws=draws)


@entry(
    "R26",
    "MagNet's reformer",
    "Meng & Chen 2017, arXiv:1705.09064; Carlini & Wagner 2017, arXiv:1711.08478",
    f"{CNN}, 5 epochs; the paper's autoencoder for MNIST, 240,000 images seen in batches of 128, Adam 1e-2; mean absolute"
    " reconstruction error above the 95% quantile of 5,000 other training images is detected; 100 correctly classified test"
    " images, Carlini-Wagner l2 with 6 searches of 50 steps",
)
def magnet(context: Context) -> list[Figure]:
    """Examples that were made for the bare network are put right; made for both together, they are hardly farther away."""
    model, part = undefended_network(context), context.training(20_000)
    reformer = _built(context, lambda: Autoencoder(part.x.shape[1]))
    _finished(
        train_autoencoder(
            reformer, part.x, epochs=_seen(context, part, 240_000), batch_size=128, learning_rate=1e-2, seed=context.seed
        )
    )
    defended = _defended(model, reformer)
    with torch.no_grad():
        assert context.data.train is not None
        threshold = reformer.reconstruction_error(context.data.train.x[-5000:]).quantile(0.95)

    def detected(x: Tensor) -> Tensor:
        with torch.no_grad():
            return reformer.reconstruction_error(x) > threshold

    kept = (defended.predict(context.test.x) == context.test.y).nonzero()[:, 0]
    few = context.few(Split(context.test.x[kept], context.test.y[kept]), 100)
    x, y = few.x, few.y
    naive, adaptive = (attack(m, x, y, QUICKLY, Minimize("l2"), seed=context.seed) for m in (model, defended))

    def after_both(examples: Tensor) -> float:
        return float((detected(examples) | (defended.predict(examples) == y)).double().mean())

    clean = context.test
    return [
        Figure("clean accuracy, undefended", 1 - error(model, clean.x, clean.y), paper=0.994),
        Figure("clean accuracy, reformed", _accuracy(defended, clean.x, clean.y), context.accept((0.95, 1.0)), paper=0.991),
        Figure("clean images detected", float(detected(clean.x).double().mean()), context.accept((0.0, 0.1))),
        Figure("Carlini-Wagner, undefended", _accuracy(model, naive.adversarial, y), (0.0, 0.1), paper=0.0),
        Figure("Carlini-Wagner, reformed", _accuracy(defended, naive.adversarial, y)),
        Figure(
            "Carlini-Wagner, detected or reformed", after_both(naive.adversarial),
            context.accept((0.9, 1.0), loose=(0.3, 1.0)), paper=0.995,
        ),
        Figure("of an adversary who knows the reformer", _accuracy(defended, adaptive.adversarial, y), (0.0, 0.2)),
        Figure(
            "how much farther it must go", float(adaptive.distance.mean() / naive.distance.mean()),
            context.accept((0.5, 2.0)), unit="",
        ),
    ]  # fmt: skip


@entry(
    "R27",
    "PixelDefend",
    "Song et al. 2018, arXiv:1710.10766; Athalye, Carlini & Wagner 2018, arXiv:1802.00420",
    f"{CNN}, 5 epochs; gated PixelCNN of 16 features and 4 layers on 16 grey levels, 15,000 images seen of 5,000, Adam 5e-3 to"
    " 0, batches of 32; eps 0.3, eps_defend 0.3, 100 test images; BIM with 20 steps of 0.03; p-values among 1,000 training"
    " images; adaptive: BPDA, PGD with 20 steps, 30 images",
)
def pixel_defend(context: Context) -> list[Figure]:
    """Perturbed images are unlikely, and the likeliest image near by is classified rightly, unless the attack knows of it."""
    model, part = undefended_network(context), context.training(5000)
    density = _built(context, lambda: PixelCNN(part.x.shape[1], levels=16, width=16, layers=4))
    _finished(
        train_pixelcnn(
            density, part.x, epochs=_seen(context, part, 15_000), batch_size=32, learning_rate=5e-3, schedule="linear",
            seed=context.seed,
        )
    )  # fmt: skip
    defended = _defended(model, PixelDefend(density, eps_defend=EPS))
    few = context.few(context.test, 100)
    iterated = BIM(steps=20, step_size=0.03)
    one_step, many_steps = (
        attack(model, few.x, few.y, made, Linf(EPS), seed=context.seed).adversarial for made in (FGSM(), iterated)
    )
    with torch.no_grad():
        reference = density.log_likelihood(part.x[:1000])
        of_clean, of_examples = (p_values(density.log_likelihood(x), reference) for x in (few.x, many_steps))
        bits = float(density.bits_per_dimension(few.x).mean())
    before = [_accuracy(model, x, few.y) for x in (few.x, one_step, many_steps)]
    after = [_accuracy(defended, x, few.y) for x in (few.x, one_step, many_steps)]
    known = few.take(10 if context.quick else 30)
    adaptive = attack(defended, known.x, known.y, PGD(steps=20), Linf(EPS), seed=context.seed)
    fashion = "of a ResNet on Fashion-MNIST, the strongest of several attacks"
    return [
        Figure("bits per pixel", bits, unit=""),
        Figure("clean accuracy, undefended", before[0]),
        Figure("clean accuracy, purified", after[0], context.accept((0.9, 1.0))),
        Figure("FGSM, undefended", before[1]),
        Figure("FGSM, purified", after[1]),
        Figure("FGSM, gained", after[1] - before[1], context.accept((0.2, 1.0)), paper=0.21, paper_note=fashion),
        Figure("BIM, undefended", before[2]),
        Figure("BIM, purified", after[2]),
        Figure("BIM, gained", after[2] - before[2], context.accept((0.2, 1.0)), paper=0.21, paper_note=fashion),
        Figure("p-values: area under the ROC curve", roc_auc(of_examples, of_clean), (0.8, 1.0)),
        Figure("of an adversary who knows it", adaptive.robust_accuracy, paper=0.09, paper_note="of CIFAR-10, 8/255"),
        Figure("lost to such an adversary", after[2] - adaptive.robust_accuracy, context.accept((0.2, 1.0))),
    ]  # fmt: skip


@entry(
    "R28",
    "The guided denoiser",
    "Liao et al. 2018, arXiv:1712.02976; Athalye & Carlini 2018, arXiv:1804.03286",
    f"{CNN}, 5 epochs; U-Net of widths 8, 16, 32, for each guide anew, 2 epochs of 2,000 images' FGSM and PGD-10 examples at"
    " eps 0.3 and PGD-10 examples at 0.15, each beside its clean image, Adam 2e-3 to 0, batches of 64; 1,000 test images, by"
    " FGSM and by PGD with 40 steps of 0.01, eps 0.3; adaptive: PGD-40, 200 of them",
)
def guided_denoiser(context: Context) -> list[Figure]:
    """What the network makes of the result is a better guide than the pixels; nobody is stopped who knows the denoiser."""
    model, part = undefended_network(context), context.training(500 if context.quick else 2000)
    strong: Sequence[tuple[Attack | str, Threat]] = [
        (FGSM(), Linf(EPS)), (PGD(steps=10), Linf(EPS)), (PGD(steps=10), Linf(EPS / 2)),
    ]  # fmt: skip
    pairs = adversarial_pairs(model, part.x, part.y, strong, seed=context.seed)
    test = context.test.take(100 if context.quick else 1000)
    forty = PGD(steps=40, step_size=0.01)
    results = [attack(model, test.x, test.y, made, Linf(EPS), seed=context.seed) for made in (FGSM(), forty)]
    white, labels = torch.cat([result.adversarial for result in results]), test.y.repeat(2)
    undefended = _accuracy(model, white, labels)
    figures = [
        Figure("clean accuracy, undefended", results[0].clean_accuracy, paper=0.767, paper_note=IMAGENET),
        Figure("FGSM and PGD-40, undefended", undefended, paper=0.144, paper_note=IMAGENET),
    ]
    paper = {"pixel": (0.753, 0.138), "feature": (0.761, 0.674), "logit": (0.762, 0.692), "class": (0.732, 0.732)}
    repaired: dict[Guide, float] = {}
    for guide in get_args(Guide):
        denoiser = _built(context, lambda: Denoiser(part.x.shape[1], widths=(8, 16, 32)))
        _finished(
            train_denoiser(
                denoiser, *pairs, model=model, guide=guide, layer=_last_hidden(model), epochs=2, learning_rate=2e-3,
                schedule="linear", seed=context.seed,
            )
        )  # fmt: skip
        defended = _defended(model, denoiser)
        repaired[guide] = _accuracy(defended, white, labels)
        clean, strongest = paper[guide]
        figures += [
            Figure(f"clean accuracy, {guide} guide", _accuracy(defended, test.x, test.y), paper=clean, paper_note=IMAGENET),
            Figure(f"FGSM and PGD-40, {guide} guide", repaired[guide], paper=strongest, paper_note=IMAGENET),
        ]
        if guide == "logit":
            known = test.take(200)
            adaptive = attack(defended, known.x, known.y, forty, Linf(EPS), seed=context.seed).robust_accuracy
    return [
        *figures,
        Figure(
            "gained by the logit guide",
            repaired["logit"] - undefended,
            context.accept((0.4, 1.0)),
            paper=0.548,
            paper_note=IMAGENET,
        ),
        Figure(
            "logit guide minus pixel guide",
            repaired["logit"] - repaired["pixel"],
            context.accept((0.0, 1.0)),
            paper=0.554,
            paper_note=IMAGENET,
        ),
        Figure("of an adversary who knows it", adaptive, context.accept((0.0, 0.2), loose=(0.0, 0.5)), paper=0.0),
    ]


def _last_hidden(model: Model) -> str:
    """The name of the layer before the last: the hidden units after their ReLU."""
    assert isinstance(model.net, nn.Module)
    return [name for name, _ in model.net.named_children()][-2]


@entry(
    "R29",
    "Defense-GAN",
    "Samangouei, Kabkab & Chellappa 2018, arXiv:1805.06605; Athalye, Carlini & Wagner 2018, arXiv:1802.00420",
    f"{CNN}, 5 epochs; generator and critic of two convolutions each, of 16 and 32 channels, 32 latent numbers, 600,000 images"
    " seen of 20,000, WGAN-GP with 3 steps of the critic, Adam 1e-3 to 0, batches of 32; L = 200, R = 10; FGSM at eps 0.3, 100"
    " test images; adaptive: BPDA, PGD with 20 steps through L = 50, R = 2, 30 images, judged by the whole defense",
)
def defense_gan(context: Context) -> list[Figure]:
    """The nearest image that a generator can make has lost a perturbation that isn't its own, but not one that moves it."""
    model, part = undefended_network(context), context.training(20_000)
    shape = tuple(part.x.shape[1:])
    generator = _built(context, lambda: Generator(shape, latent=32))
    critic = _built(context, lambda: Critic(shape))
    images = 20_000 if context.quick else 600_000
    _finished(
        train_gan(
            generator, part.x, critic=critic, critic_steps=3, epochs=_seen(context, part, images), batch_size=32,
            learning_rate=1e-3, schedule="linear", seed=context.seed,
        )
    )  # fmt: skip
    thorough = _defended(model, DefenseGAN(generator, *((50, 2) if context.quick else (200, 10))), draws=2)
    quick = _defended(model, DefenseGAN(generator, steps=50, restarts=2), draws=2)
    few = context.few(context.test, 100)
    one_step = attack(model, few.x, few.y, FGSM(), Linf(EPS), seed=context.seed)
    known = few.take(10 if context.quick else 30)
    made = attack(quick, known.x, known.y, PGD(steps=20), Linf(EPS), seed=context.seed).adversarial
    repaired, adaptive = _accuracy(thorough, one_step.adversarial, few.y), _accuracy(thorough, made, known.y)
    return [
        Figure("clean accuracy, undefended", one_step.clean_accuracy, context.accept((0.95, 1.0), loose=(0.8, 1.0))),
        Figure("clean accuracy, purified", _accuracy(thorough, few.x, few.y), context.accept((0.7, 1.0))),
        Figure("FGSM, undefended", one_step.robust_accuracy, paper=0.217),
        Figure("FGSM, purified", repaired, context.accept((0.6, 1.0)), paper=0.988),
        Figure(
            "of an adversary who knows it", adaptive, paper=0.55,
            paper_note="of examples at a mean square distance of 0.005, on the generator's manifold",
        ),
        Figure("lost to such an adversary", repaired - adaptive, context.accept((0.2, 1.0))),
    ]  # fmt: skip
