"""What integer kernels can and cannot hold, and exact references to test them against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant.errors import QParamError
from fxquant.numerics.affine import quantize
from fxquant.numerics.qparams import QParams

INT16_MAX: Final = 2**15 - 1
INT32_MAX: Final = 2**31 - 1
_AT_ONCE: Final = 2**16
"""How many codes are widened together."""


def accumulator_bound(weight_codes: Tensor, act_max_abs: int, axis: int = 0) -> int:
    """Return the largest ``abs(sum)`` that any input can bring about in any output channel.

    The bound is reached by an input of ``act_max_abs`` with the sign of each weight.

    Args:
        weight_codes: integer codes, any shape.
        act_max_abs: the largest ``abs(code - zero_point)`` of the input.
        axis: the output-channel axis; all others are summed over.

    Example:
        >>> accumulator_bound(torch.tensor([[1, -2], [3, 0]]), 10)
        30
    """
    if weight_codes.numel() == 0:
        return 0
    parts = _wide_parts(weight_codes, axis)
    return max(int(rows.abs_().sum(1, dtype=torch.int64).max()) for rows in parts) * act_max_abs


def fits_int32(
    weight_codes: Tensor, act_max_abs: int, axis: int = 0, bias_max_abs: int = 0
) -> bool:
    """Return whether no input can make an int32 accumulator overflow.

    Args:
        weight_codes: as for :func:`accumulator_bound`.
        act_max_abs: as for :func:`accumulator_bound`.
        axis: as for :func:`accumulator_bound`.
        bias_max_abs: the largest absolute value of an int32 bias that is added in.

    Example:
        >>> [fits_int32(torch.full((1, count), 127), 255) for count in (66311, 66312)]
        [True, False]
    """
    # Sums that are short enough fit whatever the codes are, and then none has to be looked at.
    ends = torch.iinfo(weight_codes.dtype)
    length = weight_codes.numel() // max(1, weight_codes.shape[axis])
    if max(-ends.min, ends.max) * act_max_abs * length + bias_max_abs <= INT32_MAX:
        return True
    return accumulator_bound(weight_codes, act_max_abs, axis) + bias_max_abs <= INT32_MAX


def pair_saturates(weight_codes: Tensor, quant_max: int = 255, axis: int = 0) -> Tensor:
    """Return, per output channel, whether ``vpmaddubsw`` could saturate on these weights.

    x86 without VNNI multiplies u8 by s8 with ``vpmaddubsw``, which adds two neighbouring products
    ``a1 w1 + a2 w2`` into an int16 *with saturation*: two weights of 127 and inputs of 255 would
    need 64,770. Which two elements of the sum become neighbours is decided by the layout a kernel
    packs its weights into (by input channel in oneDNN, by position in the unfolded patch in
    FBGEMM), so this supposes that any two can. As every a lies in ``0..quant_max``, the largest
    sum takes the two largest positive weights and the smallest the two most negative, both at
    ``quant_max``. A channel for which these fit is exact in every layout; one for which they do
    not may still be. With 7-bit inputs (``quant_max=127``) every channel fits.

    Args:
        weight_codes: int8 codes, any shape.
        quant_max: the largest input code.
        axis: the output-channel axis.

    Returns:
        bool [C], true where saturation cannot be ruled out.

    Example:
        >>> pair_saturates(torch.tensor([[127, 1, -90], [127, 2, -90]]))
        tensor([False,  True])
    """
    found = []
    for rows in _wide_parts(weight_codes, axis):
        pair = min(2, rows.shape[1])
        most = rows.clamp(min=0).topk(pair, dim=1).values.sum(1) * quant_max
        least = rows.clamp(max=0).topk(pair, dim=1, largest=False).values.sum(1) * quant_max
        found.append((most > INT16_MAX) | (least < -INT16_MAX - 1))
    return torch.cat(found)


def _wide_parts(weight_codes: Tensor, axis: int) -> Iterator[Tensor]:
    """Output channels as int32 rows, some at a time: codes in 32 bits are as large as floats."""
    rows = weight_codes.detach().movedim(axis, 0).flatten(1)
    for part in rows.split(max(1, _AT_ONCE // max(1, rows.shape[1]))):
        yield part.to(torch.int32, copy=True)


@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution reads and writes; the arguments of ``torch.nn.functional.conv2d``.

    Args:
        stride: one number, or one per dimension.
        padding: one number, or one per dimension; the padding holds the real number 0.
        dilation: one number, or one per dimension.
        groups: how many groups of channels do not see each other.
        transposed: whether it is a ``conv_transpose``.
        output_padding: of a transposed one.
    """

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0


