"""Cast floats: what was asked to compute in 16 bits does, with explicit casts at the borders.

    linear(x)                  ->   cast(linear_bfloat16(cast(x, bfloat16)), float32)
    gelu(int8_linear(codes))   ->   gelu(cast(int8_linear(codes), bfloat16))

Layers and products start a stretch of 16 bits, and so does what int8 layers write; moves,
activations and additions go on with it where all they read is 16 bits. ``quantize`` reads either.
Everything else reads float32, and so do the model's results; ``_FLOAT32`` says why.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxquant.graph.edit import Editor
from fxquant.graph.flow import asks_half, float_dtype, wanted, wanted_int8
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import DEQUANTIZE, QUANTIZE, is_op, module_of, op_named, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.graph.view import tensor_sources
from fxquant.passes.base import Pass

_PRODUCTS: Final = ("matmul", "scaled_dot_product_attention")
"""Sums of products are made in float32 inside their kernels; a mask stays as it is."""
_TABLES: Final = ("embedding",)
_FOLLOW: Final = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"),
        *("hardswish", "hardsigmoid", "elu", "dropout", "add", "sub", "mul", "cat", "stack"),
    )
)
"""Each element depends on a few: the result is rounded once, as a layer's is."""

_SUMS: Final = "it adds up many numbers, and sums of 16 bits stop growing"
_SPREAD: Final = "its results span more than 16 bits tell apart"
_MAGNIFIES: Final = "it magnifies the rounding of what it reads"
_FLOAT32: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "batch_norm"),
        "its statistics are sums of squares, which 16 bits cannot hold",
    ),
    **dict.fromkeys(
        ("mean", "sum", "var", "std", "norm", "vector_norm", "local_response_norm"), _SUMS
    ),
    **dict.fromkeys(
        (f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)), _SUMS
    ),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "exp", "log"), _SPREAD),
    **dict.fromkeys(("div", "pow", "sqrt", "rsqrt", "reciprocal", "addcdiv"), _MAGNIFIES),
}
"""Why ops that lose too much read and write float32."""


@dataclass(frozen=True)
class CastFloats(Pass):
    """Write the casts, and give the layers between them parameters in 16 bits."""

    name: ClassVar[str] = "cast-floats"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.QDQ

    def run(self, editor: Editor) -> None:
        """In graph order: what an op reads is settled before the op."""
        if any(float_dtype(node) is not torch.float32 for node in editor.graph.nodes):
            _Casts(editor).settle()


