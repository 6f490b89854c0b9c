"""Introduces ``quantize`` and ``dequantize`` to the op table.

``graph`` and ``numerics`` are blind to each other; this is the first floor that sees both.
"""

from __future__ import annotations

from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_STORED,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
    register_boundary,
    register_module,
)
from fxquant.numerics.affine import dequantize, dequantize_weight, quantize
from fxquant.numerics.dynamic import quantize_at_run_time
from fxquant.numerics.stored import dequantize_stored
from fxquant.numerics.stored_tables import StoredEmbedding, StoredEmbeddingBag

register_boundary(QUANTIZE, quantize)
register_boundary(DEQUANTIZE, dequantize)
register_boundary(DEQUANTIZE_WEIGHT, dequantize_weight)
register_boundary(DEQUANTIZE_STORED, dequantize_stored)
register_boundary(RUN_TIME, quantize_at_run_time)
register_module("embedding", StoredEmbedding)
register_module("embedding_bag", StoredEmbeddingBag)

__all__ = ["DEQUANTIZE", "DEQUANTIZE_STORED", "DEQUANTIZE_WEIGHT", "QUANTIZE", "RUN_TIME"]
