"""Patterns as lists of ops in forward order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fxquant.custom.parameters import Parameter, check_classes
from fxquant.errors import PatternError
from fxquant.graph.op_table import OPS, function_spellings, op_named


def chain_function(
    steps: Sequence[Any], line: str
) -> tuple[Callable[..., Any], tuple[Parameter, ...], str]:
    """The function that a list of ops stands for, its parameters, and its name.

    Args:
        steps: classes, functions, or tuples of alternatives.
        line: where the list is written, for messages.

    Raises:
        PatternError: a step is no op.
    """
    if not steps:
        raise PatternError(f"{line}: this pattern has no op")
    parts: list[Parameter] = []
    for place, step in enumerate(steps):
        parts.append(_part(step, f"{line}: step {place}", [part.name for part in parts]))
    others = {part.name: f"other_{part.name}" for part in parts if _is_pair(part)}

    def chain(**given: Any) -> Any:
        y = given["x"]
        for part in parts:
            call = given[part.name]
            y = call(y, given[others[part.name]]) if part.name in others else call(y)
        return y

    inputs = [Parameter("x", "tensor"), *(Parameter(name, "tensor") for name in others.values())]
    return chain, (*inputs, *parts), "+".join("|".join(part.ops) for part in parts)


def _part(step: Any, where: str, taken: list[str]) -> Parameter:
    given = tuple(step) if isinstance(step, tuple | list) else (step,)
    classes = tuple(s for s in given if isinstance(s, type) and issubclass(s, nn.Module))
    check_classes(classes, where)
    functions = [_op(s, where) for s in given if s is not None and s not in classes]
    found = Parameter("", "module", classes, None in given, tuple(dict.fromkeys(functions)))
    if not found.ops and not classes:
        raise PatternError(f"{where} has no op")
    base = found.ops[0] if found.ops else "identity"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return Parameter(name, "module", classes, found.optional, found.functions)


def _op(function: Any, where: str) -> str:
    if isinstance(function, nn.Module):
        raise PatternError(f"{where} is a module: give its class, nn.{type(function).__name__}")
    found = function_spellings(function) if callable(function) else ()
    if not found:
        known = {getattr(f, "__name__", "") for op in OPS for f in op.functions}
        name = str(getattr(function, "__name__", function))
        near = difflib.get_close_matches(name, sorted(known), n=2)
        hint = f"; the nearest that are one: {', '.join(near)}" if near else ""
        raise PatternError(f"{where}, {name}, is no op of fxquant{hint}")
    return found[0][0].name


def _is_pair(part: Parameter) -> bool:
    """Whether an op takes a second tensor or number, such as a sum."""
    pairs = [len(op_named(name).tensors) == 2 for name in part.ops]
    return bool(pairs) and all(pairs)
