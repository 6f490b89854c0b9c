"""Ops that select or move plain codes, where torch's own op on codes is missing or slow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.op_table import op_named


class MaxPool2dCodes(nn.Module):
    """``max_pool2d`` on codes: order is all it needs, so it is exact.

    Torch's own kernel refuses uint8 images of more than 255 pixels (its index has the type of
    the data). Running maxima of slices, down the rows and then along the columns, measured three
    times faster than a detour through float.

    Args:
        options: the arguments of ``max_pool2d`` after its input.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        kernel = _pair(options["kernel_size"])
        stride = _pair(options["stride"] or kernel)
        padding = _pair(options["padding"])
        self._rows = (kernel[0], stride[0], _pair(options["dilation"])[0], padding[0])
        self._columns = (kernel[1], stride[1], _pair(options["dilation"])[1], padding[1])

    def forward(self, codes: Tensor) -> Tensor:
        """``codes`` uint8 ``[batch, channels, height, width]``; other inputs go through float."""
        if codes.dim() != 4 or self.options["ceil_mode"] or codes.numel() == 0:
            pooled: Tensor = F.max_pool2d(codes.float(), **self.options)
            return pooled.to(codes.dtype)
        return _running_max(_running_max(codes, 2, *self._rows), 3, *self._columns)

    def extra_repr(self) -> str:
        """The pool's own arguments, for ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


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


class ThroughFloat(nn.Module):
    """A selection of codes by an op that torch has only for float, in which codes are exact.

    Args:
        name: the canonical op.
        options: its arguments after the input.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to float, the op, and back; nothing rounds."""
        target = op_named(self.name).target
        moved: Tensor = target(codes.float(), **self.options)  # type: ignore[misc]  # the options are of many types
        return moved.to(codes.dtype)

    def extra_repr(self) -> str:
        """The op, for ``print(model)``."""
        return self.name
