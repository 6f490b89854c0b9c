"""DenseNet-121: BatchNorm and ReLU *before* each convolution, and ever longer concatenations.

Source: Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993, table 1; the
layout is torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import init_convs


class DenseLayer(nn.Module):
    """norm, relu, 1x1, norm, relu, 3x3 over everything that came before in the block."""

    def __init__(self, cin: int, growth: int, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(cin)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(cin, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, *features: Tensor) -> Tensor:
        x = torch.cat(features, 1)
        x = self.conv1(self.relu1(self.norm1(x)))
        x = self.conv2(self.relu2(self.norm2(x)))
        return x


class DenseBlock(nn.Module):
    """``depth`` dense layers and the concatenation of all that they made."""

    def __init__(self, cin: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(cin + i * growth, growth) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(*features))
        return torch.cat(features, dim=1)


class Transition(nn.Sequential):
    """Halve the channels and the side."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(
            nn.BatchNorm2d(cin),
            nn.ReLU(inplace=True),
            nn.Conv2d(cin, cout, kernel_size=1, stride=1, bias=False),
            nn.AvgPool2d(kernel_size=2, stride=2),
        )


class DenseNet(nn.Module):
    """torchvision's DenseNet."""

    def __init__(
        self,
        num_classes: int = 1000,
        growth: int = 32,
        depths: tuple[int, ...] = (6, 12, 24, 16),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        channels = width
        for index, depth in enumerate(depths):
            layers.append(DenseBlock(channels, growth, depth))
            channels += depth * growth
            if index + 1 < len(depths):
                layers.append(Transition(channels, channels // 2))
                channels //= 2
        self.features = nn.Sequential(*layers)
        self.norm5 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.conv0(x)), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.norm5(self.features(x))
        x = F.relu(x, inplace=True)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x


def densenet121(
    num_classes: int = 1000,
    growth: int = 32,
    depths: tuple[int, ...] = (6, 12, 24, 16),
    width: int = 64,
) -> DenseNet:
    """DenseNet-121: 7,978,856 parameters at the defaults."""
    return DenseNet(num_classes, growth, depths, width)
