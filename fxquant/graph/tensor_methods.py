"""Tensor methods as functions with a name that can be imported.

A graph that calls ``torch.Tensor.size`` itself cannot be unpickled: torch.fx writes
``from torch._C import TensorBase.size``. These record themselves as one call when traced, as
unpickling does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def size(input: Tensor, dim: int | None = None) -> Any:
    """``input.size()``, or ``input.size(dim)``.

    Example:
        >>> import torch
        >>> size(torch.zeros(2, 3)), size(torch.zeros(2, 3), 1)
        (torch.Size([2, 3]), 3)
    """
    if has_torch_function_unary(input):
        return handle_torch_function(size, (input,), input, dim)
    return input.size() if dim is None else input.size(dim)


def dim(input: Tensor) -> int:
    """``input.dim()``."""
    if has_torch_function_unary(input):
        found: int = handle_torch_function(dim, (input,), input)
        return found
    return input.dim()


def expand(input: Tensor, size: Any) -> Tensor:
    """``input.expand(size)``."""
    if has_torch_function_unary(input):
        found: Tensor = handle_torch_function(expand, (input,), input, size)
        return found
    return input.expand(size)


def repeat(input: Tensor, repeats: Any) -> Tensor:
    """``input.repeat(repeats)``."""
    if has_torch_function_unary(input):
        found: Tensor = handle_torch_function(repeat, (input,), input, repeats)
        return found
    return input.repeat(repeats)


def unfold(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """``input.unfold(dimension, size, step)``."""
    if has_torch_function_unary(input):
        found: Tensor = handle_torch_function(unfold, (input,), input, dimension, size, step)
        return found
    return input.unfold(dimension, size, step)
