"""Rows of numbers become rows of bytes in one pass over memory.

Eager torch takes four passes to divide, clamp, round and narrow. FBGEMM has them in one, to
quantize tables of embeddings by row: of a row and of the numbers that the codes 0 and 255 stand for
it makes ``round_half_even((x - low) * (255 / (high - low)))``. It neither takes nor gives a
quantized tensor type. The ends of a row are what :mod:`fxquant.numerics.dynamic` chose, so that
its codes are those of the rule but where a number lies within 2**-12 steps of a half.

Behind each row it writes eight bytes more, scale and lower end. They are left there: who
multiplies codes with a weight gives them weights of 0. Kernels that multiply tiles (AMX) pay for
a row that fills no whole number of them, so there short rows are copied without those bytes:
93 + 8 us against 115 for 128 rows of 768 and a weight of 768 x 768, 305 + 8 against 350 for 2304
(one thread). From some width on the copy costs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fxquant.backends.x86_pairs import asked_once, has_tiles
from fxquant.numerics.dynamic import byte_rows, byte_scales
from fxquant.numerics.rounding import ROUND_TO_LOW_BITS
from fxquant.spec import QSpec

_EXTRA: Final = 8
_TILE: Final = 64
_SHORT: Final = 1024
_BLOCK: Final = 32
"""The kernel saturates whole blocks of so many codes, and lets others wrap around."""
_CODES: Final = torch.tensor([[0.0, 255.0]], device="cpu")
_EPSILON: Final = torch.tensor([[0.0, -1e-8]], device="cpu")
"""What the kernel adds to the width of a row is taken from it beforehand."""
_SCALES: Final = (2.0**-30, 2.0**119)
"""Below the first that leaves too few digits; above the second the width of a row overflows."""


class RowCodes:
    """Quantizes rows of ``width`` numbers as :func:`fxquant.numerics.dynamic.byte_rows` does.

    Args:
        width: how long a row is.
        spec: how it is quantized.

    Example:
        >>> from fxquant.spec import ROWS
        >>> codes, scale, zero_point = RowCodes(2, ROWS)(torch.tensor([[0.0, 25.5], [-1.0, 1.55]]))
        >>> codes
        tensor([[  0, 255],
                [  0, 255]], dtype=torch.uint8)
    """

    def __init__(self, width: int, spec: QSpec) -> None:
        fits = spec.bits == 8 and width > 0 and width % _BLOCK == 0
        self._kernel = byte_kernel() if fits else None
        self._width, self._spec = width, spec
        shape = (spec.dtype, spec.bits, spec.symmetric, spec.granularity)
        self._is_usual = shape == ("uint8", 8, False, "row")
        self._bare = has_tiles() and width % _TILE == 0 and width <= _SHORT
        self.extra = 0 if self._kernel is None or self._bare else _EXTRA
        """How many bytes without a meaning follow the codes of a row."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[rows, width + extra]``, scales and zero points of floats ``[rows, width]``."""
        if self._kernel is None:
            return byte_rows(rows, self._spec)
        if torch.compiler.is_compiling():  # compilers do not know the kernel
            codes, scale, zero_point = byte_rows(rows, self._spec)
            return torch.nn.functional.pad(codes, (0, self.extra)), scale, zero_point
        rows = rows.detach().to(torch.float32)
        usual = _usual_scales(rows) if self._is_usual else None
        scale, zero_point = byte_scales(rows, self._spec) if usual is None else usual
        ends = torch.addcmul(_EPSILON, _CODES - zero_point, scale)
        codes = self._kernel(rows, ends.expand(rows.shape[0], 2))
        odd = None if usual is not None else scale != scale.clamp(*_SCALES)
        if odd is not None and odd.any():
            self._by_the_rule(codes, rows, odd.flatten())
        if self._bare:
            codes = codes[:, : self._width].contiguous()
        return codes, scale, zero_point

    def _by_the_rule(self, codes: Tensor, rows: Tensor, which: Tensor) -> None:
        """Write the codes of a few rows over."""
        if self._spec.granularity == "row":
            codes[which, : self._width] = byte_rows(rows[which], self._spec)[0]
        else:
            codes[:, : self._width] = byte_rows(rows, self._spec)[0]


def _usual_scales(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """What :func:`byte_scales` gives of uint8 rows, bit for bit; ``None`` if one is not usual.

    Of a few numbers a call takes as long as it takes to be made, 2 to 3 us: here are nine calls
    beside the two that read the rows, and there seventeen.
    """
    ends = torch.empty((2, rows.shape[0], 1), device="cpu")
    torch.amin(rows, -1, keepdim=True, out=ends[0])
    torch.amax(rows, -1, keepdim=True, out=ends[1])
    ends.clamp_(*_AROUND_ZERO)
    low, high = ends.div(255.0).unbind()
    scale = high - low
    # Equal to no number is a NaN.
    if not torch.equal(scale.clamp(*_SCALES), scale):
        return None
    # Rounds half to even, as adding to such a number does.
    zero_point = torch.addcdiv(_ROUNDED, ends[0], scale, value=-1.0).sub_(_ROUNDED)
    return scale, zero_point


_AROUND_ZERO: Final = (
    torch.tensor([[[-math.inf]], [[0.0]]], device="cpu"),
    torch.tensor([[[0.0]], [[math.inf]]], device="cpu"),
)
_ROUNDED: Final = torch.tensor(ROUND_TO_LOW_BITS, device="cpu")


@asked_once
def byte_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """FBGEMM's kernel, if this torch has it and it computes what is expected of it."""
    try:
        kernel = torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max.default
        steps = torch.arange(-1.0, 255.0).repeat(2, 1).add_(0.25)
        found: Tensor = kernel(steps * 0.5, torch.tensor([[0.0, 127.5], [-0.5, 127.0]]))
    # A torch that was built without it, or that takes other arguments: then the rule runs.
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    wanted = torch.stack([steps[0].clamp(min=0.0), steps[1] + 1.0]).round().to(torch.uint8)
    same = found.shape == (2, 256 + _EXTRA) and torch.equal(found[:, :256], wanted)
    return kernel if same else None
