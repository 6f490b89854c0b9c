"""Linears between two views that undo each other read their rows where they are.

    linear(x.view(-1, k)).view(*x.shape[:-1], n)         ->   linear(x)

So GPT-2's ``Conv1D`` is written, and many a hand-written block. Without the views what follows,
an activation or a sum, is next to the layer, and becomes part of it.
"""

from __future__ import annotations

from typing import Any, Final

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, module_of
from fxquant.graph.view import flat_nodes
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import memory_is_free, no_users_unit

_ROWS: Final = 2


def flattens(match: Match) -> Reject | None:
    """The first view must leave rows: whatever has two dimensions, and a linear after it."""
    flat = match.node("flat")
    if is_op(flat, "flatten"):
        rows = (argument(flat, "start_dim"), argument(flat, "end_dim")) == (0, -2)
    else:
        shape = argument(flat, "shape")
        rows = isinstance(shape, tuple | list) and len(shape) == _ROWS
    return None if rows else Reject("it does not leave rows", flat)


def restores(match: Match) -> Reject | None:
    """The second view must have the leading dimensions of what the first one read.

    Then there are as many rows as before, and so they are the same: the last dimension, which the
    linear reads, is what it was.
    """
    shape, source, layer = argument(match.root, "shape"), match.bound["x"], match.node("layer")
    if not isinstance(source, Node) or layer.op != "call_module":
        return Reject("the weight of the layer is computed", match.root)
    width = module_of(layer).out_features
    if _is_sum(shape, source, width) or _is_spelled(shape, source, width):
        return None
    return Reject(
        "it is not known to have the leading dimensions of what was flattened", match.root
    )


def _is_sum(shape: Any, source: Node, width: object) -> bool:
    """``x.size()[:-1] + (n,)``."""
    if not isinstance(shape, Node) or getattr(shape.target, "__name__", "") != "add":
        return False
    lead, last = shape.args[:2]
    ends = isinstance(last, tuple | list) and tuple(last) == (width,)
    return ends and bool(_item(lead, source) == _LEAD)


def _is_spelled(shape: Any, source: Node, width: object) -> bool:
    """``(batch, tokens, n)``, where the first are asked of ``x``, which has three dimensions."""
    rank = info(source).rank
    if not isinstance(shape, tuple | list) or rank is None or len(shape) != rank:
        return False
    *lead, last = shape
    asked = [_item(each, source) for each in lead]
    return bool(last in (width, -1) and asked == list(range(rank - 1)))


def _item(value: Any, source: Node) -> Any:
    """Which part of the size of ``source`` a value is, if it is one."""
    if not isinstance(value, Node):
        return None
    if is_op(value, "size") and value.args[0] is source:
        return argument(value, "dim")
    whole = value.args[0] if value.args else None
    if getattr(value.target, "__name__", "") != "getitem" or not isinstance(whole, Node):
        return None
    of_all = is_op(whole, "size") and argument(whole, "dim") is None and whole.args[0] is source
    # Places count alike in all of the size and in all of it but its end.
    counts = of_all or (_item(whole, source) == _LEAD and isinstance(value.args[1], int))
    return value.args[1] if counts else None


_LEAD: Final = slice(None, -1, None)


def _drop_views(match: Match, editor: Editor) -> None:
    layer, flat, source = match.node("layer"), match.node("flat"), match.node("x")
    asked = list(flat_nodes(argument(match.root, "shape")))
    editor.replace_use(layer, flat, source)
    editor.note_values(layer, rank=info(source).rank, shape=None)
    editor.replace(match.root, layer, flat)
    for node in asked:
        _drop_question(editor, node)


def _drop_question(editor: Editor, node: Node) -> None:
    """Take out a size that nothing asks for any more, and what it was made of."""
    while node.op != "placeholder" and not node.users and info(node).value in ("scalar", "sizes"):
        made_of = list(flat_nodes(node.args[0]))
        editor.erase(node)
        if len(made_of) != 1:
            return
        node = made_of[0]


RULES: Final = (
    Rule(
        "linear-of-rows",
        op(
            "reshape",
            op(
                "linear",
                op(("reshape", "flatten"), var("x"), name="flat", shared=True),
                name="layer",
            ),
        ),
        _drop_views,
        (flattens, restores, no_users_unit, memory_is_free),
        priority=50,
    ),
)
