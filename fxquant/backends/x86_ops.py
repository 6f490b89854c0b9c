"""Ops on plain codes without an integer weight: sums, products, affine, averages, tables."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from fxquant.graph.info import QType
from fxquant.numerics.lut import apply_table
from fxquant.numerics.rounding import round_steps_

_ONEDNN: Final = torch.ops.onednn


class PairCodes(nn.Module):
    """``quantize(real(a) + alpha * real(b))``, ``-`` or ``*``, of codes that may broadcast.

    Torch's ``onednn.qadd`` and ``qmul`` are not used: their vectorised loop reads uint8 codes from
    128 up as negative (measured on torch 2.13: 193 + 193 came out as -63 - 63), so the sum is
    taken in float32, in which codes and their products are exact.

    Args:
        name: ``"add"``, ``"sub"`` or ``"mul"``.
        relu: whether ``relu`` follows.
        a: type of the first input.
        b: type of the second input.
        writes: type of the result.
        alpha: factor of the second operand of a sum.
    """

    def __init__(
        self, name: str, relu: bool, a: QType, b: QType, writes: QType, alpha: float = 1.0
    ) -> None:
        super().__init__()
        self.name, self.relu, self.alpha = name, relu, alpha
        self.a, self.b, self.writes = a, b, writes

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a`` and ``b`` are codes; the result has their broadcast shape."""
        steps = self._product(a, b) if self.name == "mul" else self._sum(a, b)
        out = self.writes
        return round_steps_(
            steps, out.zero_point, out.quant_min, out.quant_max, out.dtype, relu=self.relu
        )

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.numel() < b.numel():
            return self._scaled(b, self.b.zero_point, a, self.a.zero_point)
        return self._scaled(a, self.a.zero_point, b, self.b.zero_point)

    def _scaled(self, large: Tensor, zero: int, small: Tensor, small_zero: int) -> Tensor:
        """The scales go to the smaller operand: in a gate it has one element a channel."""
        scale = self.a.scale * self.b.scale / self.writes.scale
        factor = small.float().sub_(small_zero).mul_(scale)
        if large.shape != torch.broadcast_shapes(large.shape, small.shape):
            return (large.float() - zero) * factor
        return large.float().sub_(zero).mul_(factor)

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        first = self.a.scale / self.writes.scale
        second = self.b.scale / self.writes.scale * self.alpha
        second = -second if self.name == "sub" else second
        # Both zero points are subtracted from the first operand, in its own steps.
        zeros = self.a.zero_point + self.b.zero_point * second / first
        left, right = a.float().sub_(zeros).mul_(first), b.float()
        if left.shape == torch.broadcast_shapes(left.shape, right.shape):
            return left.add_(right, alpha=second)
        return left + right * second

    def extra_repr(self) -> str:
        """Types, for ``print(model)``."""
        return f"{self.name}{'+relu' if self.relu else ''}, {self.a}, {self.b} -> {self.writes}"


class GateCodes(PairCodes):
    """``quantize(real(a) * real(gate))`` of pictures and one number for each of their channels.

    The gate of squeeze-and-excitation. For a sample it is a batch norm without a shift, which has
    a kernel on codes: 34 us against 114 for 240 channels of 28 x 28 (two threads).
    """

    def __init__(self, a: QType, b: QType, writes: QType) -> None:
        super().__init__("mul", False, a, b, writes)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes, ``[batch, channels, height, width]`` and ``[batch, channels, 1, 1]``."""
        swapped = a.numel() < b.numel()
        large, gates = (b, a) if swapped else (a, b)
        read, gate = (self.b, self.a) if swapped else (self.a, self.b)
        if not _is_gated(large, gates):
            return super().forward(a, b)
        large = large.contiguous(memory_format=torch.channels_last)
        factors = gates.flatten(1).float().sub_(gate.zero_point).mul_(gate.scale)
        zeros, ones = factors.new_zeros(factors.shape[1]), factors.new_ones(factors.shape[1])
        parts = [
            _ONEDNN.qbatch_norm2d(
                sample,
                read.scale,
                read.zero_point,
                factor,
                zeros,
                zeros,
                ones,
                0.0,
                self.writes.scale,
                self.writes.zero_point,
                self.writes.dtype,
            )
            for sample, factor in zip(large.split(1), factors.unbind(), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


_LARGE: Final = 8192
"""How many codes a sample must have to be worth a call of its own."""


def _is_gated(large: Tensor, gates: Tensor) -> bool:
    if large.dim() != 4 or gates.shape != (*large.shape[:2], 1, 1) or large.numel() == 0:
        return False
    return large.numel() >= _LARGE * large.shape[0] and not torch.compiler.is_compiling()


class NormCodes(nn.Module):
    """A batch norm alone: ``quantize(real(codes) * scale + shift)``, one pair per channel.

    Args:
        scale: float32 ``[channels]``.
        shift: float32 ``[channels]``.
        reads: type of the input.
        writes: type of the result.
        relu: whether ``relu`` follows.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor

    def __init__(
        self, scale: Tensor, shift: Tensor, reads: QType, writes: QType, relu: bool
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("mean", torch.zeros_like(scale), persistent=False)
        self.register_buffer("var", torch.ones_like(scale), persistent=False)
        self.reads, self.writes = reads, writes
        # The kernel clamps at code 0, which is relu if that is the code of zero.
        self.floor = writes.zero_point if relu and writes.zero_point != writes.quant_min else None

    def forward(self, codes: Tensor) -> Tensor:
        """One kernel call; ``codes`` uint8 ``[batch, channels, height, width]``."""
        if codes.numel() == 0:
            return codes.clone()
        codes = codes.contiguous(memory_format=torch.channels_last)
        result: Tensor = _ONEDNN.qbatch_norm2d(
            codes,
            self.reads.scale,
            self.reads.zero_point,
            self.scale,
            self.shift,
            self.mean,
            self.var,
            0.0,
            self.writes.scale,
            self.writes.zero_point,
            self.writes.dtype,
        )
        return result if self.floor is None else result.clamp_(min=self.floor)

    def extra_repr(self) -> str:
        """Types, for ``print(model)``."""
        return f"{self.scale.numel()}, {self.reads} -> {self.writes}"


class TableCodes(nn.Module):
    """Any function of one element, as a table with one entry per code.

    Args:
        table: ``[256]`` codes of the result.
        name: the function, for people.
        writes: type of the result.
    """

    table: Tensor

    def __init__(self, table: Tensor, name: str, writes: QType) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.name, self.writes = name, writes

    def forward(self, codes: Tensor) -> Tensor:
        """Look every code up."""
        return apply_table(codes, self.table)

    def extra_repr(self) -> str:
        """The function and the result's type, for ``print(model)``."""
        return f"{self.name} -> {self.writes}"
