"""Static linears that read the same codes become one product with their weights stacked.

    linear(dequantize(x), wq), linear(dequantize(x), wk), ...      ->  X86StackedLinear(x), parts

The queries, keys and values of attention are such. A wide product keeps a processor busier than
three narrow ones, and a call costs 20 to 45 us beyond its kernel. Only linears that write floats
are stacked: codes have a scale of their own each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.layer_parts import codes_node, op_name, tensors_of
from fxquant.backends.x86_attention import X86Attention
from fxquant.backends.x86_layer_rules import (
    codes_type,
    is_container,
    kernel_takes,
    layer_expr,
)
from fxquant.backends.x86_layers import PostOp, X86Linear
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, is_op, op_named, op_of
from fxquant.graph.tied import tied_of
from fxquant.patterns.boundary import DEQUANTIZE_WEIGHT, QUANTIZE
from fxquant.patterns.expr import op
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS


class X86StackedLinear(X86Linear):
    """Several linears of the same codes in one call; float out, a view for each.

    Args:
        weight: int8 ``[outputs, inputs]``, the layers one below the other.
        scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]`` or ``None``.
        reads: type of the input codes.
        sizes: outputs of each layer.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: QType,
        sizes: Sequence[int],
    ) -> None:
        self.sizes = list(sizes)
        super().__init__(weight, scale, bias, reads, None, PostOp())

    def forward(self, codes: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # nn.Module.forward is open to any result
        """One kernel call; ``codes`` uint8 or int8 ``[..., features]``."""
        parts: tuple[Tensor, ...] = super().forward(codes).split(self.sizes, dim=-1)
        return parts

    def extra_repr(self) -> str:
        """How many layers, shapes and types, for ``print(model)``."""
        return f"{len(self.sizes)} layers, {super().extra_repr()}"


def joint_bias(parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor | None:
    """The bias of a stack of layers, of which some may have none.

    Args:
        parts: weight, scale and bias of each.
    """
    if all(bias is None for _, _, bias in parts):
        return None
    biases = [torch.zeros(len(weight)) if bias is None else bias for weight, _, bias in parts]
    return torch.cat(biases) if len(biases) > 1 else biases[0]


def may_be_view(node: Node) -> bool:
    """Parts of a wide product lie apart in memory, which ops take and a user's code may not."""
    return all(op_of(user) is not None or _is_attention(user) for user in node.users)


def _is_attention(node: Node) -> bool:
    """Whether it was an op, attention, and is lowered already."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return isinstance(owner.get_submodule(str(node.target)), X86Attention)


def is_integer_linear(node: Node) -> bool:
    """Whether a node is a linear of integer weights; a float one is a call of the user's module."""
    return (
        node.op == "call_function"
        and is_op(node, "linear")
        and is_op(node.args[1], DEQUANTIZE_WEIGHT)
    )


def _ends(layer: Node, half: bool) -> Node | None:
    """The last node of a linear that writes floats and nothing else; in bfloat16 a cast."""
    if not is_integer_linear(layer):
        return None
    if tied_of(codes_node(layer)) is not None or not layer.users:
        return None
    if half:
        last = next(iter(layer.users))
        alone = len(layer.users) == 1 and is_op(last, "cast")
        plain = {"dtype": torch.bfloat16, "device": None, "like": None}
        if not alone or any(argument(last, name) != value for name, value in plain.items()):
            return None
    else:
        # These would be part of a larger kernel than the linear alone.
        if any(op_name(user) in (*ACTIVATIONS, QUANTIZE, "cast", "add") for user in layer.users):
            return None
        last = layer
    return last if may_be_view(last) else None


def _together(match: Match) -> list[tuple[Node, Node]]:
    """The linears that can be stacked with the one of ``match``, each with its last node."""
    half, users = match.root is not match.node("layer"), match.node("dq").users
    ends = {node: _ends(node, half) for node in users}
    return [(n, end) for n in match.root.graph.nodes if (end := ends.get(n)) is not None]


def _has_company(match: Match) -> Reject | None:
    layer = match.node("layer")
    found = [node for node, _ in _together(match)]
    if layer not in found or len(found) < 2:
        return Reject("no other linear that writes the same floats reads its input", layer)
    return None


def _lower(match: Match, editor: Editor) -> None:
    together, dq = _together(match), match.node("dq")
    codes = dq.args[0]
    if not isinstance(codes, Node):
        return
    first = together[0][0]
    # Where the first of them stands, all that the others read is there: it is the same.
    made = _call(editor, _module(match, editor, [node for node, _ in together]), codes, first)
    origins = dict.fromkeys(o for pair in together for node in pair for o in info(node).origins)
    editor.annotate(made, origins=tuple(origins))
    for place, (layer, last) in enumerate(together):
        part = editor.call(op_named("getitem"), (made, place), like=last, before=last)
        decision = info(layer).decision
        editor.annotate(part, value="tensor", unit=None, decision=decision, shape=info(last).shape)
        editor.replace(last, part, *((layer,) if layer is not last else ()))
    if not dq.users:
        editor.erase(dq)


def _module(match: Match, editor: Editor, layers: list[Node]) -> X86StackedLinear:
    parts = [tensors_of(layer, editor) for layer in layers]
    weights, scales, _ = zip(*parts, strict=True)
    module = X86StackedLinear(
        torch.cat(weights),
        torch.cat(scales),
        joint_bias(parts),
        codes_type(match.node("dq")),
        [len(weight) for weight in weights],
    )
    if match.root is not match.node("layer"):
        module.write_real(torch.bfloat16)
    for layer in layers[1:]:
        # The stack has its weight now.
        if is_container(editor, path := _path(layer)):
            editor.set_module(path, nn.Module())
    return module


def _path(layer: Node) -> str:
    return str(codes_node(layer).target).rpartition(".")[0]


def _call(editor: Editor, module: nn.Module, codes: Node, first: Node) -> Node:
    path = _path(first)
    if is_container(editor, path):
        editor.set_module(path, module)
    else:
        path = editor.add_module(path, module)
    made = editor.call_module(path, (codes,), like=first, before=first)
    editor.annotate(
        made,
        writes=None,
        reads=(info(codes).writes,),
        value="tensors",
        unit=None,
        decision=info(first).decision,
        shape=None,
    )
    return made


_LINEAR: Final = layer_expr(("linear",))

STACKED_RULES: Final = (
    Rule(
        "x86-stacked-linears-bfloat16",
        op("cast", _LINEAR, dtype=torch.bfloat16, device=None, like=None),
        _lower,
        (kernel_takes, _has_company),
        priority=15,
    ),
    Rule("x86-stacked-linears", _LINEAR, _lower, (kernel_takes, _has_company), priority=5),
)
