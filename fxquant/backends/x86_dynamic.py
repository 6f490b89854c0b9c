"""Layers whose activations are quantized at run time, on torch's oneDNN int8 operators.

The kernels know one scale and one zero point for all rows, so they are given none: 1 and 0. Of a
row with scale ``s`` and zero point ``z`` and a weight ``w`` with scale ``t`` they return
``t * sum(codes * w)``, and what is left is

    s * (t * sum(codes * w) - z * t * sum(w)) + bias

in which the integer sum is exact; two more passes over the result, in place. Rows become codes in
one pass, besides the two that find their ends, where :mod:`fxquant.backends.x86_row_codes` can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_conv_plan import Geometry, plan_of
from fxquant.backends.x86_layers import PostOp, X86Layer
from fxquant.backends.x86_row_codes import RowCodes
from fxquant.graph.info import QType
from fxquant.numerics.dynamic import byte_rows
from fxquant.spec import QSpec

_ONEDNN: Final = torch.ops.onednn
_AT_ONCE: Final = 2**18
"""How many weights are added up together."""
_PLAIN: Final = QType(1.0, 0, 0, 255, torch.uint8)
_FLOAT: Final[tuple[Any, ...]] = (1.0, 0, torch.float32, "none", [], "")


class X86DynamicLinear(X86Layer):
    """A linear layer, or several that read the same rows as one product; float in, float out.

    Args:
        weight: int8 ``[outputs, inputs]``, the layers one below the other.
        scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]`` or ``None``.
        spec: how rows are quantized.
        sizes: outputs of each layer; with several, the result is a tuple of views.
        packed: the weight as another layer packed it, which shares it.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        spec: QSpec,
        sizes: Sequence[int] = (),
        *,
        packed: Tensor | None = None,
    ) -> None:
        super().__init__(weight, scale, bias, _PLAIN, None, PostOp(), packed)
        self.spec = spec
        self.sizes = list(sizes) or [weight.shape[0]]
        self.pack()

    def pack(self) -> None:
        """Reorder the weight, and add up its columns."""
        zeros = torch.zeros(self.weight_scale.numel(), dtype=torch.int32, device="cpu")
        rows = RowCodes(self.weight_shape[1], self.spec)
        self._head = (_sums(self.weight, self.weight_scale).unsqueeze(0), rows)
        self._kernel = _ONEDNN.qlinear_pointwise.default
        packed = self.packed_linear(rows.extra)
        self._call = (1.0, 0, packed, self.weight_scale, zeros, None, *_FLOAT)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """One quantization and one product; ``x`` floating ``[..., inputs]``."""
        outputs, inputs = self.weight_shape
        if x.numel() == 0:
            made = torch.zeros((*x.shape[:-1], outputs), device="cpu")
            made = made if self.bias is None else made.add_(self.bias)
        else:
            made = self._product(x.reshape(-1, inputs)).view(*x.shape[:-1], outputs)
        return made if len(self.sizes) == 1 else made.split(self.sizes, dim=-1)

    def _product(self, rows: Tensor) -> Tensor:
        sums, quantized = self._head
        codes, scale, zero_point = quantized(rows)
        made: Tensor = self._kernel(codes, *self._call)
        made.addcmul_(zero_point, sums, value=-1)
        if self.bias is None:
            return made.mul_(scale)
        return torch.addcmul(self.bias, made, scale, out=made)

    def extra_repr(self) -> str:
        """Shapes and what is quantized, for ``print(model)``."""
        parts = f", {len(self.sizes)} layers" if len(self.sizes) > 1 else ""
        return f"{self.weight_shape}{parts}, {self.spec.dtype} per {self.spec.granularity}"


class X86DynamicConv(X86Layer):
    """A convolution of 1, 2 or 3 dimensions; each sample is quantized by itself.

    Args:
        weight: int8 ``[outputs, inputs / groups, ...]``.
        scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]`` or ``None``.
        spec: how samples are quantized.
        geometry: how it walks.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        spec: QSpec,
        geometry: Geometry,
    ) -> None:
        super().__init__(weight, scale, bias, _PLAIN, None, PostOp())
        self.spec, self.geometry = spec, geometry
        self.pack()

    def pack(self) -> None:
        """Reorder the weight, and add up what every output channel reads."""
        g, rank = self.geometry, self.weight.dim() - 2
        # Padding is the zero point, which each sample has of its own: it is written out before.
        self.plan = plan_of(self.weight_shape, replace(g, padding=(0,) * rank), 0)
        walk, weight = self.plan.geometry.walk, self.plan.weight(self.weight)
        packed = _ONEDNN.qconv_prepack(weight, self.weight_scale, 1.0, 0, *walk, None)
        zeros = torch.zeros(self.weight_scale.numel(), dtype=torch.int32, device="cpu")
        self._kernel = _ONEDNN.qconv_pointwise.default
        self._head = (_sums(self.weight, self.weight_scale).view(-1, *(1,) * rank),)
        self._call = (1.0, 0, packed, self.weight_scale, zeros, None, *walk, *_FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` floating ``[batch, channels, ...]``, or without the batch."""
        rank = self.weight.dim() - 2
        if x.dim() == rank + 1:
            made: Tensor = self.forward(x.unsqueeze(0)).squeeze(0)
            return made
        if x.numel() == 0:
            return self._nothing(x)
        codes, scale, zero_point = byte_rows(x, self.spec, rank + 1)
        made = self.plan.run(self._kernel, self._padded(codes, zero_point), *self._call)
        rest = -(scale * zero_point) * self._head[0]
        if self.bias is not None:
            rest = rest + self.bias.view(-1, *(1,) * rank)
        return torch.addcmul(rest, made, scale, out=made)

    def _padded(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        if not any(self.geometry.padding):
            return codes
        sides = [n + 2 * p for n, p in zip(codes.shape[2:], self.geometry.padding, strict=True)]
        shape = (*codes.shape[:2], *sides)
        made = zero_point.to(torch.uint8).expand(shape).contiguous()
        parts = zip(self.geometry.padding, codes.shape[2:], strict=True)
        made[(slice(None), slice(None), *(slice(p, p + n) for p, n in parts))] = codes
        return made

    def _nothing(self, x: Tensor) -> Tensor:
        """The result of an empty batch, from the shapes alone."""
        g, convs = self.geometry, (F.conv1d, F.conv2d, F.conv3d)
        real, weight = (t.to("meta", torch.float32) for t in (x, self.weight))
        conv = convs[weight.dim() - 3]
        like = conv(real, weight, None, g.stride, g.padding, g.dilation, g.groups)
        return torch.empty(like.shape, device="cpu")

    def extra_repr(self) -> str:
        """Shapes and what is quantized, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.spec.dtype} per sample"


def _sums(weight: Tensor, scale: Tensor) -> Tensor:
    # Some rows at a time: to add them up, torch makes them four times as wide.
    rows = weight.flatten(1)
    parts = rows.split(max(1, _AT_ONCE // max(1, rows.shape[1])))
    return torch.cat([part.sum(1, dtype=torch.int32) for part in parts]).to(torch.float32) * scale
