"""Weights of a quantized model against those of the float model."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import DEQUANTIZE_WEIGHT, is_op, module_of
from fxquant.numerics.agreement import weight_sqnr
from fxquant.numerics.stored_tables import StoredParts


def weight_agreement(
    origins: Collection[str], captured: GraphModule, made: GraphModule
) -> float | None:
    """The SQNR of the weight of one op in decibels, up to a factor for each output channel.

    Args:
        origins: names of the captured nodes that the op comes from.
        captured: the float model's graph.
        made: the quantized model's graph.

    Returns:
        ``None`` where either has no weight, or several, or weights of different shapes.
    """
    float_nodes = [n for n in captured.graph.nodes if n.name in origins]
    real = [w for node in float_nodes for w in _float_weights(node, captured)]
    nodes = [n for n in made.graph.nodes if set(info(n).origins) & set(origins)]
    stored = [
        w[rows] for node in nodes for rows in _rows(node, nodes) for w in _stored_weights(node)
    ]
    if len(real) != 1 or len(stored) != 1 or real[0].numel() != stored[0].numel():
        return None
    a, b = real[0], stored[0]
    transposed = any(_is_transposed(node) for node in float_nodes)
    if transposed:
        return weight_sqnr(a.transpose(0, 1), b.reshape(a.shape).transpose(0, 1))
    # Of a matrix product the weight stands as [in, out]; a square one does not tell by its shape.
    turned = [a, a.T] if a.dim() == 2 and b.dim() == 2 else [a]
    same = [weight_sqnr(w, b.reshape(w.shape)) for w in turned if w.shape[0] == b.shape[0]]
    return max(same, default=None)


def _rows(node: Node, nodes: Collection[Node]) -> list[slice]:
    """Which rows of the weight of ``node`` are those of ``nodes``: layers may stand in a stack."""
    sizes = getattr(module_of(node), "sizes", ()) if node.op == "call_module" else ()
    if len(sizes) < 2:
        return [slice(None)]
    ends = list(itertools.accumulate(sizes, initial=0))
    parts = [user.args[1] for user in node.users if user in nodes and is_op(user, "getitem")]
    return [slice(ends[at], ends[at + 1]) for at in parts if isinstance(at, int)]


def _is_transposed(node: Node) -> bool:
    module = module_of(node) if node.op == "call_module" else None
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def _float_weights(node: Node, module: GraphModule) -> Iterator[Tensor]:
    """Weights of two dimensions or more that a captured node computes with."""
    if node.op == "call_module":
        found = getattr(module_of(node), "weight", None)
        if isinstance(found, Tensor) and found.dim() > 1:
            yield found
        return
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            held = held_tensor(source)
            if isinstance(held, nn.Parameter) and held.dim() > 1:
                yield held


def _stored_weights(node: Node) -> Iterator[Tensor]:
    """Weights that a node of a converted graph computes with, as float."""
    if is_op(node, DEQUANTIZE_WEIGHT):
        # A loaded model passes some of them by name.
        given = dict(zip(("q", "scale", "axis"), node.args, strict=False)) | node.kwargs
        codes, scale, axis = given["q"], given["scale"], given["axis"]
        q, steps = held_tensor(codes), held_tensor(scale)
        if q is not None and steps is not None:
            yield _scaled(q, steps, axis if isinstance(axis, int) else 0)
        return
    if node.op != "call_module":
        return
    module = module_of(node)
    if "weight" in node.kwargs:
        return  # in training it is rounded in every call
    if isinstance(module, StoredParts):
        rows = module.get_buffer("weight").shape[0]
        yield module.real_rows(torch.arange(rows, device=module.get_buffer("weight").device))
        return
    weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return
    if weight.is_floating_point():
        yield weight
    elif isinstance(scale, Tensor):
        yield _scaled(weight, scale, 0)


def _scaled(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Codes times their scale; a scale that fits no axis is left to the factor of each channel."""
    if scale.numel() == 1:
        return codes.float() * scale.reshape(())
    if codes.shape[axis] != scale.numel():
        return codes.float()
    shape = [1] * codes.dim()
    shape[axis] = -1
    return codes.float() * scale.reshape(shape)
