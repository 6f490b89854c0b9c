"""What the names of a pattern stand for at a match, as users see it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.fx import Node

from fxquant.custom.parameters import Parameter
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, module_of, op_of
from fxquant.graph.view import what
from fxquant.patterns.match import Match


def bound_values(match: Match, parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    """Every parameter of the pattern with what it stands for.

    Modules as they are, ops without weights as their options, numbers, tensors of the model;
    other tensors as nodes. What is optional and missing is ``None``.
    """
    return {p.name: _value(match.bound.get(p.name), p) for p in parameters}


def _value(value: Any, parameter: Parameter) -> Any:
    if not isinstance(value, Node):
        return value
    if parameter.kind == "constant":
        return held_tensor(value)
    if parameter.kind != "module":
        return value
    if value.op == "call_module":
        return module_of(value)
    found = op_of(value)
    options = {name: argument(value, name) for name in found.options} if found is not None else {}
    return SimpleNamespace(op=what(value), **options)


def described(match: Match, parameters: tuple[Parameter, ...]) -> dict[str, str]:
    """Every parameter of the pattern that is bound, with its path or number, as text."""
    found = {}
    for parameter in parameters:
        value = match.bound.get(parameter.name)
        if isinstance(value, Node):
            found[parameter.name] = info(value).path or value.name
        elif value is not None:
            found[parameter.name] = repr(value)
    return found
