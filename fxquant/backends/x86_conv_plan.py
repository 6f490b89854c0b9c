"""How a convolution is given to oneDNN's kernels: as it is, or so that they get it right.

The kernels of oneDNN 3.12 (torch 2.13) are silently wrong for some convolutions, by as much as the
result itself; with AMX for more than without it. Each was found by comparing thousands of random
shapes with a sum in float64, and has a form that is right:

- *Lowered weights.* Where rows of the kernel are lowered into longer sums, the weight has to be
  laid out anew unless it happens to fit, and the kernel with AMX thinks that it fits too often:
  with 4, 8, 12, ... input channels and ``channels * width`` a multiple of 64, or with a width and a
  stride that share a factor which takes fewer than 64 channels beyond 64. (A patch embedding of
  32x32 pixels of 4 channels is one.) A column of zeros at the right of the kernel, a *tap*, makes
  the sums another length.
- *Zero points.* What a zero point other than 0 adds is wrong at borders as wide as the kernel, at
  those of dilated kernels and of those one column wide, and in groups: with AMX of any width,
  without it of one channel. Where the layer writes the padding itself,

      sum(w * (q - z)) = sum(w * q) - z * sum(w)

  everywhere: the kernel is told no zero point, and the last term goes into the bias.
- *One layer.* Volumes of few channels and a depth of 1 are wrong where the kernel pads the depth:
  the layer pads it.
- *Nothing read.* Where no row of a dilated kernel meets the input memory is overwritten, unless the
  layer writes the padding.
- *Depth left out.* Where a stride is deeper than the kernel memory is overwritten with AMX. Layers
  of zeros behind the kernel, taps as well, make it as deep.
- *One column.* A result one column wide, of a kernel wider than that with a stride, is made of two
  columns, of which the second is cut off.
- *Steps.* Without AVX512 strided kernels of one pixel first gather what they read, in vectors of 16
  bytes (``rtus_driver_t``). Where the channels do not fill them, a thread writes over what the next
  has gathered, now and then or in every call, depending on the size; the last one, behind the
  memory. The layer leaves out what is stepped over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_pairs import has_avx512_kernels, has_tiles

_LOWERED: Final = 32
"""Rows are lowered where the input channels of a group take fewer bytes."""
_ROW: Final = 64
"""Bytes of a row of a tile."""
_WORD: Final = 4
"""Bytes that are multiplied together."""
_VECTOR: Final = 16
"""Bytes that kernels without AVX512 gather at a time."""

_FLAT: Final = 2
_DEEP: Final = 3
"""Spatial dimensions of pictures and of volumes."""
_LAST: Final = {_FLAT: torch.channels_last, _DEEP: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks.

    Args:
        stride: per spatial dimension.
        padding: per spatial dimension, both sides.
        dilation: per spatial dimension.
        groups: number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def walk(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups, as the kernel is given them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


@dataclass(frozen=True)
class Plan:
    """What is given to the kernel for a convolution.

    Args:
        geometry: how the kernel walks over the codes that it is given.
        zero_point: what the kernel is told.
        reads: zero point of the codes, which the layer pads with.
        fill: codes that the layer writes at both ends of each dimension, as ``F.pad`` takes them.
        taps: rows of zeros at the end of each dimension of the kernel.
        narrow: codes this wide, or less, give one column, which the kernel gets wrong.
        step: the stride of each dimension that the layer takes instead of the kernel.
    """

    geometry: Geometry
    zero_point: int
    reads: int
    fill: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    narrow: int = 0
    step: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the kernel is given the codes as they are, whatever their size."""
        return not (self.fill or self.narrow or self.step)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight as the kernel is given it.

        Args:
            weight: int8 ``[outputs, inputs / groups, ...]``.
        """
        return F.pad(weight, [n for t in reversed(self.taps) for n in (0, t)])

    def bias(
        self, bias: Tensor | None, weight: Tensor, weight_scale: Tensor, scale: float
    ) -> Tensor | None:
        """The bias, with what the zero point adds if the kernel is not told it.

        Args:
            bias: float32 ``[outputs]`` or ``None``.
            weight: int8 ``[outputs, inputs / groups, ...]``.
            weight_scale: float32 ``[outputs]`` or ``[1]``.
            scale: of the codes.
        """
        if self.zero_point == self.reads:
            return bias
        sums = weight.flatten(1).sum(1, dtype=torch.int64).double()
        rest = sums * weight_scale.double() * (-scale * self.reads)
        return (rest if bias is None else rest + bias.double()).float()

    def shape(self, shape: tuple[int, ...] | None) -> list[int] | None:
        """The shape of what the kernel is given for codes of ``shape``."""
        if shape is None:
            return None
        if self.step:
            steps = zip(shape[2:], self.step, strict=True)
            return [*shape[:2], *(-(-side // step) for side, step in steps)]
        if not self.fill:
            return list(shape)
        sides = zip(shape[2:], self.fill[-2::-2], self.fill[::-2], strict=True)
        return [*shape[:2], *(side + before + after for side, before, after in sides)]

    def codes(self, codes: Tensor) -> Tensor:
        """What the kernel is given: ``codes`` padded, or without what is stepped over."""
        if self.step:
            sides = [slice(0, None, step) for step in self.step]
            last = _LAST.get(len(sides), torch.contiguous_format)
            read: Tensor = codes[:, :, *sides]
            return read.contiguous(memory_format=last)
        return F.pad(codes, self.fill, value=self.reads) if self.fill else codes

    def is_narrow(self, codes: Tensor) -> bool:
        """Whether ``codes``, padded, give one column that the kernel gets wrong."""
        return codes.shape[-1] <= self.narrow

    def run(self, kernel: Callable[..., Tensor], codes: Tensor, *rest: Any) -> Tensor:
        """One kernel call, with codes that the kernel gets right.

        Args:
            kernel: of a picture or a volume.
            codes: ``[batch, inputs, ...]``.
            rest: what else the kernel is given.
        """
        if self.plain:
            return kernel(codes, *rest)
        codes = self.codes(codes)
        if not self.is_narrow(codes):
            return kernel(codes, *rest)
        return first_column(kernel(self.widened(codes), *rest))

    def widened(self, codes: Tensor) -> Tensor:
        """Codes that give two columns, of which the first is the one that ``codes`` give."""
        return F.pad(codes, (0, self.geometry.stride[-1]), value=self.reads)


def first_column(result: Tensor) -> Tensor:
    """The first column of a result ``[batch, channels, ..., 2]``, channels last in memory."""
    last = _LAST.get(result.dim() - 2, torch.contiguous_format)
    return result[..., :1].contiguous(memory_format=last)


def plan_of(
    shape: tuple[int, ...],
    geometry: Geometry,
    zero_point: int,
    *,
    size: int = 1,
    tiles: bool | None = None,
    wide: bool | None = None,
) -> Plan:
    """How the kernel gets a convolution right.

    Args:
        shape: of the weight, ``[outputs, inputs / groups, ...]``.
        geometry: how it walks.
        zero_point: of the codes that it reads; 0 for numbers.
        size: bytes of a code, or of a number.
        tiles: whether kernels with AMX run it; ``None`` asks the processor.
        wide: whether kernels with AVX512 run it; ``None`` asks the processor.
    """
    gathers = size == 1 and _steps(shape, geometry)
    if gathers and not (has_avx512_kernels() if wide is None else wide):
        return _stepping(geometry, zero_point)
    tiled = has_tiles() if tiles is None else tiles
    told = zero_point == 0 or not _loses_zero_point(shape, geometry, tiled)
    pads = not told or _loses_depth(shape, geometry, size) or _may_miss(shape, geometry)
    taps = (
        taps_of(shape, geometry, unpadded=pads, size=size) if tiled else (0,) * len(geometry.stride)
    )
    plan = Plan(geometry, zero_point if told else 0, zero_point, taps=taps)
    if any(taps) or pads:
        plan = _padding(plan)
    return replace(plan, narrow=_narrow(shape, plan))


def _steps(shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether a kernel of one pixel steps over pixels whose channels do not fill vectors."""
    single = max(shape[2:]) == 1 and not any(geometry.padding) and geometry.groups == 1
    flat = len(geometry.stride) < _DEEP
    return single and flat and max(geometry.stride) > 1 and shape[1] % _VECTOR > 0


