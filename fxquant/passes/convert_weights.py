"""Convert weights that are only stored: codes in memory, arithmetic in float.

linear(x)      ->   linear(x, dequantize_stored(codes, scale, zero_point), bias)
embedding(i)   ->   the same call of a table that holds codes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import wanted
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import DEQUANTIZE_STORED, is_op, module_of, op_named, op_of
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes
from fxquant.numerics.finite import all_finite
from fxquant.numerics.stored import store_weight
from fxquant.numerics.stored_tables import StoredEmbedding, StoredEmbeddingBag, StoredParts
from fxquant.passes.base import Pass
from fxquant.spec import DEFAULT_WEIGHT, QSpec

_TABLES: Final = ("embedding", "embedding_bag")
_LINEAR: Final = "linear"


@dataclass(frozen=True)
class _Held:
    weight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    layout: tuple[int, int, bool]


_Cache = dict[tuple[int, QSpec], _Held]
"""Stored weights by the float weight they come from, and its spec: tied weights stay one."""


@dataclass(frozen=True)
class ConvertWeights(Pass):
    """Store the weights of linears and tables as integers, where that was decided."""

    name: ClassVar[str] = "convert-weights"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.MEASURED

    def run(self, editor: Editor) -> None:
        """Op by op; a table that is also read in float stays float: it would be stored twice."""
        cache: _Cache = {}
        wants = [node for node in editor.graph.nodes if wanted(node, "weight_only")]
        takers = {str(node.target) for node in wants if node.op == "call_module"}
        for node in wants:
            if is_op(node, *_TABLES):
                why = _stays_float(editor, node, takers)
                if why is not None:
                    takers.discard(str(node.target))
                    with editor.rule("leave-float"):
                        editor.annotate(node, decision=Decision(False, why, self.name))
                    continue
                with editor.rule("store-table"):
                    self._table(editor, node, cache)
            elif is_op(node, _LINEAR) and node.op == "call_module":
                with editor.rule("store-weight"):
                    self._linear(editor, node, cache)
        with editor.rule("drop-dead"):
            editor.clean()

    def _table(self, editor: Editor, node: Node, cache: _Cache) -> None:
        layer: Any = module_of(node)
        parts = _parts(node, layer.weight, None, cache, StoredEmbedding)
        made = StoredEmbeddingBag(layer, parts) if isinstance(layer, nn.EmbeddingBag) else parts
        editor.set_module(str(node.target), made)
        given = flat_nodes((node.args, tuple(node.kwargs.values())))
        reads = (None,) * len([n for n in given if info(n).value not in ("scalar", "sizes")])
        record = info(node)
        by = record.decision.by if record.decision is not None else self.name
        why = f"its table is stored as {parts.kind}"
        editor.annotate(node, decision=Decision(True, why, by), reads=reads)

    @staticmethod
    def _linear(editor: Editor, node: Node, cache: _Cache) -> None:
        layer, path = module_of(node), str(node.target)
        weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
        own = None if bias is None else bias.detach().clone()
        parts = _parts(node, weight, own, cache, StoredParts)
        editor.set_module(path, parts)
        held: dict[str, Node | None] = {}
        for name in ("weight", "weight_scale", "weight_zero_point", "bias"):
            there = parts._buffers[name] is not None
            held[name] = (
                editor.get_attr(f"{path}.{name}", like=node, before=node) if there else None
            )
        size, _, packed = parts.layout
        codes, scale, zeros, bias_node = held.values()
        real = editor.call(
            op_named(DEQUANTIZE_STORED),
            (codes, scale, zeros, size, tuple(weight.shape), packed),
            like=node,
            before=node,
        )
        for made in (*held.values(), real):
            if made is not None:
                editor.note_values(made, unit=None, decision=None, value="tensor", shape=None)
        op = op_of(node)
        function = next(iter(op.functions)) if op is not None else nn.functional.linear
        editor.set_call(node, function, (node.args[0], real, bias_node), {})
        reads = (None,) * (2 + (bias_node is not None))
        editor.annotate(node, reads=reads)


def _parts(
    node: Node,
    weight: nn.Parameter,
    bias: torch.Tensor | None,
    cache: _Cache,
    make: type[StoredParts],
) -> StoredParts:
    config = info(node).config
    spec = config.weight if config is not None and config.weight is not None else DEFAULT_WEIGHT
    key = (id(weight), spec)
    if key not in cache:
        made = store_weight(weight, spec)
        layout = (made.group_size, made.width, made.packed)
        cache[key] = _Held(made.codes, made.scale, made.zero_point, layout)
    held = cache[key]
    return make(held.weight, held.scale, held.zero_point, held.layout, spec.bits, bias)


def _stays_float(editor: Editor, node: Node, takers: set[str]) -> str | None:
    """Why a table stays float."""
    layer: Any = module_of(node)
    table = layer.weight
    if layer.max_norm is not None:
        return "max_norm changes its table in every call"
    if table.dtype != torch.float32 or table.numel() == 0:
        return f"a {table.dtype} table {list(table.shape)} would not shrink"
    if not all_finite(table):
        return "its table holds NaN or infinity"
    for path, owner in editor.module.named_modules():
        if any(held is table for held in owner._parameters.values()) and path not in takers:
            return f"{path or 'the model'} reads the same table in float"
    return None
