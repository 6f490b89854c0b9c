"""Pictures without a data set, and BatchNorm statistics such as a trained network has."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.zoo.common import Residual

# Training makes residual branches small beside what they are added to. At equal size each block
# would be a fresh random mapping, and a stack of them amplifies every rounding beyond measure.
BRANCH_GAIN: Final = 0.3


def smooth_images(batch: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Float32 [batch, channels, size, size]: blobs and gradients with a little noise on top.

    Each picture has its own brightness and contrast, and the whole batch has about mean 0 and
    standard deviation 1, like normalised photographs.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(side: int) -> Tensor:
        return torch.randn(batch, channels, side, side, generator=generator)

    images = torch.zeros(batch, channels, size, size)
    for cells, strength in ((3, 0.7), (6, 0.7), (12, 0.7)):
        grown = F.interpolate(noise(cells), size=(size, size), mode="bilinear", align_corners=False)
        images += strength * grown
    images += 0.3 * noise(size)
    contrast = 0.85 + 0.3 * torch.rand(batch, 1, 1, 1, generator=generator)
    brightness = 0.1 * torch.randn(batch, 1, 1, 1, generator=generator)
    return images * contrast + brightness


def randomize_bn(model: nn.Module, seed: int, images: Any, *, bias: float = 0.0) -> None:
    """Give every BatchNorm of ``model`` non-trivial weights and fitting statistics, in place.

    Weights are log-normal around 1, one in sixteen negative (trained networks have some, and a
    fold that takes their absolute value must be caught); biases are normal. Then one batch goes
    through, and each BatchNorm takes the mean and variance of what reaches it, moved by a few
    percent so that no channel is normalised perfectly. Those after it see the result, so that
    the small errors do not add up and activations stay in range through any depth.

    Args:
        model: any module in eval mode that reaches each BatchNorm at least once.
        seed: the same seed, model and images give the same statistics.
        images: a batch as ``model`` takes it; a tuple is fed by position, a dict by keyword.
        bias: mean of the biases, in standard deviations of what is normalised. At 0 every ReLU
            cuts off half and a deep network amplifies any rounding; the more it lets pass, the
            nearer the whole is to a smooth function, as trained ones are.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        _randomize_affine(norm, generator, bias)
    _damp_residuals(model)

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        _set_statistics(norm, args[0], generator)

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        if isinstance(images, dict):
            model(**images)
        else:
            model(*images if isinstance(images, tuple) else (images,))
    for handle in handles:
        handle.remove()


def _randomize_affine(norm: _BatchNorm, generator: torch.Generator, bias: float) -> None:
    count = norm.num_features
    weight = torch.exp(0.3 * torch.randn(count, generator=generator))
    sign = torch.where(torch.rand(count, generator=generator) < 1 / 16, -1.0, 1.0)
    with torch.no_grad():
        norm.weight.copy_(weight * sign)
        norm.bias.copy_(bias + 0.2 * torch.randn(count, generator=generator))


def _damp_residuals(model: nn.Module) -> None:
    for module in model.modules():
        norm = module.last_norm() if isinstance(module, Residual) else None
        if norm is not None:
            with torch.no_grad():
                norm.weight.mul_(BRANCH_GAIN)
                norm.bias.mul_(BRANCH_GAIN)


def _set_statistics(norm: _BatchNorm, x: Tensor, generator: torch.Generator) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1)
    # A channel that never fired has variance zero; divided by its root it would explode later.
    variance = torch.maximum(variance, 1e-2 * variance.mean().clamp(min=1e-6))
    shift = 0.05 * torch.randn(norm.num_features, generator=generator)
    stretch = 0.9 + 0.2 * torch.rand(norm.num_features, generator=generator)
    norm.running_mean.copy_(mean + shift * variance.sqrt())
    norm.running_var.copy_(variance * stretch)
