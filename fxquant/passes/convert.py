"""Convert: from decisions and ranges to the Q/DQ graph, the hub every backend lowers from.

    conv(x)   ->   conv2d(dequantize(quantize(x)), dequantize_weight(w_int8), bias) -> quantize

Weights become integers here. A value that int8 ops read is quantized once, right where it is made,
and read through one ``dequantize``; readers in float read that too if the maker is int8, since
then only codes exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import Flow, is_join, moves_codes, wanted, wanted_int8
from fxquant.graph.info import Decision, QType, info
from fxquant.graph.integer_modules import IntegerEmbedding, IntegerEmbeddingBag
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    is_op,
    module_of,
    op_named,
    op_of,
)
from fxquant.graph.ops import Kind, Op
from fxquant.graph.tied import Tied
from fxquant.graph.verify import Stage
from fxquant.graph.view import is_given, tensor_sources
from fxquant.numerics.finite import all_finite
from fxquant.numerics.integer import fits_int32
from fxquant.numerics.integer_weights import trained_weight
from fxquant.passes.base import Pass
from fxquant.spec import DEFAULT_WEIGHT, QSpec

_TABLES: Final = (nn.Embedding, nn.EmbeddingBag)
_Cache = dict[tuple[int, QSpec, int], tuple[Tensor, Tensor]]
"""Integer weights by the float weight they come from, its spec and its channel axis."""


class QuantizedWeight(nn.Module):
    """Holds the integer weight of one layer, under the path of the layer it came from.

    Args:
        weight: int8 codes, shaped as the layer's weight.
        scale: float32, ``[channels]`` or ``[1]``.
        bias: float32 ``[channels]`` or ``None``.

    Attributes:
        tied: what it shares with the other layers that hold the same codes.
    """

    tied: Tied | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.tied = None
        scale, bias = _one_block(scale, bias)
        # Buffers: integers cannot require gradients, and what users do to all parameters may.
        for name, tensor in (("weight", weight), ("weight_scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        """Shape and granularity, for ``print(model)``."""
        weight, scale = self.get_buffer("weight"), self.get_buffer("weight_scale")
        kind = "per channel" if scale.numel() > 1 else "per tensor"
        return f"{tuple(weight.shape)} int8 {kind}, bias={self._buffers['bias'] is not None}"


def _one_block(scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and bias in one piece of memory: files hold a record of its own for every piece."""
    if bias is None or bias.shape != scale.shape:
        return scale, bias
    block = torch.stack((scale, bias.to(scale.dtype)))
    return block[0], block[1]


