"""The one quantization rule: ``q = clamp(round_half_even(x / s) + z, quant_min, quant_max)``.

Observers, fake-quantization, the reference backend and the tests all use this file and nothing
else, so that there is one answer to "which code is this number?". ``quantize``, ``dequantize``
and ``dequantize_weight`` are also the nodes of the Q/DQ graph: each records itself as one
``call_function`` when torch.fx traces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from fxquant.errors import QParamError
from fxquant.spec import QSpec

SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny
"""The smallest normal float32: a smaller scale has no reciprocal and is flushed to zero."""

_STORAGE: Final = {"uint8": torch.uint8, "int8": torch.int8}

# A float32 between 2**23 and 2**24 has a spacing of 1, so adding this to a small number rounds it
# half to even and leaves the integer in the low bits; the extra 2**22 keeps negatives in range.
_ROUND_TO_LOW_BITS: Final = 1.5 * 2.0**23


@dataclass(frozen=True, eq=False)
class QParams:
    """A scale and zero point (or one pair per channel) that are known to be usable.

    Args:
        scale: float32, shape [1], or [C] with an ``axis``; finite, normal and positive.
        zero_point: int32, the shape of ``scale``, each in ``quant_min..quant_max``.
        quant_min: smallest code in use.
        quant_max: largest code in use.
        dtype: ``torch.uint8`` or ``torch.int8``, what the codes are stored in.
        axis: the dimension of the quantized tensor that has C channels; ``None``: per tensor.

    Raises:
        QParamError: any of this does not hold; the message names the value and its index.

    Example:
        >>> QParams.per_tensor(0.5, 3, 0, 255, torch.uint8).zero_point_value
        3
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    axis: int | None = None

    def __post_init__(self) -> None:
        self._check_codes()
        self._check_shapes()
        usable = torch.isfinite(self.scale) & (self.scale >= SMALLEST_SCALE)
        if not bool(usable.all()):
            index = int((~usable).nonzero()[0, 0])
            raise QParamError(
                f"scale[{index}] is {float(self.scale[index])!r}: a scale must be finite, normal "
                f"(at least {SMALLEST_SCALE:.3g}) and positive; check the data it was chosen from"
            )
        inside = (self.zero_point >= self.quant_min) & (self.zero_point <= self.quant_max)
        if not bool(inside.all()):
            index = int((~inside).nonzero()[0, 0])
            raise QParamError(
                f"zero_point[{index}] is {int(self.zero_point[index])}: it must be a code, from "
                f"{self.quant_min} to {self.quant_max}, so that 0.0 is represented exactly"
            )

    def _check_codes(self) -> None:
        if self.dtype not in (torch.uint8, torch.int8):
            raise QParamError(f"dtype is {self.dtype}: codes are torch.uint8 or torch.int8")
        info = torch.iinfo(self.dtype)
        if not info.min <= self.quant_min < self.quant_max <= info.max:
            raise QParamError(
                f"codes {self.quant_min}..{self.quant_max} do not fit {self.dtype}: they must be "
                f"an ascending range inside {info.min}..{info.max}"
            )

    def _check_shapes(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise QParamError(
                f"scale is {self.scale.dtype} and zero_point is {self.zero_point.dtype}: they "
                "must be torch.float32 and torch.int32"
            )
        shape = tuple(self.scale.shape)
        if len(shape) != 1 or shape[0] == 0 or shape != tuple(self.zero_point.shape):
            raise QParamError(
                f"scale has shape {shape} and zero_point {tuple(self.zero_point.shape)}: both "
                "must be [1], or [C] with one entry per channel"
            )
        if self.axis is None and shape != (1,):
            raise QParamError(f"{shape[0]} scales but axis is None: pass the channel axis")

    @classmethod
    def per_tensor(
        cls, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
    ) -> QParams:
        """Build the qparams of a whole tensor from two Python numbers.

        Raises:
            QParamError: as for the class, and when ``zero_point`` does not fit int32.
        """
        if not -(2**31) <= zero_point < 2**31:
            raise QParamError(f"zero_point is {zero_point}: it must be a code, not past int32")
        scales = torch.tensor([scale], dtype=torch.float32)
        zeros = torch.tensor([zero_point], dtype=torch.int32)
        return cls(scales, zeros, quant_min, quant_max, dtype)

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale per channel of ``axis``."""
        return self.axis is not None

    @property
    def scale_value(self) -> float:
        """The one scale of a per-tensor quantization.

        Raises:
            QParamError: there is one per channel.
        """
        self._need_per_tensor("scale")
        return float(self.scale.item())

    @property
    def zero_point_value(self) -> int:
        """The one zero point of a per-tensor quantization.

        Raises:
            QParamError: there is one per channel.
        """
        self._need_per_tensor("zero point")
        return int(self.zero_point.item())

    def _need_per_tensor(self, what: str) -> None:
        if self.per_channel:
            raise QParamError(
                f"asked for the one {what} of qparams with {self.scale.numel()} channels on axis "
                f"{self.axis}: use .scale and .zero_point"
            )

    def same_as(self, other: QParams) -> bool:
        """Whether both describe exactly the same codes; no tolerance."""
        mine = (self.quant_min, self.quant_max, self.dtype, self.axis)
        theirs = (other.quant_min, other.quant_max, other.dtype, other.axis)
        return (
            mine == theirs
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


def choose_qparams(low: Tensor, high: Tensor, spec: QSpec, axis: int | None = None) -> QParams:
    """Choose the scale and zero point that cover ``low..high``, widened to contain 0.

    Computed in float64, so a range as wide as float32 itself does not overflow. A range that is
    exactly 0 gets scale 1.0; one too small for a normal float32 scale gets the smallest.

    Args:
        low: smallest value, scalar or [1], or [C] with an ``axis``; any floating dtype.
        high: largest value, the shape of ``low``.
        spec: dtype, bits and symmetry.
        axis: the channel axis; ``None``: per tensor.

    Raises:
        QParamError: a bound is NaN or infinite, ``low > high``, or the shapes are wrong.

    Example:
        >>> q = choose_qparams(torch.tensor(0.0), torch.tensor(25.5), QSpec())
        >>> round(q.scale_value, 6), q.zero_point_value
        (0.1, 0)
    """
    below = low.detach().reshape(-1).to(torch.float64)
    above = high.detach().reshape(-1).to(torch.float64)
    _check_range(below, above)
    below, above = below.clamp(max=0.0), above.clamp(min=0.0)
    quant_min, quant_max = spec.quant_min, spec.quant_max
    if spec.symmetric:
        middle = 2 ** (spec.bits - 1) if spec.dtype == "uint8" else 0
        # The shorter side sets the scale, so that neither end of the range is clipped.
        wide = torch.maximum(-below, above) / min(middle - quant_min, quant_max - middle)
    else:
        wide = (above - below) / (quant_max - quant_min)
    scale = torch.where(wide == 0.0, 1.0, wide.clamp(min=SMALLEST_SCALE)).to(torch.float32)
    if spec.symmetric:
        zero_point = torch.full_like(scale, middle, dtype=torch.int32)
    else:
        # From the float32 scale that will be used, not from the float64 one it was rounded from.
        exact = quant_min - below / scale.to(torch.float64)
        zero_point = exact.round().clamp(quant_min, quant_max).to(torch.int32)
    return QParams(scale, zero_point, quant_min, quant_max, _STORAGE[spec.dtype], axis)


def _check_range(low: Tensor, high: Tensor) -> None:
    if low.shape != high.shape:
        raise QParamError(f"low has {low.numel()} entries and high {high.numel()}: same number")
    wrong = ~(torch.isfinite(low) & torch.isfinite(high) & (low <= high))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0, 0])
        raise QParamError(
            f"the range [{float(low[index])!r}, {float(high[index])!r}] (index {index}) cannot be "
            "quantized: both ends must be finite and in ascending order; check the data"
        )


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
    steps = _in_steps(x, scale)
    # clamp(round(y) + z, a, b) == round(clamp(y, a - z, b - z)) + z, as a, b and z are integers.
    steps.clamp_(quant_min - zero_point, quant_max - zero_point)
    if steps.dtype == torch.float64:
        return steps.round_().add_(zero_point).to(torch.int32).to(dtype)
    # The low byte of the float now holds the code less z, modulo 256; the 8-bit addition wraps
    # back to the code. One pass less than round and cast, and the casts it uses are the fast ones.
    return steps.add_(_ROUND_TO_LOW_BITS).view(torch.int32).to(dtype).add_(zero_point)


def _in_steps(x: Tensor, scale: float) -> Tensor:
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
        >>> spec = QSpec("int8", symmetric=True, granularity="channel")
        >>> w = torch.tensor([[1.0, -0.5], [4.0, 2.0]])
        >>> quantize_weight(w, choose_qparams(w.amin(1), w.amax(1), spec, axis=0))
        tensor([[127, -64],
                [127,  64]], dtype=torch.int8)
    """
    low, high, dtype = qparams.quant_min, qparams.quant_max, qparams.dtype
    if qparams.axis is None:
        return quantize(w, qparams.scale_value, qparams.zero_point_value, low, high, dtype)
    w = w.detach()
    wide = w if w.dtype in (torch.float32, torch.float64) else w.to(torch.float32)
    steps = wide / _along(qparams.scale, w, qparams.axis)
    codes = steps.round_().add_(_along(qparams.zero_point, w, qparams.axis)).clamp_(low, high)
    return codes.to(torch.int32).to(dtype)


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
