"""A transposed convolution as a convolution, since torch has no int8 kernel for it.

Every output pixel at phase ``r = t mod stride`` is a plain convolution of the input with every
``stride``-th tap of the kernel, so all phases together are one convolution with ``stride`` times
as many output channels per dimension, whose result is interleaved and cropped (sub-pixel
convolution, Shi et al. 2016, arXiv:1609.05158). No product with an inserted zero is computed:

    y[s * m + r] = sum_j x[m - j] * w[s * j + r]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.backends.x86_layers import PostOp, X86Layer
from fxquant.graph.info import QType

_ONEDNN: Final = torch.ops.onednn


@dataclass(frozen=True)
class TransposedGeometry:
    """How a transposed convolution of two dimensions walks.

    Args:
        stride: per spatial dimension.
        padding: per spatial dimension, both sides.
        output_padding: extra rows and columns at the end.
        dilation: per spatial dimension.
        groups: number of groups.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def reach(self, kernel: tuple[int, ...]) -> tuple[int, int]:
        """How many pixels a dilated kernel spans."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True)]
        return spans[0], spans[1]

    def taps(self, kernel: tuple[int, ...]) -> tuple[int, int]:
        """The kernel size of the convolution that stands for it."""
        sizes = [-(-r // s) for r, s in zip(self.reach(kernel), self.stride, strict=True)]
        return sizes[0], sizes[1]

    def fits(self, kernel: tuple[int, ...]) -> bool:
        """Whether every output pixel lies where some tap reaches."""
        parts = zip(
            self.reach(kernel),
            self.taps(kernel),
            self.stride,
            self.padding,
            self.output_padding,
            strict=True,
        )
        return all(reach + extra - pad <= s * taps for reach, taps, s, pad, extra in parts)


def subpixel_weight(weight: Tensor, geometry: TransposedGeometry) -> Tensor:
    """The weight of the convolution that stands for a transposed one.

    Args:
        weight: ``[in, out / groups, height, width]``.
        geometry: how it walks.

    Returns:
        ``[groups * stride * stride * out / groups, in / groups, taps, taps]``.
    """
    (s0, s1), groups = geometry.stride, geometry.groups
    k0, k1 = geometry.taps(tuple(weight.shape[2:]))
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    padded = weight.new_zeros(weight.shape[0], outputs, s0 * k0, s1 * k1)
    reach = geometry.reach(tuple(weight.shape[2:]))
    rows = slice(0, reach[0], geometry.dilation[0])
    columns = slice(0, reach[1], geometry.dilation[1])
    padded[:, :, rows, columns] = weight
    phases = padded.view(groups, inputs, outputs, k0, s0, k1, s1).flip(3, 5)
    ordered = phases.permute(0, 4, 6, 2, 1, 3, 5)
    return ordered.reshape(groups * s0 * s1 * outputs, inputs, k0, k1).contiguous()


class X86ConvTranspose2d(X86Layer):
    """An int8 transposed convolution of two dimensions.

    Args:
        weight: int8 ``[in, out / groups, height, width]``.
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

    def _per_phase(self, per_channel: Tensor) -> Tensor:
        """Values of output channels, once for each phase, in the order of the weight."""
        (s0, s1), groups = self.geometry.stride, self.geometry.groups
        grouped = per_channel.view(groups, 1, -1).expand(groups, s0 * s1, -1)
        return grouped.reshape(-1).contiguous()

    def pack(self) -> None:
        """Rebuild the convolution that stands for it."""
        g = self.geometry
        k0, k1 = g.taps(tuple(self.weight.shape[2:]))
        scale = self._per_phase(self.weight_scale.repeat(g.groups))
        bias = None if self.bias is None else self._per_phase(self.bias)
        walk: tuple[Any, ...] = ([1, 1], [k0 - 1, k1 - 1], [1, 1], g.groups)
        packed = _ONEDNN.qconv_prepack(
            subpixel_weight(self.weight, g),
            scale,
            self.reads.scale,
            self.reads.zero_point,
            *walk,
            None,
        )
        zeros = torch.zeros(scale.numel(), dtype=torch.int32)
        self._call = (
            self.reads.scale,
            self.reads.zero_point,
            packed,
            scale,
            zeros,
            bias,
            *walk,
            *self._output(),
            self.post.name,
            list(self.post.scalars),
            self.post.algorithm,
        )

    def forward(self, codes: Tensor) -> Tensor:
        """One kernel call, then the phases are interleaved; uint8 ``[batch, in, h, w]``."""
        if codes.dim() == 3:
            return self.forward(codes.unsqueeze(0)).squeeze(0)
        g = self.geometry
        (s0, s1), (p0, p1) = g.stride, g.padding
        height, width = codes.shape[2:]
        phases: Tensor = _ONEDNN.qconv_pointwise.default(codes, *self._call)
        batch, _, rows, columns = phases.shape
        outputs = self.weight.shape[1]
        # Memory holds [batch, row, column, group, phase, phase, channel]: channels move in runs.
        split = phases.permute(0, 2, 3, 1).reshape(batch, rows, columns, g.groups, s0, s1, outputs)
        pixels = split.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            batch, rows * s0, columns * s1, g.groups * outputs
        )
        reach = g.reach(tuple(self.weight.shape[2:]))
        tall = (height - 1) * s0 - 2 * p0 + reach[0] + g.output_padding[0]
        wide = (width - 1) * s1 - 2 * p1 + reach[1] + g.output_padding[1]
        cropped = pixels[:, p0 : p0 + tall, p1 : p1 + wide].contiguous()
        return cropped.permute(0, 3, 1, 2)
