"""Quantizing a picture straight into the memory layout that convolutions want.

A picture arrives channel after channel; int8 convolutions read it pixel after pixel, and moving
single bytes about costs more than quantizing them. A float32 from 2**23 up to 2**24 is an integer
whose low 16 bits are its own low bits, so the codes of up to three channels are put together by
integer arithmetic on whole channels, and what comes out needs no cast.

The codes may be given a border that stands for 0.0, as a convolution pads: one more copy of a third
of the picture, for a kernel that is given no padding and no zero point and has less to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.affine import in_steps

_INTEGERS: Final = 2.0**23
"""From here on floats have a spacing of 1: adding this rounds half to even."""

_EACH: Final = 0x010101
"""One code more in each of three channels."""

PACKED_CHANNELS: Final = 4
"""An int32 has room for four codes; the last is without meaning."""

PACKABLE: Final = (2, 3)
"""How many channels can be packed: the fourth byte holds what is left of the float, and a single
channel lies in the same order either way."""


def quantize_pixels(
    x: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """Return the uint8 codes of a picture, pixel after pixel; channels it lacks hold anything.

    Args:
        x: float32 or float64 ``[batch, channels, height, width]`` with 2 or 3 channels.
        scale: positive.
        zero_point: the code of 0.0, 0 to 255.
        quant_min: smallest code, at least 0.
        quant_max: largest code, at most 255.
        padding: rows above and below, and columns on both sides, of pixels that are 0.0.

    Returns:
        uint8 ``[batch, 4, height + 2 * padding[0], width + 2 * padding[1]]`` in channels_last
        memory.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
        >>> quantize_pixels(x, 0.5, 10, 0, 255)[:, :3].flatten()
        tensor([12, 14, 16], dtype=torch.uint8)
        >>> quantize_pixels(x, 0.5, 10, 0, 255, (0, 1))[0, 0]
        tensor([[10, 12, 10]], dtype=torch.uint8)
    """
    steps = in_steps(x, scale).to(torch.float32)
    # An even shift leaves ties where they are; if it is one too many, it is taken back below.
    odd = zero_point % 2
    steps.add_(_INTEGERS + (zero_point + odd))
    # Below 2**23 the spacing is finer; such numbers are clamped to codes at least.
    steps.clamp_(_INTEGERS + (quant_min + odd), _INTEGERS + (quant_max + odd))
    bits = steps.view(torch.int32)
    # Sums wrap around: what a float has above its low bits ends in the fourth byte.
    words = torch.add(bits[:, 0], bits[:, 1], alpha=1 << 8)
    if bits.shape[1] == 3:
        words.add_(bits[:, 2], alpha=1 << 16)
    if odd:
        words.sub_(_EACH)
    if any(padding):
        words = _bordered(words, zero_point * _EACH, padding)
    shape = (*words.shape, PACKED_CHANNELS)
    return words.contiguous().view(torch.uint8).view(shape).permute(0, 3, 1, 2)


def _bordered(words: Tensor, border: int, padding: Sequence[int]) -> Tensor:
    """``words`` ``[batch, height, width]`` with ``border`` around each picture."""
    batch, height, width = words.shape
    down, right = padding
    made = words.new_full((batch, height + 2 * down, width + 2 * right), border)
    made[:, down : down + height, right : right + width] = words
    return made