@dataclass(frozen=True)
class Convert(Pass):
    """Write the Q/DQ graph.

    Args:
        saturates_pairs: whether the machine's kernels add products in pairs of 16 bits; then
            output channels that could pass them have a coarser scale, and only those.
    """

    name: ClassVar[str] = "convert"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.QDQ
    saturates_pairs: bool = False

    def run(self, editor: Editor) -> None:
        """Weights first: one whose sums could pass 32 bits sends its unit back to float."""
        cache: _Cache = {}
        ties: dict[int, Tied] = {}
        for node in list(editor.graph.nodes):
            op = op_of(node)
            if op is None or op.kind is not Kind.CONTRACT:
                continue
            # Weights are the same whether activations are quantized beforehand or at run time.
            if wanted_int8(node) or wanted(node, "dynamic"):
                self._weight(editor, node, op, cache, ties)
        self._edges(editor)
        for node in [n for n in editor.graph.nodes if is_op(n, "embedding", "embedding_bag")]:
            self._table(editor, node, cache, ties)
        with editor.rule("drop-dead"):
            editor.clean()

    def _weight(
        self,
        editor: Editor,
        node: Node,
        op: Op,
        cache: _Cache,
        ties: dict[int, Tied],
    ) -> None:
        layer: Any = module_of(node)
        config = info(node).config
        spec = config.weight if config is not None and config.weight is not None else DEFAULT_WEIGHT
        # A transposed weight is [in, out / groups, ...]: groups share the scale of a channel.
        axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
        fit = self.saturates_pairs and not _one_input(layer)
        codes, scale = _cached(node, layer.weight, spec, axis, cache, fit)
        if not fits_int32(codes, 255, axis):
            self._refuse(editor, node)
            return
        bias = layer.bias.detach().clone() if layer.bias is not None else None
        path = str(node.target)
        with editor.rule("quantize-weight"):
            held = QuantizedWeight(codes, scale, bias)
            held.tied = ties.setdefault(id(codes), Tied())
            held.tied.calls += 1
            editor.set_module(path, held)
            self._call(editor, node, op, layer, None if scale.numel() == 1 else axis)

    def _table(self, editor: Editor, node: Node, cache: _Cache, ties: dict[int, Tied]) -> None:
        """Store a table of embeddings as int8: a lookup moves rows, whatever runs the rest."""
        config, layer = info(node).config, module_of(node)
        if config is None or config.activation is None or not isinstance(layer, _TABLES):
            return
        table, why = layer.weight, _stays_float(editor, layer, config.weight is None)
        if why is None:
            spec = config.weight or DEFAULT_WEIGHT
            integers = _cached(node, table, spec, 0, cache, False)
            tied = ties.get(id(integers[0]))
            if tied is not None:
                tied.calls, tied.table = tied.calls + 1, True
            why, by = "its table is int8", info(node).configured_by
            with editor.rule("quantize-table"):
                made: nn.Module = (
                    IntegerEmbeddingBag(layer, *integers)
                    if isinstance(layer, nn.EmbeddingBag)
                    else IntegerEmbedding(*integers)
                )
                editor.set_module(str(node.target), made)
                reads = (None,) * len(tensor_sources(node))
                editor.annotate(node, decision=Decision(True, why, by), reads=reads)
            return
        with editor.rule("leave-float"):
            editor.annotate(node, decision=Decision(False, why, "convert"))

    @staticmethod
    def _refuse(editor: Editor, node: Node) -> None:
        why = "the sum of its products could pass 32 bits"
        unit = next((u for u in Flow(editor.graph).units if node in u.nodes), None)
        with editor.rule("leave-float"):
            for member in unit.nodes if unit is not None else (node,):
                editor.annotate(member, decision=Decision(False, why, "convert"))

    @staticmethod
    def _call(editor: Editor, node: Node, op: Op, layer: Any, axis: int | None) -> None:
        """``call_module[conv](x)`` becomes ``conv2d(x, dequantize_weight(w), b, ...)``."""
        path = str(node.target)
        codes = editor.get_attr(f"{path}.weight", like=node, before=node)
        scale = editor.get_attr(f"{path}.weight_scale", like=node, before=node)
        real = editor.call(
            op_named(DEQUANTIZE_WEIGHT), (codes, scale, axis), like=node, before=node
        )
        bias = None
        if layer.bias is not None:
            bias = editor.get_attr(f"{path}.bias", like=node, before=node)
        for made in (codes, scale, real, bias):
            if made is not None:
                editor.note_values(made, unit=None, decision=None, value="tensor", shape=None)
        options = {name: getattr(layer, name) for name in op.options}
        function = next(iter(op.functions))
        editor.set_call(node, function, (node.args[0], real, bias), options)

    @staticmethod
    def _edges(editor: Editor) -> None:
        boundary = _Boundary(editor)
        for node in list(editor.graph.nodes):
            boundary.settle(node)


