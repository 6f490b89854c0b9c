"""Quantization at run time: every row takes its scale from its own numbers.

The rounding rule is that of :mod:`fxquant.numerics.affine`. What is said here holds for every
backend, since every backend takes scales and zero points from this file:

- a row's range always includes 0, and a row of zeros gives exact zeros;
- a row that holds a NaN or an infinity has no range: all its outputs are NaN, and no other row
  is touched (one that reaches past 2**127 may come back as infinite, as half a step may);
- what a row becomes depends on that row alone, to the last bit: not on the batch it is in, nor on
  its place there.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxquant.errors import QParamError
from fxquant.numerics.qparams import SMALLEST_SCALE
from fxquant.numerics.rounding import ROUND_TO_LOW_BITS
from fxquant.spec import Dtype, QSpec

_STORAGE: Final = {"uint8": torch.uint8, "int8": torch.int8}
runtime_spec = functools.lru_cache(maxsize=None)(QSpec)
"""A :class:`QSpec`, made once: its checks cost as much as quantizing a short row."""


def row_qparams(x: Tensor, spec: QSpec, dims: int = 1) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each row of ``x``, covering its range and 0.

    Args:
        x: any shape with at least ``dims`` dimensions, any floating dtype (taken as float32).
        spec: dtype, bits and symmetry; ``granularity="tensor"`` gives one scale for all of ``x``.
        dims: how many trailing dimensions make a row: 1 for tokens, or channels and pixels for
            the samples of a convolution.

    Returns:
        float32 scales and int32 zero points, ``x.shape[:-dims] + (1,) * dims``, or all ones where
        there is one for all. A row with a NaN or an infinity has the scale NaN.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> from fxquant.spec import ROWS
        >>> scale, zero_point = row_qparams(torch.tensor([[0.0, 25.5], [-1.0, 1.55]]), ROWS)
        >>> zero_point.flatten()
        tensor([  0, 100], dtype=torch.int32)
    """
    scale, zero_point = _float_qparams(_real(x), spec, dims)
    return scale, zero_point.to(torch.int32)


