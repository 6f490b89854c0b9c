"""Lowering of ops that move codes: they run on the codes themselves.

quantize(reshape(dequantize(x)))             ->  reshape(x), the codes themselves
quantize(cat([dequantize(x), ...]))          ->  cat([x, ...])
argmax(dequantize(x))                        ->  argmax(x)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn
from torch.fx import Node

from fxquant.backends import x86_moves
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
from fxquant.backends.x86_pools import AdaptiveMaxPoolCodes, LocatedMaxPoolCodes, MaxPoolCodes
from fxquant.graph.edit import Editor
from fxquant.graph.fills import code_of, fill_of
from fxquant.graph.flow import gives_indices, moves_codes, wanted_int8
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import is_op, op_named, op_names
from fxquant.graph.ops import Kind
from fxquant.graph.table_pools import WITH_INDICES
from fxquant.graph.view import flat_nodes, what
from fxquant.patterns.boundary import DEQUANTIZE
from fxquant.patterns.expr import op
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule


def _of_kind(kind: Kind) -> tuple[str, ...]:
    return tuple(name for name in op_names() if op_named(name).kind is kind)


_MOVES: Final = (*(n for n in _of_kind(Kind.MOVE) if n != "dropout"), "interpolate", "where")
_SPLITS: Final = (*_of_kind(Kind.SPLIT), *_of_kind(Kind.PICK))
_NUMBERS: Final = ("scalar", "sizes")

_POOLS: Final[dict[str, Callable[[dict[str, Any]], nn.Module]]] = {
    **{f"max_pool{rank}d": functools.partial(MaxPoolCodes, rank) for rank in (1, 2, 3)},
    **{
        f"adaptive_max_pool{rank}d": functools.partial(AdaptiveMaxPoolCodes, rank)
        for rank in (1, 2, 3)
    },
}
_LOCATED: Final = tuple(name for name in _SPLITS if name.endswith(WITH_INDICES))
_ON_CODES: Final[dict[str, Callable[..., Any]]] = {
    "masked_fill": x86_moves.masked_fill_codes,
    "where": x86_moves.where_number_codes,
    "tril": x86_moves.tril_codes,
    "triu": x86_moves.triu_codes,
    "pixel_shuffle": x86_moves.pixel_shuffle_codes,
    "pixel_unshuffle": x86_moves.pixel_unshuffle_codes,
    "repeat_interleave": x86_moves.repeat_interleave_codes,
    "getitem": x86_moves.getitem_codes,
    "take_along_dim": x86_moves.take_along_dim_codes,
    "im2col": x86_moves.im2col_codes,
    **{f"max_unpool{rank}d": x86_moves.max_unpool_codes for rank in (1, 2, 3)},
}
"""Moves that need another call on codes than on float."""
_ZERO_POINT: Final = ("tril", "triu", "im2col", *(f"max_unpool{rank}d" for rank in (1, 2, 3)))


def same_type(match: Match) -> Reject | None:
    """Moved codes keep their type."""
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    if reads != writes:
        return Reject(f"it reads {reads} and writes {writes}", match.root)
    return None


def _lower_move(match: Match, editor: Editor) -> None:
    node, codes = match.node("op"), codes_of(match, "dq")
    name = what(node)
    if name in _POOLS:
        put_op(match, editor, _POOLS[name](options_of(node)), "dq")
        return
    args, kwargs = node.args[1:], dict(node.kwargs)
    qtype = writes_of(match)
    if name == "where":
        args = (code_of(fill_of(node), qtype),)
    elif "value" in kwargs and fill_of(node) is not None:
        kwargs["value"] = code_of(fill_of(node), qtype)
    if name in _ZERO_POINT:
        kwargs["zero_point"] = qtype.zero_point
    if name.startswith("max_unpool"):
        kwargs["rank"] = int(name[-2])
    target: Any = node.target
    if name in _ON_CODES and not (name == "getitem" and not _has_places(node)):
        target = _ON_CODES[name]
    _recall(match, editor, target, (codes, *args), kwargs)


def _has_places(node: Node) -> bool:
    """Whether an index is a list or tensor of places, which has a faster call."""
    index = node.args[1]
    places = index if isinstance(index, tuple) else (index,)
    last = places[-1] if places else None
    return isinstance(last, list) or (isinstance(last, Node) and info(last).value not in _NUMBERS)


def moves_here(match: Match) -> Reject | None:
    """Options computed in every call are fine for views, not for modules and constants."""
    node = match.node("op")
    if is_op(node, *_POOLS):
        return options_are_constant(match)
    if not moves_codes(node):
        return Reject("it computes new values", node)
    if not is_constant(fill_of(node)):
        return Reject("its fill value is computed in every call", node)
    return None


def _recall(
    match: Match, editor: Editor, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Call the same op on codes."""
    _call_on_codes(match, editor, target, args, kwargs, writes_of(match))


def _call_on_codes(
    match: Match,
    editor: Editor,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    writes: QType | None,
) -> None:
    node = match.node("op")
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
    parts = tuple(dq.args[0] for dq in _joined(node))
    if is_op(node, "where"):
        _recall(match, editor, x86_moves.where_codes, parts, dict(node.kwargs))
    elif is_op(node, "index_put"):
        _recall(match, editor, node.target, parts, dict(node.kwargs))
    else:
        _recall(match, editor, node.target, (list(parts),), dict(node.kwargs))


