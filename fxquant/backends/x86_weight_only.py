"""Linears whose weight is only stored as integers, on x86.

    linear(x, dequantize_stored(codes, scale), bias)   ->   the same with int8 kernels of torch

For few rows ``torch._weight_int8pack_mm`` reads the codes as they are: it neither makes a float
weight nor reads four bytes for each. It reads the weight anew for every row, so that from
``FEW_ROWS`` on one product in float is faster. Scales of whole channels are then multiplied into
the result, which is smaller than the weight.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_layer_rules import put
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import argument
from fxquant.numerics.stored_tables import StoredParts
from fxquant.patterns.boundary import DEQUANTIZE_STORED
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

FEW_ROWS: Final = 2
"""Rows of activations up to which the int8 kernel was measured faster (AVX2, 2 threads)."""


class StoredLinear(StoredParts):
    """``linear(x, codes * scale, bias)`` with one symmetric scale for each output channel.

    Args:
        parts: what holds the weight.
    """

    def __init__(self, parts: StoredParts) -> None:
        held = parts._buffers
        super().__init__(
            held["weight"], held["weight_scale"], None, parts.layout, parts.bits, held["bias"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        codes, scale = self.get_buffer("weight"), self.get_buffer("weight_scale")[:, 0]
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        # Of bfloat16 the kernel reads past the end of rows that are no multiple of its width.
        if 0 < rows <= FEW_ROWS and x.dtype == torch.float32 == scale.dtype and x.is_cpu:
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            made = torch._weight_int8pack_mm(flat, codes, scale).view(*x.shape[:-1], -1)
        else:
            made = F.linear(x, codes.to(x.dtype)).mul_(scale.to(x.dtype))
        bias = self._buffers["bias"]
        return made if bias is None else made.add_(bias)


def _has_kernel(match: Match) -> Reject | None:
    real, layer = match.node("real"), match.node("layer")
    parts = layer.graph.owning_module.get_submodule(_path(match))  # type: ignore[union-attr]  # graphs of passes have one
    if not isinstance(parts, StoredParts):
        return Reject("its weight is held by no stored layer", real)
    codes, scale = parts.get_buffer("weight"), parts.get_buffer("weight_scale")
    if codes.dtype != torch.int8 or scale.shape != (codes.shape[0], 1):
        return Reject("the kernel takes 8-bit codes with one scale for each output channel", real)
    if argument(real, "zero_point") is not None:
        return Reject("the kernel takes no zero points of weights", real)
    return None


def _path(match: Match) -> str:
    return str(match.bound["w"].target).rpartition(".")[0]


def _lower(match: Match, editor: Editor) -> None:
    like = match.node("layer")
    parts = editor.module.get_submodule(_path(match))
    if not isinstance(parts, StoredParts):
        raise TypeError(f"{_path(match)} is no stored layer")
    reads = (match.bound["x"],)
    put(match, editor, StoredLinear(parts), reads, None, path=_path(match), like=like)


_WEIGHT: Final = op(DEQUANTIZE_STORED, var("w"), var("scale"), name="real", shared=True)

WEIGHT_ONLY_RULES: Final = (
    Rule(
        "x86-weight-only",
        op("linear", var("x"), _WEIGHT, name="layer"),
        _lower,
        (_has_kernel,),
    ),
)
