"""MobileNetV3-small: squeeze-and-excitation, hardswish, hardsigmoid.

Source: Howard et al., "Searching for MobileNetV3", arXiv 1905.02244, table 2; the layout is
torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import conv_bn_act, divisible, find_last_norm, init_convs

EPS = 0.001
# kernel, expanded, out, squeeze-and-excitation, hardswish, stride
SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the mean of all of them."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = F.relu(self.fc1(scale), inplace=True)
        scale = F.hardsigmoid(self.fc2(scale))
        return scale * x


class Block(nn.Module):
    """Expand, depthwise, gate, project; added to its input where shapes agree."""

    def __init__(
        self, cin: int, kernel: int, hidden: int, cout: int, se: bool, swish: bool, stride: int
    ) -> None:
        super().__init__()
        act = nn.Hardswish if swish else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != cin:
            layers.append(conv_bn_act(cin, hidden, 1, act=act, eps=EPS))
        layers.append(conv_bn_act(hidden, hidden, kernel, stride, groups=hidden, act=act, eps=EPS))
        if se:
            layers.append(SqueezeExcitation(hidden, divisible(hidden // 4)))
        layers.append(conv_bn_act(hidden, cout, 1, act=None, eps=EPS))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        if self.residual:
            result += x
        return result

    def last_norm(self) -> nn.BatchNorm2d | None:
        return find_last_norm(self.block) if self.residual else None


class MobileNetV3(nn.Module):
    """torchvision's MobileNetV3-small; ``width`` multiplies every channel count."""

    def __init__(self, num_classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        channels = divisible(16 * width)
        features: list[nn.Module] = [conv_bn_act(3, channels, 3, 2, act=nn.Hardswish, eps=EPS)]
        for kernel, expanded, planes, se, swish, stride in SMALL:
            hidden, cout = divisible(expanded * width), divisible(planes * width)
            features.append(Block(channels, kernel, hidden, cout, se, swish, stride))
            channels = cout
        features.append(conv_bn_act(channels, channels * 6, 1, act=nn.Hardswish, eps=EPS))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        last = divisible(1024 * width)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 6, last),
            nn.Hardswish(inplace=True),
            nn.Dropout(0.2, inplace=True),
            nn.Linear(last, num_classes),
        )
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x


def mobilenet_v3_small(num_classes: int = 1000, width: float = 1.0) -> MobileNetV3:
    """MobileNetV3-small: 2,542,856 parameters at the defaults."""
    return MobileNetV3(num_classes, width)