def _stepping(geometry: Geometry, zero_point: int) -> Plan:
    """The layer leaves out what is stepped over."""
    rank = len(geometry.stride)
    close = replace(geometry, stride=(1,) * rank)
    return Plan(close, zero_point, zero_point, taps=(0,) * rank, step=geometry.stride)


def _padding(plan: Plan) -> Plan:
    """The same, where the layer writes the padding, and what the taps read beyond it."""
    geometry = plan.geometry
    ends = zip(geometry.padding, plan.taps, geometry.dilation, strict=True)
    fill = [side for p, tap, d in reversed([*ends]) for side in (p, p + tap * d)]
    unpadded = replace(geometry, padding=(0,) * len(geometry.padding))
    return replace(plan, geometry=unpadded, fill=tuple(fill) if any(fill) else ())


def _loses_zero_point(shape: tuple[int, ...], geometry: Geometry, tiled: bool) -> bool:
    """Whether what a zero point adds to a sum may be wrong."""
    outputs, inputs, *kernel = shape
    walks = zip(kernel, geometry.padding, geometry.dilation, strict=True)
    if any(padding > (size - 1) * dilation for size, padding, dilation in walks):
        return True
    depthwise = inputs == 1 and outputs == geometry.groups
    grouped = geometry.groups > 1 and not depthwise
    borders = any(geometry.padding) and (kernel[-1] == 1 or max(geometry.dilation) > 1)
    return borders or (grouped and (tiled or inputs == 1))


