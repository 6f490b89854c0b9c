"""EfficientNet-B0: SiLU everywhere, squeeze-and-excitation, stochastic depth.

Source: Tan and Le, "EfficientNet", arXiv 1905.11946, table 1; the layout is torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import conv_bn_act, divisible, find_last_norm, init_convs

# expansion, kernel, stride, channels, repeats
B0 = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the mean of all of them."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        scale = self.scale_activation(self.fc2(scale))
        return x * scale


class StochasticDepth(nn.Module):
    """Drop whole rows of the batch while training; nothing at all in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1, device=x.device).bernoulli_(1.0 - self.p)
        return x * keep.div_(1.0 - self.p)


class MBConv(nn.Module):
    """Expand, depthwise, gate, project; added to its input where shapes agree."""

    def __init__(
        self, cin: int, cout: int, expand: int, kernel: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        hidden = cin * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(conv_bn_act(cin, hidden, 1, act=nn.SiLU))
        layers += [
            conv_bn_act(hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU),
            SqueezeExcitation(hidden, max(1, cin // 4)),
            conv_bn_act(hidden, cout, 1, act=None),
        ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)
        self.use_res_connect = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result

    def last_norm(self) -> nn.BatchNorm2d | None:
        return find_last_norm(self.block) if self.use_res_connect else None


class EfficientNet(nn.Module):
    """torchvision's EfficientNet-B0; ``width`` multiplies every channel count."""

    def __init__(self, num_classes: int = 1000, width: float = 1.0, drop: float = 0.2) -> None:
        super().__init__()
        channels = divisible(32 * width)
        blocks: list[nn.Module] = [conv_bn_act(3, channels, 3, 2, act=nn.SiLU)]
        total = sum(repeats for *_, repeats in B0)
        done = 0
        for expand, kernel, stride, planes, repeats in B0:
            cout = divisible(planes * width)
            for index in range(repeats):
                step = 1 if index else stride
                blocks.append(MBConv(channels, cout, expand, kernel, step, drop * done / total))
                channels = cout
                done += 1
        blocks.append(conv_bn_act(channels, 4 * channels, 1, act=nn.SiLU))
        self.features = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(p=0.2, inplace=True)
        self.classifier = nn.Linear(4 * channels, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = self.classifier(self.dropout(x))
        return x


def efficientnet_b0(num_classes: int = 1000, width: float = 1.0) -> EfficientNet:
    """EfficientNet-B0: 5,288,548 parameters at the defaults."""
    return EfficientNet(num_classes, width)
