"""The one quantization rule: ``q = clamp(round_half_even(x / s) + z, quant_min, quant_max)``.

Observers, fake-quantization, the reference backend and the tests all use this file and nothing
else, so that there is one answer to "which code is this number?". ``quantize``, ``dequantize``
and ``dequantize_weight`` are also the nodes of the Q/DQ graph: each records itself as one
``call_function`` when torch.fx traces it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from fxquant.errors import QParamError
from fxquant.numerics.qparams import QParams, choose_qparams
from fxquant.numerics.rounding import round_steps_

__all__ = [
    "QParams",
    "choose_qparams",
    "dequantize",
    "dequantize_weight",
    "fake_quantize",
    "quantize",
    "quantize_weight",
]

_AT_ONCE: Final = 2**16
"""How many weights are quantized together."""


def quantize(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """Return the codes of ``x``: ``clamp(round_half_even(x / scale) + zero_point, ...)``.

    Infinities and numbers of any size saturate; a NaN has no code, and gets an unspecified one.

    Args:
        x: any shape, strides and memory format; float32, float16, bfloat16 (computed in float32)
            or float64 (computed in float64); not modified.
        scale: positive; rounded to float32 unless ``x`` is float64.
        zero_point: the code of 0.0.
        quant_min: smallest code.
        quant_max: largest code.
        dtype: ``torch.uint8`` or ``torch.int8``.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.25, 0.75, 1e30]), 0.5, 3, 0, 255, torch.uint8)
        tensor([  1,   3,   5, 255], dtype=torch.uint8)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            quantize,
            (x,),
            x,
            scale=scale,
            zero_point=zero_point,
            quant_min=quant_min,
            quant_max=quant_max,
            dtype=dtype,
        )
    steps = in_steps(x, scale)
    if steps.dtype == torch.float32:
        return round_steps_(steps, zero_point, quant_min, quant_max, dtype)
    # clamp(round(y) + z, a, b) == round(clamp(y, a - z, b - z)) + z, as a, b and z are integers.
    steps.clamp_(quant_min - zero_point, quant_max - zero_point)
    return steps.round_().add_(zero_point).to(torch.int32).to(dtype)


def in_steps(x: Tensor, scale: float) -> Tensor:
    """``x / scale`` in a new float32 (or float64) tensor; always a true division."""
    x = x.detach()
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    # CUDA turns division by a Python number into multiplication by its rounded reciprocal.
    divisor = scale if x.is_cpu else torch.full((), scale, dtype=wide.dtype, device=x.device)
    return torch.div(wide, divisor)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return ``(q - zero_point) * scale`` as float32, with one rounding.

    Args:
        q: codes, uint8 or int8, any shape and memory format; not modified.
        scale: as given to :func:`quantize`.
        zero_point: as given to :func:`quantize`.

    Example:
        >>> dequantize(torch.tensor([1, 3, 5], dtype=torch.uint8), 0.5, 3)
        tensor([-1.,  0.,  1.])
    """
    if has_torch_function_unary(q):
        return handle_torch_function(dequantize, (q,), q, scale=scale, zero_point=zero_point)
    steps = q.to(torch.float32)
    if zero_point:
        steps.sub_(zero_point)
    return steps.mul_(scale)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Reshape ``values`` [C] so that it broadcasts along ``axis`` of ``like``."""
    if not -like.dim() <= axis < like.dim() or like.shape[axis] != values.numel():
        raise QParamError(
            f"{values.numel()} scales on axis {axis} do not fit a tensor of shape "
            f"{tuple(like.shape)}: there must be one per index of that axis"
        )
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.to(like.device).view(shape)


def quantize_weight(w: Tensor, qparams: QParams) -> Tensor:
    """Return the integer codes of a weight, per tensor or per channel.

    Args:
        w: the weight, any floating dtype, any shape.
        qparams: one scale, or one per index of ``qparams.axis``.

    Raises:
        QParamError: the number of scales is not the size of that axis.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.int32)
        >>> q = QParams(torch.tensor([0.5, 1.0]), zero, -127, 127, torch.int8, axis=0)
        >>> quantize_weight(torch.tensor([[1.0, -0.5], [4.0, 2.0]]), q)
        tensor([[ 2, -1],
                [ 4,  2]], dtype=torch.int8)
    """
    low, high, dtype = qparams.quant_min, qparams.quant_max, qparams.dtype
    if qparams.axis is None:
        return quantize(w, qparams.scale_value, qparams.zero_point_value, low, high, dtype)
    w, axis = w.detach(), qparams.axis
    scale, zero_point = (_along(each, w, axis) for each in (qparams.scale, qparams.zero_point))
    # Some channels at a time: between float and codes lie two tensors of the weight's own size.
    size = max(1, w.shape[axis] * _AT_ONCE // max(1, w.numel()))
    made = torch.empty_like(w, dtype=dtype)
    whole = (w, scale, zero_point, made)
    for part, s, z, codes in zip(*(each.split(size, axis) for each in whole), strict=True):
        wide = part if part.dtype in (torch.float32, torch.float64) else part.to(torch.float32)
        codes.copy_((wide / s).round_().add_(z).clamp_(low, high).to(torch.int32))
    return made


def dequantize_weight(q: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """Return ``q * scale`` as float32, for symmetric weights (zero point 0).

    Args:
        q: codes, int8, any shape.
        scale: float32, [1], or [C] with an ``axis``.
        axis: the channel axis; ``None``: one scale.

    Raises:
        QParamError: the number of scales is not the size of that axis.

    Example:
        >>> dequantize_weight(torch.tensor([[2], [2]], dtype=torch.int8), torch.tensor([1.0, 3]), 0)
        tensor([[2.],
                [6.]])
    """
    if has_torch_function_variadic(q, scale):
        return handle_torch_function(dequantize_weight, (q, scale), q, scale, axis=axis)
    steps = q.to(torch.float32)
    return steps.mul_(scale if axis is None else _along(scale, q, axis))


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Return ``dequantize(quantize(x))`` as float32: what is left of ``x`` in 8 bits.

    No gradient passes through.

    Args:
        x: any floating dtype, shape and memory format; not modified.
        qparams: per tensor, or per channel of ``qparams.axis``.

    Raises:
        QParamError: the number of scales is not the size of that axis.

    Example:
        >>> fake_quantize(torch.tensor([0.3, 9.0]), QParams.per_tensor(0.5, 0, 0, 15, torch.uint8))
        tensor([0.5000, 7.5000])
    """
    codes = quantize_weight(x, qparams)
    if qparams.axis is None:
        return dequantize(codes, qparams.scale_value, qparams.zero_point_value)
    steps = codes.to(torch.float32).sub_(_along(qparams.zero_point, codes, qparams.axis))
    return steps.mul_(_along(qparams.scale, codes, qparams.axis))
