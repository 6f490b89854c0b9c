"""Functions that PyTorch has in no spelling that takes the tensor first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

P = ParamSpec("P")
R = TypeVar("R")


def one_call(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function be one call in a graph that is traced anew, as unpickling does.

    Args:
        function: takes tensors, and may look at them.

    Example:
        >>> doubled = one_call(lambda x: x * 2)
        >>> [node.op for node in torch.fx.symbolic_trace(lambda x: doubled(x)).graph.nodes]
        ['placeholder', 'call_function', 'output']
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            found: R = handle_torch_function(call, given, *args, **kwargs)
            return found
        return function(*args, **kwargs)

    return call


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


def reverse_dims(input: Tensor) -> Tensor:
    """Return a view with the dimensions in reverse order: ``.T``, and ``.t()`` of a matrix.

    Args:
        input: any shape, any dtype.

    Example:
        >>> reverse_dims(torch.zeros(2, 3)).shape
        torch.Size([3, 2])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(reverse_dims, (input,), input)
    return input.permute(tuple(reversed(range(input.dim()))))


def where(input: Tensor, other: Tensor | float, *, condition: Tensor) -> Tensor:
    """Return ``input`` where ``condition`` holds, else ``other``; tensors first.

    Args:
        input: any shape that broadcasts with the others.
        other: a tensor or a number.
        condition: bool.

    Example:
        >>> where(torch.ones(2), 0.0, condition=torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if has_torch_function((input, other, condition)):
        given = (input, other, condition)
        return handle_torch_function(where, given, input, other, condition=condition)
    return torch.where(condition, input, other)


def set_item(input: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``input`` after ``input[index] = value``.

    Args:
        input: any shape, any dtype.
        index: whatever may stand in the brackets.
        value: a tensor or a number.

    Example:
        >>> set_item(torch.zeros(3), slice(1), 2.0)
        tensor([2., 0., 0.])
    """
    given = (input, value, *(index if isinstance(index, tuple) else (index,)))
    if has_torch_function(given):
        return handle_torch_function(set_item, given, input, index, value)
    made = input.clone()
    made[index] = value
    return made


def index_put(input: Tensor, values: Tensor, *, indices: tuple[Tensor | None, ...]) -> Tensor:
    """Return ``input`` with ``values`` at ``indices``; tensors first.

    Args:
        input: any shape.
        values: broadcasts with ``input[indices]``.
        indices: integer or bool tensors, one for each leading dimension.

    Example:
        >>> index_put(torch.zeros(3), torch.tensor(1.0), indices=(torch.tensor([1]),))
        tensor([0., 1., 0.])
    """
    if has_torch_function((input, values)):
        return handle_torch_function(index_put, (input, values), input, values, indices=indices)
    return torch.index_put(input, indices, values)


def cast(
    input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Return ``input`` in another dtype, on another device, or in those of another tensor.

    Args:
        input: any shape.
        dtype: the dtype wanted; ``None`` keeps it.
        device: the device wanted; ``None`` keeps it.
        like: a tensor whose dtype and device are wanted.

    Example:
        >>> cast(torch.tensor([1]), dtype=torch.float32)
        tensor([1.])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(cast, (input,), input, dtype=dtype, device=device, like=like)
    if like is not None:
        return input.to(like)
    return input.to(device=device if device is not None else input.device, dtype=dtype)