def _loses_depth(shape: tuple[int, ...], geometry: Geometry, size: int) -> bool:
    """Whether what lies before and behind an input of one layer may be wrong."""
    few = shape[1] * size < _LOWERED and shape[-1] > 1
    return few and len(geometry.padding) == _DEEP and geometry.padding[0] > 0


def _may_miss(shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether a dilated kernel may reach over the input without touching it.

    Never where nothing is padded, nor where the middle of the kernel walks over the input.
    """
    walks = zip(shape[2:], geometry.padding, geometry.dilation, strict=True)
    return any(p and d > 1 and (size % 2 == 0 or 2 * p != (size - 1) * d) for size, p, d in walks)


def taps_of(
    shape: tuple[int, ...], geometry: Geometry, *, unpadded: bool, size: int = 1
) -> tuple[int, ...]:
    """How many rows of zeros a kernel needs, per dimension, to be one that is computed rightly.

    Args:
        shape: of the weight, ``[outputs, inputs / groups, ...]``.
        geometry: how it walks.
        unpadded: whether the layer writes the padding in any case.
        size: bytes of a code, or of a number.
    """
    kernel, stride = shape[2:], geometry.stride
    pointwise = max(kernel) == 1 and not any(geometry.padding)
    deep = len(kernel) == _DEEP and not pointwise
    depth = max(stride[0] - kernel[0], 0) if deep else 0
    width = 0
    while _misfits((*shape[:-1], shape[-1] + width), geometry, size, unpadded or width + depth > 0):
        width += 1
    return (depth, *(0,) * (len(kernel) - 2), width) if len(kernel) > 1 else (width,)


def _misfits(shape: tuple[int, ...], geometry: Geometry, size: int, unpadded: bool) -> bool:
    """Whether the kernel takes a weight for laid out as lowered rows that is not.

    Args:
        shape: of the weight.
        geometry: how it walks.
        size: bytes of a code, or of a number.
        unpadded: whether the layer writes the padding.
    """
    inputs, width, stride = shape[1] * size, shape[-1], geometry.stride[-1]
    if inputs % _WORD or geometry.dilation[-1] > 1:
        return False
    if width == 1:
        rows = shape[-2] if len(shape[2:]) == _FLAT else 1
        return rows > 1 and inputs <= _LOWERED and rows * inputs % _ROW == 0
    lowered = inputs * width
    if inputs < _LOWERED and lowered > _ROW and lowered % _ROW == 0:
        return True
    if geometry.groups > 1 or (geometry.padding[-1] and not unpadded):
        return False
    shared = (n for n in range(2, min(width, stride) + 1) if width % n == 0 and stride % n == 0)
    return inputs < _ROW and any(inputs * n > _ROW and inputs * n % _ROW == 0 for n in shared)


def _narrow(shape: tuple[int, ...], plan: Plan) -> int:
    """How wide codes may be that give one column, where that is wrong; 0 where it is not."""
    geometry, width = plan.geometry, shape[-1] + plan.taps[-1]
    if width == 1 or max(geometry.stride) == 1:
        return 0
    reach = (width - 1) * geometry.dilation[-1]
    return reach + geometry.stride[-1] - 2 * geometry.padding[-1]
