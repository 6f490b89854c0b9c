"""Lowering of dynamic layers to the x86 backend.

linear(quantize_at_run_time(x), dequantize_weight(w), b)   ->  X86DynamicLinear(x)
conv2d(quantize_at_run_time(x), dequantize_weight(w), b)   ->  X86DynamicConv(x)

Linears that read one value become one product with their weights stacked: a row is quantized
once, and a wide product keeps a processor busier than three narrow ones.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.x86_dynamic import X86DynamicConv, X86DynamicLinear
from fxquant.backends.x86_layer_rules import geometry_of, is_container, tensors_of
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, op_named, op_of
from fxquant.numerics.dynamic import runtime_spec
from fxquant.patterns.boundary import DEQUANTIZE_WEIGHT, RUN_TIME
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match
from fxquant.patterns.norm import CONVS
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
    editor: Editor, module: nn.Module, rows: Node, layers: list[Node], value: str = "tensor"
) -> Node:
    """Call ``module`` on what is quantized, where the first of ``layers`` stands."""
    first = layers[0]
    path = _path(first)
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
    weight: Any = layer.args[1]
    return str(weight.args[0].target).rpartition(".")[0]


def _lower_conv(match: Match, editor: Editor) -> None:
    layer, rows = match.node("layer"), match.node("rows")
    parts = tensors_of(layer, editor)
    made = call_layer(
        editor, X86DynamicConv(*parts, spec_of(rows), geometry_of(layer)), rows, [layer]
    )
    editor.replace(layer, made, *match.nodes[1:])


def _lower_linear(match: Match, editor: Editor) -> None:
    rows = match.node("rows")
    shared = [user for user in rows.users if _is_dynamic_linear(user) and _may_be_view(user)]
    together = [node for node in editor.graph.nodes if node in shared]
    layers = together if match.root in shared else [match.root]
    module = _stacked([tensors_of(layer, editor) for layer in layers], spec_of(rows))
    if len(layers) == 1:
        made = call_layer(editor, module, rows, layers)
        editor.replace(match.root, made, *match.nodes[1:])
        return
    made = call_layer(editor, module, rows, layers, "tensors")
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


def _is_dynamic_linear(node: Node) -> bool:
    return (
        node.op == "call_function"
        and is_op(node, "linear")
        and is_op(node.args[1], DEQUANTIZE_WEIGHT)
    )


def _may_be_view(node: Node) -> bool:
    """Parts of a wide product lie apart in memory, which ops take and a user's code may not."""
    return all(op_of(user) is not None for user in node.users)


def _stacked(parts: list[tuple[Tensor, Tensor, Tensor | None]], spec: QSpec) -> X86DynamicLinear:
    if len(parts) == 1:
        return X86DynamicLinear(*parts[0], spec)
    weights, scales, biases = zip(*parts, strict=True)
    bias = None
    if any(each is not None for each in biases):
        filled = [
            torch.zeros(weight.shape[0]) if each is None else each
            for weight, each in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(filled)
    sizes = [weight.shape[0] for weight in weights]
    return X86DynamicLinear(torch.cat(weights), torch.cat(scales), bias, spec, sizes)


DYNAMIC_RULES: Final = (
    Rule("x86-dynamic-linear", at_run_time(("linear",)), _lower_linear),
    Rule("x86-dynamic-conv", at_run_time(CONVS), _lower_conv),
)
