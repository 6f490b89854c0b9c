"""Cast floats: units that were asked to compute in bfloat16 do, with explicit casts at the borders.

    linear(x)   ->   cast(linear_bfloat16(cast(x, bfloat16)), float32)

Layers and products start a stretch of bfloat16; moves, activations and additions go on with it
where all they read is bfloat16. Everything else reads float32: norms, softmax by itself, averages,
exponentials and sums, which lose too much of eight bits of mantissa, and the model's results.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import asks_half
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import module_of, op_named, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.graph.view import tensor_sources
from fxquant.passes.base import Pass

_PRODUCTS: Final = ("matmul", "scaled_dot_product_attention")
_TABLES: Final = ("embedding",)
_FOLLOW: Final = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"),
        *("hardswish", "hardsigmoid", "elu", "dropout", "add", "sub", "mul", "cat", "stack"),
    )
)
"""Each element depends on a few: bfloat16 rounds the result once, as it does a layer's."""


@dataclass(frozen=True)
class CastFloats(Pass):
    """Write the casts, and give the layers between them parameters in bfloat16."""

    name: ClassVar[str] = "cast-floats"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.QDQ

    def run(self, editor: Editor) -> None:
        """In graph order: what an op reads is settled before the op."""
        if not any(asks_half(node) for node in editor.graph.nodes):
            return
        _Casts(editor).settle()


class _Casts:
    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._half: set[Node] = set()
        self._made: dict[tuple[Node, torch.dtype], Node] = {}
        self._layers: dict[int, nn.Parameter] = {}

    def settle(self) -> None:
        for node in list(self._editor.graph.nodes):
            starts, follows = self._starts(node), self._follows(node)
            with self._editor.rule("cast-floats"):
                if starts:
                    self._start(node)
                if starts or follows:
                    self._half.add(node)
                    why = Decision(False, "it computes in bfloat16", "cast-floats")
                    self._editor.annotate(node, decision=why)
                else:
                    self._read_float32(node)

    def _starts(self, node: Node) -> bool:
        """A layer with float32 parameters, or a product with a bfloat16 factor."""
        op = op_of(node)
        if op is None or not _may_change(node) or not asks_half(node):
            return False
        if op.name in _PRODUCTS:
            sources = tensor_sources(node)
            # A mask may be of booleans, and is not known to be: it would have to be cast.
            return len(sources) <= 3 - (op.name == "matmul") and not self._half.isdisjoint(sources)
        if node.op != "call_module" or not (op.kind is Kind.CONTRACT or op.name in _TABLES):
            return False
        held = [p for p in module_of(node)._parameters.values() if p is not None]
        if getattr(module_of(node), "max_norm", None) is not None:
            return False
        return bool(held) and all(p.dtype == torch.float32 for p in held)

    def _follows(self, node: Node) -> bool:
        op = op_of(node)
        if op is None or not _may_change(node) or not asks_half(node):
            return False
        if op.name not in _FOLLOW and op.kind is not Kind.MOVE:
            return False
        sources = tensor_sources(node)
        known = all(source in self._half or info(source).integral for source in sources)
        return known and not self._half.isdisjoint(sources) and info(node).value == "tensor"

    def _start(self, node: Node) -> None:
        op = op_of(node)
        if node.op == "call_module":
            self._editor.set_module(str(node.target), self._layer(module_of(node)))
        if op is None or op.name in _TABLES:
            return
        for source in dict.fromkeys(tensor_sources(node)):
            if source not in self._half:
                self._editor.replace_use(node, source, self._cast(source, torch.bfloat16))

    def _layer(self, layer: nn.Module) -> nn.Module:
        """A copy with bfloat16 parameters; tied ones stay one."""
        made = copy.copy(layer)
        made._parameters = {}
        for name, held in layer._parameters.items():
            if held is None:
                made.register_parameter(name, None)
                continue
            if id(held) not in self._layers:
                half = held.detach().to(torch.bfloat16)
                self._layers[id(held)] = nn.Parameter(half, requires_grad=False)
            made.register_parameter(name, self._layers[id(held)])
        return made

    def _read_float32(self, node: Node) -> None:
        op = op_of(node)
        if op is not None and op.kind is Kind.SHAPE and "dtype" not in str(node.args):
            return
        for source in node.all_input_nodes:
            if source in self._half:
                self._editor.replace_use(node, source, self._cast(source, torch.float32))

    def _cast(self, value: Node, dtype: torch.dtype) -> Node:
        key = (value, dtype)
        if key not in self._made:
            last = value
            while value.op == "placeholder" and last.next.op == "placeholder":
                last = last.next
            options = {"dtype": dtype, "device": None, "like": None}
            made = self._editor.call(op_named("cast"), (value,), options, like=value, after=last)
            self._editor.note_values(
                made, unit=None, decision=None, config=None, value="tensor", reads=None
            )
            self._made[key] = made
        return self._made[key]


def _may_change(node: Node) -> bool:
    """Whether nobody writes into what the node makes or reads, and no pattern owns it."""
    if info(node).pinned or info(node).custom is not None or info(node).reads is not None:
        return False
    return not any(info(source).pinned for source in tensor_sources(node))
