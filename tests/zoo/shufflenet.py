"""ShuffleNetV2 x1.0: channel split, depthwise branches, concatenation, channel shuffle.

Source: Ma et al., "ShuffleNet V2", arXiv 1807.11164, table 5; the layout is torchvision's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.common import init_convs


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave ``groups`` groups of channels, written with view and transpose."""
    batch, channels, height, width = x.size()
    per_group = channels // groups
    x = x.view(batch, groups, per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


def _pointwise(cin: int, cout: int) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class InvertedResidual(nn.Module):
    """Half of the channels pass untouched at stride 1; both halves are computed at stride 2."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = cout // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(*_depthwise(cin, stride), *_pointwise(cin, half))
        self.branch2 = nn.Sequential(
            *_pointwise(cin if stride > 1 else half, half),
            *_depthwise(half, stride),
            *_pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """torchvision's ShuffleNetV2; ``channels`` are those of stem, three stages and last conv."""

    def __init__(self, num_classes: int, channels: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        stem, *stages, last = channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        cin = stem
        for cout, repeats in zip(stages, (4, 8, 4), strict=True):
            blocks.append(InvertedResidual(cin, cout, 2))
            blocks += [InvertedResidual(cout, cout, 1) for _ in range(repeats - 1)]
            cin = cout
        self.stages = nn.Sequential(*blocks)
        self.conv5 = nn.Sequential(*_pointwise(cin, last))
        self.fc = nn.Linear(last, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stages(x))
        x = x.mean([2, 3])  # global pool, as torchvision writes it here
        x = self.fc(x)
        return x


def shufflenet_v2_x1_0(
    num_classes: int = 1000, channels: tuple[int, int, int, int, int] = (24, 116, 232, 464, 1024)
) -> ShuffleNetV2:
    """ShuffleNetV2 x1.0: 2,278,604 parameters at the defaults."""
    return ShuffleNetV2(num_classes, channels)
