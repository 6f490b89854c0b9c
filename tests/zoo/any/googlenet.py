"""GoogLeNet and Inception: branches that are concatenated, pools with padding, tuples out.

Source: Szegedy et al., arXiv 1409.4842 and 1512.00567; the spelling is torchvision's.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images
from tests.zoo.common import init_convs

Outputs = namedtuple("Outputs", ["logits", "aux"])


class BasicConv2d(nn.Module):
    """Convolution, BatchNorm and the functional ReLU."""

    def __init__(self, cin: int, cout: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """Four branches."""

    def __init__(self, cin: int, c1: int, c3: int, c5: int, cp: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(cin, c1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(cin, c3, kernel_size=1), BasicConv2d(c3, c3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(cin, c5, kernel_size=1), BasicConv2d(c5, c5, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(cin, cp, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1 = self.branch1(x)
        branch2 = self.branch2(x)
        branch3 = self.branch3(x)
        branch4 = self.branch4(x)
        return [branch1, branch2, branch3, branch4]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class GoogLeNet(nn.Module):
    """With input transform, ceil-mode pools, an auxiliary head and a namedtuple in training."""

    def __init__(self, aux_logits: bool = True, transform_input: bool = True) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(16, 8, 8, 4, 4)
        self.inception3b = Inception(24, 12, 12, 4, 4)
        self.aux1 = nn.Linear(24, 10) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.2)
        self.fc = nn.Linear(32, 10)
        init_convs(self)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        return x

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.maxpool1(self.conv1(x))
        x = self.inception3a(x)
        aux: Tensor | None = None
        if self.aux1 is not None and self.training:
            aux = self.aux1(x.mean((2, 3)))
        x = self.inception3b(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        return self.fc(x), aux

    def eager_outputs(self, x: Tensor, aux: Tensor | None) -> Any:
        if self.training and self.aux_logits:
            return Outputs(x, aux)
        return x

    def forward(self, x: Tensor) -> Any:
        x = self._transform_input(x)
        logits, aux = self._forward(x)
        return self.eager_outputs(logits, aux)


class InceptionV3(nn.Module):
    """Asymmetric kernels, an average pool with padding, nested concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 16, kernel_size=3, stride=2)
        self.branch7x7_1 = BasicConv2d(16, 8, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(8, 8, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(8, 12, kernel_size=(7, 1), padding=(3, 0))
        self.branch3x3_1 = BasicConv2d(16, 8, kernel_size=1)
        self.branch3x3_2a = BasicConv2d(8, 8, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(8, 8, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(16, 8, kernel_size=1)
        self.reduce = BasicConv2d(36, 24, kernel_size=3, stride=2)
        self.fc = nn.Linear(24, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch7x7 = self.branch7x7_1(x)
        branch7x7 = self.branch7x7_2(branch7x7)
        branch7x7 = self.branch7x7_3(branch7x7)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], 1)
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        x = torch.cat([branch7x7, branch3x3, branch_pool], 1)
        x = self.reduce(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = F.dropout(x, training=self.training)
        return self.fc(x.view(x.size(0), -1))


CASES = {
    "googlenet": Case(GoogLeNet, images(), 48, 64, plain=True),
    # torch itself cannot settle the -1 of view(0, -1)
    "inception_v3": Case(InceptionV3, images(), 47, 63, plain=True, empty=False),
}
