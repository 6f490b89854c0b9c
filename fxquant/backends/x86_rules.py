"""Lowering of ops without an integer weight to the x86 backend.

quantize(dequantize(x) + dequantize(y))      ->  PairCodes(x, y)
quantize(f(dequantize(x)))                   ->  TableCodes(x), any f of one element
quantize(reshape(dequantize(x)))             ->  reshape(x), the codes themselves
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.x86_layer_rules import codes_type, put
from fxquant.backends.x86_ops import (
    AverageCodes,
    MaxPool2dCodes,
    NormCodes,
    PairCodes,
    TableCodes,
    ThroughFloat,
)
from fxquant.graph.edit import Editor
from fxquant.graph.flow import moves_codes
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, is_op, module_of, op_named, op_names, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import flat_nodes
from fxquant.numerics.lut import make_table
from fxquant.numerics.qparams import QParams
from fxquant.patterns.boundary import DEQUANTIZE, QUANTIZE
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import affine_of
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS

_AVERAGES: Final = (
    "mean",
    *(f"{kind}_pool{rank}d" for kind in ("avg", "adaptive_avg") for rank in (1, 2, 3)),
)
_MOVES: Final = (
    *(name for name in op_names() if op_named(name).kind is Kind.MOVE and name != "dropout"),
    "interpolate",
)
_NUMBERS: Final = ("scalar", "sizes")
_THROUGH_FLOAT: Final = (
    *(f"max_pool{rank}d" for rank in (1, 3)),
    *(f"adaptive_max_pool{rank}d" for rank in (1, 2, 3)),
)


def _dq(name: str, source: str) -> OpExpr:
    return op(DEQUANTIZE, var(source), name=name, shared=True)


def _q(inner: OpExpr) -> OpExpr:
    return op(QUANTIZE, inner, name="q")


def _writes(match: Match) -> QType:
    found = info(match.root).writes
    if found is None:
        raise TypeError(f"%{match.root.name} writes no codes")
    return found


def _codes(match: Match, name: str) -> Node:
    source = match.node(name).args[0]
    if not isinstance(source, Node):
        raise TypeError(f"{name} reads a constant")
    return source


def _replace(match: Match, editor: Editor, module: nn.Module, *dqs: str) -> None:
    inputs = tuple(_codes(match, name) for name in dqs)
    like = match.node("op")
    put(match, editor, module, inputs, _writes(match), path=info(like).path, like=like)


def _options(node: Node) -> dict[str, Any]:
    found = op_of(node)
    return {name: argument(node, name) for name in found.options} if found is not None else {}


def _constant(value: Any) -> bool:
    return not isinstance(value, Node) and (
        not isinstance(value, tuple | list) or all(_constant(item) for item in value)
    )


def full_codes(match: Match) -> Reject | None:
    """The uint8 kernels saturate at 0 and 255, so those must be the ends of the code range."""
    for qtype in (*(codes_type(n) for n in match.nodes if is_op(n, DEQUANTIZE)), _writes(match)):
        if (qtype.dtype, qtype.quant_min, qtype.quant_max) != (torch.uint8, 0, 255):
            return Reject(f"the kernel works on full uint8 codes, not on {qtype}", match.root)
    return None


def options_are_constant(match: Match) -> Reject | None:
    """What is computed in every call cannot be baked into a module."""
    node = match.node("op")
    bad = [name for name, value in _options(node).items() if not _constant(value)]
    return Reject(f"its {bad[0]} is computed in every call", node) if bad else None


def _lower_pair(match: Match, editor: Editor) -> None:
    node, relu = match.node("op"), "relu" in match.bound
    found = op_of(node)
    name = found.name if found is not None else ""
    alpha = float(argument(node, "alpha")) if name != "mul" else 1.0
    a, b = codes_type(match.node("dq")), codes_type(match.node("dq2"))
    _replace(match, editor, PairCodes(name, relu, a, b, _writes(match), alpha), "dq", "dq2")


def to_qparams(qtype: QType) -> QParams:
    """The type of an edge as per-tensor qparams."""
    return QParams.per_tensor(
        qtype.scale, qtype.zero_point, qtype.quant_min, qtype.quant_max, qtype.dtype
    )


def _table(match: Match, editor: Editor, function: Callable[[Tensor], Tensor], name: str) -> None:
    reads, writes = codes_type(match.node("dq")), _writes(match)
    table = make_table(function, to_qparams(reads), to_qparams(writes))
    _replace(match, editor, TableCodes(table, name, writes), "dq")


def _lower_unary(match: Match, editor: Editor) -> None:
    node = match.node("op")
    found = op_of(node)
    if found is None or found.target is None:
        return
    target = found.target
    rest, kwargs = tuple(node.args[1:]), dict(node.kwargs)

    def function(x: Tensor) -> Tensor:
        result: Tensor = target(x, *rest, **kwargs)
        act = match.bound.get("relu")
        return result if act is None else torch.relu(result)

    _table(match, editor, function, found.name)


def reads_a_number(match: Match) -> Reject | None:
    """``x * 2`` is a function of one element; ``x * y`` is not."""
    other = match.bound.get("number")
    if isinstance(other, int | float) and not isinstance(other, bool):
        return None
    return Reject("the other operand is no constant", match.node("op"))


def _lower_requantize(match: Match, editor: Editor) -> None:
    codes, reads, writes = match.node("op").args[0], codes_type(match.node("op")), _writes(match)
    if not isinstance(codes, Node):
        return
    table = make_table(lambda x: x, to_qparams(reads), to_qparams(writes))
    module = TableCodes(table, "requantize", writes)
    like = match.root
    put(match, editor, module, (codes,), writes, path=f"{like.name}_requantize", like=like)


def _lower_average(match: Match, editor: Editor) -> None:
    node = match.node("op")
    name = op_of(node).name  # type: ignore[union-attr]
    module = AverageCodes(name, _options(node), codes_type(match.node("dq")), _writes(match))
    _replace(match, editor, module, "dq")


def averages_pixels_only(match: Match) -> Reject | None:
    """Zeros that padding adds are not code 0, so padded averages are computed in float."""
    options = _options(match.node("op"))
    padding = options.get("padding", 0)
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    if padded or options.get("ceil_mode") or options.get("divisor_override") is not None:
        return Reject("it averages over padding", match.node("op"))
    return None


def _lower_norm(match: Match, editor: Editor) -> None:
    scale, shift = affine_of(module_of(match.node("op")))
    reads, writes = codes_type(match.node("dq")), _writes(match)
    module = NormCodes(scale.float(), shift.float(), reads, writes, "relu" in match.bound)
    _replace(match, editor, module, "dq")


def is_image(match: Match) -> Reject | None:
    """The kernel takes ``[batch, channels, height, width]``."""
    shape = info(match.node("op")).shape or info(match.node("dq")).shape
    if shape is None or len(shape) != 4:
        return Reject("its input is not known to have 4 dimensions", match.node("op"))
    return None


def same_type(match: Match) -> Reject | None:
    """Moved codes keep their type."""
    reads, writes = codes_type(match.node("dq")), _writes(match)
    if reads != writes:
        return Reject(f"it reads {reads} and writes {writes}", match.root)
    return None


def _lower_move(match: Match, editor: Editor) -> None:
    node, codes = match.node("op"), _codes(match, "dq")
    name = op_of(node).name  # type: ignore[union-attr]
    if name == "max_pool2d" or name in _THROUGH_FLOAT:
        options = _options(node)
        module = MaxPool2dCodes(options) if name == "max_pool2d" else ThroughFloat(name, options)
        _replace(match, editor, module, "dq")
        return
    kwargs = dict(node.kwargs)
    if name == "pad" and kwargs["mode"] == "constant":
        kwargs["value"] = _code_of(kwargs["value"], _writes(match))
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
    if is_op(node, "pad") and not _constant(node.kwargs["value"]):
        return Reject("its padding value is computed in every call", node)
    return None


def _recall(
    match: Match, editor: Editor, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Call the same op on codes."""
    node, writes = match.node("op"), _writes(match)
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
    parts = [dq.args[0] for dq in node.args[0]]  # type: ignore[union-attr]
    _recall(match, editor, node.target, (parts,), dict(node.kwargs))


