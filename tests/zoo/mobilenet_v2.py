"""MobileNetV2, for ImageNet and for CIFAR.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv
1801.04381, table 2; the layout is torchvision's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import conv_bn_act, divisible, find_last_norm, init_convs

# expansion, channels, repeats, stride
IMAGENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project without activation; added to its input where shapes agree."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(conv_bn_act(cin, hidden, 1, act=nn.ReLU6))
        layers += [
            conv_bn_act(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        x = self.conv(x)
        return x

    def last_norm(self) -> nn.BatchNorm2d | None:
        return find_last_norm(self.conv) if self.use_res_connect else None


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2.

    Args:
        num_classes: size of the output.
        width: multiplier of every channel count.
        strides: stride of the stem, then of the seven stages.
        last: channels before the classifier at width 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        strides: tuple[int, ...] = (2, 1, 2, 2, 2, 1, 2, 1),
        last: int = 1280,
    ) -> None:
        super().__init__()
        channels = divisible(32 * width)
        features: list[nn.Module] = [conv_bn_act(3, channels, 3, strides[0], act=nn.ReLU6)]
        for (expand, planes, repeats, _), stride in zip(IMAGENET, strides[1:], strict=True):
            cout = divisible(planes * width)
            for index in range(repeats):
                block = InvertedResidual(channels, cout, 1 if index else stride, expand)
                features.append(block)
                channels = cout
        final = divisible(last * max(1.0, width))
        features.append(conv_bn_act(channels, final, 1, act=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(final, num_classes))
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        x = self.classifier(x)
        return x


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2: 3,504,872 parameters at the defaults."""
    return MobileNetV2(num_classes, width)


def mobilenet_v2_cifar(
    num_classes: int = 10,
    width: float = 1.0,
    strides: tuple[int, ...] = (1, 1, 1, 2, 2, 1, 2, 1),
    last: int = 1280,
) -> MobileNetV2:
    """MobileNetV2 for 32x32 pictures: the same blocks, shrunk three times instead of five."""
    return MobileNetV2(num_classes, width, strides, last)
