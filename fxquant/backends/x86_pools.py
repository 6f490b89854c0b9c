"""Max pools of plain codes: order is all they need, so they are exact."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.x86_pairs import asked_once
from fxquant.graph.op_table import op_named

_PIXELS: Final = 64 * 64
"""Above so many the slices are faster, where there are any."""
_TAIL: Final = 2**15
"""How many numbers the kernel may compare one by one."""
_VECTOR: Final = 32
"""Channels that the kernel takes at once; it takes the rest of them one by one."""


class MaxPoolCodes(nn.Module):
    """A max pool on codes: by a kernel where that is fast, else as running maxima of slices.

    ``aten::max_pool2d`` refuses uint8 images of more than 255 pixels (its index has the type of the
    data). ``quantized::max_pool2d`` takes plain uint8 too: 0.13 to 0.7 of the time of the slices
    for up to 64 x 64 pixels, 1.1 to 1.6 of it for 112 x 112 and more, and 4 to 8 where many
    channels are left over that fill no vector (two threads, AVX512 and AVX2). Slices, along one
    dimension after the other, measured three times faster than a detour through float, which is
    the other way where ``ceil_mode`` leaves no even slices: there the kernel took 0.1 to 0.2 of it.

    Args:
        rank: how many dimensions are pooled.
        options: the arguments of ``max_pool{rank}d`` after its input.
    """

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.options = rank, options
        kernel = each(options["kernel_size"], rank)
        stride = each(options["stride"] or kernel, rank)
        dilation, padding = each(options["dilation"], rank), each(options["padding"], rank)
        self._steps = tuple(zip(kernel, stride, dilation, padding, strict=True))
        self._has_kernel = rank == 2 and has_max_pool()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pool made elsewhere, perhaps by another torch."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._has_kernel = self.rank == 2 and has_max_pool()

    def forward(self, codes: Tensor) -> Tensor:
        """``codes`` ``[batch, channels, ...]``; what is rare goes through float."""
        if self._has_kernel and self._suits_kernel(codes):
            sizes, strides, dilations, paddings = map(list, zip(*self._steps, strict=True))
            more = (strides, paddings, dilations, bool(self.options["ceil_mode"]))
            made: Tensor = torch.ops.quantized.max_pool2d.default(codes, sizes, *more)
            return made
        if codes.dim() != self.rank + 2 or self.options["ceil_mode"] or codes.numel() == 0:
            target: Any = op_named(f"max_pool{self.rank}d").target
            pooled: Tensor = target(codes.float(), **self.options)
            return pooled.to(codes.dtype)
        best = codes
        for place, step in enumerate(self._steps):
            best = _running_max(best, place + 2, *step)
        # A kernel of one pixel only slices; the next op may write over what it is given.
        return best.clone() if all(step[0] == 1 for step in self._steps) else best

    def _suits_kernel(self, codes: Tensor) -> bool:
        """Whether the kernel takes such codes, and is the faster way."""
        if codes.dim() != 4 or codes.numel() == 0 or codes.dtype != torch.uint8:
            return False
        if not codes.permute(0, 2, 3, 1).is_contiguous():
            return False
        _, channels, height, width = codes.shape
        (tall, down, *_), (wide, across, *_) = self._steps
        singles = channels % _VECTOR * tall * wide * height * width // (down * across)
        small = height * width <= _PIXELS or self.options["ceil_mode"]
        return bool(small and singles <= _TAIL)

    def extra_repr(self) -> str:
        """The pool's own arguments, for ``print(model)``."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.rank}d, {given}"


@asked_once
def has_max_pool() -> bool:
    """Whether this torch has ``quantized::max_pool2d`` for plain uint8 tensors."""
    try:
        codes = torch.arange(36, dtype=torch.uint8).view(1, 6, 6, 1).permute(0, 3, 1, 2)
        found = torch.ops.quantized.max_pool2d.default(codes, [3, 3], [2, 2], [1, 1], [1, 1], False)
    # A torch that has it for quantized tensors only, or that takes other arguments.
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    wanted = F.max_pool2d(codes.float(), 3, 2, 1)
    return found.dtype == torch.uint8 and torch.equal(found.float(), wanted)