class _Casts:
    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._half: dict[Node, torch.dtype] = {}
        self._made: dict[tuple[Node, torch.dtype], Node] = {}
        self._layers: dict[tuple[int, torch.dtype], nn.Parameter] = {}
        layers = [n for n in editor.graph.nodes if _is_layer(n)]
        self._layer_units = {info(node).unit or node.name for node in layers}

    def settle(self) -> None:
        for node in list(self._editor.graph.nodes):
            starts, follows = self._starts(node), self._follows(node)
            with self._editor.rule("cast-floats"):
                if starts or follows:
                    self._compute(node, float_dtype(node))
                elif not is_op(node, QUANTIZE) and not _is_dynamic_layer(node):
                    self._read_float32(node)
                    self._say_why(node)

    def _starts(self, node: Node) -> bool:
        """A layer with float32 parameters, or a product with a factor of 16 bits."""
        op = op_of(node)
        if op is None or not _may_change(node):
            return False
        if op.name in _PRODUCTS:
            return any(self._is_half(source, node) for source in tensor_sources(node))
        if node.op != "call_module" or not (op.kind is Kind.CONTRACT or op.name in _TABLES):
            return False
        held = [p for p in module_of(node)._parameters.values() if p is not None]
        if getattr(module_of(node), "max_norm", None) is not None:
            return False
        return bool(held) and all(p.dtype == torch.float32 for p in held)

    def _follows(self, node: Node) -> bool:
        if not _may_follow(node):
            return False
        sources = tensor_sources(node)
        known = all(
            self._is_half(source, node) or is_op(source, DEQUANTIZE) or info(source).integral
            for source in sources
        )
        if not known or not any(self._is_half(source, node) for source in sources):
            return False
        # Nothing is gained by casting what is moved alone.
        return not _moves(node) or any(s in self._half for s in sources) or self._gains(node)

    def _gains(self, node: Node) -> bool:
        """Whether an op that computes reads what ``node`` moves, and would do so in 16 bits."""
        dtype = float_dtype(node)
        for user in node.users:
            op = op_of(user)
            if op is None or float_dtype(user) is not dtype or not _may_change(user):
                continue
            if _moves(user):
                if _may_follow(user) and self._gains(user):
                    return True
            elif op.name in _PRODUCTS or op.name in _FOLLOW or op.kind is Kind.CONTRACT:
                return True
        return False

    def _is_half(self, value: Node, reader: Node) -> bool:
        """Whether ``reader`` finds a value in 16 bits, or the int8 layer behind it can write so."""
        dtype = float_dtype(reader)
        if self._half.get(value) is dtype:
            return True
        if float_dtype(value) is not dtype or not (wanted_int8(value) or wanted(value, "dynamic")):
            return False
        unit = info(value).unit
        inside = unit is not None and any(info(user).unit == unit for user in value.users)
        return not inside and (unit or value.name) in self._layer_units

    def _compute(self, node: Node, dtype: torch.dtype) -> None:
        """Let ``node`` read and write ``dtype``."""
        if node.op == "call_module" and module_of(node)._parameters:
            self._editor.set_module(str(node.target), self._layer(module_of(node), dtype))
        if not is_op(node, *_TABLES):
            for source in dict.fromkeys(tensor_sources(node)):
                if self._half.get(source) is not dtype and not info(source).integral:
                    self._editor.replace_use(node, source, self._cast(source, dtype))
        self._half[node] = dtype
        name = str(dtype).removeprefix("torch.")
        why = Decision(False, f"it computes in {name}", "cast-floats")
        self._editor.annotate(node, decision=why)

    def _layer(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A copy with parameters in ``dtype``; tied ones stay one."""
        made = copy.copy(layer)
        made._parameters = {}
        for name, held in layer._parameters.items():
            if held is None:
                made.register_parameter(name, None)
                continue
            key = (id(held), dtype)
            if key not in self._layers:
                self._layers[key] = nn.Parameter(held.detach().to(dtype), requires_grad=False)
            made.register_parameter(name, self._layers[key])
        return made

    def _read_float32(self, node: Node) -> None:
        op = op_of(node)
        if op is not None and op.kind is Kind.SHAPE and "dtype" not in str(node.args):
            return
        for source in node.all_input_nodes:
            if source in self._half:
                self._editor.replace_use(node, source, self._cast(source, torch.float32))

    def _say_why(self, node: Node) -> None:
        """What was asked for 16 bits and stays float32 has a reason of its own."""
        op = op_of(node)
        if op is None or op.kind is Kind.SHAPE or not asks_half(node):
            return
        why = _FLOAT32.get(
            op.name, "what it reads or writes is float32, or not known to be 16 bits"
        )
        decision = Decision(False, f"it stays float32: {why}", "the table of 16-bit ops")
        self._editor.annotate(node, decision=decision)

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


def _moves(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.kind in (Kind.MOVE, Kind.SPLIT)


def _may_follow(node: Node) -> bool:
    """Whether an op goes on in 16 bits where all it reads is; of several results, where all do."""
    op = op_of(node)
    if op is None or not _may_change(node) or not _numbers_fit(node):
        return False
    if op.kind is Kind.SPLIT:
        return all(is_op(user, "getitem") and _may_follow(user) for user in node.users)
    return info(node).value == "tensor" and (op.name in _FOLLOW or op.kind is Kind.MOVE)


def _is_layer(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.kind is Kind.CONTRACT


def _is_dynamic_layer(node: Node) -> bool:
    """What it reads is quantized at run time, whatever float it is."""
    return _is_layer(node) and wanted(node, "dynamic")


def _numbers_fit(node: Node) -> bool:
    """Whether no number of the call, such as the -1e9 of a mask, is too large for the dtype."""
    most = torch.finfo(float_dtype(node)).max
    given = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
    numbers = [float(each) for each in given if isinstance(each, int | float)]
    return not any(most < abs(number) < math.inf for number in numbers)


def _may_change(node: Node) -> bool:
    """Whether it was asked to be 16 bits, nobody writes into it, and no pattern owns it."""
    record = info(node)
    if float_dtype(node) is torch.float32 or wanted_int8(node) or wanted(node, "dynamic"):
        return False
    if record.config is None or record.config.scheme == "weight_only":
        return False
    if record.pinned or record.custom is not None or record.reads is not None:
        return False
    return not any(info(source).pinned for source in tensor_sources(node))
