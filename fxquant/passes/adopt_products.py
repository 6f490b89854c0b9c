"""Adopt products: a product with a constant matrix is a linear layer that owns it.

    matmul(x, self.w) + self.b          ->   Linear(x), weight self.w transposed
    matmul(self.w, x)                   ->   transpose(Linear(transpose(x)))

Where the matrix is a transposed parameter the layer owns that very parameter: tied weights stay
tied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.layers import linear_of
from fxquant.graph.op_table import argument, is_op, op_named, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.ranks import record_ranks
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes, single_user
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class AdoptProducts(Pass):
    """Make linear layers of products with constants.

    Args:
        ranks: name and number of dimensions of the inputs that are known.
    """

    name: ClassVar[str] = "adopt-products"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    ranks: tuple[tuple[str, int], ...] = field(default=())

    def run(self, editor: Editor) -> None:
        """Look at every product, in graph order."""
        record_ranks(editor.graph, dict(self.ranks))
        for node in list(editor.graph.nodes):
            if not is_op(node, "matmul") or info(node).pinned:
                continue
            left, right = node.args[:2]
            matrix = _constant(editor, right)
            if isinstance(left, Node) and matrix is not None and matrix.dim() == 2:
                self._right(editor, node, left, matrix)
                continue
            matrix = _constant(editor, left)
            if isinstance(right, Node) and matrix is not None and matrix.dim() == 2:
                self._left(editor, node, right, matrix)
        with editor.rule("drop-dead"):
            editor.clean()

    @staticmethod
    def _right(editor: Editor, node: Node, source: Node, matrix: Tensor) -> None:
        with editor.rule("adopt-product"):
            total = _addition(editor, node, matrix.shape[1])
            weight, bias = matrix.t(), None
            if total is not None:
                bias = _bias(editor, node, total)
            made = _linear(editor, node, source, weight, bias)
            if total is None:
                editor.replace(node, made)
            else:
                editor.replace(total, made, node)

    @staticmethod
    def _left(editor: Editor, node: Node, source: Node, matrix: Tensor) -> None:
        """``W @ X`` is ``(X^T W^T)^T``."""
        rank = info(source).rank
        if rank is None:
            editor.miss("adopt-product", node.name, "the rank of its other operand is not known")
            return
        with editor.rule("adopt-product"):
            flip = op_named("transpose")
            turn = {"dim0": -2, "dim1": -1}
            if rank > 1:
                source = editor.call(flip, (source,), turn, like=node, before=node)
                editor.note_values(source, value="tensor", rank=rank)
            made = _linear(editor, node, source, matrix, None)
            if rank > 1:
                made = editor.call(flip, (made,), turn, like=node, before=node)
                editor.note_values(made, value="tensor", rank=rank)
            editor.replace(node, made)


def _constant(editor: Editor, value: Any) -> Tensor | None:
    """The value of a constant, or of one that only moves changed."""
    if not isinstance(value, Node) or info(value).pinned:
        return None
    if value.op == "get_attr":
        found: Any = editor.module
        for part in str(value.target).split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, Tensor) and found.is_floating_point() else None
    op = op_of(value)
    sources = list(flat_nodes((value.args, dict(value.kwargs))))
    if op is None or op.kind is not Kind.MOVE or op.target is None or len(sources) != 1:
        return None
    held = _constant(editor, sources[0])
    if held is None:
        return None
    args, kwargs = map_arg((value.args, value.kwargs), lambda _: held)
    with torch.no_grad():
        made: Tensor = op.target(*args, **kwargs)
    return made


def _addition(editor: Editor, node: Node, width: int) -> Node | None:
    """The sum with a constant row that follows, if nothing else reads the product."""
    user = single_user(node)
    if user is None or not is_op(user, "add") or user.args[0] is user.args[1]:
        return None
    if user.args[0] is not node and argument(user, "alpha") != 1:
        return None
    row = _constant(editor, _other(user, node))
    return user if row is not None and tuple(row.shape) == (width,) else None


def _other(total: Node, node: Node) -> Any:
    return total.args[1] if total.args[0] is node else total.args[0]


def _bias(editor: Editor, node: Node, total: Node) -> Tensor | None:
    row, alpha = _constant(editor, _other(total, node)), argument(total, "alpha")
    return row if row is None or alpha == 1 else row.detach() * alpha


def _linear(editor: Editor, node: Node, source: Node, weight: Tensor, bias: Tensor | None) -> Node:
    owners = info(node).owners
    path = f"{owners[-1][0]}.linear" if owners else "linear"
    layer = linear_of(_own(editor, weight), bias)
    where = editor.add_module(path, layer)
    made = editor.call_module(where, (source,), like=node, before=node)
    editor.annotate(made, path=where)
    editor.note_values(made, value="tensor", rank=info(source).rank, shape=None)
    return made


def _own(editor: Editor, weight: Tensor) -> Tensor:
    """The user's parameter that ``weight`` is a view of all of, else a tensor in plain order."""
    for parameter in editor.module.parameters():
        same_memory = parameter.data_ptr() == weight.data_ptr()
        same_layout = (parameter.shape, parameter.stride()) == (weight.shape, weight.stride())
        if same_memory and same_layout:
            return parameter
    return nn.Parameter(weight.detach().contiguous(), weight.requires_grad)
