"""Ops that compute in float between codes and codes, in one call and with the scales folded in.

Torch has no int8 kernels for these on plain tensors. Reading codes and writing codes in one module
saves the float copies that ``quantize`` and ``dequantize`` nodes around a float op would make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.graph.info import QType
from fxquant.graph.op_table import op_named
from fxquant.numerics.affine import dequantize
from fxquant.numerics.rounding import round_steps_


def to_codes_(steps: Tensor, writes: QType, relu: bool = False) -> Tensor:
    """Round numbers in steps of ``writes`` to its codes; ``steps`` is overwritten."""
    return round_steps_(
        steps, writes.zero_point, writes.quant_min, writes.quant_max, writes.dtype, relu=relu
    )


class RealCodes(nn.Module):
    """``quantize(op(real(a), real(b), ...))`` of codes and of float operands, maybe with ``relu``.

    Args:
        name: the canonical op.
        options: its arguments that are not tensors.
        reads: for each tensor argument the type of its codes, or ``None`` for float.
        writes: type of the result.
        relu: whether ``relu`` follows.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        reads: tuple[QType | None, ...],
        writes: QType,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.options, self.relu = name, options, relu
        self.reads, self.writes = reads, writes

    def forward(self, *given: Tensor) -> Tensor:
        """Codes, and float tensors where ``reads`` says so; shapes as the op takes them."""
        reals = [
            value if qtype is None else dequantize(value, qtype.scale, qtype.zero_point)
            for value, qtype in zip(given, self.reads, strict=True)
        ]
        result: Tensor = op_named(self.name).target(*reals, **self.options)  # type: ignore[misc]  # the options are of many types
        return to_codes_(result.mul_(1.0 / self.writes.scale), self.writes, self.relu)

    def extra_repr(self) -> str:
        """The op and types, for ``print(model)``."""
        types = ", ".join("float32" if q is None else str(q) for q in self.reads)
        return f"{self.name}{'+relu' if self.relu else ''}, {types} -> {self.writes}"


class AffineCodes(nn.Module):
    """``quantize(real(codes) * factor + term)``: a norm with fixed statistics, or a constant.

    Args:
        factor: float, a number or a shape that broadcasts with the codes.
        term: the same.
        reads: type of the input.
        writes: type of the result.
        relu: whether ``relu`` follows.
        channels: whether both are ``[channels]``, which is dimension 1 of the codes.
    """

    factor: Tensor
    term: Tensor

    def __init__(
        self,
        factor: Tensor,
        term: Tensor,
        reads: QType,
        writes: QType,
        *,
        relu: bool = False,
        channels: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        steps = factor.double() * (reads.scale / writes.scale)
        shift = term.double() / writes.scale - steps * reads.zero_point
        self.register_buffer("factor", steps.float())
        self.register_buffer("term", shift.float())
        self.reads, self.writes, self.relu = reads, writes, relu

    def forward(self, codes: Tensor) -> Tensor:
        """One multiplication and one addition for every code."""
        factor, term = self.factor, self.term
        if self.channels and codes.dim() > 2:
            along = (-1, *[1] * (codes.dim() - 2))
            factor, term = factor.view(along), term.view(along)
        return to_codes_(torch.addcmul(term, codes.float(), factor), self.writes, self.relu)

    def extra_repr(self) -> str:
        """Shape of the factor and types, for ``print(model)``."""
        return f"{tuple(self.factor.shape)}, {self.reads} -> {self.writes}"


class SoftmaxCodes(nn.Module):
    """``quantize(softmax(real(codes)))``, or ``log_softmax``: neither sees the zero point.

    Args:
        name: ``"softmax"`` or ``"log_softmax"``.
        dim: the dimension that is normalized.
        reads: type of the input.
        writes: type of the result.
    """

    def __init__(self, name: str, dim: int, reads: QType, writes: QType) -> None:
        super().__init__()
        self.name, self.dim, self.reads, self.writes = name, dim, reads, writes

    def forward(self, codes: Tensor) -> Tensor:
        """Exponentials and their sum in float."""
        real = codes.float().mul_(self.reads.scale)
        function = torch.softmax if self.name == "softmax" else torch.log_softmax
        return to_codes_(function(real, self.dim).mul_(1.0 / self.writes.scale), self.writes)

    def extra_repr(self) -> str:
        """Dimension and types, for ``print(model)``."""
        return f"{self.name}, dim={self.dim}, {self.reads} -> {self.writes}"


class SlopeCodes(nn.Module):
    """``quantize(prelu(real(codes)))`` with a slope per channel.

    Args:
        slope: float32 ``[channels]``.
        reads: type of the input.
        writes: type of the result.
    """

    slope: Tensor

    def __init__(self, slope: Tensor, reads: QType, writes: QType) -> None:
        super().__init__()
        self.register_buffer("slope", slope)
        self.reads, self.writes = reads, writes

    def forward(self, codes: Tensor) -> Tensor:
        """``codes`` ``[batch, channels, ...]``; whole numbers, so the scales can wait."""
        centred = codes.float().sub_(self.reads.zero_point)
        steps = F.prelu(centred, self.slope).mul_(self.reads.scale / self.writes.scale)
        return to_codes_(steps, self.writes)

    def extra_repr(self) -> str:
        """Channels and types, for ``print(model)``."""
        return f"{self.slope.numel()}, {self.reads} -> {self.writes}"
