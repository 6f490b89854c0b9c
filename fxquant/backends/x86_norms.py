"""Norms on codes: statistics in float, straight from the codes.

A norm is blind to the scale of its input, and but for ``rms_norm`` to its zero point:

    norm(s * (q - z), eps) = norm(q, eps / s**2)

so the codes themselves are normalized, and the scale of the output goes into weight and bias.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from fxquant.backends.x86_real import to_codes_
from fxquant.graph.info import QType

BY_STATISTICS: Final = ("layer_norm", "group_norm", "instance_norm", "rms_norm")
"""The norms that :class:`StatisticsCodes` computes."""


def eps_of(module: nn.Module) -> float:
    """What a norm adds to the variance; ``rms_norm`` has a default of its own."""
    eps = getattr(module, "eps", None)
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


class StatisticsCodes(nn.Module):
    """``quantize(norm(real(codes)))`` for a norm that takes its statistics from its input.

    Args:
        name: one of :data:`BY_STATISTICS`.
        norm: the float module.
        reads: type of the input.
        writes: type of the result.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, name: str, norm: nn.Module, reads: QType, writes: QType) -> None:
        super().__init__()
        self.name, self.reads, self.writes = name, reads, writes
        self.eps = eps_of(norm) / reads.scale**2
        self.shape = tuple(getattr(norm, "normalized_shape", ()))
        self.groups = int(getattr(norm, "num_groups", 1))
        # Instance norms take a single picture, too.
        self.single = norm._get_no_batch_dim() if isinstance(norm, _InstanceNorm) else -1
        for part in ("weight", "bias"):
            given = norm._parameters.get(part)
            steps = None if given is None else (given.detach().double() / writes.scale).float()
            self.register_buffer(part, steps)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of any shape that the float norm takes."""
        real = codes.float()
        steps = self._norm(real)
        if self.weight is None:
            steps = steps.mul_(1.0 / self.writes.scale)
        return to_codes_(steps, self.writes)

    def _norm(self, real: Tensor) -> Tensor:
        if self.name == "layer_norm":
            return F.layer_norm(real, self.shape, self.weight, self.bias, self.eps)
        if self.name == "group_norm":
            return F.group_norm(real, self.groups, self.weight, self.bias, self.eps)
        if real.dim() == self.single:
            return self._norm(real.unsqueeze(0)).squeeze(0)
        if self.name == "instance_norm":
            return F.instance_norm(real, weight=self.weight, bias=self.bias, eps=self.eps)
        real.sub_(self.reads.zero_point)
        return F.rms_norm(real, self.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """The norm and types, for ``print(model)``."""
        return f"{self.name}, {self.reads} -> {self.writes}"