def _one_input(layer: Any) -> bool:
    """Whether sums run over one input channel, as in a depthwise layer: kernels pair channels."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return bool(layer.in_channels == layer.groups)
    return False


def _cached(
    node: Node, weight: Tensor, spec: QSpec, axis: int, cache: _Cache, fit_pairs: bool
) -> tuple[Tensor, Tensor]:
    """The integers of a weight: those it was trained with, where it was trained with some."""
    key = (id(weight), spec, axis)
    if key not in cache:
        trained = info(node).weight_scales
        cache[key] = trained_weight(weight.detach(), spec, axis, trained, fit_pairs=fit_pairs)
    return cache[key]


def _stays_float(editor: Editor, layer: nn.Embedding | nn.EmbeddingBag, asked: bool) -> str | None:
    """Why a table cannot be int8; one that is also read in float would be stored twice."""
    table = layer.weight
    if asked:
        return "its weight was asked to stay float"
    if layer.max_norm is not None:
        return "max_norm changes its table in every call"
    if table.dtype != torch.float32 or table.shape[1] < 2 or table.numel() == 0:
        return f"a {table.dtype} table {list(table.shape)} would not shrink"
    if not all_finite(table):
        return "its table holds NaN or infinity"
    for path, owner in editor.module.named_modules():
        shares = any(held is table for held in owner._parameters.values())
        if shares and not isinstance(owner, _TABLES):
            return f"{path} reads the same table in float"
    named = [str(n.target) for n in editor.graph.nodes if n.op == "get_attr"]
    for path in named:
        parent, _, leaf = path.rpartition(".")
        if getattr(editor.module.get_submodule(parent), leaf, None) is table:
            return f"{path} is read as a tensor too"
    return None


class _Boundary:
    """Puts ``quantize`` and ``dequantize`` where codes are made and read."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor

    def settle(self, value: Node) -> None:
        """Quantize ``value`` if int8 ops read it, and let its readers read the codes."""
        qtype = info(value).qtype
        tuple_valued = info(value).value == "tensors"
        if qtype is None or tuple_valued or is_inside(value):
            return
        makes_codes = wanted_int8(value)
        users = [u for u in value.users if not _same_unit(u, value)]
        readers = [u for u in users if wanted_int8(u) and value in tensor_sources(u)]
        # Moving codes is exact, so codes that were moved stay codes even for readers in float.
        # A kernel of the user's makes codes and nothing else.
        if not readers and not (makes_codes and (moves_codes(value) or _has_kernel(value))):
            return
        with self._editor.rule("insert-qdq"):
            real = self._pair(value, qtype)
            for user in users:
                if _asks_shape(user):
                    self._ask_codes(user, value, real)
                elif user in readers or makes_codes:
                    self._editor.replace_use(user, value, real)
            self._join(real, qtype)

    def _ask_codes(self, user: Node, value: Node, real: Node) -> None:
        """Codes have the shape of what they stand for; nothing need be made float to ask."""
        codes = real.args[0]
        if isinstance(codes, Node):
            self._editor.replace_use(user, value, codes)
            self._editor.annotate(user, reads=(info(codes).writes,))

    def _join(self, real: Node, qtype: QType) -> None:
        """A join that does not share this scale reads its own, requantized."""
        for user in list(real.users):
            wanted = info(user).qtype
            if not is_join(user) or not wanted_int8(user) or wanted is None or wanted == qtype:
                continue
            self._editor.replace_use(user, real, self._pair(real, wanted))

    def _pair(self, value: Node, qtype: QType) -> Node:
        editor = self._editor
        last = value
        while value.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        codes = editor.call(
            op_named(QUANTIZE),
            (value, qtype.scale, qtype.zero_point, qtype.quant_min, qtype.quant_max, qtype.dtype),
            like=value,
            after=last,
        )
        real = editor.call(
            op_named(DEQUANTIZE), (codes, qtype.scale, qtype.zero_point), like=value, after=codes
        )
        editor.note_values(codes, writes=qtype, unit=None, decision=None, value="tensor")
        editor.note_values(real, unit=None, decision=None, value="tensor")
        return real


def _same_unit(user: Node, value: Node) -> bool:
    label = info(value).unit
    return label is not None and info(user).unit == label


def _has_kernel(value: Node) -> bool:
    custom = info(value).custom
    return custom is not None and custom.kernel is not None


def _asks_shape(user: Node) -> bool:
    op = op_of(user)
    return op is not None and op.kind is Kind.SHAPE


def is_inside(value: Node) -> bool:
    """Whether ``value`` is inside a unit, not one of its results."""
    return not is_given(value) and any(_same_unit(user, value) for user in value.users)
