"""Sums that a norm reads, which no one scale serves: the residual stream of a transformer.

A norm divides each token by its own size. Tokens, and channels, of a residual stream differ in
size by orders of magnitude, so the small ones would have a few of the 256 codes, and each block
would round the stream anew. The norm computes in float anyway, and float sums cost no more.
"""

from __future__ import annotations

from typing import Final

from torch.fx import Node

from fxquant.graph.flow import rescaled_by
from fxquant.graph.info import info
from fxquant.graph.op_table import is_op, op_named, op_of
from fxquant.graph.ops import Kind

__all__ = ["norm_that_reads", "sum_that_takes"]

_NORMS: Final = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
_THROUGH: Final = (Kind.MOVE, Kind.SPLIT, Kind.JOIN)
_MOST: Final = 64
"""How many ops may stand between: chains of sums have no end, and each would be walked along."""


def norm_that_reads(node: Node) -> Node | None:
    """The norm with statistics of its own that reads the sum ``node``, maybe through moves.

    ``None`` if there is none, if ``node`` is no sum of two tensors, if a user's pattern has taken
    it, or if an override names it or the function that it calls.
    """
    if not is_op(node, "add") or info(node).custom is not None:
        return None
    if not _adds_tensors(node) or _is_asked(node):
        return None
    todo, seen = [node], {node}
    while todo and len(seen) <= _MOST:
        value = todo.pop()
        for user in value.users:
            if is_op(user, *_NORMS) and user.args[0] is value:
                return user
            if user not in seen and _hands_on(user, value):
                seen.add(user)
                todo.append(user)
    return None


def sum_that_takes(node: Node) -> Node | None:
    """The sum that takes all that ``node`` moves and that a norm reads, maybe through more moves.

    ``None`` if there is none, if something else reads it, or if ``node`` computes.
    """
    for _ in range(_MOST):
        op = op_of(node)
        moves = op is not None and op.kind in _THROUGH and info(node).custom is None
        if not moves or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if norm_that_reads(user) is not None:
            return user
        node = user
    return None


def _adds_tensors(node: Node) -> bool:
    return all(
        isinstance(each, Node) and info(each).value not in ("scalar", "sizes")
        for each in node.args[:2]
    )


def _is_asked(node: Node) -> bool:
    record, op = info(node), op_named("add")
    names = {getattr(function, "__name__", "") for function in op.functions}
    return record.configured_by in (f"override {record.path!r}", *(f"override {n}" for n in names))


def _hands_on(user: Node, value: Node) -> bool:
    """Whether ``user`` moves ``value``, scales it, or is all that reads it and adds to it."""
    op = op_of(user)
    if op is None:
        return False
    if op.kind in _THROUGH or op.name == "dropout" or rescaled_by(user) is not None:
        return True
    return op.name == "add" and len(value.users) == 1
