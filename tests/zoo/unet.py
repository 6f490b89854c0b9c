"""A U-Net whose up-path is ConvTranspose2d, BatchNorm, ReLU.

Source: Ronneberger et al., "U-Net", arXiv 1505.04597, figure 1; padded convolutions and
BatchNorm as in most later code.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.common import conv_bn_act, init_convs


def _double(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(conv_bn_act(cin, cout, 3), conv_bn_act(cout, cout, 3))


class Up(nn.Module):
    """Double the side, join the skip connection, convolve twice."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cout, kernel_size=2, stride=2)
        self.bn = nn.BatchNorm2d(cout)
        self.conv = _double(2 * cout, cout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.bn(self.up(x)).relu()
        x = self.conv(torch.cat([skip, x], dim=1))
        return x


class UNet(nn.Module):
    """Encoder, decoder and skips; the output has the side of the input.

    Args:
        num_classes: channels of the output map.
        width: channels of the first level, doubled at each of the ``depth`` levels below.
        depth: how often the side is halved; it must be divisible by ``2**depth``.
    """

    def __init__(self, num_classes: int = 2, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        levels = [width * 2**level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(levels))
        self.stem = _double(3, width)
        self.down = nn.ModuleList(_double(cin, cout) for cin, cout in pairs)
        self.up = nn.ModuleList(Up(cin, cout) for cout, cin in reversed(pairs))
        self.head = nn.Conv2d(width, num_classes, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for block in self.up:
            x = block(x, skips.pop())
        x = self.head(x)
        return x


def unet(num_classes: int = 2, width: int = 16, depth: int = 3) -> UNet:
    """A U-Net of 482,978 parameters at the defaults."""
    return UNet(num_classes, width, depth)
