"""Fake-quantization of what dynamic ops read: every row in its own range, as at run time.

A row's range covers all of it. So nothing is clipped, and gradients pass as if nothing were there.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fxquant.numerics.dynamic import qdq_rows
from fxquant.numerics.fake_quantizer import FakeQuantizer
from fxquant.spec import QSpec

T = TypeVar("T")


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QSpec, dims: int) -> Tensor:
        del ctx
        return qdq_rows(x, spec, dims)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        del ctx
        return grads[0], None, None


def trained_rows(x: Tensor, spec: QSpec, dims: int = 1) -> Tensor:
    """As :func:`~fxquant.numerics.dynamic.qdq_rows`, and gradients pass unchanged.

    Args:
        x: float, of at least ``dims`` dimensions; not modified.
        spec: how its rows are quantized.
        dims: how many trailing dimensions make a row.

    Example:
        >>> from fxquant.spec import ROWS
        >>> x = torch.tensor([[0.0, 0.1234, 25.5]], requires_grad=True)
        >>> y = trained_rows(x, ROWS)
        >>> y.sum().backward()
        >>> [round(value, 3) for value in y[0].tolist()], x.grad.tolist()
        ([0.0, 0.1, 25.5], [[1.0, 1.0, 1.0]])
    """
    made: Tensor = _Rows.apply(x, spec, dims)  # type: ignore[no-untyped-call]  # autograd functions have no types
    return made


class FakeQuantizeRows(FakeQuantizer):
    """Return what is left of a tensor whose rows are quantized at run time.

    Args:
        spec: what the rows are to become.
        path: what reads them.
        dims: how many trailing dimensions make a row.
        by_column: whether the rows are those of the tensor transposed.
    """

    def __init__(self, spec: QSpec, path: str, dims: int, *, by_column: bool = False) -> None:
        super().__init__(spec, path)
        self.dims, self.by_column = dims, by_column

    def forward(self, x: T) -> T:
        """Return ``x`` quantized and dequantized; what is no floating-point tensor passes."""
        if not self.quantizing or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if not x.numel():
            return x
        turned = self.by_column and x.dim() > 1
        made = trained_rows(x.mT if turned else x, self.spec, self.dims).to(x.dtype)
        return made.mT if turned else made  # type: ignore[return-value]  # T is Tensor here
