"""Lowering of dynamic layers to the x86 backend.

linear(quantize_at_run_time(x), dequantize_weight(w), b)   ->  X86DynamicLinear(x)
conv2d(quantize_at_run_time(x), dequantize_weight(w), b)   ->  X86DynamicConv(x)
conv_transpose2d(...)                                      ->  X86DynamicConvTranspose(x)

Linears that read one value become one product with their weights stacked: a row is quantized
once, and a wide product keeps a processor busier than three narrow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.layer_parts import (
    codes_node,
    geometry_of,
    tensors_of,
    transposed_geometry_of,
    weight_of,
)
from fxquant.backends.x86_dynamic import X86DynamicConv, X86DynamicLinear
from fxquant.backends.x86_dynamic_transposed import X86DynamicConvTranspose
from fxquant.backends.x86_layer_rules import is_container
from fxquant.backends.x86_layers import X86Layer
from fxquant.backends.x86_stacked import is_integer_linear, joint_bias, may_be_view
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, op_named
from fxquant.graph.tied import tied_of
from fxquant.numerics.dynamic import runtime_spec
from fxquant.patterns.boundary import DEQUANTIZE_WEIGHT, RUN_TIME
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match
from fxquant.patterns.norm import CONVS, TRANSPOSED
from fxquant.patterns.rule import Rule
from fxquant.spec import QSpec


def at_run_time(layers: tuple[str, ...]) -> OpExpr:
    """A layer with integer weights whose input is quantized at run time."""
    codes = op(RUN_TIME, var("x"), name="rows", shared=True)
    weight = op(DEQUANTIZE_WEIGHT, var("w"), var("scale"), name="dqw", shared=True)
    return op(layers, codes, weight, var("bias"), name="layer")


def spec_of(rows: Node) -> QSpec:
    """How a ``quantize_at_run_time`` quantizes."""
    dtype, bits, symmetric, per_row = (
        argument(rows, name) for name in ("dtype", "bits", "symmetric", "per_row")
    )
    return runtime_spec(dtype, bits, symmetric, "row" if per_row else "tensor", "runtime")


def call_layer(
    editor: Editor, module: nn.Module | str, rows: Node, layers: list[Node], value: str = "tensor"
) -> Node:
    """Call ``module`` on what is quantized, where the first of ``layers`` stands.

    Args:
        editor: the graph.
        module: what to call, or the path of one that is there.
        rows: the quantization at run time.
        layers: what it does the work of.
        value: what it gives.
    """
    first = layers[0]
    path = module if isinstance(module, str) else _path(first)
    if not isinstance(module, str):
        if is_container(editor, path):
            editor.set_module(path, module)
        else:
            path = editor.add_module(path, module)
    made = editor.call_module(path, (rows.args[0],), like=first, before=first)
    origins = dict.fromkeys(name for layer in layers for name in info(layer).origins)
    editor.annotate(
        made,
        reads=(None,),
        value=value,
        unit=None,
        decision=info(first).decision,
        shape=info(first).shape if len(layers) == 1 else None,
        origins=tuple(origins),
    )
    return made


def _path(layer: Node) -> str:
    return str(codes_node(layer).target).rpartition(".")[0]


def _call_once_made(
    editor: Editor,
    rows: Node,
    layers: list[Node],
    bias: Tensor | None,
    make: Callable[[X86Layer | None], X86Layer],
    geometry: Hashable = None,
) -> Node:
    """Call what ``make`` makes, or what was made before of the same weights.

    Args:
        editor: the graph.
        rows: the quantization at run time.
        layers: what it does the work of.
        bias: that of all layers.
        make: makes it, maybe with the packed weight of one that differs in its bias alone.
        geometry: how it walks.
    """
    ties = tuple(tied_of(codes_node(layer)) for layer in layers)
    known: list[str] = []
    if ties[0] is not None and None not in ties:
        known = ties[0].made.setdefault((ties, spec_of(rows), geometry), known)
    value = "tensor" if len(layers) == 1 else "tensors"
    before = [(path, editor.module.get_submodule(path)) for path in known]
    for path, module in before:
        if isinstance(module, X86Layer) and _equal(module.bias, bias):
            known[known.index(path)] = _move(editor, module, path, _path(layers[0]))
            return call_layer(editor, _path(layers[0]), rows, layers, value)
    other = before[0][1] if before else None
    module = make(other if isinstance(other, X86Layer) else None)
    if len(layers) == 1 and ties[0] is not None and ties[0].table:
        module.keep_plain(weight_of(layers[0]))
    made = call_layer(editor, module, rows, layers, value)
    known.append(str(made.target))
    return made


def _move(editor: Editor, module: X86Layer, path: str, to: str) -> str:
    """Let the calls of ``module`` find it under the path of an earlier call: the first is the
    user's own name."""
    editor.set_module(to, module)
    for node in [n for n in editor.graph.nodes if n.op == "call_module" and n.target == path]:
        editor.set_call(node, to, node.args, dict(node.kwargs))
    return to


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _lower_conv(match: Match, editor: Editor) -> None:
    layer, rows = match.node("layer"), match.node("rows")
    parts, geometry = tensors_of(layer, editor), geometry_of(layer)

    def make(_: X86Layer | None) -> X86Layer:
        return X86DynamicConv(*parts, spec_of(rows), geometry)

    made = _call_once_made(editor, rows, [layer], parts[2], make, geometry)
    editor.replace(layer, made, *match.nodes[1:])


