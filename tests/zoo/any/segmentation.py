"""Segmentation: DeepLab, a feature pyramid, U-Nets that resize and crop to what they meet.

Sources: Chen et al., arXiv 1706.05587; Lin et al., arXiv 1612.03144; Ronneberger, arXiv 1505.04597.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images
from tests.zoo.common import conv_bn_act, init_convs


class ASPPPooling(nn.Sequential):
    """Global average, 1x1, back to the size of the input: a Sequential with its own forward."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(cin, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    """Parallel dilated convolutions."""

    def __init__(self, cin: int, rates: list[int], cout: int) -> None:
        super().__init__()
        modules: list[nn.Module] = [conv_bn_act(cin, cout, 1)]
        for rate in rates:
            modules.append(
                nn.Sequential(
                    nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate, bias=False),
                    nn.BatchNorm2d(cout),
                    nn.ReLU(),
                )
            )
        modules.append(ASPPPooling(cin, cout))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * cout, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Dropout(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        _res = []
        for conv in self.convs:
            _res.append(conv(x))
        res = torch.cat(_res, dim=1)
        return self.project(res)


class DeepLab(nn.Module):
    """torchvision's _SimpleSegmentationModel: an OrderedDict out, resized to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            conv_bn_act(3, 12, 3, 2), conv_bn_act(12, 16, 3, 2), conv_bn_act(16, 16, 3)
        )
        self.classifier = nn.Sequential(
            ASPP(16, [2, 4], 12), conv_bn_act(12, 12, 3), nn.Conv2d(12, 4, 1)
        )
        self.aux_classifier: nn.Module | None = nn.Conv2d(16, 4, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        features = {"out": self.backbone(x)}
        result: dict[str, Tensor] = OrderedDict()
        x = features["out"]
        x = self.classifier(x)
        x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        result["out"] = x
        if self.aux_classifier is not None:
            x = features["out"]
            x = self.aux_classifier(x)
            x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
            result["aux"] = x
        return result


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, nearest upsampling to the size below, 3x3 on each level."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "c2": conv_bn_act(3, 12, 3, 2),
                "c3": conv_bn_act(12, 16, 3, 2),
                "c4": conv_bn_act(16, 24, 3, 2),
            }
        )
        self.inner_blocks = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in (12, 16, 24)])
        self.layer_blocks = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        init_convs(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = OrderedDict()
        for name, stage in self.body.items():
            x = stage(x)
            features[name] = x
        names, values = list(features.keys()), list(features.values())
        last_inner = self.inner_blocks[-1](values[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(values) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](values[idx])
            feat_shape = inner_lateral.shape[-2:]
            inner_top_down = F.interpolate(last_inner, size=feat_shape, mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))
        results.append(F.max_pool2d(results[-1], kernel_size=1, stride=2, padding=0))
        return OrderedDict([(k, v) for k, v in zip([*names, "pool"], results, strict=True)])


class PaddedUNet(nn.Module):
    """The up-path pads what it upsampled to the size of the skip: shape arithmetic everywhere."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inc = conv_bn_act(3, width, 3)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), conv_bn_act(width, 2 * width, 3))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), conv_bn_act(2 * width, 2 * width, 3))
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up1 = conv_bn_act(4 * width, width, 3)
        self.up2 = conv_bn_act(2 * width, width, 3)
        self.outc = nn.Conv2d(width, 2, kernel_size=1)
        init_convs(self)

    def _up(self, conv: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.upsample(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        return conv(torch.cat([x2, x1], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self._up(self.up1, x3, x2)
        x = self._up(self.up2, x, x1)
        logits = self.outc(x)
        return torch.sigmoid(logits)


class CroppedUNet(nn.Module):
    """Convolutions without padding; skips are cropped to the centre."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.mid = nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.dec = nn.Sequential(nn.Conv2d(2 * width, width, 3), nn.ReLU(), nn.Conv2d(width, 1, 1))
        init_convs(self)

    @staticmethod
    def center_crop(layer: Tensor, target_size: torch.Size) -> Tensor:
        _, _, layer_height, layer_width = layer.size()
        diff_y = (layer_height - target_size[0]) // 2
        diff_x = (layer_width - target_size[1]) // 2
        bottom, right = diff_y + target_size[0], diff_x + target_size[1]
        return layer[:, :, diff_y:bottom, diff_x:right]

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enc(x))
        x = self.mid(F.max_pool2d(skip, 2))
        x = self.up(x)
        crop = self.center_crop(skip, x.shape[2:])
        return self.dec(torch.cat((x, crop), 1))


class PyramidPooling(nn.Module):
    """PSPNet: pools of several grids, each resized and concatenated in a comprehension."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_act(3, 12, 3, 2), conv_bn_act(12, 16, 3, 2))
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(16, 4, 1)) for size in (1, 2, 4)]
        )
        self.bottleneck = nn.Conv2d(16 + 3 * 4, 6, kernel_size=1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        feats = self.features(x)
        h, w = feats.size(2), feats.size(3)
        priors = [
            F.interpolate(input=stage(feats), size=(h, w), mode="bilinear") for stage in self.stages
        ] + [feats]
        return self.bottleneck(torch.cat(priors, 1))


CASES = {
    "deeplab": Case(DeepLab, images(), 48, 56),
    "fpn": Case(FeaturePyramid, images(), 48, 44),
    "unet_padded": Case(PaddedUNet, images(), 32, 38),
    "unet_cropped": Case(CroppedUNet, images(), 36, 44),
    "pspnet": Case(PyramidPooling, images(), 32, 48),
}
