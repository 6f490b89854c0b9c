"""Convert recurrent layers: the float module becomes one with int8 weights, in its place.

lstm(x, (h, c))   ->   the same call of an IntegerRecurrent
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.base import MEASURED, Costs
from fxquant.graph.edit import Editor
from fxquant.graph.flow import wanted
from fxquant.graph.info import Decision, info
from fxquant.graph.recurrent_layers import (
    recurrent_layer,
    recurrent_matrices,
    why_slower,
    work_of,
)
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.numerics.integer_weights import trained_weight
from fxquant.passes.base import Pass
from fxquant.spec import DEFAULT_WEIGHT, ROWS, QSpec

_Cache = dict[tuple[int, QSpec], tuple[Tensor, Tensor]]
"""Integer weights by the float weight they come from, and its spec."""


@dataclass(frozen=True)
class ConvertRecurrent(Pass):
    """Give recurrent layers int8 weights, where that was decided and is worth it.

    Args:
        costs: what a step costs in float and in int8; where a user asked for a layer, or for
            dynamic quantization, that decides and not the costs.
        saturates_pairs: as for the pass that converts other weights.
    """

    name: ClassVar[str] = "convert-recurrent"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.MEASURED
    costs: Costs = field(default_factory=lambda: MEASURED)
    saturates_pairs: bool = False

    def run(self, editor: Editor) -> None:
        """Layer by layer; two calls that share a weight share its codes."""
        cache: _Cache = {}
        for node in editor.graph.nodes:
            layer = recurrent_layer(node) if wanted(node, "dynamic") else None
            if layer is None:
                continue
            work = work_of(layer)
            real, codes = (cost.of(0, work) for cost in self.costs.recurrent())
            slower = why_slower(node, layer, real, codes)
            if slower is not None:
                with editor.rule("leave-float"):
                    editor.annotate(node, decision=Decision(False, slower, self.name))
                continue
            with editor.rule("quantize-recurrent"):
                editor.set_module(str(node.target), self._integer(node, layer, cache))
                given = flat_nodes((node.args, tuple(node.kwargs.values())))
                wants = [n for n in given if info(n).value not in ("scalar", "sizes")]
                editor.annotate(node, reads=(None,) * len(wants))

    def _integer(self, node: Node, layer: nn.RNNBase, cache: _Cache) -> IntegerRecurrent:
        config = info(node).config
        spec = config.weight if config is not None and config.weight is not None else DEFAULT_WEIGHT
        reads = config.activation if config is not None and config.activation is not None else ROWS
        made, trained = {}, dict(info(node).matrix_scales)
        for name, weight in recurrent_matrices(layer):
            if weight is None:
                raise TypeError(f"{node.target}.{name} is no parameter")
            key = (id(weight), spec)
            if key not in cache:
                fit = self.saturates_pairs
                cache[key] = trained_weight(
                    weight.detach(), spec, 0, trained.get(name), fit_pairs=fit
                )
            made[name] = cache[key]
        # One range for several rows would make a sequence depend on its batch mates.
        return IntegerRecurrent(layer, made, dataclasses.replace(reads, granularity="row"))