def _lower_transposed(match: Match, editor: Editor) -> None:
    layer, rows = match.node("layer"), match.node("rows")
    parts, geometry = tensors_of(layer, editor), transposed_geometry_of(layer)

    def make(_: X86Layer | None) -> X86Layer:
        return X86DynamicConvTranspose(*parts, spec_of(rows), geometry)

    made = _call_once_made(editor, rows, [layer], parts[2], make, geometry)
    editor.replace(layer, made, *match.nodes[1:])


def _lower_linear(match: Match, editor: Editor) -> None:
    rows = match.node("rows")
    shared = [user for user in rows.users if is_integer_linear(user) and may_be_view(user)]
    together = [node for node in editor.graph.nodes if node in shared]
    layers = together if match.root in shared else [match.root]
    parts = [tensors_of(layer, editor) for layer in layers]
    bias = joint_bias(parts)

    def make(other: X86Layer | None) -> X86Layer:
        packed = None if other is None else other.packed
        return _stacked(parts, bias, spec_of(rows), packed)

    made = _call_once_made(editor, rows, layers, bias, make)
    for layer in layers[1:]:
        # The stack has its weight now: its memory is for the next one to be packed into.
        if tied_of(codes_node(layer)) is None and is_container(editor, _path(layer)):
            editor.set_module(_path(layer), nn.Module())
    if len(layers) == 1:
        editor.replace(match.root, made, *match.nodes[1:])
        return
    for place, layer in enumerate(layers):
        part = editor.call(op_named("getitem"), (made, place), like=layer, before=layer)
        editor.annotate(
            part,
            value="tensor",
            unit=None,
            decision=info(layer).decision,
            shape=info(layer).shape,
        )
        editor.replace(layer, part)


_Parts = list[tuple[Tensor, Tensor, Tensor | None]]
"""Weight, scale and bias of layers."""


def _stacked(
    parts: _Parts, bias: Tensor | None, spec: QSpec, packed: Tensor | None
) -> X86DynamicLinear:
    if len(parts) == 1:
        return X86DynamicLinear(*parts[0], spec, packed=packed)
    weights, scales, _ = zip(*parts, strict=True)
    sizes = [len(weight) for weight in weights]
    return X86DynamicLinear(torch.cat(weights), torch.cat(scales), bias, spec, sizes, packed=packed)


DYNAMIC_RULES: Final = (
    Rule("x86-dynamic-linear", at_run_time(("linear",)), _lower_linear),
    Rule("x86-dynamic-conv", at_run_time(CONVS), _lower_conv),
    Rule("x86-dynamic-conv-transpose", at_run_time(TRANSPOSED), _lower_transposed),
)
