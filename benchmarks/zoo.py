"""The published classifiers of the shared data folder, rebuilt, and their clean accuracy beside the stated one.

    SADDLEPOINT_DATA=... python benchmarks/zoo.py [--full] [NAME ...]

Exits with 1 if an accuracy over the whole test set is more than 0.05 points away from the stated one.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saddlepoint import data, zoo
from saddlepoint.zoo import networks

Values = tuple[float, ...]
TOLERANCE = 0.05  # points
GREY, RGB, PHOTO = (1, 28, 28), (3, 32, 32), (3, 224, 224)
NONE_GREY: tuple[Values, Values] = ((0.0,), (1.0,))
MNIST_NORM: tuple[Values, Values] = ((0.1307,), (0.3081,))
IMAGENET: tuple[Values, Values] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORM_A: tuple[Values, Values] = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
NORM_B: tuple[Values, Values] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORM_C: tuple[Values, Values] = ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225))


class PlainBlock(nn.Module):
    """Residual block without batch norm, with a 1x1 convolution as the shortcut where it strides."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu2 = nn.ReLU()
        strided = [nn.Conv2d(in_width, width, 1, stride=stride)] if stride > 1 else []
        self.shortcut = nn.Sequential(*strided)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))  # type: ignore[no-any-return]


class CResNet(nn.Module):
    """Small residual network of the verification literature: CResNet with one stage (2B) or two (4B)."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        wide = 2 * width
        self.layer1 = nn.Sequential(PlainBlock(width, wide, 2), PlainBlock(wide, wide, 1))
        second = [PlainBlock(wide, wide, 2), PlainBlock(wide, wide, 1)] if stages == 2 else []
        self.layer2 = nn.Sequential(*second)
        self.linear1 = nn.Linear(wide * (32 // 2 ** (stages + 1)) ** 2, 100)
        self.relu2 = nn.ReLU()
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu1(self.conv1(x))))
        return self.linear2(self.relu2(self.linear1(x.flatten(1))))  # type: ignore[no-any-return]


class MobileNetV1(nn.Module):
    """MobileNet v1 with a quarter of the widths (Howard et al. 2017, arXiv:1704.04861)."""

    def __init__(self) -> None:
        super().__init__()

        def depthwise(in_width: int, width: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_width, in_width, 3, stride=stride, padding=1, groups=in_width, bias=False),
                nn.BatchNorm2d(in_width),
                nn.ReLU(),
                nn.Conv2d(in_width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )

        stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        steps = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stage1 = nn.Sequential(stem, *(depthwise(*step) for step in steps))
        self.stage2 = nn.Sequential(depthwise(64, 128, 2), *(depthwise(128, 128, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(depthwise(128, 256, 2), depthwise(256, 256, 1))
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def from_zoo(name: str, in_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    return lambda: zoo.build(name, in_shape=in_shape)


def conv_small(in_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    """CNN-A without padding."""
    return lambda: networks.cnn_a(in_shape, 10, padding=0)


@dataclass(frozen=True)
class Reference:
    """A weight file: how to build its network, the normalisation it expects, its data, and its stated accuracy in %."""

    build: Callable[[], nn.Module]
    norm: tuple[Values, Values]
    in_shape: tuple[int, int, int]
    dataset: str
    accuracy: float


REFERENCES: dict[str, Reference] = {
    "mnist_cnnA_provable_eps0.1": Reference(from_zoo("cnn-a", GREY), NONE_GREY, GREY, "mnist", 98.20),
    "mnist_cnnA_pgd_eps0.3": Reference(from_zoo("cnn-a", GREY), NONE_GREY, GREY, "mnist", 98.99),
    "mnist_cnnA_adv_eps0.3": Reference(from_zoo("cnn-a", GREY), NONE_GREY, GREY, "mnist", 96.33),
    "mnist_convsmall_standard": Reference(conv_small(GREY), MNIST_NORM, GREY, "mnist", 98.25),
    "mnist_smallcnn_trades_eps0.3": Reference(from_zoo("smallcnn", GREY), NONE_GREY, GREY, "mnist", 99.48),
    "mnist_lenet_standard": Reference(from_zoo("lenet", GREY), NONE_GREY, GREY, "mnist", 98.89),
    "mnist_lenet_adv_eps0.3": Reference(from_zoo("lenet", GREY), NONE_GREY, GREY, "mnist", 98.64),
    "fashion_cnnA_provable_eps0.1": Reference(from_zoo("cnn-a", GREY), NONE_GREY, GREY, "fashion-mnist", 78.27),
    "cifar10_resnet20_standard": Reference(from_zoo("resnet20", RGB), IMAGENET, RGB, "cifar10", 91.73),
    "cifar10_resnet56_standard": Reference(from_zoo("resnet56", RGB), IMAGENET, RGB, "cifar10", 93.39),
    "cifar10_cnnA_adv": Reference(from_zoo("cnn-a", RGB), NORM_B, RGB, "cifar10", 69.75),
    "cifar10_cnnA_adv4": Reference(from_zoo("cnn-a", RGB), NORM_B, RGB, "cifar10", 60.07),
    "cifar10_convsmall_pgd": Reference(conv_small(RGB), NORM_B, RGB, "cifar10", 62.92),
    "cifar10_resnet2b_adv": Reference(lambda: CResNet(8, 1), NORM_A, RGB, "cifar10", 69.25),
    "cifar10_cnnA_provable_oval_wide": Reference(from_zoo("cnn-a", RGB), NORM_C, RGB, "cifar10", 61.61),
    "cifar10_cnnA_provable_eps8_stage1": Reference(from_zoo("cnn-a", RGB), NORM_C, RGB, "cifar10", 27.61),
    "imagenet_mobilenet_v1_025": Reference(MobileNetV1, IMAGENET, PHOTO, "photographs", 55.0),
}


def reference(name: str, data_root: str | Path) -> tuple[nn.Module, Values, Values, tuple[int, int, int]]:
    """The network with its weights, in eval mode, the mean and standard deviation it expects, and its input shape."""
    entry = REFERENCES[name]
    net = zoo.load_weights(entry.build(), Path(data_root) / "models" / f"{name}.pt").eval()
    return net, *entry.norm, entry.in_shape


@cache
def test_split(dataset: str, data_root: Path) -> data.Split:
    """The test images; "photographs" are the ImageNet sample's central 224x224 pixels."""
    if dataset != "photographs":
        return data.load(dataset, root=data_root).test
    folder = data_root / "imagenet_sample"
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = []
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            images.append(np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224))))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255
    return data.Split(x, torch.tensor([int(row["class_index"]) for row in rows]))


