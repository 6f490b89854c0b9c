"""Networks to test with: torchvision's topologies, random weights, realistic statistics.

Example:
    >>> from tests import zoo
    >>> model = zoo.build("mobilenet_v2", seed=1, size=64, num_classes=10, width=0.25)
    >>> model(zoo.example("mobilenet_v2", batch=2, size=64)).shape
    torch.Size([2, 10])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from tests.zoo.densenet import densenet121
from tests.zoo.efficientnet import efficientnet_b0
from tests.zoo.mlp import mlp
from tests.zoo.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar
from tests.zoo.mobilenet_v3 import mobilenet_v3_small
from tests.zoo.resnet import resnet18, resnet20, resnet50
from tests.zoo.shufflenet import shufflenet_v2_x1_0
from tests.zoo.statistics import randomize_bn, smooth_images
from tests.zoo.unet import unet
from tests.zoo.vgg import vgg11_bn

__all__ = ["NAMES", "architecture", "build", "example", "randomize_bn", "smooth_images"]


@dataclass(frozen=True)
class _Entry:
    make: Callable[..., nn.Module]
    size: int
    channels: int = 3


_ZOO: Final[dict[str, _Entry]] = {
    "resnet18": _Entry(resnet18, 224),
    "resnet50": _Entry(resnet50, 224),
    "resnet20": _Entry(resnet20, 32),
    "mobilenet_v2": _Entry(mobilenet_v2, 224),
    "mobilenet_v2_cifar": _Entry(mobilenet_v2_cifar, 32),
    "mobilenet_v3_small": _Entry(mobilenet_v3_small, 224),
    "vgg11_bn": _Entry(vgg11_bn, 224),
    "densenet121": _Entry(densenet121, 224),
    "efficientnet_b0": _Entry(efficientnet_b0, 224),
    "shufflenet_v2_x1_0": _Entry(shufflenet_v2_x1_0, 224),
    "unet": _Entry(unet, 64),
    "mlp": _Entry(mlp, 8, channels=1),
}

NAMES: Final = tuple(_ZOO)


def architecture(name: str, **kw: Any) -> nn.Module:
    """The network ``name`` as its constructor leaves it; ``kw`` goes to the constructor."""
    return _ZOO[name].make(**kw)


def example(name: str, batch: int = 1, size: int | None = None, seed: int = 0) -> Tensor:
    """A batch for ``name``: float32 [batch, channels, size, size], smooth pictures.

    ``size`` is 224 for the ImageNet networks, 32 for CIFAR's, 64 for the U-Net, 8 for the MLP.
    """
    entry = _ZOO[name]
    return smooth_images(batch, entry.channels, size or entry.size, seed)


def build(name: str, seed: int = 0, *, size: int | None = None, **kw: Any) -> nn.Module:
    """The network ``name`` in eval mode with random weights and realistic BatchNorm statistics.

    The same arguments give the same bits; the global random state is left as found.

    Args:
        name: one of :data:`NAMES`.
        seed: of the weights and of the statistics.
        size: side of the pictures it is meant for, as for :func:`example`. Statistics are taken at
            this size: what is border and what is inside differs, and with it every variance.
        kw: of the family's constructor: ``num_classes``, ``width``, ...

    Raises:
        KeyError: ``name`` is not in the zoo.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(name, **kw).eval()
    side = size or _ZOO[name].size
    batch = 8 if side > 160 else 32  # some hundred values per channel even in the last, 32nd part
    randomize_bn(model, seed, example(name, batch, size, seed=seed + 1))
    return model
