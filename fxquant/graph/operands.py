"""Settle: one order of operands, and a reason for what no canonical call can say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.fx import Node

from fxquant.graph.info import info
from fxquant.graph.op_table import op_named
from fxquant.graph.ops import Call, Unreadable

_NUMBERS: Final = ("scalar", "sizes")


def settle(call: Call) -> Call | Unreadable:
    """Put the tensor first where order does not matter; refuse what cannot be said canonically.

    Args:
        call: a call as it was written, read through the op table.
    """
    op, given = call.op, call.arguments
    if op.tensors == ("tensors",):
        return _of_list(call)
    if op.commutes and not is_tensor(given[op.tensors[0]]):
        return _swapped(call)
    call = _respelled(call)
    why = _refused(call)
    return _with_whole_size(call) if why is None else Unreadable(why)


def is_tensor(value: Any) -> bool:
    """Whether an argument is computed, and no number or shape."""
    return isinstance(value, Node) and info(value).value not in _NUMBERS


def _of_list(call: Call) -> Call | Unreadable:
    first = call.arguments["tensors"]
    if isinstance(first, Node) and info(first).value == "tensors":
        return call  # torch.cat(x.chunk(2))
    parts = first if isinstance(first, tuple | list) else ()
    if not parts or not all(isinstance(part, Node) for part in parts):
        return Unreadable(f"{call.op.name} of something that is not a list of tensors")
    return call


def _swapped(call: Call) -> Call | Unreadable:
    op, given = call.op, call.arguments
    first, second = op.tensors[:2]
    if given.get("alpha", 1) != 1 or not is_tensor(given[second]):
        return Unreadable(f"{op.name} of two numbers, or with a scaled constant")
    return Call(op, {**given, first: given[second], second: given[first]}, call.inplace)


def _respelled(call: Call) -> Call:
    """The op that says the same with the tensor in front, or more simply."""
    op, given = call.op, call.arguments
    first = given[op.tensors[0]]
    if op.name == "where" and not is_tensor(first) and is_tensor(given["other"]):
        filled = {"input": given["other"], "mask": given["condition"], "value": first}
        return Call(op_named("masked_fill"), filled, call.inplace)
    turned = _REVERSED.get(op.name)
    if not is_tensor(first) and turned is not None and is_tensor(given[turned[0]]):
        return Call(op_named(turned[1]), turned[2](given), call.inplace)
    if op.name == "rsub" and is_tensor(given["other"]):
        swapped = {"input": given["other"], "other": first, "alpha": given["alpha"]}
        return Call(op_named("sub"), swapped, call.inplace)
    if op.name == "hardtanh" and (given["min_val"], given["max_val"]) == (0, 6):
        return Call(op_named("relu6"), {"input": first}, call.inplace)
    return call


_REVERSED: Final[dict[str, tuple[str, str, Callable[[Mapping[str, Any]], dict[str, Any]]]]] = {
    "sub": ("other", "rsub", lambda g: {"input": g["other"], "other": g["input"], "alpha": 1}),
    "pow": ("exponent", "power_of", lambda g: {"input": g["exponent"], "base": g["input"]}),
}
"""``2 - x`` and ``2 ** x``: where the tensor stands, the op with it in front, its arguments."""


def _refused(call: Call) -> str | None:
    op, given = call.op, call.arguments
    first = given[op.tensors[0]]
    if not is_tensor(first):
        return f"{op.name} of the constant {first!r}"
    if op.name == "reshape" and any(isinstance(side, torch.dtype) for side in _sides(given)):
        return "view of other bits: x.view(dtype)"
    if op.name in ("softmax", "log_softmax") and given["dim"] is None:
        return f"{op.name} without dim: PyTorch guesses it from the rank in every call"
    return None


def _sides(given: Mapping[str, Any]) -> tuple[Any, ...]:
    shape = given["shape"]
    return tuple(shape) if isinstance(shape, tuple | list) else (shape,)


def _with_whole_size(call: Call) -> Call:
    """``x.view(y.shape)``: a lone shape is not a list of one number."""
    for name, value in call.arguments.items():
        lone = isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Node)
        if lone and info(value[0]).value == "sizes":
            return Call(call.op, {**call.arguments, name: value[0]}, call.inplace)
    return call
