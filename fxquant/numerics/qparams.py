"""Scales and zero points: :class:`QParams`, checked when made, and how to choose them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxquant.errors import QParamError
from fxquant.spec import QSpec

SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny
"""The smallest normal float32: a smaller scale has no reciprocal and is flushed to zero."""

_STORAGE: Final = {"uint8": torch.uint8, "int8": torch.int8}


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
        # A NaN among them is both ends, and is not in any range.
        least, most = (end.item() for end in self.scale.aminmax())
        if not SMALLEST_SCALE <= least <= most < math.inf:
            usable = torch.isfinite(self.scale) & (self.scale >= SMALLEST_SCALE)
            index = int((~usable).nonzero()[0, 0])
            raise QParamError(
                f"scale[{index}] is {float(self.scale[index])!r}: a scale must be finite, normal "
                f"(at least {SMALLEST_SCALE:.3g}) and positive; check the data it was chosen from"
            )
        least, most = (end.item() for end in self.zero_point.aminmax())
        if not self.quant_min <= least <= most <= self.quant_max:
            inside = (self.zero_point >= self.quant_min) & (self.zero_point <= self.quant_max)
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

    def representable(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest number that has a code, float64, shape of ``scale``."""
        scale = self.scale.to(torch.float64)
        return (
            (self.quant_min - self.zero_point) * scale,
            (self.quant_max - self.zero_point) * scale,
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
    scale, zero_point = steps_from_range(below, above, spec)
    return QParams(scale, zero_point, spec.quant_min, spec.quant_max, _STORAGE[spec.dtype], axis)


def choose_many(low: Tensor, high: Tensor, spec: QSpec) -> tuple[QParams, ...]:
    """Choose the qparams of B whole tensors at once; each is what :func:`choose_qparams` gives.

    Args:
        low: [B] float64, smallest values.
        high: [B] float64, largest values.
        spec: dtype, bits and symmetry.

    Raises:
        QParamError: as for :func:`choose_qparams`; the index is that of the tensor.

    Example:
        >>> ends = torch.zeros(2).double(), torch.tensor([25.5, 51.0]).double()
        >>> [round(q.scale_value, 6) for q in choose_many(*ends, QSpec())]
        [0.1, 0.2]
    """
    together = choose_qparams(low, high, spec, axis=0)
    rest = (spec.quant_min, spec.quant_max, together.dtype)
    pairs = zip(together.scale.split(1), together.zero_point.split(1), strict=True)
    return tuple(QParams(scale.clone(), zero.clone(), *rest) for scale, zero in pairs)


def steps_from_range(low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Return the scales (float32) and zero points (int32) for many ranges at once.

    Args:
        low: float64, any shape, at most 0.
        high: float64, the shape of ``low``, at least 0.
        spec: dtype, bits and symmetry.
    """
    quant_min, quant_max = spec.quant_min, spec.quant_max
    if spec.symmetric:
        middle = 2 ** (spec.bits - 1) if spec.dtype == "uint8" else 0
        # The shorter side sets the scale, so that neither end of the range is clipped.
        wide = torch.maximum(-low, high) / min(middle - quant_min, quant_max - middle)
    else:
        wide = (high - low) / (quant_max - quant_min)
    scale = torch.where(wide == 0.0, 1.0, wide.clamp(min=SMALLEST_SCALE)).to(torch.float32)
    if spec.symmetric:
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    # From the float32 scale that will be used, not from the float64 one it was rounded from.
    zero_point = (quant_min - low / scale.to(torch.float64)).round()
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


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
