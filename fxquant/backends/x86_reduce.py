"""Sums and averages of codes, interpolation among them: the affine map moves past the average."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

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
    sum), the zero point is subtracted first.

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

    def forward(self, codes: Tensor, *computed: Any) -> Tensor:
        """Average the codes, then map once per result."""
        average = op_named(self.name).target
        options = {**self.options, **dict(zip(self.computed, computed, strict=True))}
        real = codes.to(self._wide(codes))
        if self._centred:
            real = real.sub_(self.reads.zero_point)
        mean: Tensor = average(real, **options)  # type: ignore[misc]  # the options are of many types
        if not self._centred:
            mean = mean.sub_(self.reads.zero_point)
        return to_codes_(mean.mul_(self.reads.scale / self.writes.scale).float(), self.writes)

    def _wide(self, codes: Tensor) -> torch.dtype:
        if self.name not in ("sum", "mean"):
            return torch.float32
        dim = self.options.get("dim")
        if dim is None or dim == ():
            return torch.float64
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        # Only the dimensions added up are asked: the batch stays symbolic where it is traced.
        count = 1
        for each in dims:
            count *= codes.shape[each]
        return torch.float32 if count <= _EXACT else torch.float64

    def extra_repr(self) -> str:
        """The op and types, for ``print(model)``."""
        return f"{self.name}, {self.reads} -> {self.writes}"


def _sees_zeros(options: dict[str, Any]) -> bool:
    padding = options.get("padding", 0)
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return padded or bool(options.get("ceil_mode")) or options.get("divisor_override") is not None