@dataclass(frozen=True, eq=False)
class Reference:
    """What an exact kernel would compute.

    Args:
        real: float64, the output before it is rounded to a code.
        codes: ``real`` quantized by the one rule.
    """

    real: Tensor
    codes: Tensor


def conv_reference(
    x: Tensor,
    x_q: QParams,
    w: Tensor,
    w_q: QParams,
    out_q: QParams,
    *,
    bias: Tensor | None = None,
    geometry: ConvGeometry = ConvGeometry(),
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Reference:
    """Convolve codes exactly: an integer sum, then float64.

    Args:
        x: codes, [N, C, ...] with one to three further dimensions.
        x_q: their qparams, per tensor.
        w: codes of the weight.
        w_q: their qparams, per tensor or per output channel (axis 1 of a transposed weight).
        out_q: qparams of the output, per tensor.
        bias: floating, one per output channel.
        geometry: stride and the like.
        activation: applied in float64 before rounding.

    Raises:
        QParamError: activations are quantized per channel.

    Example:
        >>> q = QParams.per_tensor(0.5, 0, 0, 255, torch.uint8)
        >>> w_q = QParams.per_tensor(0.25, 0, -127, 127, torch.int8)
        >>> x, w = torch.full((1, 1, 1, 3), 3).byte(), torch.full((1, 1, 1, 2), 1).char()
        >>> conv_reference(x, q, w, w_q, q).real.flatten()
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    inputs, weights = _centred(x, x_q), _centred(w, w_q)
    g = geometry
    if g.transposed:
        deconv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[w.dim() - 3]
        total = deconv(
            inputs, weights, None, g.stride, g.padding, g.output_padding, g.groups, g.dilation
        )
    else:
        conv = (F.conv1d, F.conv2d, F.conv3d)[w.dim() - 3]
        total = conv(inputs, weights, None, g.stride, g.padding, g.dilation, g.groups)
    scale = w_q.scale.to(torch.float64) * x_q.scale_value
    if w_q.per_channel and g.transposed:
        scale = scale.repeat(g.groups)
    return _finish(total, scale, bias, activation, out_q, 1)


def linear_reference(
    x: Tensor,
    x_q: QParams,
    w: Tensor,
    w_q: QParams,
    out_q: QParams,
    *,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Reference:
    """Multiply codes exactly: an integer sum, then float64.

    Args:
        x: codes, [..., I].
        x_q: their qparams, per tensor.
        w: codes of the weight, [O, I].
        w_q: their qparams, per tensor or per output channel.
        out_q: qparams of the output, per tensor.
        bias: floating, [O].
        activation: applied in float64 before rounding.

    Raises:
        QParamError: activations are quantized per channel.

    Example:
        >>> q = QParams.per_tensor(0.5, 0, 0, 255, torch.uint8)
        >>> w_q = QParams.per_tensor(0.25, 0, -127, 127, torch.int8)
        >>> x, w = torch.tensor([[2, 4]]).byte(), torch.ones(1, 2).char()
        >>> linear_reference(x, q, w, w_q, q).codes
        tensor([[2]], dtype=torch.uint8)
    """
    total = F.linear(_centred(x, x_q), _centred(w, w_q))
    scale = w_q.scale.to(torch.float64) * x_q.scale_value
    return _finish(total, scale, bias, activation, out_q, -1)


def _centred(codes: Tensor, qparams: QParams) -> Tensor:
    """Subtract the zero point; float64, in which sums of such products are exact below 2**53."""
    if qparams.axis is None:
        return codes.to(torch.float64) - qparams.zero_point_value
    if bool(qparams.zero_point.any()):
        raise QParamError("a weight with one scale per channel must have zero point 0")
    return codes.to(torch.float64)


def _finish(
    total: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor] | None,
    out_q: QParams,
    channel: int,
) -> Reference:
    along = [1] * total.dim()
    along[channel] = -1
    real = total * scale.view(along)
    if bias is not None:
        real = real + bias.detach().to(torch.float64).view(along)
    if activation is not None:
        real = activation(real)
    codes = quantize(
        real,
        out_q.scale_value,
        out_q.zero_point_value,
        out_q.quant_min,
        out_q.quant_max,
        out_q.dtype,
    )
    return Reference(real, codes)
