"""All built-in fusion rules, in one tuple."""

from __future__ import annotations

from typing import Final

from fxquant.patterns import conv, flattened, linear, norm, residual, scale_shift, unary
from fxquant.patterns.rule import Rule

FUSION_RULES: Final[tuple[Rule, ...]] = (
    *flattened.RULES,
    *norm.RULES,
    *scale_shift.RULES,
    *conv.RULES,
    *linear.RULES,
    *residual.RULES,
    *unary.RULES,
)
