"""Units of linear layers: ``act(linear(x))``, any activation."""

from __future__ import annotations

from typing import Final

from fxquant.patterns.expr import op, var
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS, CHECKS, group

RULES: Final = (
    Rule("linear-act", op(ACTIVATIONS, op("linear", var("x"), name="head")), group, CHECKS),
)
