"""Lowering of ops that move codes: they run on the codes themselves.

quantize(reshape(dequantize(x)))             ->  reshape(x), the codes themselves
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch.fx import Node

from fxquant.backends.rule_parts import (
    codes_of,
    dequantized,
    is_constant,
    options_are_constant,
    options_of,
    put_op,
    quantized,
    writes_of,
)
from fxquant.backends.x86_layer_rules import codes_type
from fxquant.backends.x86_moves import MaxPool2dCodes, ThroughFloat
from fxquant.graph.edit import Editor
from fxquant.graph.flow import moves_codes
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import is_op, op_named, op_names, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import flat_nodes
from fxquant.patterns.boundary import DEQUANTIZE
from fxquant.patterns.expr import op
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

_MOVES: Final = (
    *(name for name in op_names() if op_named(name).kind is Kind.MOVE and name != "dropout"),
    "interpolate",
)
_NUMBERS: Final = ("scalar", "sizes")
_THROUGH_FLOAT: Final = (
    *(f"max_pool{rank}d" for rank in (1, 3)),
    *(f"adaptive_max_pool{rank}d" for rank in (1, 2, 3)),
)


def same_type(match: Match) -> Reject | None:
    """Moved codes keep their type."""
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    if reads != writes:
        return Reject(f"it reads {reads} and writes {writes}", match.root)
    return None


def _lower_move(match: Match, editor: Editor) -> None:
    node, codes = match.node("op"), codes_of(match, "dq")
    name = op_of(node).name  # type: ignore[union-attr]  # the pattern that matched has it
    if name == "max_pool2d" or name in _THROUGH_FLOAT:
        options = options_of(node)
        module = MaxPool2dCodes(options) if name == "max_pool2d" else ThroughFloat(name, options)
        put_op(match, editor, module, "dq")
        return
    kwargs = dict(node.kwargs)
    if name == "pad" and kwargs["mode"] == "constant":
        kwargs["value"] = _code_of(kwargs["value"], writes_of(match))
    _recall(match, editor, node.target, (codes, *node.args[1:]), kwargs)


def _code_of(value: Any, qtype: QType) -> int:
    """The code of a padding constant; zero is always a code of its own."""
    code = round(float(value or 0.0) / qtype.scale) + qtype.zero_point
    return max(qtype.quant_min, min(qtype.quant_max, code))


def moves_here(match: Match) -> Reject | None:
    """Options computed in every call are fine for views, not for modules."""
    node = match.node("op")
    if is_op(node, "max_pool2d", *_THROUGH_FLOAT):
        return options_are_constant(match)
    if not moves_codes(node):
        return Reject("it computes new values", node)
    if is_op(node, "pad") and not is_constant(node.kwargs["value"]):
        return Reject("its padding value is computed in every call", node)
    return None


def _recall(
    match: Match, editor: Editor, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Call the same op on codes."""
    node, writes = match.node("op"), writes_of(match)
    made = editor.call(target, args, dict(kwargs), like=node, before=match.root)
    sources = [s for s in flat_nodes((args, dict(kwargs))) if info(s).value not in _NUMBERS]
    editor.annotate(
        made,
        writes=writes,
        # Codes, and whatever else it reads: the indices of an index_select are no codes.
        reads=tuple(info(source).writes for source in sources),
        value="tensor",
        decision=info(node).decision,
        shape=info(match.root).shape,
    )
    editor.replace(match.root, made, *match.nodes[1:])


def _lower_join(match: Match, editor: Editor) -> None:
    node = match.node("op")
    parts = [dq.args[0] for dq in node.args[0]]  # type: ignore[union-attr]  # the pattern that matched has it
    _recall(match, editor, node.target, (parts,), dict(node.kwargs))


def joins_one_type(match: Match) -> Reject | None:
    """All parts and the result must be codes of one type."""
    node, writes = match.node("op"), writes_of(match)
    parts = node.args[0]
    if not isinstance(parts, tuple | list):
        return Reject("it joins something unknown", node)
    for part in parts:
        if not isinstance(part, Node) or not is_op(part, DEQUANTIZE):
            return Reject("one of its parts is float", node)
        if codes_type(part) != writes:
            return Reject(f"%{part.name} has another type", part)
    return None


def _lower_part(match: Match, editor: Editor) -> None:
    """``quantize(split(dequantize(x))[i])``: split the codes once, take part ``i`` of them."""
    node, split, codes = match.node("op"), match.node("split"), codes_of(match, "dq")
    cut = next((u for u in codes.users if u.meta.get("splits") == split.name), None)
    if cut is None:
        target: Any = split.target
        args = (codes, *split.args[1:])
        cut = editor.call(target, args, dict(split.kwargs), like=split, before=split)
        kept, decision = info(codes).writes, info(split).decision
        editor.annotate(cut, writes=kept, reads=(kept,), value="tensors", decision=decision)
        cut.meta["splits"] = split.name
    _recall(match, editor, node.target, (cut, *node.args[1:]), dict(node.kwargs))


_SPLITS: Final = tuple(name for name in op_names() if op_named(name).kind is Kind.SPLIT)

MOVE_RULES: Final = (
    Rule(
        "x86-move",
        quantized(op(_MOVES, dequantized("dq", "x"), name="op")),
        _lower_move,
        (same_type, moves_here),
    ),
    Rule("x86-join", quantized(op(("cat", "stack"), name="op")), _lower_join, (joins_one_type,)),
    Rule(
        "x86-split",
        quantized(
            op("getitem", op(_SPLITS, dequantized("dq", "x"), name="split", shared=True), name="op")
        ),
        _lower_part,
        (same_type,),
        priority=5,
    ),
)
