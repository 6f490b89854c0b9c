"""Quantizing a picture straight into the memory layout that convolutions want.

A picture arrives channel after channel; int8 convolutions read it pixel after pixel, and moving
single bytes about costs more than quantizing them. The codes of up to three channels of a pixel
fit into one float32 exactly, so they are put together by arithmetic on whole channels and come
out of a single cast side by side.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.affine import ROUND_TO_LOW_BITS, in_steps

PACKED_CHANNELS: Final = 4
"""An int32 has room for four codes; the last is always 0."""

PACKABLE: Final = (2, 3)
"""How many channels can be packed: three codes fill the 24 exact bits of a float32, and a single
channel lies in the same order either way."""


def quantize_pixels(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> Tensor:
    """Return the uint8 codes of a picture, pixel after pixel, with zeros for missing channels.

    Args:
        x: float32 or float64 ``[batch, channels, height, width]`` with 2 or 3 channels.
        scale: positive.
        zero_point: the code of 0.0, 0 to 255.
        quant_min: smallest code, at least 0.
        quant_max: largest code, at most 255.

    Returns:
        uint8 ``[batch, 4, height, width]`` in channels_last memory.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
        >>> quantize_pixels(x, 0.5, 10, 0, 255).flatten()
        tensor([12, 14, 16,  0], dtype=torch.uint8)
    """
    steps = in_steps(x, scale).to(torch.float32)
    steps.clamp_(quant_min - zero_point, quant_max - zero_point)
    # Adding and taking away the large number rounds half to even; both results are integers.
    steps.add_(ROUND_TO_LOW_BITS).sub_(ROUND_TO_LOW_BITS - zero_point)
    pixels = torch.add(steps[:, 0], steps[:, 1], alpha=256.0)
    if steps.shape[1] == 3:
        pixels.add_(steps[:, 2], alpha=65536.0)
    packed = pixels.to(torch.int32).contiguous().view(torch.uint8)
    batch, height, width = pixels.shape
    return packed.view(batch, height, width, PACKED_CHANNELS).permute(0, 3, 1, 2)
