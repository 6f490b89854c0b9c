"""What two calls have to agree in, so that they are the same calls of operators."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

Leaves: TypeAlias = list[Tensor]

_LITERALS: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)
_TENSORS: Final = (Tensor, nn.Parameter)
_GLOBAL_HOOKS: Final = tuple(
    value for name, value in vars(hooks).items() if name.startswith("_global_") and "hooks" in name
)
"""Dictionaries of hooks that torch calls for every module there is."""
_ALIGNED: Final = 64
"""Elements. Kernels that look at memory as another type ask where in it a tensor begins."""


def signature_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, Leaves] | None:
    """What the inputs are but for the numbers in them, and the tensors among them, in order.

    Args:
        args: by place; tensors, literals, and tuples, lists and dictionaries of them.
        kwargs: by name.

    Returns:
        ``None`` where an input is anything else: a tensor of another class, on another device
        than the CPU, sparse, or one that a transformation of ``torch.func`` wraps.

    Example:
        >>> one, two = torch.zeros(2, 3), torch.ones(2, 3)
        >>> signature_of((one,), {})[0] == signature_of((two,), {})[0]
        True
        >>> signature_of((one,), {})[0] == signature_of((two.double(),), {})[0]
        False
        >>> signature_of((object(),), {}) is None
        True
    """
    leaves: Leaves = []
    try:
        key = (_described(args, leaves), _described(kwargs, leaves) if kwargs else None)
    except _Unusual:
        return None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (modes, key, _shared(leaves)), leaves


class _Unusual(Exception):
    """An input is nothing that a program is given."""


def _described(value: Any, leaves: Leaves) -> Hashable:
    kind = type(value)
    if kind in _TENSORS:
        leaves.append(value)
        return _tensor(value)
    if kind in _LITERALS:
        # 1, 1.0 and True are equal, and lead to other operators.
        return kind, value
    if kind is tuple or kind is list:
        return kind, *(_described(item, leaves) for item in value)
    if kind is dict:
        items = ((name, _described(item, leaves)) for name, item in value.items())
        if all(type(name) is str for name in value):
            return kind, *items
    raise _Unusual


def _tensor(value: Tensor) -> Hashable:
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_nested:
        raise _Unusual
    return (
        value.dtype,
        value.shape,
        value.stride(),
        value.storage_offset() % _ALIGNED,
        value.requires_grad,
        value.is_inference(),
        value.is_neg() or value.is_conj(),
    )


def _shared(leaves: Leaves) -> Hashable:
    """Which inputs are one tensor, or lie in the same memory."""
    if len(leaves) < 2:
        return None
    places = [leaf.untyped_storage()._cdata for leaf in leaves]
    if len(set(places)) == len(places):
        return None
    first = [places.index(place) for place in places]
    same = [next(i for i, other in enumerate(leaves) if other is leaf) for leaf in leaves]
    return (*first, *same)


def is_usual() -> bool:
    """Whether torch just runs: nothing traces, compiles, transforms or watches what is called."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or any(_GLOBAL_HOOKS)
    )
