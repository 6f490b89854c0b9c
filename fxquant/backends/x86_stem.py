"""The first convolution of a network: it quantizes the float picture itself.

The kernel reads pixel after pixel, so codes that lie channel after channel are moved byte by byte
in every call: 240 us of the 850 us of ResNet's first layer (one thread, 224x224). Quantizing into
the right layout costs 40 us more than quantizing alone, see :mod:`fxquant.numerics.pixels`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fxquant.backends.x86_layers import X86Conv
from fxquant.numerics.affine import quantize
from fxquant.numerics.pixels import PACKABLE, PACKED_CHANNELS, quantize_pixels

_PICTURE: Final = 4


class X86Stem(X86Conv):
    """``act(conv2d(quantize(x)))`` of a float picture with two or three channels."""

    def _kernel_weight(self) -> Tensor:
        missing = PACKED_CHANNELS - self.weight.shape[1]
        return torch.nn.functional.pad(self.weight, (0, 0, 0, 0, 0, missing))

    def _kernel_shape(self) -> list[int] | None:
        if self.shape is None:
            return None
        return [self.shape[0], PACKED_CHANNELS, *self.shape[2:]]

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
        result: Tensor = self._kernel(quantize_pixels(x, *limits), *self._call)
        return result


def can_read_floats(weight: Tensor, groups: int) -> bool:
    """Whether a convolution has few enough input channels to pack a pixel into one word."""
    return weight.dim() == _PICTURE and weight.shape[1] in PACKABLE and groups == 1
