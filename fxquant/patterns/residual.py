"""Units of residual sums: ``relu(layer(x) + y)``, and ``relu`` of a sum, product or affine.

Where both operands are convolutions the later one carries the sum: the other is finished by then.
"""

from __future__ import annotations

from typing import Final

from torch.fx import Node

from fxquant.graph.info import info
from fxquant.graph.normed_sums import norm_that_reads
from fxquant.graph.op_table import is_op
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import CONVS, LINEAR
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import CHECKS, group

LAYERS: Final = (*CONVS, *LINEAR)


def _sum() -> OpExpr:
    return op("add", op(LAYERS, var("x"), name="head"), var("y"), name="add", alpha=1)


def adds_a_tensor(match: Match) -> Reject | None:
    """The other operand must be a tensor, not a number."""
    other = match.bound["y"]
    if not isinstance(other, Node) or info(other).value in ("scalar", "sizes"):
        return Reject("the other operand is a number", match.node("add"))
    return None


def combines_tensors(match: Match) -> Reject | None:
    """With a number it is a function of one element, and a table takes it as a whole."""
    head = match.node("head")
    if not is_op(head, "batch_norm") and not isinstance(head.args[1], Node):
        return Reject("the other operand is a number", head)
    return None


def is_the_later_layer(match: Match) -> Reject | None:
    """Of two layers the one that runs last takes the sum."""
    head, other = match.node("head"), match.bound["y"]
    if not isinstance(other, Node) or not is_op(other, *LAYERS) or len(other.users) > 1:
        return None
    if head < other:
        return Reject(f"%{other.name} runs later and takes the sum", head)
    return None


def no_norm_reads_it(match: Match) -> Reject | None:
    """A sum that stays float is no part of an int8 unit."""
    norm = norm_that_reads(match.node("add"))
    if norm is None:
        return None
    return Reject(f"%{norm.name} reads the sum, which stays float", match.node("add"))


_SUM_CHECKS: Final = (*CHECKS, adds_a_tensor, is_the_later_layer, no_norm_reads_it)

RULES: Final = (
    Rule("layer-add", _sum(), group, _SUM_CHECKS),
    Rule("layer-add-relu", op("relu", _sum()), group, _SUM_CHECKS),
    Rule(
        "arithmetic-relu",
        op("relu", op(("add", "sub", "mul", "batch_norm"), var("x"), name="head")),
        group,
        (*CHECKS, combines_tensors),
    ),
)
