"""What several families share: channel rounding, the conv-bn-activation unit, initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# How much of a depthwise filter stays random.
BLUR_NOISE: Final = 0.5


@runtime_checkable
class Residual(Protocol):
    """A block that may add its input to its result."""

    def last_norm(self) -> nn.BatchNorm2d | None:
        """The BatchNorm right before the addition, None if there is no addition."""


def divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor`` without losing more than a tenth.

    Source: ``_make_divisible`` of the TensorFlow MobileNet models, as in torchvision.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def find_last_norm(block: nn.Module) -> nn.BatchNorm2d:
    """The last BatchNorm inside ``block``."""
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]


def conv_bn_act(
    cin: int,
    cout: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    act: Callable[..., nn.Module] | None = nn.ReLU,
    eps: float = 1e-5,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, and the activation built with ``inplace=True``."""
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout, eps=eps),
    ]
    if act is not None:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


def init_convs(model: nn.Module) -> None:
    """He initialisation of every convolution's weight, as torchvision does it.

    Depthwise filters get a share of a blur on top, as trained ones have: white noise passes a
    purely random one better than a picture does, and a stack of them turns the rounding of the
    first layers into most of the output.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.groups > 1:
                _add_blur(module.weight)


def _add_blur(weight: Tensor) -> None:
    side = weight.shape[-1]
    distance = torch.arange(side) - (side - 1) / 2
    line = torch.exp(-0.5 * distance.square())
    blur = torch.outer(line, line) / line.sum().square()
    with torch.no_grad():
        weight.mul_(BLUR_NOISE).add_(blur * weight.std() * side)
