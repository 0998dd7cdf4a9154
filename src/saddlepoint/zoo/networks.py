"""The architectures; each function builds one for inputs of `in_shape` and returns its logits' module.

Layer names follow the published weight files, so that those load as they are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.errors import InputError

Shape = tuple[int, ...]


def _flat_size(features: nn.Module, in_shape: Shape) -> int:
    """How many values `features` makes of one input."""
    try:
        with torch.no_grad():
            return features(torch.zeros(1, *in_shape)).numel()  # type: ignore[no-any-return]
    except RuntimeError as error:  # a kernel or pooling window larger than what is left of the image
        raise InputError(f"in_shape {in_shape} is too small for this network's convolutions: {error}") from error


def softmax(in_shape: Shape, num_classes: int) -> nn.Module:
    """Softmax regression: one linear layer."""
    return mlp(in_shape, num_classes, widths=())


def mlp(in_shape: Shape, num_classes: int, widths: tuple[int, ...]) -> nn.Module:
    """Fully connected ReLU network with hidden layers of `widths`."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(in_shape)
    for width in widths:
        layers += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


def cnn_a(in_shape: Shape, num_classes: int, padding: int = 1) -> nn.Module:
    """Two strided convolutions of 16 and 32 channels, then 100 hidden units (Wong and Kolter 2018)."""
    features = nn.Sequential(
        nn.Conv2d(in_shape[0], 16, 4, stride=2, padding=padding),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=padding),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(*features, nn.Linear(_flat_size(features, in_shape), 100), nn.ReLU(), nn.Linear(100, num_classes))


def lenet(in_shape: Shape, num_classes: int) -> nn.Module:
    """Convolutions of 32 and 64 channels, each with pooling, then 200 hidden units (advertorch's LeNet5)."""
    features = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(in_shape[0], 32, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
    )
    size = _flat_size(nn.Sequential(features), in_shape)
    head = OrderedDict[str, nn.Module](linear1=nn.Linear(size, 200), relu3=nn.ReLU(), linear2=nn.Linear(200, num_classes))
    return nn.Sequential(features | head)


def smallcnn(in_shape: Shape, num_classes: int) -> nn.Module:
    """Four convolutions and three linear layers (Carlini and Wagner 2017; Zhang et al. 2019, TRADES)."""
    features = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_shape[0], 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
        )
    )
    classifier = nn.Sequential(
        OrderedDict[str, nn.Module](
            fc1=nn.Linear(_flat_size(features, in_shape), 200),
            relu1=nn.ReLU(),
            drop=nn.Dropout(0.5),
            fc2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            fc3=nn.Linear(200, num_classes),
        )
    )
    return nn.Sequential(OrderedDict(feature_extractor=features, classifier=classifier))


def cnn_s(in_shape: Shape, num_classes: int) -> nn.Module:
    """Two 5x5 convolutions of 16 and 32 channels, each with pooling, then 128 hidden units."""
    features = nn.Sequential(
        nn.Conv2d(in_shape[0], 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return nn.Sequential(*features, nn.Linear(_flat_size(features, in_shape), 128), nn.ReLU(), nn.Linear(128, num_classes))


def digits_cnn(in_shape: Shape, num_classes: int) -> nn.Module:
    """Two 3x3 convolutions of 32 and 64 channels, then 128 hidden units: 8x8 digits, with the capacity to be hardened."""
    features = nn.Sequential(
        nn.Conv2d(in_shape[0], 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(*features, nn.Linear(_flat_size(features, in_shape), 128), nn.ReLU(), nn.Linear(128, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride, self.pad = stride, (width - in_width) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_width, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.relu2(out + x)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """CIFAR's residual network of depth 6 n + 2 (He et al. 2016, arXiv:1512.03385, section 4.2)."""

    def __init__(self, in_shape: Shape, num_classes: int, n: int) -> None:
        super().__init__()

        def stage(in_width: int, width: int, stride: int) -> nn.Sequential:
            rest = [BasicBlock(width, width, 1) for _ in range(n - 1)]
            return nn.Sequential(BasicBlock(in_width, width, stride), *rest)

        self.conv1 = nn.Conv2d(in_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 convolution as the shortcut where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_width), nn.ReLU()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride > 1 or width != in_width
        self.shortcut = nn.Conv2d(in_width, width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_width, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.relu1(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + kept  # type: ignore[no-any-return]


class PreActResNet18(nn.Module):
    """Residual network of 64 to 512 channels, for small images, activated before its convolutions (He et al. 2016)."""

    def __init__(self, in_shape: Shape, num_classes: int) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        stages = [
            nn.Sequential(PreActBlock(before, width, 1 if place == 0 else 2), PreActBlock(width, width, 1))
            for place, (before, width) in enumerate(pairwise(widths))
        ]
        self.conv1 = nn.Conv2d(in_shape[0], 64, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*stages)
        self.bn, self.relu = nn.BatchNorm2d(512), nn.ReLU()
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = self.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]
