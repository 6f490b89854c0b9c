"""Integer codes of a weight, as the processor that multiplies them can hold their products."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.affine import quantize_weight
from fxquant.numerics.integer import pair_saturates
from fxquant.numerics.observers import weight_qparams
from fxquant.numerics.qparams import QParams
from fxquant.spec import QSpec

_PAIR: Final = 127.5
"""What the two largest weights of one sign may add up to, in steps: rounded, each is up to half a
step more, so that their codes add up to 128 at most, and 128 * 255 is less than 2**15."""


def integer_weight(
    weight: Tensor, spec: QSpec, axis: int, *, fit_pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a weight.

    With ``fit_pairs`` no two products of a uint8 input with the codes of one output channel add up
    to more than an int16 holds (:func:`fxquant.numerics.integer.pair_saturates`). A channel that
    could pass that gets a coarser scale, up to twice as coarse, and only as coarse as its two
    largest weights of one sign ask for; all others keep theirs.

    Args:
        weight: floating, any shape.
        spec: dtype, bits, symmetry and granularity.
        axis: the output-channel axis.
        fit_pairs: whether kernels add products in pairs of 16 bits (x86 without VNNI).

    Returns:
        int8 codes shaped as ``weight`` and contiguous; float32 scales, [C] or [1].

    Raises:
        QParamError: the weight holds NaN or infinity, or has no channels.

    Example:
        >>> spec = QSpec("int8", symmetric=True, granularity="channel")
        >>> w = torch.tensor([[1.0, 1.0, -0.5], [1.0, 0.0, -0.5]])
        >>> integer_weight(w, spec, 0, fit_pairs=True)[0]
        tensor([[ 64,  64, -32],
                [127,   0, -64]], dtype=torch.int8)
    """
    qparams = weight_qparams(weight, spec, axis)
    codes = quantize_weight(weight, qparams)
    # Below 8 bits the largest code is 63, and two of those always fit.
    if fit_pairs and spec.bits == 8:
        over = pair_saturates(codes, axis=axis)
        if bool(over.any()):
            # Freed first, so that the others take its place.
            del codes
            qparams = _coarser(weight, qparams, over, axis)
            codes = quantize_weight(weight, qparams)
    # Codes take over the strides of what they stand for, and kernels pack memory as it lies: a
    # transposed weight would be packed untransposed.
    return codes.contiguous(), qparams.scale


def trained_weight(
    weight: Tensor,
    spec: QSpec,
    axis: int,
    scales: tuple[float, ...] | None,
    *,
    fit_pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a weight: those it was trained with, where there are some.

    Args:
        weight: as for :func:`integer_weight`; trained to lie on the grid of ``scales``.
        spec: as for :func:`integer_weight`.
        axis: as for :func:`integer_weight`.
        scales: one or one per channel; ``None``: it was not trained with any.
        fit_pairs: as for :func:`integer_weight`; a weight that was trained for a machine whose
            kernels could add it up gets other scales where those of this one cannot.
    """
    if scales is not None:
        scale = torch.tensor(scales, dtype=torch.float32)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        along = axis if spec.granularity == "channel" else None
        qparams = QParams(scale, zero, spec.quant_min, spec.quant_max, torch.int8, along)
        codes = quantize_weight(weight, qparams).contiguous()
        if not (fit_pairs and bool(pair_saturates(codes, axis=axis).any())):
            return codes, scale.to(weight.device)
    return integer_weight(weight, spec, axis, fit_pairs=fit_pairs)


def _coarser(weight: Tensor, qparams: QParams, over: Tensor, axis: int) -> QParams:
    """The smallest scale per channel (or of the tensor) whose pairs fit, where they do not."""
    rows = weight.detach().to(torch.float64).movedim(axis, 0).flatten(1)
    pair = min(2, rows.shape[1])
    ends = [signed.clamp(min=0).topk(pair, dim=1).values.sum(1) for signed in (rows, -rows)]
    needed = torch.maximum(*ends) / _PAIR
    needed = needed.where(over.to(needed.device), 0.0)
    if qparams.axis is None:
        needed = needed.amax(0, keepdim=True)
    scale = torch.maximum(qparams.scale, needed.to(qparams.scale))
    return dataclasses.replace(qparams, scale=scale)
