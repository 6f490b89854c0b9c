"""What a layer of the Q/DQ graph is made of: its integer weight, and how it walks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_transposed import TransposedGeometry
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import argument, op_of
from fxquant.patterns.norm import TRANSPOSED


def op_name(node: Node) -> str:
    """The canonical op that a node calls, or nothing."""
    found = op_of(node)
    return found.name if found is not None else ""


def tensors_of(layer: Node, editor: Editor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight codes, scale and bias, as the graph's attributes hold them."""

    def at(value: Any) -> Any:
        if not isinstance(value, Node):
            return None
        parent, _, leaf = str(value.target).rpartition(".")
        return getattr(editor.module.get_submodule(parent), leaf).detach()

    real, held = layer.args[1], argument(layer, "bias")
    weight, scale = (at(source) for source in real.args[:2])  # type: ignore[union-attr]  # the pattern that matched has it
    if scale.numel() == 1:
        axis = 1 if op_name(layer) in TRANSPOSED else 0
        scale = scale.expand(weight.shape[axis]).contiguous()
    return weight, scale, at(held)


def codes_node(layer: Node) -> Node:
    """The ``get_attr`` of the integer weight that a layer reads."""
    codes: Node = layer.args[1].args[0]  # type: ignore[union-attr,assignment]  # the pattern that matched has it
    return codes


def weight_of(layer: Node) -> Tensor:
    """The integer weight that a layer reads."""
    parent, _, leaf = str(codes_node(layer).target).rpartition(".")
    owner = layer.graph.owning_module
    if owner is None:
        raise TypeError(f"%{layer.name} belongs to no module")
    weight: Tensor = getattr(owner.get_submodule(parent), leaf)
    return weight


def _each(layer: Node, name: str, rank: int) -> tuple[int, ...]:
    value = argument(layer, name)
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * rank


def geometry_of(layer: Node) -> Geometry:
    """How a convolution of the graph walks."""
    rank = int(op_name(layer)[-2])
    stride, padding, dilation = (
        _each(layer, name, rank) for name in ("stride", "padding", "dilation")
    )
    return Geometry(stride, padding, dilation, int(argument(layer, "groups")))


def transposed_geometry_of(layer: Node) -> TransposedGeometry:
    """How a transposed convolution of the graph walks."""
    rank = int(op_name(layer)[-2])
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, extra, dilation = (_each(layer, name, rank) for name in names)
    return TransposedGeometry(stride, padding, extra, dilation, int(argument(layer, "groups")))
