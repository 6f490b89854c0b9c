"""The torchvision networks of the zoo, in sizes that take milliseconds."""

from __future__ import annotations

import functools

from torch import nn

from tests import zoo
from tests.zoo.any.case import Case, images


def _make(name: str, **options: object) -> nn.Module:
    return zoo.architecture(name, **options)


def _case(
    name: str,
    size: int,
    other: int | None,
    *,
    plain: bool = False,
    empty: bool = True,
    bias: float = 1.0,
    **options: object,
) -> Case:
    channels = 1 if name == "mlp" else 3
    make = functools.partial(_make, name, num_classes=10, **options)
    # Full depth: at bias 0 random weights would amplify the rounding of the first layers beyond
    # measure, see randomize_bn.
    return Case(make, images(channels), size, other, plain=plain, empty=empty, bias=bias)


CASES = {
    "resnet18": _case("resnet18", 64, 96, plain=True, width=8),
    "resnet50": _case("resnet50", 64, 96, width=4),
    "vgg11_bn": _case("vgg11_bn", 64, 80, plain=True, empty=False, width=8, hidden=32, pool=1),
    "mobilenet_v2": _case("mobilenet_v2", 64, 96, empty=False, width=0.25),
    "mobilenet_v3": _case("mobilenet_v3_small", 64, 96, bias=2.0, width=0.5),
    "efficientnet": _case("efficientnet_b0", 96, 64, bias=1.5, width=0.25),
    "densenet": _case("densenet121", 64, 96, growth=4, width=8, depths=(2, 4, 4, 2)),
    "shufflenet": _case("shufflenet_v2_x1_0", 64, 96, channels=(8, 16, 32, 64, 128)),
    "unet": _case("unet", 32, 48, width=4),
    "mlp": _case("mlp", 8, None, hidden=32),
}
