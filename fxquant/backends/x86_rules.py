"""Lowering of ops without an integer weight to the x86 backend.

quantize(dequantize(x) + dequantize(y))      ->  PairCodes(x, y)
quantize(dequantize(x) * dequantize(gate))   ->  GateCodes(x, gate), one number a channel
quantize(f(dequantize(x)))                   ->  TableCodes(x), any f of one element
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.backends.rule_parts import (
    codes_of,
    dequantized,
    options_are_constant,
    put_op,
    quantized,
    writes_of,
)
from fxquant.backends.x86_layer_rules import codes_type, put
from fxquant.backends.x86_ops import (
    GateCodes,
    NormCodes,
    PairCodes,
    TableCodes,
)
from fxquant.graph.edit import Editor
from fxquant.graph.flow import gates, rescaled_by
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, is_op, module_of, op_named, op_of
from fxquant.numerics.lut import make_table
from fxquant.numerics.qparams import QParams
from fxquant.patterns.boundary import DEQUANTIZE
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import affine_of
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS


def full_codes(match: Match) -> Reject | None:
    """The uint8 kernels saturate at 0 and 255, so those must be the ends of the code range."""
    for qtype in (*(codes_type(n) for n in match.nodes if is_op(n, DEQUANTIZE)), writes_of(match)):
        if (qtype.dtype, qtype.quant_min, qtype.quant_max) != (torch.uint8, 0, 255):
            return Reject(f"the kernel works on full uint8 codes, not on {qtype}", match.root)
    return None


def _lower_pair(match: Match, editor: Editor) -> None:
    node, relu = match.node("op"), "relu" in match.bound
    found = op_of(node)
    name = found.name if found is not None else ""
    alpha = float(argument(node, "alpha")) if name != "mul" else 1.0
    a, b = codes_type(match.node("dq")), codes_type(match.node("dq2"))
    put_op(match, editor, PairCodes(name, relu, a, b, writes_of(match), alpha), "dq", "dq2")


def is_gate(match: Match) -> Reject | None:
    """One operand is a picture, the other has one number for each of its channels."""
    shapes = sorted(
        (info(match.node(name)).shape or () for name in ("dq", "dq2")), key=math.prod, reverse=True
    )
    if not gates(shapes[0], shapes[1]):
        return Reject("it is no product with one number a channel", match.node("op"))
    return None


def _lower_gate(match: Match, editor: Editor) -> None:
    a, b = codes_type(match.node("dq")), codes_type(match.node("dq2"))
    put_op(match, editor, GateCodes(a, b, writes_of(match)), "dq", "dq2")


def to_qparams(qtype: QType) -> QParams:
    """The type of an edge as per-tensor qparams."""
    return QParams.per_tensor(
        qtype.scale, qtype.zero_point, qtype.quant_min, qtype.quant_max, qtype.dtype
    )


def _table(match: Match, editor: Editor, function: Callable[[Tensor], Tensor], name: str) -> None:
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    table = make_table(function, to_qparams(reads), to_qparams(writes))
    put_op(match, editor, TableCodes(table, name, writes), "dq")


def _lower_unary(match: Match, editor: Editor) -> None:
    node = match.node("op")
    found = op_of(node)
    if found is None:
        return
    target: Callable[..., Tensor] = found.target or module_of(node)
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


def only_rescales(match: Match) -> Reject | None:
    """The codes stay what they are if the scale takes the factor."""
    node, reads, writes = match.node("op"), codes_type(match.node("dq")), writes_of(match)
    factor = rescaled_by(node)
    if factor is None:
        return Reject("it is no product with a positive number", node)
    if writes != dataclasses.replace(reads, scale=reads.scale * factor):
        return Reject(f"its result has codes of its own: {writes}", node)
    return None


def _lower_rescale(match: Match, editor: Editor) -> None:
    node, codes = match.node("op"), codes_of(match, "dq")
    # A view, so that nothing overwrites codes that are read under another scale.
    made = editor.call(op_named("getitem"), (codes, ...), like=node, before=match.root)
    editor.annotate(
        made,
        reads=(codes_type(match.node("dq")),),
        writes=writes_of(match),
        value="tensor",
        decision=info(node).decision,
        shape=info(match.root).shape,
    )
    editor.replace(match.root, made, *match.nodes[1:])


def _lower_requantize(match: Match, editor: Editor) -> None:
    codes, reads, writes = match.node("op").args[0], codes_type(match.node("op")), writes_of(match)
    if not isinstance(codes, Node):
        return
    table = make_table(lambda x: x, to_qparams(reads), to_qparams(writes))
    module = TableCodes(table, "requantize", writes)
    like = match.root
    put(match, editor, module, (codes,), writes, path=f"{like.name}_requantize", like=like)


def _lower_norm(match: Match, editor: Editor) -> None:
    scale, shift = affine_of(module_of(match.node("op")))
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    module = NormCodes(scale.float(), shift.float(), reads, writes, "relu" in match.bound)
    put_op(match, editor, module, "dq")


def is_image(match: Match) -> Reject | None:
    """The kernel takes ``[batch, channels, height, width]``."""
    shape = info(match.node("op")).shape or info(match.node("dq")).shape
    if shape is None or len(shape) != 4:
        return Reject("its input is not known to have 4 dimensions", match.node("op"))
    return None


_RELU_OF: Final[Callable[[OpExpr], OpExpr]] = lambda inner: op(  # noqa: E731
    "relu", inner, name="relu", optional=True
)
OP_RULES: Final = (
    Rule(
        "x86-pair",
        quantized(
            _RELU_OF(
                op(
                    ("add", "sub", "mul"),
                    dequantized("dq", "x"),
                    dequantized("dq2", "y"),
                    name="op",
                )
            )
        ),
        _lower_pair,
        (options_are_constant,),
        priority=10,
    ),
    Rule(
        "x86-gate",
        quantized(op("mul", dequantized("dq", "x"), dequantized("dq2", "y"), name="op")),
        _lower_gate,
        (is_gate, full_codes),
        priority=15,
    ),
    Rule(
        "x86-table",
        quantized(op((*ACTIVATIONS, "unary"), dequantized("dq", "x"), name="op")),
        _lower_unary,
        (options_are_constant,),
    ),
    Rule(
        "x86-table-number",
        quantized(
            _RELU_OF(
                op(("add", "sub", "mul", "div"), dequantized("dq", "x"), var("number"), name="op")
            )
        ),
        _lower_unary,
        (reads_a_number, options_are_constant),
    ),
    Rule(
        "x86-rescale",
        quantized(op(("mul", "div"), dequantized("dq", "x"), name="op")),
        _lower_rescale,
        (only_rescales,),
        priority=8,
    ),
    Rule(
        "x86-requantize",
        quantized(op(DEQUANTIZE, var("x"), name="op", shared=True)),
        _lower_requantize,
    ),
    Rule(
        "x86-batch-norm",
        quantized(_RELU_OF(op("batch_norm", dequantized("dq", "x"), name="op"))),
        _lower_norm,
        (full_codes, is_image),
    ),
)
