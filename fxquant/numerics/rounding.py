"""The last step of whatever computes in float: from numbers in output steps to codes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# A float32 between 2**23 and 2**24 has a spacing of 1, so adding this to a small number rounds it
# half to even and leaves the integer in the low bits; the extra 2**22 keeps negatives in range.
ROUND_TO_LOW_BITS: Final = 1.5 * 2.0**23


def round_steps_(
    steps: Tensor,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    relu: bool = False,
) -> Tensor:
    """Return ``clamp(round_half_even(steps) + zero_point, ...)``; ``steps`` is overwritten.

    The same as :func:`fxquant.numerics.affine.quantize` of ``steps * scale``, but for the rounding
    of that product.

    Args:
        steps: float32, real numbers divided by the scale of the codes.
        zero_point: the code of 0.0.
        quant_min: smallest code.
        quant_max: largest code.
        dtype: ``torch.uint8`` or ``torch.int8``.
        relu: whether negative numbers become 0.0.

    Example:
        >>> round_steps_(torch.tensor([-2.0, 0.5, 1.5, 1e30]), 3, 0, 255, torch.uint8)
        tensor([  1,   3,   5, 255], dtype=torch.uint8)
    """
    # An even part of the zero point goes along with the rounding: it leaves ties where they are.
    odd = zero_point % 2
    shift = ROUND_TO_LOW_BITS + (zero_point - odd)
    low = max(quant_min, zero_point) if relu else quant_min
    origin = ROUND_TO_LOW_BITS - odd
    steps.add_(shift).clamp_(origin + low, origin + quant_max)
    codes = steps.view(torch.int32).to(dtype)
    return codes.add_(odd) if odd else codes
