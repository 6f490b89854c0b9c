"""A transposed convolution as a convolution, since torch has no int8 kernel for it.

Every output pixel at phase ``r = t mod stride`` is a plain convolution of the input with every
``stride``-th tap of the kernel, so all phases together are one convolution with ``stride`` times
as many output channels per dimension, whose result is interleaved and cropped (sub-pixel
convolution, Shi et al. 2016, arXiv:1609.05158). No product with an inserted zero is computed:

    y[s * m + r] = sum_j x[m - j] * w[s * j + r]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxquant.backends.x86_conv_plan import Geometry, plan_of
from fxquant.backends.x86_layers import PostOp, X86Layer
from fxquant.graph.info import QType

_ONEDNN: Final = torch.ops.onednn


@dataclass(frozen=True)
class TransposedGeometry:
    """How a transposed convolution of one, two or three dimensions walks.

    Args:
        stride: per spatial dimension.
        padding: per spatial dimension, both sides.
        output_padding: extra rows and columns at the end.
        dilation: per spatial dimension.
        groups: number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def reach(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """How many pixels a dilated kernel spans."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True))

    def taps(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel size of the convolution that stands for it.

        Output padding beyond the kernel's reach is reached by taps of zero, which add nothing.
        """
        beyond = [max(0, o - p) for o, p in zip(self.output_padding, self.padding, strict=True)]
        parts = zip(self.reach(kernel), beyond, self.stride, strict=True)
        return tuple(-(-(reach + more) // stride) for reach, more, stride in parts)

    def sides(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial size of the result for an input of ``size``."""
        parts = zip(
            size, self.stride, self.padding, self.reach(kernel), self.output_padding, strict=True
        )
        return tuple((n - 1) * s - 2 * p + reach + more for n, s, p, reach, more in parts)


def subpixel_weight(weight: Tensor, geometry: TransposedGeometry) -> Tensor:
    """The weight of the convolution that stands for a transposed one.

    Args:
        weight: ``[in, out / groups, ...]`` with one to three spatial dimensions.
        geometry: how it walks.

    Returns:
        ``[groups * prod(stride) * out / groups, in / groups, *taps]``.
    """
    stride, groups, rank = geometry.stride, geometry.groups, weight.dim() - 2
    taps = geometry.taps(tuple(weight.shape[2:]))
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    spans = [s * t for s, t in zip(stride, taps, strict=True)]
    padded = weight.new_zeros(weight.shape[0], outputs, *spans)
    reach = geometry.reach(tuple(weight.shape[2:]))
    places = (slice(0, r, d) for r, d in zip(reach, geometry.dilation, strict=True))
    padded[(slice(None), slice(None), *places)] = weight
    pairs = [side for pair in zip(taps, stride, strict=True) for side in pair]
    tap_dims = [3 + 2 * i for i in range(rank)]
    phases = padded.view(groups, inputs, outputs, *pairs).flip(tap_dims)
    ordered = phases.permute(0, *[4 + 2 * i for i in range(rank)], 2, 1, *tap_dims)
    return ordered.reshape(groups * math.prod(stride) * outputs, inputs, *taps).contiguous()


def per_phase(per_channel: Tensor, geometry: TransposedGeometry) -> Tensor:
    """Values of output channels, once for each phase, in the order of :func:`subpixel_weight`.

    Args:
        per_channel: ``[out]``.
        geometry: how the transposed convolution walks.
    """
    phases, groups = math.prod(geometry.stride), geometry.groups
    grouped = per_channel.view(groups, 1, -1).expand(groups, phases, -1)
    return grouped.reshape(-1).contiguous()


def interleave(
    phases: Tensor, sides: tuple[int, ...], geometry: TransposedGeometry, outputs: int
) -> Tensor:
    """Make pixels of the phases that the convolution gives, and crop them.

    Args:
        phases: ``[batch, groups * prod(stride) * outputs, ...]``.
        sides: the spatial size of the result.
        geometry: how the transposed convolution walks.
        outputs: output channels of one group.

    Returns:
        ``[batch, groups * outputs, *sides]``, channels last in memory.
    """
    stride, groups, rank = geometry.stride, geometry.groups, phases.dim() - 2
    batch, rows = phases.shape[0], phases.shape[2:]
    # Memory holds [batch, pixel, group, phases, channel]: channels move in runs.
    split = phases.movedim(1, -1).reshape(batch, *rows, groups, *stride, outputs)
    order = [dim for i in range(rank) for dim in (1 + i, 2 + rank + i)]
    moved = split.permute(0, *order, 1 + rank, 2 + 2 * rank)
    whole = [row * s for row, s in zip(rows, stride, strict=True)]
    pixels = moved.reshape(batch, *whole, groups * outputs)
    crop = (slice(None), *(slice(p, p + n) for p, n in zip(geometry.padding, sides, strict=True)))
    return pixels[crop].contiguous().movedim(-1, 1)


class X86ConvTranspose(X86Layer):
    """An int8 transposed convolution of one, two or three dimensions.

    Args:
        weight: int8 ``[in, out / groups, ...]``.
        scale: float32 ``[out / groups]``.
        bias: float32 ``[out]`` or ``None``.
        reads: type of the input codes.
        writes: type of the output codes, or ``None`` for float32.
        post: what follows the sum inside the kernel.
        geometry: how it walks.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: QType,
        writes: QType | None,
        post: PostOp,
        geometry: TransposedGeometry,
    ) -> None:
        super().__init__(weight, scale, bias, reads, writes, post)
        self.geometry = geometry
        self.pack()

    def pack(self) -> None:
        """Rebuild the convolution that stands for it."""
        g = self.geometry
        taps = g.taps(tuple(self.weight.shape[2:]))
        scale = per_phase(self.weight_scale.repeat(g.groups), g)
        bias = None if self.bias is None else per_phase(self.bias, g)
        ones = (1,) * len(taps)
        weight = subpixel_weight(self.weight, g)
        stands = Geometry(ones, tuple(t - 1 for t in taps), ones, g.groups)
        self.plan = plan_of(tuple(weight.shape), stands, self.reads.zero_point)
        read = (self.reads.scale, self.plan.zero_point)
        walk = self.plan.geometry.walk
        packed = _ONEDNN.qconv_prepack(self.plan.weight(weight), scale, *read, *walk, None)
        zeros = torch.zeros(scale.numel(), dtype=torch.int32, device="cpu")
        self._call = (
            *read,
            packed,
            scale,
            zeros,
            self.plan.bias(bias, weight, scale, self.reads.scale),
            *walk,
            *self._output(),
            self.post.name,
            list(self.post.scalars),
            self.post.algorithm,
        )

    def forward(self, codes: Tensor) -> Tensor:
        """One kernel call, then the phases are interleaved; uint8 ``[batch, in, ...]``."""
        rank = self.weight.dim() - 2
        if codes.dim() == rank + 1:
            return self.forward(codes.unsqueeze(0)).squeeze(0)
        sides = self.geometry.sides(tuple(codes.shape[2:]), tuple(self.weight.shape[2:]))
        if codes.numel() == 0:
            channels = self.geometry.groups * self.weight.shape[1]
            return codes.new_empty((codes.shape[0], channels, *sides), dtype=self._output()[2])
        phases = _ONEDNN.qconv_pointwise.default(self.plan.codes(codes), *self._call)
        result = interleave(phases, sides, self.geometry, self.weight.shape[1])
        return result if self.floor is None else result.clamp_(min=self.floor)
