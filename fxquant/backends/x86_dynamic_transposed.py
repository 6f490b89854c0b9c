"""Transposed convolutions whose input is quantized at run time, sample by sample.

Each is the convolution that :mod:`fxquant.backends.x86_transposed` writes it as, with a dynamic
one in the place of the static one: what the taps read beyond the edges is the zero point of the
sample, so that every output subtracts the sum of all its taps.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor

from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_dynamic import X86DynamicConv
from fxquant.backends.x86_layers import PostOp, X86Layer
from fxquant.backends.x86_transposed import (
    TransposedGeometry,
    interleave,
    per_phase,
    subpixel_weight,
)
from fxquant.graph.info import QType
from fxquant.spec import QSpec

_PLAIN: Final = QType(1.0, 0, 0, 255, torch.uint8)
"""What codes are to the kernel; their scale and zero point are each sample's own."""


class X86DynamicConvTranspose(X86Layer):
    """A transposed convolution of 1, 2 or 3 dimensions; each sample is quantized by itself.

    Args:
        weight: int8 ``[in, out / groups, ...]``.
        scale: float32 ``[out / groups]``.
        bias: float32 ``[out]`` or ``None``.
        spec: how samples are quantized.
        geometry: how it walks.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        spec: QSpec,
        geometry: TransposedGeometry,
    ) -> None:
        super().__init__(weight, scale, bias, _PLAIN, None, PostOp())
        self.spec, self.geometry = spec, geometry
        self.pack()

    def pack(self) -> None:
        """Rebuild the convolution that stands for it."""
        g = self.geometry
        taps = g.taps(tuple(self.weight.shape[2:]))
        ones, around = (1,) * len(taps), tuple(tap - 1 for tap in taps)
        scale = per_phase(self.weight_scale.repeat(g.groups), g)
        bias = None if self.bias is None else per_phase(self.bias, g)
        walk = Geometry(ones, around, ones, g.groups)
        # In a tuple: as an attribute it would be a child, with a weight in the state_dict.
        self._call = (
            X86DynamicConv(subpixel_weight(self.weight, g), scale, bias, self.spec, walk),
        )

    def forward(self, x: Tensor) -> Tensor:
        """One convolution, then the phases are interleaved; floating ``[batch, in, ...]``."""
        if x.dim() == self.weight.dim() - 1:
            made: Tensor = self.forward(x.unsqueeze(0)).squeeze(0)
            return made
        g, outputs = self.geometry, self.weight.shape[1]
        sides = g.sides(tuple(x.shape[2:]), tuple(self.weight.shape[2:]))
        if x.numel() == 0:
            return x.new_zeros((x.shape[0], g.groups * outputs, *sides)).float()
        conv = cast(X86DynamicConv, self._call[0])
        return interleave(conv(x), sides, g, outputs)

    def extra_repr(self) -> str:
        """Shapes and what is quantized, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.spec.dtype} per sample"
