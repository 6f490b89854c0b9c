"""Op table: arithmetic on the elements of two or three tensors, or of a tensor and a number."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Node

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, sig, spellings

_PAIR: Final = ("input", "other")


def _of_tensors(given: dict[str, Any]) -> dict[str, Any] | None:
    """``torch.max(x, y)`` is a maximum; ``torch.max(x, 1)`` reduces a dimension."""
    return given if isinstance(given["other"], Node) else None


ARITHMETIC: Final = (
    entry(
        "add",
        Kind.ARITH,
        torch.add,
        sig(lambda input, other, *, alpha=1: None),
        tensors=_PAIR,
        commutes=True,
        functions=spellings((operator.add,), lambda input, other: None)
        | spellings((operator.iadd,), lambda input, other: None, inplace=True),
        methods=spellings(("add",), lambda input, other, *, alpha=1: None)
        | spellings(("add_",), lambda input, other, *, alpha=1: None, inplace=True),
    ),
    entry(
        "sub",
        Kind.ARITH,
        torch.sub,
        sig(lambda input, other, *, alpha=1: None),
        tensors=_PAIR,
        functions=spellings((torch.subtract,), lambda input, other, *, alpha=1: None)
        | spellings((operator.sub,), lambda input, other: None)
        | spellings((operator.isub,), lambda input, other: None, inplace=True),
        methods=spellings(("sub", "subtract"), lambda input, other, *, alpha=1: None)
        | spellings(("sub_", "subtract_"), lambda input, other, *, alpha=1: None, inplace=True),
    ),
    entry(
        "mul",
        Kind.ARITH,
        torch.mul,
        sig(lambda input, other: None),
        tensors=_PAIR,
        commutes=True,
        functions=spellings((torch.multiply, operator.mul), lambda input, other: None)
        | spellings((operator.imul,), lambda input, other: None, inplace=True),
        methods=spellings(("mul", "multiply"), lambda input, other: None)
        | spellings(("mul_", "multiply_"), lambda input, other: None, inplace=True),
    ),
    entry(
        "div",
        Kind.ARITH,
        torch.div,
        sig(lambda input, other: None),
        tensors=_PAIR,
        absorb={"rounding_mode": (None,)},
        functions=spellings(
            (torch.div, torch.divide), lambda input, other, rounding_mode=None: None
        )
        | spellings((operator.truediv, torch.true_divide), lambda input, other: None)
        | spellings((operator.itruediv,), lambda input, other: None, inplace=True),
        methods=spellings(("div", "divide"), lambda input, other, rounding_mode=None: None)
        | spellings(("true_divide",), lambda input, other: None)
        | spellings(
            ("div_", "divide_"), lambda input, other, rounding_mode=None: None, inplace=True
        ),
    ),
    *(
        entry(
            name,
            Kind.ARITH,
            target,
            sig(lambda input, other: None),
            tensors=_PAIR,
            commutes=True,
            functions=spellings((target,), lambda input, other: None)
            | spellings((short,), lambda input, other: None, read=_of_tensors),
            methods=spellings((name,), lambda input, other: None)
            | spellings((short.__name__,), lambda input, other: None, read=_of_tensors),
        )
        for name, target, short in (
            ("maximum", torch.maximum, torch.max),
            ("minimum", torch.minimum, torch.min),
        )
    ),
    *(
        entry(
            name,
            Kind.ARITH,
            target,
            sig(lambda input, tensor1, tensor2, *, value=1: None),
            tensors=("input", "tensor1", "tensor2"),
            methods=spellings((name,), lambda input, tensor1, tensor2, *, value=1: None)
            | spellings(
                (f"{name}_",), lambda input, tensor1, tensor2, *, value=1: None, inplace=True
            ),
        )
        for name, target in (("addcmul", torch.addcmul), ("addcdiv", torch.addcdiv))
    ),
    entry(
        "lerp",
        Kind.ARITH,
        torch.lerp,
        sig(lambda input, end, weight: None),
        tensors=("input", "end"),
        methods=spellings(("lerp",), lambda input, end, weight: None)
        | spellings(("lerp_",), lambda input, end, weight: None, inplace=True),
    ),
)