def joins_one_type(match: Match) -> Reject | None:
    """All parts and the result must be codes of one type."""
    node, writes = match.node("op"), _writes(match)
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
    node, split, codes = match.node("op"), match.node("split"), _codes(match, "dq")
    cut = next((u for u in codes.users if u.meta.get("splits") == split.name), None)
    if cut is None:
        target: Any = split.target
        args = (codes, *split.args[1:])
        cut = editor.call(target, args, dict(split.kwargs), like=split, before=split)
        kept, decision = info(codes).writes, info(split).decision
        editor.annotate(cut, writes=kept, reads=(kept,), value="tensors", decision=decision)
        cut.meta["splits"] = split.name
    _recall(match, editor, node.target, (cut, *node.args[1:]), dict(node.kwargs))


_RELU_OF: Final[Callable[[OpExpr], OpExpr]] = lambda inner: op(  # noqa: E731
    "relu", inner, name="relu", optional=True
)
_SPLITS: Final = tuple(name for name in op_names() if op_named(name).kind is Kind.SPLIT)

OP_RULES: Final = (
    Rule(
        "x86-pair",
        _q(_RELU_OF(op(("add", "sub", "mul"), _dq("dq", "x"), _dq("dq2", "y"), name="op"))),
        _lower_pair,
        (options_are_constant,),
        priority=10,
    ),
    Rule(
        "x86-table",
        _q(op(ACTIVATIONS, _dq("dq", "x"), name="op")),
        _lower_unary,
        (options_are_constant,),
    ),
    Rule(
        "x86-table-number",
        _q(_RELU_OF(op(("add", "sub", "mul", "div"), _dq("dq", "x"), var("number"), name="op"))),
        _lower_unary,
        (reads_a_number, options_are_constant),
    ),
    Rule("x86-requantize", _q(op(DEQUANTIZE, var("x"), name="op", shared=True)), _lower_requantize),
    Rule(
        "x86-average",
        _q(op(_AVERAGES, _dq("dq", "x"), name="op")),
        _lower_average,
        (averages_pixels_only, options_are_constant),
    ),
    Rule(
        "x86-batch-norm",
        _q(_RELU_OF(op("batch_norm", _dq("dq", "x"), name="op"))),
        _lower_norm,
        (full_codes, is_image),
    ),
    Rule(
        "x86-move",
        _q(op(_MOVES, _dq("dq", "x"), name="op")),
        _lower_move,
        (same_type, moves_here),
    ),
    Rule("x86-join", _q(op(("cat", "stack"), name="op")), _lower_join, (joins_one_type,)),
    Rule(
        "x86-split",
        _q(op("getitem", op(_SPLITS, _dq("dq", "x"), name="split", shared=True), name="op")),
        _lower_part,
        (same_type,),
        priority=5,
    ),
)
