"""ConvNeXt: depthwise 7x7, LayerNorm over channels, an inverted bottleneck, layer scale.

Source: Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545; the two spellings of its
repository (channels last inside a block, channels first between stages).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images


class LayerNorm(nn.Module):
    """Channels last or first, as the authors wrote it."""

    def __init__(
        self, channels: int, eps: float = 1e-6, data_format: str = "channels_last"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(channels))
        self.bias = nn.Parameter(0.1 * torch.randn(channels))
        self.eps = eps
        self.data_format = data_format
        if self.data_format not in ["channels_last", "channels_first"]:
            raise NotImplementedError
        self.normalized_shape = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        x = self.weight[:, None, None] * x + self.bias[:, None, None]
        return x


class DropPath(nn.Module):
    """Stochastic depth per sample; nothing in eval."""

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x / keep * (keep + torch.rand(shape)).floor_()


class Block(nn.Module):
    """Depthwise convolution, then two linears over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.5 * torch.ones(dim), requires_grad=True)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        input = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv1(x)
        x = self.act(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return input + self.drop_path(x)


class ConvNeXt(nn.Module):
    """Two stages."""

    def __init__(self, dims: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, dims[0], kernel_size=4, stride=4),
                    LayerNorm(dims[0], data_format="channels_first"),
                ),
                nn.Sequential(
                    LayerNorm(dims[0], data_format="channels_first"),
                    nn.Conv2d(dims[0], dims[1], kernel_size=2, stride=2),
                ),
            ]
        )
        self.stages = nn.ModuleList(nn.Sequential(*[Block(dim) for _ in range(2)]) for dim in dims)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], 10)

    def forward_features(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.head(x)
        return x


class LayerNorm2d(nn.LayerNorm):
    """torchvision's: an nn.LayerNorm whose forward permutes around itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return x


class Permute(nn.Module):
    """torchvision.ops.Permute."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class CNBlock(nn.Module):
    """torchvision's block: one Sequential with Permute modules."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=True),
            Permute([0, 2, 3, 1]),
            norm_layer(dim),
            nn.Linear(in_features=dim, out_features=4 * dim, bias=True),
            nn.GELU(),
            nn.Linear(in_features=4 * dim, out_features=dim, bias=True),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1) * 0.5)

    def forward(self, input: Tensor) -> Tensor:
        result = self.layer_scale * self.block(input)
        result += input
        return result


def torchvision_convnext() -> nn.Module:
    """A network of CNBlocks."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        LayerNorm2d(16, eps=1e-6),
        CNBlock(16),
        CNBlock(16),
        nn.AdaptiveAvgPool2d(1),
        LayerNorm2d(16, eps=1e-6),
        nn.Flatten(1),
        nn.Linear(16, 10),
    )


CASES = {
    "convnext": Case(ConvNeXt, images(), 32, 48),
    "convnext_torchvision": Case(torchvision_convnext, images(), 32, 48),
}
