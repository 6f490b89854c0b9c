"""Units of convolutions: ``act(conv(x))`` and ``act(conv_transpose(x))``, any activation."""

from __future__ import annotations

from typing import Final

from fxquant.patterns.expr import op, var
from fxquant.patterns.norm import CONVS, TRANSPOSED
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS, CHECKS, group

RULES: Final = (
    Rule("conv-act", op(ACTIVATIONS, op(CONVS, var("x"), name="head")), group, CHECKS),
    Rule(
        "conv-transpose-act",
        op(ACTIVATIONS, op(TRANSPOSED, var("x"), name="head")),
        group,
        CHECKS,
    ),
)
