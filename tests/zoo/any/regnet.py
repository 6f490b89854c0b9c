"""RegNet: grouped bottlenecks with squeeze-and-excitation, as in torchvision.

Source: Radosavovic et al., "Designing Network Design Spaces", arXiv 2003.13678.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tests.zoo.any.case import Case, images
from tests.zoo.common import init_convs


class ConvNormActivation(nn.Sequential):
    """A Sequential by inheritance, with padding worked out from the kernel."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(cin, cout, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
        ]
        if act:
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """The gate of torchvision.ops, with its helper method."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Sigmoid()

    def _scale(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self._scale(x)
        return scale * x


class ResBottleneckBlock(nn.Module):
    """1x1, grouped 3x3, gate, 1x1."""

    def __init__(self, cin: int, cout: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj = None
        if cin != cout or stride != 1:
            self.proj = ConvNormActivation(cin, cout, 1, stride, act=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["a"] = ConvNormActivation(cin, cout, 1)
        layers["b"] = ConvNormActivation(cout, cout, 3, stride, groups=cout // group_width)
        layers["se"] = SqueezeExcitation(cout, cin // 4)
        layers["c"] = ConvNormActivation(cout, cout, 1, act=False)
        self.f = nn.Sequential(layers)
        self.activation = nn.ReLU(inplace=True)

    def last_norm(self) -> nn.BatchNorm2d | None:
        norm = self.f.get_submodule("c.1")
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class RegNet(nn.Module):
    """Stem, two stages, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormActivation(3, 16, 3, 2)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (cin, cout, stride) in enumerate(((16, 24, 2), (24, 24, 1), (24, 48, 2))):
            blocks[f"block{index + 1}"] = ResBottleneckBlock(cin, cout, stride, 8)
        self.trunk_output = nn.Sequential(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(in_features=48, out_features=10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk_output(x)
        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        x = self.fc(x)
        return x


class GroupNormNet(nn.Module):
    """The same idea with GroupNorm, a list of blocks and a learned gain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(
                nn.Sequential(
                    nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=2)
                )
            )
        self.gain = nn.Parameter(torch.full((1,), 0.5))
        self.norm = nn.GroupNorm(1, 16)
        self.head = nn.Linear(16, 5)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.gain * block(x)
        return self.head(torch.relu(self.norm(x)).mean([2, 3]))


CASES = {
    "regnet": Case(RegNet, images(), 48, 64, plain=True, bias=0.5),
    "group_norm_resnet": Case(GroupNormNet, images(), 32, 40),
}