@torch.no_grad()
def accuracy(net: nn.Module, mean: Values, std: Values, split: data.Split) -> float:
    """Clean accuracy in per cent."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    right = 0
    for start in range(0, len(split), 100):
        batch = slice(start, start + 100)
        right += int((net((split.x[batch] - shift) / scale).argmax(1) == split.y[batch]).sum())
    return 100 * right / len(split)


def main() -> int:
    parser = argparse.ArgumentParser(description="Clean accuracy of the published classifiers beside the stated one.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(REFERENCES)}")
    parser.add_argument("--full", action="store_true", help="the whole test set instead of its first 1,000 images")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in REFERENCES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if "SADDLEPOINT_DATA" not in os.environ:
        parser.error("set SADDLEPOINT_DATA to the folder that holds models/, mnist/, cifar10/, ...")
    root = Path(os.environ["SADDLEPOINT_DATA"])

    wrong = []
    print(f"{'model':36} {'images':>6} {'measured %':>10} {'stated %':>8}")
    for name in options.names or REFERENCES:
        net, mean, std, _ = reference(name, root)
        whole = test_split(REFERENCES[name].dataset, root)
        split = whole if options.full else whole.take(1000)
        measured, stated = accuracy(net, mean, std, split), REFERENCES[name].accuracy
        print(f"{name:36} {len(split):6} {measured:10.2f} {stated:8.2f}", flush=True)
        if len(split) == len(whole) and abs(measured - stated) > TOLERANCE + 1e-9:
            wrong.append(name)
    if wrong:
        print(f"more than {TOLERANCE} points off: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
