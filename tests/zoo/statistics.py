"""Pictures without a data set, and BatchNorm statistics such as a trained network has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def smooth_images(batch: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Float32 [batch, channels, size, size]: blobs and gradients with a little noise on top.

    Each picture has its own brightness and contrast, and the whole batch has about mean 0 and
    standard deviation 1, like normalised photographs.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(side: int) -> Tensor:
        return torch.randn(batch, channels, side, side, generator=generator)

    images = torch.zeros(batch, channels, size, size)
    for cells, strength in ((2, 0.8), (4, 0.6), (8, 0.4)):
        grown = F.interpolate(noise(cells), size=(size, size), mode="bilinear", align_corners=False)
        images += strength * grown
    images += 0.15 * noise(size)
    contrast = 0.6 + 0.8 * torch.rand(batch, 1, 1, 1, generator=generator)
    brightness = 0.4 * torch.randn(batch, 1, 1, 1, generator=generator)
    return images * contrast + brightness


def randomize_bn(model: nn.Module, seed: int, images: Tensor) -> None:
    """Give every BatchNorm of ``model`` non-trivial weights and fitting statistics, in place.

    Weights are log-normal around 1, one in sixteen negative (trained networks have some, and a
    fold that takes their absolute value must be caught); biases are normal. Then one batch goes
    through with the BatchNorms in training mode, so that every running statistic belongs to the
    activations it will meet and these stay in range through any depth. Last, the statistics are
    moved by a few percent, so that no channel is normalised perfectly. Dropout stays off.

    Args:
        model: any module; its training flags are left as found.
        seed: the same seed, model and images give the same statistics.
        images: a batch as ``model`` takes it.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        _randomize_affine(norm, generator)
    _measure(model, norms, images)
    for norm in norms:
        _disturb(norm, generator)


def _randomize_affine(norm: _BatchNorm, generator: torch.Generator) -> None:
    count = norm.num_features
    weight = torch.exp(0.3 * torch.randn(count, generator=generator))
    sign = torch.where(torch.rand(count, generator=generator) < 1 / 16, -1.0, 1.0)
    with torch.no_grad():
        norm.weight.copy_(weight * sign)
        norm.bias.copy_(0.2 * torch.randn(count, generator=generator))


def _measure(model: nn.Module, norms: list[_BatchNorm], images: Tensor) -> None:
    flags = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average: one batch sets the statistics outright
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in flags.items():
        module.training = training


def _disturb(norm: _BatchNorm, generator: torch.Generator) -> None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return
    # A channel that never fired has variance zero; divided by its root it would explode later.
    floor = 1e-3 * variance.mean().clamp(min=1e-6)
    variance.copy_(torch.maximum(variance, floor))
    count = norm.num_features
    mean.add_(0.05 * variance.sqrt() * torch.randn(count, generator=generator))
    variance.mul_(0.9 + 0.2 * torch.rand(count, generator=generator))
