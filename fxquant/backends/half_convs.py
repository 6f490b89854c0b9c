"""Convolutions of 16 bits, which oneDNN's kernels get wrong where they do int8 ones.

With AMX rows of bfloat16 are lowered into sums as rows of codes are, with the same faults, see
:mod:`fxquant.backends.x86_conv_plan`: 42 of 2,500 random convolutions were wrong, one read beyond
its memory. They are given to the kernel as the same plans say, for numbers of two bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fxquant.backends.x86_conv_plan import Geometry, plan_of
from fxquant.graph.copies import share_parameters
from fxquant.graph.op_table import register_module

_BYTES: Final = 2

if TYPE_CHECKING:
    _Conv = nn.modules.conv._ConvNd
else:
    _Conv = object


class _Planned(_Conv):
    """A convolution of 16 bits that is given to the kernel as it gets it right."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = walk_of(self)
        if geometry is None or input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        plan = plan_of(tuple(weight.shape), geometry, 0, size=_BYTES)
        read = plan.codes(input)
        narrow = plan.is_narrow(read)
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[weight.dim() - 3]
        given = plan.widened(read) if narrow else read
        made: Tensor = conv(given, plan.weight(weight), bias, *plan.geometry.walk)
        return made[..., :1] if narrow else made


class PlannedConv1d(_Planned, nn.Conv1d):
    """A one-dimensional convolution of 16 bits."""


class PlannedConv2d(_Planned, nn.Conv2d):
    """A two-dimensional convolution of 16 bits."""


class PlannedConv3d(_Planned, nn.Conv3d):
    """A three-dimensional convolution of 16 bits."""


_PLANNED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Conv1d: PlannedConv1d,
    nn.Conv2d: PlannedConv2d,
    nn.Conv3d: PlannedConv3d,
}
for _rank, _made in enumerate(_PLANNED.values(), start=1):
    register_module(f"conv{_rank}d", _made)


def walk_of(conv: Any) -> Geometry | None:
    """How a layer of torch's walks; ``None`` if its sides are padded unequally, or not with 0."""
    if conv.padding_mode != "zeros":
        return None
    padding = conv.padding
    if isinstance(padding, str):
        ends = conv._reversed_padding_repeated_twice
        if ends[::2] != ends[1::2]:
            return None
        padding = ends[::-2]
    return Geometry(conv.stride, tuple(padding), conv.dilation, conv.groups)


def planned(conv: nn.Module) -> nn.Module:
    """The layer in a form that is right on any processor; itself, if it is that already.

    Args:
        conv: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
    """
    weight, geometry = conv.get_parameter("weight"), walk_of(conv)
    if weight.dtype != torch.bfloat16 or geometry is None:
        return conv
    if plan_of(tuple(weight.shape), geometry, 0, size=_BYTES, tiles=True).plain:
        return conv
    twin = share_parameters(conv)
    twin.__class__ = _PLANNED[type(conv)]
    return twin


PLANNED: Final[Mapping[type[nn.Module], Callable[..., nn.Module]]] = dict.fromkeys(
    _PLANNED, planned
)
"""For :class:`fxquant.passes.lower.Lower`."""
