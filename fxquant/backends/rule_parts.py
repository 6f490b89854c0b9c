"""Parts that the lowering rules of ops without an integer weight are written with."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node

from fxquant.backends.x86_layer_rules import put
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, op_of
from fxquant.patterns.boundary import DEQUANTIZE, QUANTIZE
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject


def dequantized(name: str, source: str) -> OpExpr:
    """Codes made float: the shared pattern that every op on codes starts from."""
    return op(DEQUANTIZE, var(source), name=name, shared=True)


def quantized(inner: OpExpr) -> OpExpr:
    """A result made codes."""
    return op(QUANTIZE, inner, name="q")


def writes_of(match: Match) -> QType:
    """The type of the codes that the match's root makes."""
    found = info(match.root).writes
    if found is None:
        raise TypeError(f"%{match.root.name} writes no codes")
    return found


def codes_of(match: Match, name: str) -> Node:
    """The codes behind the dequantize called ``name``."""
    source = match.node(name).args[0]
    if not isinstance(source, Node):
        raise TypeError(f"{name} reads a constant")
    return source


def put_op(match: Match, editor: Editor, module: nn.Module, *dqs: str) -> None:
    """Put ``module`` in the place of the match: it reads the codes behind ``dqs``."""
    inputs = tuple(codes_of(match, name) for name in dqs)
    like = match.node("op")
    put(match, editor, module, inputs, writes_of(match), path=info(like).path, like=like)


def options_of(node: Node) -> dict[str, Any]:
    """The arguments of a canonical call that are not tensors."""
    found = op_of(node)
    return {name: argument(node, name) for name in found.options} if found is not None else {}


def is_constant(value: Any) -> bool:
    """Whether no part of an argument is computed in every call."""
    return not isinstance(value, Node) and (
        not isinstance(value, tuple | list) or all(is_constant(item) for item in value)
    )


def options_are_constant(match: Match) -> Reject | None:
    """What is computed in every call cannot be baked into a module."""
    node = match.node("op")
    bad = [name for name, value in options_of(node).items() if not is_constant(value)]
    return Reject(f"its {bad[0]} is computed in every call", node) if bad else None
