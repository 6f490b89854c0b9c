"""Units for training: a layer and its batch norm stay two modules, and are one unit.

    act(bn(layer(x))),   bn(layer(x)),   act(bn(layer(x)) + y)

After training the norm is folded; until then its statistics are those of the layer's results.
"""

from __future__ import annotations

from typing import Final

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.op_table import is_op, module_of
from fxquant.patterns import conv, flattened, linear, residual, unary
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import CONVS, LINEAR, TRANSPOSED, channels_agree, normalizes_features
from fxquant.patterns.residual import LAYERS, adds_a_tensor
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS, CHECKS

_SUMMED: Final = (*CONVS, *LINEAR)


def _normed(layers: tuple[str, ...]) -> OpExpr:
    return op("batch_norm", op(layers, var("x"), name="layer"), name="bn")


def tracks_statistics(match: Match) -> Reject | None:
    """A norm without running statistics is no affine map in evaluation either."""
    if getattr(module_of(match.node("bn")), "running_mean", None) is None:
        return Reject("the batch norm tracks no running statistics", match.node("bn"))
    return None


def features_if_linear(match: Match) -> Reject | None:
    """After a linear the channels are the last dimension only if the input has two."""
    return normalizes_features(match) if is_op(match.node("layer"), *LINEAR) else None


def is_the_later_layer(match: Match) -> Reject | None:
    """Of two layers the one that runs last takes the sum."""
    layer, other = match.node("layer"), match.bound["y"]
    source = other.args[0] if is_op(other, "batch_norm") else other
    if not isinstance(source, Node) or not is_op(source, *LAYERS) or len(other.users) > 1:
        return None
    if layer < source:
        return Reject(f"%{source.name} runs later and takes the sum", layer)
    return None


def join(match: Match, editor: Editor) -> None:
    """Give all matched nodes the label of the unit: the name of the layer."""
    label = match.node("layer").name
    for node in reversed(match.nodes):
        editor.annotate(node, unit=label)


_CHECKS: Final = (*CHECKS, tracks_statistics, channels_agree, features_if_linear)
_ALL: Final = (*CONVS, *TRANSPOSED, *LINEAR)


def _sum() -> OpExpr:
    return op("add", _normed(_SUMMED), var("y"), name="add", alpha=1)


_SUM_CHECKS: Final = (*_CHECKS, adds_a_tensor, is_the_later_layer)

TRAINING_RULES: Final[tuple[Rule, ...]] = (
    Rule("layer-bn", _normed(_ALL), join, _CHECKS, priority=10),
    Rule("layer-bn-act", op(ACTIVATIONS, _normed(_ALL)), join, _CHECKS, priority=10),
    Rule("layer-bn-add", _sum(), join, _SUM_CHECKS, priority=10),
    Rule("layer-bn-add-relu", op("relu", _sum()), join, _SUM_CHECKS, priority=10),
    *flattened.RULES,
    *conv.RULES,
    *linear.RULES,
    *residual.RULES,
    *unary.RULES,
)
"""The built-in fusion rules of quantization-aware training."""
