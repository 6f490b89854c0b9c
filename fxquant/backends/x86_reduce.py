"""Sums and averages of codes, interpolation among them: the affine map moves past the average."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_layers import PostOp, X86Conv
from fxquant.backends.x86_pools import each
from fxquant.backends.x86_quantize import codes_between
from fxquant.backends.x86_real import to_codes_
from fxquant.graph.info import QType
from fxquant.graph.op_table import op_named

AVERAGES: Final = (
    *("mean", "sum", "interpolate"),
    *(f"{kind}_pool{rank}d" for kind in ("avg", "adaptive_avg") for rank in (1, 2, 3)),
)
"""Ops that are linear in their input, so that :class:`AverageCodes` can compute them."""

_EXACT: Final = 2**24 // 255
"""How many codes a float32 can add up without rounding."""


class AverageCodes(nn.Module):
    """``quantize(average(real(codes)))``, the average taken over whole numbers.

    Sums of codes are exact in float32 below 2**24, beyond that they are taken in float64, so only
    the last steps round. Where zeros take part (padding) or the weights do not add up to one (a
    sum), the zero point is subtracted first. Windows of pictures are a convolution with ones.

    Args:
        name: one of :data:`AVERAGES`.
        options: its arguments after the input, but for those computed in every call.
        reads: type of the input.
        writes: type of the result.
        computed: names of the arguments that are computed in every call.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        reads: QType,
        writes: QType,
        computed: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.name, self.options, self.reads, self.writes = name, options, reads, writes
        self.computed = computed
        self._centred = name == "sum" or (name.startswith("avg_pool") and _sees_zeros(options))
        self._ends = _ends(reads, writes, self._centred)
        self._window = None if computed else _window(name, options, writes)
        self._convs: dict[int, X86Conv] = {}

    def forward(self, codes: Tensor, *computed: Any) -> Tensor:
        """Average the codes, then map once per result."""
        if self._window is not None and _fills_a_kernel(codes):
            return self._convolved(codes, self._window)
        average = op_named(self.name).target
        options = {**self.options, **dict(zip(self.computed, computed, strict=True))}
        real = codes.to(self._wide(codes))
        if self._centred:
            real = real.sub_(self.reads.zero_point)
        mean: Tensor = average(real, **options)  # type: ignore[misc]  # the options are of many types
        # A handful of numbers: one call instead of seven is half of the time.
        few = _of_a_sample(mean) <= _FEW and not torch.compiler.is_compiling()
        made = codes_between(mean, self._ends) if self._ends is not None and few else None
        if made is not None:
            return made
        if not self._centred:
            mean = mean.sub_(self.reads.zero_point)
        return to_codes_(mean.mul_(self.reads.scale / self.writes.scale).float(), self.writes)

    def _convolved(self, codes: Tensor, window: Geometry) -> Tensor:
        """A convolution with ones: integer sums, rounded once, in one call."""
        channels = codes.shape[1]
        if channels not in self._convs:
            kernel = each(self.options["kernel_size"], _PICTURE)
            ones = torch.ones(channels, 1, *kernel, dtype=torch.int8, device=codes.device)
            count = self.options.get("divisor_override") or math.prod(kernel)
            scale = torch.full((channels,), 1.0 / count, device=codes.device)
            walk = replace(window, groups=channels)
            more = (self.reads, self.writes, PostOp(), walk, (1, *codes.shape[1:]))
            self._convs[channels] = X86Conv(ones, scale, None, *more)
        made: Tensor = self._convs[channels](codes)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without what the kernel is given, which is made anew."""
        return {**self.__dict__, "_convs": {}}

    def _wide(self, codes: Tensor) -> torch.dtype:
        if self.name not in ("sum", "mean"):
            return torch.float32
        dim = self.options.get("dim")
        if dim is None or dim == ():
            return torch.float64
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        # Only the dimensions added up are asked: the batch stays symbolic where it is traced.
        count = 1
        for place in dims:
            count *= codes.shape[place]
        return torch.float32 if count <= _EXACT else torch.float64

    def extra_repr(self) -> str:
        """The op and types, for ``print(model)``."""
        return f"{self.name}, {self.reads} -> {self.writes}"


def _ends(reads: QType, writes: QType, centred: bool) -> Tensor | None:
    """The averages of codes that become the codes 0 and 255, if no average lies on a tie.

    Between scales with a simple ratio many do: they are rounded by the rule.
    """
    ratio = writes.scale / reads.scale
    full = (writes.quant_min, writes.quant_max, writes.dtype) == (0, 255, torch.uint8)
    if not full or not _RATIOS[0] < ratio < _RATIOS[1] or (ratio * _SIMPLE).is_integer():
        return None
    low = (0.0 if centred else reads.zero_point) - writes.zero_point * ratio
    return torch.tensor([[low, low + 255 * ratio - 1e-8]], device="cpu")


_PICTURE: Final = 2
_LARGEST: Final = 25
"""How many pixels a window has at most: wider ones take longer than an average in float."""
_WORTH: Final = 2**15
"""From how many codes of a sample on the kernel is faster: 40 us against 33 for 6,000, 54 against
139 for 401,000 (2x2, two threads with AMX)."""


def _window(name: str, options: dict[str, Any], writes: QType) -> Geometry | None:
    """How a pool walks that is a convolution with ones, ``None`` if it is none."""
    full = (writes.quant_min, writes.quant_max, writes.dtype) == (0, 255, torch.uint8)
    if name != "avg_pool2d" or not full or options.get("ceil_mode"):
        return None
    kernel = each(options["kernel_size"], _PICTURE)
    stride = each(options.get("stride") or kernel, _PICTURE)
    padding = each(options.get("padding", 0), _PICTURE)
    counts = options.get("count_include_pad", True) or options.get("divisor_override")
    if not (counts or not any(padding)) or math.prod(kernel) > _LARGEST:
        return None
    return Geometry(stride, padding, (1, 1), 1)


def _fills_a_kernel(codes: Tensor) -> bool:
    pictures = codes.dim() == _PICTURE + 2 and codes.dtype == torch.uint8
    return pictures and _of_a_sample(codes) >= _WORTH and not torch.compiler.is_compiling()


def _of_a_sample(batch: Tensor) -> int:
    """Who else is in the batch must not decide how a sample is rounded."""
    return batch.numel() // max(1, batch.shape[0]) if batch.dim() > 1 else batch.numel()


_FEW: Final = 2**13
_RATIOS: Final = (1e-3, 1e3)
_SIMPLE: Final = 5040.0 * 2**10
"""A multiple of all denominators that a simple ratio has, or its inverse's numerator."""


def _sees_zeros(options: dict[str, Any]) -> bool:
    padding = options.get("padding", 0)
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return padded or bool(options.get("ceil_mode")) or options.get("divisor_override") is not None
