"""Moves that put a constant where nothing is moved: padding, masks, triangles."""

from __future__ import annotations

import math
from typing import Any, Final

from torch.fx import Node

from fxquant.graph.info import QType
from fxquant.graph.op_table import argument, is_op

_WITH_VALUE: Final = ("masked_fill", "index_fill")
_WITH_ZERO: Final = ("tril", "triu", "im2col", "max_unpool1d", "max_unpool2d", "max_unpool3d")
MASKING: Final = 1e4
"""Constants from here on stand for infinity: a range that held them would hold little else."""


def fill_of(node: Node) -> Any:
    """The constant that a call puts in: a number, a node that computes it, or ``None``."""
    if is_op(node, "pad"):
        if argument(node, "mode") != "constant":
            return None
        value = argument(node, "value")
        return 0.0 if value is None else value
    if is_op(node, *_WITH_VALUE):
        return argument(node, "value")
    if is_op(node, "where"):
        other = argument(node, "other")
        return None if isinstance(other, Node) else other
    return 0.0 if is_op(node, *_WITH_ZERO) else None


def bad_fill(node: Node) -> str | None:
    """Why no code can stand for the constant of ``node``, whatever the range."""
    value = fill_of(node)
    if value is None:
        return None
    if isinstance(value, Node) or not isinstance(value, int | float):
        return "its fill value is computed in every call"
    if not math.isfinite(value) or abs(value) >= MASKING:
        return f"its fill value {value} is a mask: no range should hold it"
    return None


def outside(node: Node, qtype: QType) -> str | None:
    """Why the codes of ``qtype`` cannot stand for the constant of ``node``."""
    value = fill_of(node)
    if value is None or isinstance(value, Node):
        return None
    half = qtype.scale / 2
    if qtype.low - half <= value <= qtype.high + half:
        return None
    return f"its fill value {value} lies outside {qtype.low:.4g} to {qtype.high:.4g}"


def code_of(value: float, qtype: QType) -> int:
    """The code of a constant; zero is always a code of its own."""
    code = round(float(value) / qtype.scale) + qtype.zero_point
    return max(qtype.quant_min, min(qtype.quant_max, code))