def quantize_rows(x: Tensor, spec: QSpec, dims: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of ``x``, each row in its own range, and the scales and zero points.

    Args:
        x: as for :func:`row_qparams`; not modified.
        spec: as for :func:`row_qparams`.
        dims: as for :func:`row_qparams`.

    Returns:
        Codes of ``spec.dtype`` in the shape and memory format of ``x``; scales and zero points
        as :func:`row_qparams` returns them. Codes of a row whose scale is NaN are unspecified.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> from fxquant.spec import ROWS
        >>> quantize_rows(torch.tensor([[0.0, 2.0], [0.0, 51.0]]), ROWS)[0]
        tensor([[  0, 255],
                [  0, 255]], dtype=torch.uint8)
    """
    codes, scale, zero_point = _codes(x, spec, dims, _STORAGE[spec.dtype])
    return codes, scale, zero_point.to(torch.int32)


def byte_rows(x: Tensor, spec: QSpec, dims: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`quantize_rows` as kernels want it: codes in uint8, zero points in float32.

    Args:
        x: as for :func:`row_qparams`; not modified.
        spec: as for :func:`row_qparams`; signed codes and their zero points are moved up by 128.
        dims: as for :func:`row_qparams`.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> symmetric = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
        >>> byte_rows(torch.tensor([[-1.0, 1.0]]), symmetric)[0]
        tensor([[  1, 255]], dtype=torch.uint8)
    """
    return _codes(x, spec, dims, torch.uint8)


def byte_scales(x: Tensor, spec: QSpec, dims: int = 1) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of :func:`byte_rows`, both float32.

    Args:
        x: as for :func:`row_qparams`; not modified.
        spec: as for :func:`byte_rows`.
        dims: as for :func:`row_qparams`.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> from fxquant.spec import ROWS
        >>> byte_scales(torch.tensor([[-1.0, 1.55]]), ROWS)[1]
        tensor([[100.]])
    """
    scale, zero_point = _float_qparams(_real(x), spec, dims)
    return scale, zero_point.add_(128.0) if spec.dtype == "int8" else zero_point


def _codes(x: Tensor, spec: QSpec, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = _real(x)
    scale, zero_point = _float_qparams(x, spec, dims)
    steps = torch.div(x, scale)
    if not spec.symmetric:
        # Both ends may round up, by one code together. No number lies below its row's low end,
        # and the ends of a symmetric range lie on codes: nothing else is left to clamp.
        torch.minimum(steps, spec.quant_max - zero_point, out=steps)
    if dtype is torch.uint8 and spec.dtype == "int8":
        zero_point.add_(128.0)
    # As in affine.quantize(): the low byte holds the code less the zero point.
    codes = steps.add_(ROUND_TO_LOW_BITS).view(torch.int32).to(dtype)
    if not (spec.symmetric and dtype is torch.int8):
        codes.add_(zero_point.to(torch.int32).to(dtype))
    return codes, scale, zero_point


def qdq_rows(x: Tensor, spec: QSpec, dims: int = 1) -> Tensor:
    """Return the float32 numbers that the codes of ``x`` stand for.

    Args:
        x: as for :func:`row_qparams`; not modified.
        spec: as for :func:`row_qparams`.
        dims: as for :func:`row_qparams`.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> from fxquant.spec import ROWS
        >>> qdq_rows(torch.tensor([[0.0, 0.2, 25.5], [0.0, float("inf"), 1.0]]), ROWS)
        tensor([[ 0.0000,  0.2000, 25.5000],
                [    nan,     nan,     nan]])
    """
    x = _real(x)
    scale, zero_point = _float_qparams(x, spec, dims)
    steps = torch.div(x, scale).round_()
    if not spec.symmetric:
        torch.minimum(steps, spec.quant_max - zero_point, out=steps)
    return steps.mul_(scale)


def quantize_at_run_time(
    x: Tensor,
    dims: int,
    dtype: Dtype,
    bits: int,
    symmetric: bool,
    per_row: bool,
    by_column: bool = False,
) -> Tensor:
    """Return :func:`qdq_rows` of ``x``: a node of the Q/DQ graph, float in and float out.

    Like ``quantize`` it records itself as one ``call_function`` when torch.fx traces it, which is
    why the fields of the :class:`QSpec` are spelled out.

    Args:
        x: the values.
        dims: how many trailing dimensions make a row.
        dtype: ``"uint8"`` or ``"int8"``.
        bits: how many bits of it are used.
        symmetric: whether the zero point is fixed.
        per_row: one scale per row, or one for all.
        by_column: whether the rows are those of ``x`` transposed: of the right factor of a
            product of matrices, which is summed over them. A vector is one column.

    Raises:
        QParamError: ``x`` has fewer than ``dims`` dimensions.

    Example:
        >>> quantize_at_run_time(torch.tensor([[0.0, 3.2, 7.0]]), 1, "int8", 4, True, True)
        tensor([[0., 3., 7.]])
    """
    if has_torch_function_unary(x):
        # As passes write it, so that a graph that is traced anew is the same graph.
        more = {"by_column": True} if by_column else {}
        return handle_torch_function(
            quantize_at_run_time,
            (x,),
            x,
            dims=dims,
            dtype=dtype,
            bits=bits,
            symmetric=symmetric,
            per_row=per_row,
            **more,
        )
    granularity = "row" if per_row else "tensor"
    spec = runtime_spec(dtype, bits, symmetric, granularity, "runtime")
    if by_column and x.dim() > 1:
        return qdq_rows(x.mT, spec, dims).mT
    return qdq_rows(x, spec, dims)


def _real(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32)


def _float_qparams(x: Tensor, spec: QSpec, dims: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row, the zero point as float32."""
    low, high = _ends(x, spec, dims)
    if spec.symmetric:
        middle = 1 << (spec.bits - 1) if spec.dtype == "uint8" else 0
        # The shorter side sets the scale, so that neither end of the range is clipped.
        side = min(middle - spec.quant_min, spec.quant_max - middle)
        scale = torch.maximum(low.neg_(), high).div_(_divisor(side, x))
    else:
        steps = _divisor(spec.quant_max - spec.quant_min, x)
        low.clamp_(max=0.0)
        # Not (high - low) / steps, which overflows where a row spans more than float32 does.
        scale = high.clamp_(min=0.0).div_(steps).sub_(low / steps)
    # Infinity times 0 is NaN, and any other number plus 0 is itself.
    scale.add_(scale, alpha=0.0).clamp_(min=SMALLEST_SCALE)
    if spec.symmetric:
        return scale, torch.full_like(scale, middle)
    zero_point = low.div_(scale).round_().neg_()
    if spec.quant_min:
        zero_point.add_(spec.quant_min)
    return scale, zero_point.nan_to_num_(nan=spec.quant_min)


def _divisor(number: int, x: Tensor) -> int | Tensor:
    """CUDA turns division by a Python number into multiplication by its rounded reciprocal."""
    return number if x.is_cpu else torch.full((), float(number), device=x.device)


def _ends(x: Tensor, spec: QSpec, dims: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each row, both NaN where the row holds one."""
    if x.dim() < dims:
        raise QParamError(
            f"a row has {dims} dimensions, and the tensor to quantize has the shape "
            f"{tuple(x.shape)}"
        )
    each = spec.granularity == "row"
    over = tuple(range(-dims, 0)) if each else tuple(range(x.dim()))
    if 0 in (x.shape[-dims:] if each else x.shape):
        # An empty row has no numbers, and the range that includes 0.
        shape = (*x.shape[:-dims], *(1,) * dims) if each else (1,) * x.dim()
        return x.new_zeros(shape), x.new_zeros(shape)
    # Two reductions: aminmax(), in one, takes 14 times as long (torch 2.13, rows of 768).
    return x.amin(over, keepdim=True), x.amax(over, keepdim=True)
