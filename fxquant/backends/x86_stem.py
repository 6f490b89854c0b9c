"""The first convolution of a network: it quantizes the float picture itself.

The kernel reads pixel after pixel, so codes that lie channel after channel are moved byte by byte
in every call: 240 us of the 850 us of ResNet's first layer (one thread, 224x224). Quantizing into
the right layout costs no more than quantizing, see :mod:`fxquant.numerics.pixels`.

It writes the padding too. A kernel that pads by itself works out in every call what a zero point
that is not 0 adds at the borders; where the codes of 0.0 lie in memory,

    sum(w * (q - z)) = sum(w * q) - z * sum(w)

everywhere, and the last term goes into the bias: 445 -> 350 us for ResNet's first layer and 250 ->
175 us for MobileNetV2's (two threads with AMX; 3 and 9 % less without).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fxquant.backends.x86_conv_plan import Geometry, Plan, plan_of, taps_of
from fxquant.backends.x86_layers import X86Conv
from fxquant.numerics.affine import quantize
from fxquant.numerics.pixels import PACKABLE, PACKED_CHANNELS, quantize_pixels

_PICTURE: Final = 4


class X86Stem(X86Conv):
    """``act(conv2d(quantize(x)))`` of a float picture with two or three channels."""

    def _planned(self) -> Plan:
        unpadded = replace(self.geometry, padding=(0,) * len(self.geometry.padding))
        shape = (self.weight_shape[0], PACKED_CHANNELS, *self.weight_shape[2:])
        return replace(plan_of(shape, unpadded, 0), reads=self.reads.zero_point)

    def _kernel_weight(self) -> Tensor:
        missing = PACKED_CHANNELS - self.weight.shape[1]
        return torch.nn.functional.pad(self.weight, (0, 0, 0, 0, 0, missing))

    def _kernel_shape(self) -> list[int] | None:
        if self.shape is None:
            return None
        batch, _, *sides = self.shape
        padded = [side + 2 * p for side, p in zip(sides, self.geometry.padding, strict=True)]
        return self.plan.shape((batch, PACKED_CHANNELS, *padded))

    def forward(self, x: Tensor) -> Tensor:
        """One kernel call; ``x`` float ``[batch, channels, height, width]``, or without batch."""
        reads = self.reads
        limits = (reads.scale, reads.zero_point, reads.quant_min, reads.quant_max)
        if x.dim() == self._unbatched:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != _PICTURE or x.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"this convolution reads {self.weight.shape[1]} channels, [batch, channels, "
                f"height, width], and got {list(x.shape)}"
            )
        if x.numel() == 0:
            return self._nothing(quantize(x, *limits, reads.dtype))
        codes = quantize_pixels(x, *limits, self.geometry.padding)
        return self.plan.run(self._kernel, codes, *self._call)


def can_read_floats(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution has few enough input channels to pack a pixel into one word.

    Not so where the packed weight would need columns of zeros, see :mod:`.x86_conv_plan`: a layer
    of three channels needs none.
    """
    if weight.dim() != _PICTURE or weight.shape[1] not in PACKABLE or geometry.groups != 1:
        return False
    packed = (weight.shape[0], PACKED_CHANNELS, *weight.shape[2:])
    return not any(taps_of(packed, geometry, unpadded=True))
