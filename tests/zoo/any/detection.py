"""Detectors: SSD heads over levels, shared RetinaNet heads, a YOLO with checks and flags.

Sources: Liu et al., arXiv 1512.02325; Lin et al., arXiv 1708.02002; the YOLOv5 repository.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images
from tests.zoo.common import conv_bn_act, init_convs


class SSD(nn.Module):
    """Predictions of every level, permuted, viewed and concatenated."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.num_classes = classes
        self.stem = conv_bn_act(3, 16, 3, 2)
        self.extras = nn.ModuleList([conv_bn_act(16, 24, 3, 2), conv_bn_act(24, 24, 3, 2)])
        self.loc = nn.ModuleList([nn.Conv2d(c, 3 * 4, 3, padding=1) for c in (16, 24, 24)])
        self.conf = nn.ModuleList([nn.Conv2d(c, 3 * classes, 3, padding=1) for c in (16, 24, 24)])
        self.L2Norm = nn.Parameter(torch.full((16,), 3.0))
        init_convs(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sources = []
        loc = []
        conf = []
        x = self.stem(x)
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        sources.append(self.L2Norm.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * (x / norm))
        for k in range(len(self.extras)):
            x = self.extras[k](x)
            sources.append(x)
        for x, l, c in zip(sources, self.loc, self.conf):  # noqa: B905, E741 - as people write it
            loc.append(l(x).permute(0, 2, 3, 1).contiguous())
            conf.append(c(x).permute(0, 2, 3, 1).contiguous())
        loc_all = torch.cat([o.view(o.size(0), -1) for o in loc], 1)
        conf_all = torch.cat([o.view(o.size(0), -1) for o in conf], 1)
        return (
            loc_all.view(loc_all.size(0), -1, 4),
            F.softmax(conf_all.view(conf_all.size(0), -1, self.num_classes), dim=-1),
        )


class RetinaNet(nn.Module):
    """One head for all levels: the same convolutions are called three times; a list out."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = conv_bn_act(3, 16, 3, 2)
        self.c2 = conv_bn_act(16, 16, 3, 2)
        self.c3 = conv_bn_act(16, 16, 3, 2)
        head: list[nn.Module] = []
        for _ in range(2):
            head.append(nn.Conv2d(16, 16, kernel_size=3, padding=1))
            head.append(nn.ReLU())
        self.tower = nn.Sequential(*head)
        self.cls_logits = nn.Conv2d(16, 3 * 4, kernel_size=3, padding=1)
        self.scales = nn.ParameterList(
            [nn.Parameter(torch.tensor(1.0 + 0.2 * i)) for i in range(3)]
        )
        init_convs(self)

    def head(self, features: list[Tensor]) -> list[Tensor]:
        all_logits = []
        for level, features_per_level in enumerate(features):
            logits = self.cls_logits(self.tower(features_per_level)) * self.scales[level]
            N, _, H, W = logits.shape
            logits = logits.view(N, -1, 4, H, W)
            logits = logits.permute(0, 3, 4, 1, 2)
            logits = logits.reshape(N, -1, 4)
            all_logits.append(logits)
        return all_logits

    def forward(self, images: Tensor) -> list[Tensor]:
        f1 = self.c1(images)
        f2 = self.c2(f1)
        f3 = self.c3(f2)
        return [torch.cat(self.head([f1, f2, f3]), dim=1), f3]


class Conv(nn.Module):
    """YOLO's convolution: SiLU by default, an activation or none by argument."""

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool | nn.Module = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = (
            nn.SiLU() if act is True else (act if isinstance(act, nn.Module) else nn.Identity())
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """With a shortcut if asked to."""

    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c, 3), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Chunk, a list that extends itself, concatenation."""

    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """One pool, three times."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(2 * c1, c2)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(nn.Module):
    """Boxes from a grid: views, sigmoid, split, arithmetic with a grid made per size."""

    def __init__(self, nc: int, ch: tuple[int, ...]) -> None:
        super().__init__()
        self.no, self.na, self.nl = nc + 5, 2, len(ch)
        self.m = nn.ModuleList(nn.Conv2d(x, self.no * self.na, 1) for x in ch)
        self.stride = (8, 4)

    def forward(self, x: list[Tensor]) -> Any:
        z = []
        for i in range(self.nl):
            x[i] = self.m[i](x[i])
            bs, _, ny, nx = x[i].shape
            x[i] = x[i].view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
                grid = torch.stack((xv, yv), 2).expand(1, self.na, ny, nx, 2).float() - 0.5
                xy, wh, conf = x[i].sigmoid().split((2, 2, self.no - 4), 4)
                xy = (xy * 2 + grid) * self.stride[i]
                wh = (wh * 2) ** 2 * 4.0
                y = torch.cat((xy, wh, conf), 4)
                z.append(y.view(bs, self.na * nx * ny, self.no))
        return x if self.training else (torch.cat(z, 1), x)


class YOLO(nn.Module):
    """With the flags, checks and prints of the original."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.ch = 3
        self.model = nn.ModuleList(
            [Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), C2f(16, 16), Conv(16, 32, 3, 2), SPPF(32, 32)]
        )
        self.up = nn.Upsample(None, 2, "nearest")
        self.fuse = C2f(48, 16)
        self.detect = Detect(nc, (32, 16))
        init_convs(self)

    def forward(self, x: Tensor, augment: bool = False, profile: bool = False) -> Any:
        if augment:
            return self._forward_augment(x)
        return self._forward_once(x, profile)

    def _forward_augment(self, x: Tensor) -> Any:
        y = [self._forward_once(F.interpolate(x, scale_factor=s))[0] for s in (1, 0.5)]
        return torch.cat(y, 1), None

    def _forward_once(self, x: Tensor, profile: bool = False) -> Any:
        if x.size(1) != self.ch:
            raise ValueError(f"expected {self.ch} channels, got {x.size(1)}")
        if x.dim() == 3:
            x = x[None]
        y = []
        for m in self.model:
            if profile:
                print(type(m).__name__)
            x = m(x)
            y.append(x)
        small = self.fuse(torch.cat([self.up(x), y[2]], 1))
        return self.detect([x, small])


CASES = {
    "ssd": Case(SSD, images(), 32, empty=False),
    "retinanet": Case(RetinaNet, images(), 32, 48, empty=False),
    "yolo": Case(YOLO, images(), 32, 64, bias=1.0),
}
