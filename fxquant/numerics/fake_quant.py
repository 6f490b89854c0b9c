"""Fake-quantization that can be trained through: one autograd function for every tensor.

Forward is the rule of :mod:`fxquant.numerics.affine`, to the last bit:

    y = (clamp(round_half_even(x / s) + z, quant_min, quant_max) - z) * s

Backward is the clipped straight-through estimator (Jacob et al. 2018, arXiv:1712.05877): what has
a code of its own passes the gradient, what was clipped stops it. A learned step gets

    dy/ds = round(x / s) - x / s  inside,  quant_min - z  below,  quant_max - z  above
    dy/dz = 0                     inside,  -s             outside

(LSQ, Esser et al. 2020, arXiv:1902.08153; the zero point as in LSQ+, Bhalgat et al. 2020,
arXiv:2004.09576), each times ``1 / sqrt(N * quant_max)`` as in the first of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.observer import CHUNK

__all__ = ["fake_quantize_trained"]


def fake_quantize_trained(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Return what is left of ``x`` in a few bits; gradients pass where nothing was clipped.

    Args:
        x: float32, float16, bfloat16 (computed in float32), or float64 (in float64); any shape
            and memory format; not modified.
        scale: float32 and positive, ``[1]``, or of a shape that broadcasts to ``x``; it gets a
            gradient if it asks for one.
        zero_point: float32 or an integer type, whole numbers, shaped as ``scale``; likewise.
        quant_min: smallest code.
        quant_max: largest code.
        gradient_scale: what gradients of ``scale`` and ``zero_point`` are multiplied by.

    Returns:
        The dtype, shape and memory format of ``x``.

    Example:
        >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
        >>> y = fake_quantize_trained(x, torch.tensor([0.5]), torch.tensor([0]), 0, 15)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.5, 7.5], [1.0, 0.0])
    """
    options = (quant_min, quant_max, gradient_scale)
    made: Tensor = _FakeQuantize.apply(x, scale, zero_point, *options)  # type: ignore[no-untyped-call]  # autograd functions have no types
    return made


class _FakeQuantize(torch.autograd.Function):
    """Saves one byte an element; where the step is learned, the input too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        gradient_scale: float,
    ) -> Tensor:
        ctx.options = (quant_min, quant_max, gradient_scale)
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        alone = scale.numel() == 1 and not torch.compiler.is_compiling()
        if alone and wide.is_cpu and wide.layout == torch.strided and _is_dense(wide):
            made, inside = _in_pieces(wide, scale, zero_point, quant_min, quant_max)
        else:
            made, inside = _whole(wide, scale, zero_point, quant_min, quant_max)
        if learned:
            ctx.save_for_backward(inside, x, scale, zero_point)
        else:
            ctx.save_for_backward(inside)
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        inside, *others = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        for_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        if not others:
            return for_x, None, None, None, None, None
        x, scale, zero_point = others
        quant_min, quant_max, factor = ctx.options
        steps = x.to(torch.float32) / scale
        least, most = quant_min - zero_point, quant_max - zero_point
        wide = grad.to(torch.float32)
        for_scale = for_zero = None
        if ctx.needs_input_grad[1]:
            clipped = torch.where(steps < 0, least, most)
            slope = torch.where(inside, steps.round() - steps, clipped.to(torch.float32))
            for_scale = (wide * slope * factor).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            slope = torch.where(inside, torch.zeros_like(scale), -scale)
            for_zero = (wide * slope * factor).sum_to_size(zero_point.shape)
        return for_x, for_scale, for_zero, None, None, None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() in (4, 5)
        and x.is_contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    )


def _in_memory_order(x: Tensor) -> Tensor:
    """View a dense tensor as [N]."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _in_pieces(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """One scale, on the CPU: piece by piece, so that all steps but the first work in the cache."""
    step, zero = float(scale), round(float(zero_point))
    least, most = quant_min - zero, quant_max - zero
    made = torch.empty_like(x)
    inside = torch.empty_like(x, dtype=torch.bool)
    pieces = (_in_memory_order(each).split(CHUNK) for each in (x, made, inside))
    rounded = x.new_empty(min(CHUNK, x.numel()))
    for source, result, mask in zip(*pieces, strict=True):
        steps = rounded[: source.numel()]
        torch.div(source, step, out=steps)
        steps.round_()
        torch.clamp(steps, least, most, out=result)
        torch.eq(steps, result, out=mask)
        result.mul_(step)
    return made, inside


def _whole(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Any shape of scale, on any device."""
    zero = zero_point.to(scale.dtype).round()
    steps = (x / scale).round()
    kept = torch.minimum(torch.maximum(steps, quant_min - zero), quant_max - zero)
    return kept * scale, steps == kept
