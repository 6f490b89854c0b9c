"""The reference backend: the Q/DQ graph as it stands, in float, on every device.

It is the numerical truth that every other backend is compared with. (Convolutions of 16 bits are
run by torch's kernels, and by the plans with which these get them right.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fxquant.backends.base import MEASURED, Costs
from fxquant.backends.half_convs import PLANNED
from fxquant.graph.user_class import Executor
from fxquant.patterns.rule import Rule


@dataclass(frozen=True)
class Reference:
    """Quantize, dequantize, compute in float."""

    name: str = "reference"
    rules: tuple[Rule, ...] = ()
    modules: Mapping[type[nn.Module], Callable[..., nn.Module]] = field(
        default_factory=lambda: dict(PLANNED)
    )
    costs: Costs = MEASURED
    saturates_pairs: bool = False
    reads_unsigned: bool = False
    cpu_only: bool = False
    executor: Callable[[], Executor] | None = None

    def missing(self) -> str | None:
        """It runs everywhere."""
        return None
