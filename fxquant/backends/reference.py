"""The reference backend: the Q/DQ graph as it stands, in float, on every device.

It is the numerical truth that every other backend is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.backends.base import MEASURED, Costs
from fxquant.patterns.rule import Rule


@dataclass(frozen=True)
class Reference:
    """Quantize, dequantize, compute in float."""

    name: str = "reference"
    rules: tuple[Rule, ...] = ()
    costs: Costs = MEASURED
    saturates_pairs: bool = False

    def missing(self) -> str | None:
        """It runs everywhere."""
        return None
