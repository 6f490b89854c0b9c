"""Whether a tensor holds NaN or infinity, asked of every weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; the same answer as ``torch.isfinite(values).all()``.

    A sum with such a value in it is not finite, and one pass that makes no tensor of its own finds
    the sum; only where finite values add up past the largest number are they looked at one by one.

    Args:
        values: any shape and dtype.

    Example:
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([1.0, math.inf]))
        (True, False)
        >>> all_finite(torch.full((9,), 3e38))
        True
    """
    if values.is_floating_point() and math.isfinite(values.sum().item()):
        return True
    return bool(torch.isfinite(values).all())
