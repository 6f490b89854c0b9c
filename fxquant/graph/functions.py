"""Functions that PyTorch has in no spelling that takes the tensor first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def power_of(input: Tensor, base: float) -> Tensor:
    """Return ``base ** input``, elementwise; one call where torch.fx traces it.

    Args:
        input: the exponents, any shape.
        base: the number that is raised.

    Example:
        >>> power_of(torch.tensor([0.0, 3.0]), 2)
        tensor([1., 8.])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(power_of, (input,), input, base=base)
    return torch.pow(base, input)
