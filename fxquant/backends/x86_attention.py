"""Attention in bfloat16, where the processor multiplies it by vectors.

    scaled_dot_product_attention(q, k, v)    ->    X86Attention(q, k, v), of bfloat16

torch's fused attention multiplies small blocks, for which bfloat16 is no faster than float32. Two
whole products with a softmax between them took 0.5 to 0.7 of its time (12 heads of 64; 128, 197 and
512 tokens, batches of 1 and 4, two threads with AVX512-BF16). They round scores to bfloat16, as
attention that is written out does; the sums of the softmax stay float32 inside.

Where the processor multiplies tiles (AMX), torch's fused attention does: it took 0.5 to 0.75 of the
time of two products there (12 heads; 64 to 512 tokens, two threads), and is left as it is.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.x86_layer_rules import put
from fxquant.backends.x86_pairs import has_bfloat16, has_tiles
from fxquant.graph.edit import Editor
from fxquant.graph.flow import float_dtype
from fxquant.graph.info import info
from fxquant.graph.op_table import argument
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

_MOST: Final = 2**24
"""How many scores are kept at once; fused attention keeps none."""


class X86Attention(nn.Module):
    """``softmax(q @ k.mT * scale) @ v`` in bfloat16; anything else as torch does it.

    Args:
        scale: of the scores; ``None`` for one by the square root of the width.
    """

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tensors ``[..., tokens, width]`` as :func:`F.scaled_dot_product_attention` takes them."""
        if not _fits(query, key, value):
            return F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        scale = 1.0 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        q, k, v = (part.reshape(-1, *part.shape[-2:]) for part in (query, key, value))
        # With a beta of 0 nothing of the first argument is read.
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=scale)
        made = torch.bmm(torch.softmax(scores, -1), v)
        return made.view(*query.shape[:-1], value.shape[-1])

    def extra_repr(self) -> str:
        """The scale, for ``print(model)``."""
        return f"bfloat16, scale={self.scale}"


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16} or query.dim() < 3:
        return False
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return False
    return 0 < math.prod(query.shape[:-1]) * key.shape[-2] <= _MOST and query.shape[-1] > 0


def _computes_in_bfloat16(match: Match) -> Reject | None:
    node = match.node("op")
    decision = info(node).decision
    half = decision is not None and decision.by == "cast-floats"
    if not half or float_dtype(node) is not torch.bfloat16:
        return Reject("it does not compute in bfloat16", node)
    if not has_bfloat16():
        return Reject("this processor has no bfloat16 instructions", node)
    if has_tiles():
        return Reject("torch's fused attention is faster on a processor with AMX", node)
    return None


def _is_plain(match: Match) -> Reject | None:
    node = match.node("op")
    plain = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    other = [name for name, value in plain.items() if argument(node, name) != value]
    if other:
        return Reject(f"its {other[0]} is left to torch's fused attention", node)
    if not isinstance(argument(node, "scale"), float | int | None):
        return Reject("its scale is computed in every call", node)
    return None


def _lower(match: Match, editor: Editor) -> None:
    node = match.node("op")
    scale = argument(node, "scale")
    module = X86Attention(None if scale is None else float(scale))
    inputs = (match.bound["q"], match.bound["k"], match.bound["v"])
    put(match, editor, module, inputs, None, path=f"{node.name}_bfloat16", like=node)


ATTENTION_RULES: Final = (
    Rule(
        "x86-attention-bfloat16",
        op("scaled_dot_product_attention", var("q"), var("k"), var("v"), name="op"),
        _lower,
        (_computes_in_bfloat16, _is_plain),
    ),
)
