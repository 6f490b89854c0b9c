"""Products of two computed matrices on codes, with torch's own integer product.

    quantize(matmul(dequantize(a), dequantize(b)))       ->   ProductCodes(a, b)
    matmul(dequantize(a), dequantize(b))                 ->   ProductCodes(a, b), float result

``torch._int_mm`` multiplies one pair of matrices, uint8 or int8 by int8, exactly into int32; a
batch is a loop. Zero points are taken out by the sums of rows and columns (Jacob et al. 2018,
arXiv:1712.05877, equation 7). On two AVX512-VNNI cores that took 0.68 of the time of float32 for
512 x 512 x 512 (the product alone 0.27), 1.3 of it for 256 x 256 x 256 and about 4 times it for 12
products of 128 x 64 x 128; what a model has is weighed before anything is lowered. Without VNNI
torch multiplies in a plain loop, as exact and about 60 times slower than float32: there a product
is int8 only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from fxquant.backends.rule_parts import codes_of, dequantized, put_op, quantized, writes_of
from fxquant.backends.x86_layer_rules import codes_type, put
from fxquant.backends.x86_pairs import integer_product, products_saturate
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType, info
from fxquant.numerics.affine import quantize
from fxquant.patterns.expr import op
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

_INT8: Final = 128
"""What turns uint8 codes into int8 codes of the same numbers."""
_LONGEST: Final = (2**31 - 1) // 255**2
"""How many products of any codes an int32 sum can hold."""


def of_vectors(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product of which one factor or both are vectors, as :func:`torch.matmul` counts them.

    Args:
        product: multiplies factors of two dimensions and more.
        a: the left factor; a vector is one row.
        b: the right factor; a vector is one column.
    """
    row, column = a.dim() == 1, b.dim() == 1
    made = product(a.unsqueeze(0) if row else a, b.unsqueeze(-1) if column else b)
    made = made.squeeze(-1) if column else made
    return made.squeeze(-1 if column else -2) if row else made


class ProductCodes(nn.Module):
    """``matmul(real(a), real(b))`` of codes, quantized or float.

    Args:
        a: type of the left codes.
        b: type of the right codes.
        writes: type of the result, or ``None`` for float32.
    """

    def __init__(self, a: QType, b: QType, writes: QType | None) -> None:
        super().__init__()
        self.a, self.b, self.writes = a, b, writes
        self._shift = _INT8 if b.dtype == torch.uint8 else 0

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes ``[..., rows, inner]`` by ``[..., inner, columns]``, as :func:`torch.matmul`."""
        if a.dim() == 1 or b.dim() == 1:
            return of_vectors(self.forward, a, b)
        right = (b ^ _INT8).view(torch.int8) if self._shift else b
        real = self._sums(a, right).mul_(self.a.scale * self.b.scale)
        out = self.writes
        if out is None:
            return real
        return quantize(real, out.scale, out.zero_point, out.quant_min, out.quant_max, out.dtype)

    def _sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums of products of codes without their zero points, as float32."""
        total = products(a, b)
        left, right = self.a.zero_point, self.b.zero_point - self._shift
        # In integers: a difference of large sums would lose bits in float32.
        if right:
            total = total.sub_(a.sum(-1, keepdim=True, dtype=torch.int32).mul_(right))
        if left:
            columns = b.sum(-2, keepdim=True, dtype=torch.int32)
            total = total.sub_(columns.sub_(right * a.shape[-1]).mul_(left))
        return total.float()

    def extra_repr(self) -> str:
        """Types, for ``print(model)``."""
        return f"{self.a}, {self.b} -> {self.writes or 'float32'}"


def products(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 sums of products of plain codes.

    Args:
        a: uint8 or int8 ``[..., rows, inner]``.
        b: int8 ``[..., inner, columns]``; the leading dimensions broadcast.
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    if math.prod(shape) == 0 or a.shape[-1] == 0:
        return torch.zeros(shape, dtype=torch.int32, device="cpu")
    if b.dim() == 2:
        return integer_product(a.reshape(-1, a.shape[-1]), b).view(shape)
    total = torch.empty((math.prod(batch), *shape[-2:]), dtype=torch.int32, device="cpu")
    lefts = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    rights = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    for left, right, out in zip(lefts, rights, total, strict=True):
        integer_product(left, right, out=out)
    return total.view(shape)


def sums_fit(match: Match) -> Reject | None:
    """Sums must fit 32 bits, and the product must be exact on this machine."""
    shape = info(match.node("dq")).shape
    if shape is None:
        return Reject("calibration saw no shape of its input", match.node("op"))
    if shape[-1] > _LONGEST:
        return Reject(f"sums of {shape[-1]} products could pass 32 bits", match.node("op"))
    if products_saturate():
        return Reject("pairs of its products could saturate here", match.node("op"))
    return None


def _lower(match: Match, editor: Editor) -> None:
    a, b = codes_type(match.node("dq")), codes_type(match.node("dq2"))
    if "q" in match.bound:
        put_op(match, editor, ProductCodes(a, b, writes_of(match)), "dq", "dq2")
        return
    inputs, like = (codes_of(match, "dq"), codes_of(match, "dq2")), match.node("op")
    module = ProductCodes(a, b, None)
    put(match, editor, module, inputs, None, path=info(like).path, like=like)


_PRODUCT: Final = op("matmul", dequantized("dq", "x"), dequantized("dq2", "y"), name="op")

MATMUL_RULES: Final = (
    Rule("x86-product", quantized(_PRODUCT), _lower, (sums_fit,), priority=10),
    Rule("x86-product-float", _PRODUCT, _lower, (sums_fit,)),
)
