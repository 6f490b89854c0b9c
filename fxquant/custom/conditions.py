"""Conditions on what the names of a pattern may stand for; each gives ``None`` or the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from fxquant.graph.info import info
from fxquant.graph.op_table import OPS, module_of, op_of
from fxquant.graph.view import what

_STANDARD = {cls for op in OPS for cls in op.modules}


def joins(count: int) -> Callable[[Node], str | None]:
    """Whether an op joins so many tensors."""

    def check(node: Node) -> str | None:
        given = node.args[0]
        found = len(given) if isinstance(given, tuple | list) else 0
        return None if found == count else f"%{node.name} joins {found} tensors, not {count}"

    return check


def is_tensor(value: Any) -> str | None:
    """Whether it is a tensor, and no number computed in every call."""
    if isinstance(value, Node) and info(value).value not in ("scalar", "sizes"):
        return None
    return "would be a number, not a tensor"


def is_number(value: Any) -> str | None:
    """Whether it is a number that never changes."""
    return None if isinstance(value, int | float) else "would not be a constant number"


def is_constant(value: Any) -> str | None:
    """Whether it is a tensor that the model holds."""
    if isinstance(value, Node) and value.op == "get_attr":
        return None
    return "would not be a parameter or buffer of the model"


def is_one_of(
    classes: tuple[type[nn.Module], ...], functions: tuple[str, ...]
) -> Callable[[Node], str | None] | None:
    """Ops such as ``batch_norm`` are spelled by several classes, and it may matter by which."""
    if not classes:
        return None

    def check(node: Node) -> str | None:
        if node.op != "call_module" or (op_of(node) is not None and what(node) in functions):
            return None
        module = module_of(node)
        named = [
            c for c in type(module).__mro__ if c in _STANDARD and c.__module__.startswith("torch.")
        ]
        if (
            not named
            or isinstance(module, classes)
            or any(issubclass(c, named[0]) for c in classes)
        ):
            return None
        wanted = " or ".join(cls.__name__ for cls in classes)
        return f"`{info(node).path or node.name}` is a {named[0].__name__}, not a {wanted}"

    return check
