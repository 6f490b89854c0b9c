"""Which module of the model a functional call came from: ``F.conv2d(x, self.conv.weight)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.info import info
from fxquant.graph.op_table import module_op
from fxquant.graph.ops import Op


def own_module(
    root: GraphModule, node: Node, op: Op, given: Mapping[str, Any], weights: list[str]
) -> str | None:
    """The path of a module of the model that does exactly what a functional call does.

    Users then see their own names, as they do when the module itself is called.

    Args:
        root: the graph module that holds the model's modules.
        node: the functional call.
        op: the op with parameters that it spells.
        given: canonical arguments; tensors are the model's own.
        weights: paths of the tensors it reads.
    """
    for path in dict.fromkeys(_candidates(node, weights)):
        module = _module_at(root, path)
        if module is not None and module_op(module) is op and _agrees(op, module, given):
            return path
    return None


def _candidates(node: Node, weights: list[str]) -> Iterator[str]:
    owners = info(node).owners
    if owners:
        yield owners[-1][0]
    yield from (path.rpartition(".")[0] for path in weights if "." in path)


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = root
    for part in path.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


_ANY: Final = ("momentum",)
"""Options that change nothing once statistics are fixed."""


def _agrees(op: Op, module: nn.Module, given: Mapping[str, Any]) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if any(getattr(module, name, None) is not given.get(name) for name in op.tensors[1:]):
        return False
    for name, allowed in op.absorb.items():
        if hasattr(module, name) and getattr(module, name) not in allowed:
            return False
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    options = [name for name in op.options if name not in _ANY]
    return all(_same(getattr(module, name, None), given[name]) for name in options)


def _same(own: Any, asked: Any) -> bool:
    """``(1, 1)``, ``[1, 1]`` and ``1`` are the same stride."""
    if isinstance(own, tuple | list) and isinstance(asked, int):
        return all(side == asked for side in own)
    if isinstance(asked, tuple | list) and isinstance(own, int):
        return all(side == own for side in asked)
    if isinstance(own, tuple | list) and isinstance(asked, tuple | list):
        return tuple(own) == tuple(asked)
    return bool(own == asked)
