"""ResNets: torchvision's for ImageNet and the small one of He et al. for CIFAR.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, sections 4.1
and 4.2; the layout (strides in the 3x3 convolution, module names) is torchvision's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import init_convs


def _conv3x3(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; one in-place ReLU module used twice."""

    expansion = 1

    def __init__(self, cin: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(cin, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(cin, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out

    def last_norm(self) -> nn.BatchNorm2d | None:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(cin, planes * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out

    def last_norm(self) -> nn.BatchNorm2d | None:
        return self.bn3


def _projection(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """torchvision's ResNet; ``width`` is the number of channels of the first stage."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = width
        self.layer1 = self._stage(block, depths[0], width, 1)
        self.layer2 = self._stage(block, depths[1], width * 2, 2)
        self.layer3 = self._stage(block, depths[2], width * 4, 2)
        self.layer4 = self._stage(block, depths[3], width * 8, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.channels, num_classes)
        init_convs(self)

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], depth: int, planes: int, stride: int
    ) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index in range(depth):
            layers.append(block(self.channels, planes, 1 if index else stride))
            self.channels = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        return x


class CifarBlock(nn.Module):
    """The block of the CIFAR networks, in the functional spelling."""

    def __init__(self, cin: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(cin, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.extra = planes - cin
        self.downsample = _projection(cin, planes, stride) if shortcut == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.extra or self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al.'s network for 32x32 pictures: 6n + 2 layers, 16/32/64 channels.

    Args:
        n: blocks per stage; 3 gives ResNet-20.
        shortcut: ``"conv"`` (option B, 1x1 convolution) or ``"pad"`` (option A, slices and zeros).
    """

    def __init__(
        self,
        n: int = 3,
        num_classes: int = 10,
        width: int = 16,
        shortcut: Literal["conv", "pad"] = "conv",
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            planes = width * 2**stage
            for index in range(n):
                stride = 2 if stage and not index else 1
                blocks.append(CifarBlock(channels, planes, stride, shortcut))
                channels = planes
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = self.fc(x.mean([2, 3]))
        return x


def resnet18(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-18: 11,689,512 parameters at the defaults."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, width)


def resnet50(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50 with the stride in the 3x3 convolution: 25,557,032 parameters at the defaults."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width)


def resnet20(
    num_classes: int = 10, width: int = 16, shortcut: Literal["conv", "pad"] = "conv"
) -> CifarResNet:
    """ResNet-20 for CIFAR: 272,474 parameters, 269,722 with ``shortcut="pad"``."""
    return CifarResNet(3, num_classes, width, shortcut)