def _joined(node: Node) -> tuple[Any, ...]:
    """What a join puts side by side."""
    first = node.args[0]
    return tuple(first) if isinstance(first, tuple | list) else node.args


def joins_one_type(match: Match) -> Reject | None:
    """All parts and the result must be codes of one type."""
    node, writes = match.node("op"), writes_of(match)
    for part in _joined(node):
        if not isinstance(part, Node) or not is_op(part, DEQUANTIZE):
            return Reject("one of its parts is float", node)
        if codes_type(part) != writes:
            return Reject(f"%{part.name} has another type", part)
    return None


def _lower_part(match: Match, editor: Editor) -> None:
    """``quantize(split(dequantize(x))[i])``: split the codes once, take part ``i`` of them."""
    cut = _cut(match, editor)
    node = match.node("op")
    _recall(match, editor, node.target, (cut, *node.args[1:]), dict(node.kwargs))


def _lower_joined_parts(match: Match, editor: Editor) -> None:
    """``quantize(cat(split(dequantize(x))))``: a join of all parts as one tuple."""
    cut = _cut(match, editor)
    node = match.node("op")
    _recall(match, editor, node.target, (cut,), dict(node.kwargs))


def _cut(match: Match, editor: Editor) -> Node:
    """The call on codes that stands for the split of the match; one for all its parts."""
    split, codes = match.node("split"), codes_of(match, "dq")
    found = next((u for u in codes.users if u.meta.get("splits") == split.name), None)
    if found is not None:
        return found
    kept, decision = info(codes).writes, info(split).decision
    name = what(split)
    if name in _LOCATED:
        path = editor.add_module(info(split).path or split.name, _located(split))
        cut = editor.call_module(path, (codes,), like=split, before=split)
    else:
        target: Any = split.target
        args = (codes, *split.args[1:])
        cut = editor.call(target, args, dict(split.kwargs), like=split, before=split)
    editor.annotate(cut, writes=kept, reads=(kept,), value="tensors", decision=decision)
    cut.meta["splits"] = split.name
    for user in [u for u in split.users if gives_indices(u)]:
        editor.replace_use(user, split, cut)
        editor.annotate(user, reads=(kept,), value="tensor")
    return cut


def _located(split: Node) -> nn.Module:
    return LocatedMaxPoolCodes(what(split), options_of(split))


def cuts_here(match: Match) -> Reject | None:
    """Values of a pool with indices come from a module, whose options are baked in."""
    split = match.node("split")
    if gives_indices(match.node("op")):
        return Reject("it takes indices", match.node("op"))
    if is_op(split, *_LOCATED) and not is_constant(tuple(options_of(split).values())):
        return Reject("its options are computed in every call", split)
    return None


def _lower_index(match: Match, editor: Editor) -> None:
    node = match.node("op")
    args = (codes_of(match, "dq"), *node.args[1:])
    _call_on_codes(match, editor, node.target, args, dict(node.kwargs), None)


def _lower_indices(match: Match, editor: Editor) -> None:
    """``sort(dequantize(x))[1]``, where no values are read that would have been lowered."""
    _cut(match, editor)


def takes_indices(match: Match) -> Reject | None:
    """Only the part of a pick that says where."""
    node, split = match.node("op"), match.node("split")
    if not gives_indices(node) or not wanted_int8(split):
        return Reject("it takes values, or was decided to stay float", node)
    return None


def is_int8(match: Match) -> Reject | None:
    """What was decided to be float reads float."""
    node = match.node("op")
    return None if wanted_int8(node) else Reject("it was decided to stay float", node)


MOVE_RULES: Final = (
    Rule(
        "x86-move",
        quantized(op(_MOVES, dequantized("dq", "x"), name="op")),
        _lower_move,
        (same_type, moves_here),
    ),
    Rule("x86-join", quantized(op(_of_kind(Kind.JOIN), name="op")), _lower_join, (joins_one_type,)),
    Rule(
        "x86-split",
        quantized(
            op("getitem", op(_SPLITS, dequantized("dq", "x"), name="split", shared=True), name="op")
        ),
        _lower_part,
        (same_type, cuts_here),
        priority=5,
    ),
    Rule(
        "x86-join-parts",
        quantized(
            op(
                _of_kind(Kind.JOIN),
                op(_of_kind(Kind.SPLIT), dequantized("dq", "x"), name="split", shared=True),
                name="op",
            )
        ),
        _lower_joined_parts,
        (same_type,),
        priority=5,
    ),
    Rule(
        "x86-indices",
        op(
            "getitem",
            op(_of_kind(Kind.PICK), dequantized("dq", "x"), name="split", shared=True),
            name="op",
        ),
        _lower_indices,
        (takes_indices,),
    ),
    Rule(
        "x86-index",
        op(_of_kind(Kind.INDEX), dequantized("dq", "x"), name="op"),
        _lower_index,
        (is_int8,),
    ),
)
