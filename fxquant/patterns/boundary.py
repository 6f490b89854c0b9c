"""Introduces ``quantize`` and ``dequantize`` to the op table.

``graph`` and ``numerics`` are blind to each other; this is the first floor that sees both.
"""

from __future__ import annotations

from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
    register_boundary,
)
from fxquant.numerics.affine import dequantize, dequantize_weight, quantize
from fxquant.numerics.dynamic import quantize_at_run_time

register_boundary(QUANTIZE, quantize)
register_boundary(DEQUANTIZE, dequantize)
register_boundary(DEQUANTIZE_WEIGHT, dequantize_weight)
register_boundary(RUN_TIME, quantize_at_run_time)

__all__ = ["DEQUANTIZE", "DEQUANTIZE_WEIGHT", "QUANTIZE", "RUN_TIME"]