def each(value: Any, rank: int) -> tuple[int, ...]:
    """A size for every dimension, whether one was given or as many as there are."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * rank if len(given) == 1 else given


def _running_max(
    codes: Tensor, dim: int, size: int, stride: int, dilation: int, padding: int
) -> Tensor:
    """Maxima of windows along one dimension; windows over the edge see what is there of them."""
    length = codes.shape[dim]
    count = (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    whole: list[tuple[int, Tensor]] = []
    cut: list[tuple[int, Tensor]] = []
    for start in range(-padding, size * dilation - padding, dilation):
        first = max(0, -(start // stride))
        last = min(count - 1, (length - 1 - start) // stride)
        if first > last:
            continue
        window = _every(codes, dim, start + first * stride, last - first + 1, stride)
        (whole if (first, last) == (0, count - 1) else cut).append((first, window))
    if not whole:  # a picture smaller than its window
        lowest = torch.iinfo(codes.dtype).min
        sides = (0, 0) * (codes.dim() - 1 - dim) + (padding, padding)
        return _running_max(F.pad(codes, sides, value=lowest), dim, size, stride, dilation, 0)
    best = whole[0][1] if len(whole) == 1 else torch.maximum(whole[0][1], whole[1][1])
    if len(whole) == 1 and cut:
        best = best.clone()
    for _, window in whole[2:]:
        best.clamp_min_(window)
    for first, window in cut:
        best.narrow(dim, first, window.shape[dim]).clamp_min_(window)
    return best


def _every(codes: Tensor, dim: int, start: int, count: int, stride: int) -> Tensor:
    """Every ``stride``-th slice, ``count`` of them."""
    index: list[slice] = [slice(None)] * codes.dim()
    index[dim] = slice(start, start + (count - 1) * stride + 1, stride)
    return codes[tuple(index)]


class AdaptiveMaxPoolCodes(nn.Module):
    """An adaptive max pool on codes: a maximum of blocks where the sizes divide, else by float.

    Args:
        rank: how many dimensions are pooled.
        options: the arguments of ``adaptive_max_pool{rank}d`` after its input.
    """

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.options = rank, options

    def forward(self, codes: Tensor) -> Tensor:
        """``codes`` ``[batch, channels, ...]``."""
        before = codes.shape[-self.rank :]
        given = _each_or_none(self.options["output_size"], self.rank)
        after = [a if a is not None else b for a, b in zip(given, before, strict=True)]
        pairs = list(zip(before, after, strict=True))
        if codes.numel() == 0 or not codes.is_contiguous() or any(b % a for b, a in pairs):
            target: Any = op_named(f"adaptive_max_pool{self.rank}d").target
            pooled: Tensor = target(codes.float(), **self.options)
            return pooled.to(codes.dtype)
        lead = codes.dim() - self.rank
        blocks = codes.reshape(*codes.shape[:lead], *(s for b, a in pairs for s in (a, b // a)))
        return blocks.amax([lead + 1 + 2 * place for place in range(self.rank)])

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        return f"{self.rank}d, output_size={self.options['output_size']}"


def _each_or_none(value: Any, rank: int) -> tuple[int | None, ...]:
    given = (value,) if isinstance(value, int) or value is None else tuple(value)
    return given * rank if len(given) == 1 else given


class LocatedMaxPoolCodes(nn.Module):
    """A max pool that says where its values were: through float, in which codes are exact.

    Args:
        name: the canonical op.
        options: its arguments after the input.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The codes picked, and int64 places of theirs."""
        target: Any = op_named(self.name).target
        values, indices = target(codes.float(), **self.options)
        return values.to(codes.dtype), indices

    def extra_repr(self) -> str:
        """The op, for ``print(model)``."""
        return self.name
