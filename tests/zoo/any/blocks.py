"""Building blocks: gates, shuffles, pixel shuffle, depthwise attention, multi-branch sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images
from tests.zoo.common import conv_bn_act, init_convs


class SELayer(nn.Module):
    """The most copied squeeze-and-excitation: linears, view, expand_as."""

    def __init__(self, channel: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class CBAM(nn.Module):
    """Channel gate from two pools, spatial gate from mean and max over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        avg = self.mlp(F.adaptive_avg_pool2d(x, 1))
        top = self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(avg + top)
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        scale = torch.sigmoid(self.spatial(torch.cat([avg_out, max_out], dim=1)))
        return x * scale


class Gated(nn.Module):
    """A network of these."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 16, 3, 2)
        self.se, self.cbam = SELayer(16), CBAM(16)
        self.conv = conv_bn_act(16, 16, 3)
        self.fc = nn.Linear(16, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.stem(x))
        x = x + self.cbam(self.conv(x))
        return self.fc(F.avg_pool2d(x, x.size()[2:]).flatten(1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """torchvision's, by views."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class Shuffled(nn.Module):
    """Grouped pointwise convolutions with shuffles between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 16, 3, 2)
        self.a = nn.Sequential(nn.Conv2d(16, 16, 1, groups=4), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16))
        self.c = nn.Sequential(nn.Conv2d(16, 16, 1, groups=4), nn.BatchNorm2d(16))
        self.fc = nn.Linear(32, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.c(self.b(channel_shuffle(self.a(x), 4)))
        x1, x2 = x.chunk(2, dim=1)
        x = torch.cat((F.relu(x1 + y[:, :8]), F.relu(y[:, 8:] - x2)), dim=1)
        x = F.channel_shuffle(x, 2)
        return self.fc(torch.cat((x.mean([2, 3]), x.amax([2, 3])), 1))


class SuperResolution(nn.Module):
    """EDSR: residual scaling, a long skip, pixel shuffle, a mean that is taken off and put back."""

    mean: Tensor

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(True),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1), nn.PixelShuffle(2))
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        x = self.head(x)
        res = x
        for block in self.body:
            res = block(res).mul(0.1) + res
        res += x
        return self.up(res) + self.mean


class Ghost(nn.Module):
    """GhostNet: cheap features by a depthwise convolution, sliced to the width asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.oup = 20
        self.primary_conv = conv_bn_act(3, 12, 3, 2)
        self.cheap_operation = conv_bn_act(12, 12, 3, groups=12)
        self.pointwise = conv_bn_act(20, 24, 1, act=nn.Hardswish)
        self.unshuffle = nn.PixelUnshuffle(2)
        self.classifier = nn.Conv2d(96, 10, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        out = self.pointwise(out[:, : self.oup, :, :])
        out = self.classifier(self.unshuffle(out))
        return F.adaptive_avg_pool2d(out, 1).squeeze(-1).squeeze(dim=2)


class HighResolution(nn.Module):
    """HRNet: every resolution is the sum of all others, made by loops over lists of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 8, 3, 2)
        self.transition = conv_bn_act(8, 16, 3, 2)
        channels = (8, 16)
        self.branches = nn.ModuleList(conv_bn_act(c, c, 3) for c in channels)
        layers = []
        for i in range(2):
            row: list[nn.Module] = []
            for j in range(2):
                if j > i:
                    up = nn.Upsample(scale_factor=2, mode="nearest")
                    row.append(nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), up))
                elif j == i:
                    row.append(nn.Identity())
                else:
                    row.append(nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)))
            layers.append(nn.ModuleList(row))
        self.fuse_layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(24, 4, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        xs = [x, self.transition(x)]
        for i, branch in enumerate(self.branches):
            xs[i] = branch(xs[i])
        fused = []
        for i in range(len(self.fuse_layers)):
            y = xs[0] if i == 0 else self.fuse_layers[i][0](xs[0])  # type: ignore[index]
            for j in range(1, 2):
                y = y + xs[j] if i == j else y + self.fuse_layers[i][j](xs[j])  # type: ignore[index]
            fused.append(F.relu(y))
        small = F.interpolate(
            fused[1], size=fused[0].shape[2:], mode="bilinear", align_corners=True
        )
        return self.head(torch.cat([fused[0], small], 1))


CASES = {
    "se_cbam": Case(Gated, images(), 32, 40),
    "channel_shuffle": Case(Shuffled, images(), 32, 40),
    "super_resolution": Case(SuperResolution, images(), 20, 28),
    # torch itself unshuffles nothing into the wrong shape
    "ghostnet": Case(Ghost, images(), 32, 40, empty=False),
    "hrnet": Case(HighResolution, images(), 32, 40),
}
