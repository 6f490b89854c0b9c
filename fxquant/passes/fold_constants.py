"""Fold constants: what is computed from the model's own tensors alone is computed once.

    linear(x, self.weight * self.mask)   ->   linear(x, folded)

Only results no larger than the tensors they are made from: an expanded table stays a view.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import function_spelling, method_spelling
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes
from fxquant.passes.base import Pass

_PURE: Final = (Kind.UNARY, Kind.MOVE, Kind.JOIN, Kind.ARITH, Kind.FLOAT, Kind.SPLIT, Kind.SHAPE)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace computed constants by their values."""

    name: ClassVar[str] = "fold-constants"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, editor: Editor) -> None:
        """Evaluate in graph order; then keep the results that something else reads."""
        values: dict[Node, Any] = {}
        for node in editor.graph.nodes:
            if node.op == "get_attr":
                held = _held(editor, node)
                if isinstance(held, Tensor) and not held.is_meta and not info(node).pinned:
                    values[node] = held
            elif _foldable(node, values):
                values[node] = _evaluate(node, values)
        for node, value in list(values.items()):
            outside = [user for user in node.users if user not in values]
            if node.op != "get_attr" and outside and _worth(node, value, values):
                self._put(editor, node, value)

    @staticmethod
    def _put(editor: Editor, node: Node, value: Tensor) -> None:
        with editor.rule("fold-constant"):
            # A view of a part would keep the whole in memory and in files.
            whole = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
            held = nn.Parameter(
                value.detach() if whole else value.detach().clone(), requires_grad=False
            )
            path = editor.add_buffer(f"{info(node).path or node.name}_folded", held)
            made = editor.get_attr(path, like=node, before=node)
            editor.replace(node, made)


def _held(editor: Editor, node: Node) -> Any:
    found: Any = editor.module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def _foldable(node: Node, values: dict[Node, Any]) -> bool:
    sources = list(flat_nodes((node.args, dict(node.kwargs))))
    if not sources or info(node).pinned or not all(source in values for source in sources):
        return False
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return True
        found = function_spelling(node.target)
    elif node.op == "call_method":
        found = method_spelling(str(node.target))
    else:
        return False
    if found is None or found[1].inplace or node.kwargs.get("inplace"):
        return False
    return found[0].kind in _PURE and found[0].name != "dropout"


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function has a function


def _worth(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    """A tensor that is no larger than what it is made from, directly or not."""
    if not isinstance(value, Tensor):
        return False
    todo: list[Node] = [node]
    leaves: dict[Node, int] = {}
    while todo:
        for source in flat_nodes((todo[-1].args, dict(todo.pop().kwargs))):
            if source.op == "get_attr":
                leaves[source] = values[source].numel()
            else:
                todo.append(source)
    return value.numel() <= sum(leaves.values())
