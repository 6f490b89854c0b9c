"""What several families share: channel rounding, the conv-bn-activation unit, initialisation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor`` without losing more than a tenth.

    Source: ``_make_divisible`` of the TensorFlow MobileNet models, as in torchvision.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


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
    """He initialisation of every convolution's weight, as torchvision does it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
