"""Max pools of plain codes: order is all they need, so they are exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.op_table import op_named


class MaxPoolCodes(nn.Module):
    """A max pool on codes, as running maxima of slices along one dimension after the other.

    Torch's own kernel refuses uint8 images of more than 255 pixels (its index has the type of
    the data). Slices measured three times faster than a detour through float.

    Args:
        rank: how many dimensions are pooled.
        options: the arguments of ``max_pool{rank}d`` after its input.
    """

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.options = rank, options
        kernel = _each(options["kernel_size"], rank)
        stride = _each(options["stride"] or kernel, rank)
        dilation, padding = _each(options["dilation"], rank), _each(options["padding"], rank)
        self._steps = tuple(zip(kernel, stride, dilation, padding, strict=True))

    def forward(self, codes: Tensor) -> Tensor:
        """``codes`` ``[batch, channels, ...]``; what is rare goes through float."""
        if codes.dim() != self.rank + 2 or self.options["ceil_mode"] or codes.numel() == 0:
            target: Any = op_named(f"max_pool{self.rank}d").target
            pooled: Tensor = target(codes.float(), **self.options)
            return pooled.to(codes.dtype)
        best = codes
        for place, step in enumerate(self._steps):
            best = _running_max(best, place + 2, *step)
        # A kernel of one pixel only slices; the next op may write over what it is given.
        return best.clone() if all(step[0] == 1 for step in self._steps) else best

    def extra_repr(self) -> str:
        """The pool's own arguments, for ``print(model)``."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.rank}d, {given}"


def _each(value: Any, rank: int) -> tuple[int, ...]:
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
        torch.maximum(best, window, out=best)
    for first, window in cut:
        part = best.narrow(dim, first, window.shape[dim])
        torch.maximum(part, window, out=part)
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
