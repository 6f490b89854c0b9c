"""Where masks are: between the scores of an attention and its softmax.

A mask holds minus infinity, or -1e9 in its place. No range may ever span that.
"""

from __future__ import annotations

from typing import Final

from torch.fx import Node

from fxquant.graph.info import info
from fxquant.graph.op_table import is_op, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import tensor_sources

_MASKING: Final = (
    *("add", "sub", "where", "masked_fill", "masked_scatter", "maximum", "minimum"),
    *("addcmul", "attention_scores"),
)
_FILLS: Final = ("masked_fill", "masked_fill_", "where", "masked_scatter")
_SCALING: Final = ("mul", "div", "clamp")
_SOFTMAX: Final = ("softmax", "log_softmax")


def masks_scores(node: Node) -> bool:
    """Whether ``node`` does to scores what masks do: all its readers lead to a softmax."""
    return is_op(node, *_MASKING) and _leads_to_softmax(node)


def reads_masked(node: Node) -> bool:
    """Whether ``node`` is a softmax, or scales or moves, what a mask may have been put into."""
    if is_op(node, *_SOFTMAX, *_SCALING) or _moves(node):
        sources = tensor_sources(node)[:1]
        return any(_masked(source) or reads_masked(source) for source in sources)
    return False


def _masked(node: Node) -> bool:
    # A fill may have no canonical form: in place, or with a value computed in every call.
    named = getattr(node.target, "__name__", node.target)
    return masks_scores(node) or (bool(info(node).opaque) and named in _FILLS)


def _moves(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.kind is Kind.MOVE


def _leads_to_softmax(node: Node) -> bool:
    seen: set[Node] = set()
    todo = [node]
    found = False
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if is_op(user, *_SOFTMAX):
                found = True
            elif is_op(user, *_MASKING, *_SCALING) or _moves(user):
                todo.append(user)
            else:
                return False
    return found
