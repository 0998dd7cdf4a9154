"""What evolution finds with scores alone: one pixel that is enough, and rubbish of which a network is sure."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint import data as datasets
from saddlepoint.attacks.evolution import FewPixel
from saddlepoint.attacks.facade import attack
from saddlepoint.attacks.rubbish import evolve_rubbish
from saddlepoint.data import Split
from saddlepoint.defenses import train
from saddlepoint.errors import DataError
from saddlepoint.goals import Goal, Targeted, Untargeted
from saddlepoint.models import Model
from saddlepoint.reproduce.frame import Context, Figure, Recipe, UnavailableError, entry
from saddlepoint.reproduce.masking import CNN, UNIT, undefended_network
from saddlepoint.reproduce.measures import right
from saddlepoint.threats import L0


def small_network(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Convolutions of 16, 32 and 64 channels, 3x3, each with batch norm and pooling, then the logits."""
    layers: list[nn.Module] = []
    for before, width in ((in_shape[0], 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (in_shape[1] // 8) * (in_shape[2] // 8), num_classes))


SMALL = Recipe(small_network, epochs=30, bounds=UNIT, samples=10_000)


def flipped_and_shifted(x: Tensor) -> Tensor:
    """Each image mirrored or not, and moved by up to 4 pixels with its edge reflected."""
    count, (height, width) = len(x), x.shape[2:]
    x = torch.where((torch.rand(count) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    down, across = torch.randint(0, 9, (2, count, 1, 1, 1))
    rows, columns = down + torch.arange(height)[:, None], across + torch.arange(width)
    sample, channel = torch.arange(count).view(-1, 1, 1, 1), torch.arange(x.shape[1])[:, None, None]
    return functional.pad(x, (4, 4, 4, 4), mode="reflect")[sample, channel, rows, columns]


def _coloured(context: Context) -> tuple[Model, Split]:
    """A small network on CIFAR-10 and its test images; on a stand-in the network and images of that."""
    if context.stand_in:
        return undefended_network(context), context.test
    try:
        cifar = datasets.load("cifar10", root=Path(context.data.source).parent)
    except DataError as error:
        raise UnavailableError(str(error)) from None
    if cifar.train is None:
        raise UnavailableError(f"{cifar.source} holds CIFAR-10's test part alone")
    if SMALL not in context.trained:
        training = train(
            Model(context.network(SMALL.net, tuple(cifar.train.x.shape[1:]), cifar.num_classes), bounds=UNIT),
            cifar.train.take(1000 if context.quick else 10_000),
            epochs=3 if context.quick else SMALL.epochs,
            learning_rate=4e-3,
            schedule="cyclic",
            augment=flipped_and_shifted,
            seed=context.seed,
        )
        if not training.complete:
            raise KeyboardInterrupt
        context.trained[SMALL] = training.model
    return context.trained[SMALL], cifar.test.take(1000)


@entry(
    "R36",
    "One pixel",
    "Su, Vargas & Sakurai 2019, arXiv:1710.08864",
    "CIFAR-10: convolutions of 16, 32 and 64 channels, 3x3, each with batch norm and pooling; Adam, 30 epochs of 10,000 images,"
    " flipped and shifted; 50 correctly classified test images, differential evolution, 400 individuals, 75 generations",
)
def one_pixel(context: Context) -> list[Figure]:
    """One pixel of 1,024 changes the class of many images, and more pixels that of more."""
    model, split = _coloured(context)
    x, y = right(model, split)
    few = context.few(Split(x, y), 50)
    clean = len(x) / len(split)

    def fooled(pixels: int, goal: Goal) -> float:
        evolution = FewPixel(pixels=pixels, population=50, steps=10) if context.quick else FewPixel(pixels=pixels)
        result = attack(model, few.x, few.y, evolution, L0(pixels, per="pixel"), goal, seed=context.seed)
        return float(result.success.double().mean())

    one, three, five = (fooled(pixels, Untargeted()) for pixels in (1, 3, 5))
    targeted = fooled(1, Targeted("random"))
    lenet = "of LeNet, 74.9 % accurate, in the attack's best-known reimplementation"
    return [
        Figure("clean accuracy", clean, context.accept((0.65, 0.8)), goal=0.72),
        Figure("one pixel: success", one, context.accept((0.3, 0.75)), paper=0.63, paper_note=lenet),
        Figure("three pixels: success", three, paper=0.92, paper_note=lenet),
        Figure("five pixels: success", five, paper=0.93, paper_note=lenet),
        Figure("more with three pixels", three - one, (0.0, 1.0)),
        Figure("more with five pixels", five - one, (0.0, 1.0)),
        Figure("one pixel, a random target: success", targeted, paper=0.344, paper_note=f"{lenet}, all targets"),
    ]


@entry(
    "R37",
    "Fooling images",
    "Nguyen, Yosinski & Clune 2015, arXiv:1412.1897, section 3.1",
    f"{CNN}, 5 epochs; MAP-Elites with 200 children a generation, at most 200 generations, until all classes have 99.99 %;"
    " images encoded directly, or as networks from place to grey value",
)
def fooling_images(context: Context) -> list[Figure]:
    """Noise and regular patterns that the network takes for digits, almost certainly."""
    model, shape, figures = undefended_network(context), tuple(context.data.test.x.shape[1:]), []
    for encoding, word, goal in (("direct", "noise", 0.9999), ("cppn", "patterns", 0.9999)):
        most = 60 if context.quick else 200
        found = evolve_rubbish(model, shape, encoding=encoding, generations=most, seed=context.seed)
        sure, all_classes = found.probabilities, context.accept((0.99, 1.0), loose=(0.9, 1.0))
        figures += [
            Figure(f"{word}: mean confidence", float(sure.mean()), all_classes, paper=0.9999, goal=goal),
            Figure(f"{word}: least of the ten classes", float(sure.min())),
            Figure(f"{word}: generations", float(len(found.history)), paper=200, paper_note="or fewer", unit=""),
        ]
    return figures
