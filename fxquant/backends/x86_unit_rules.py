"""Lowering of users' units that no kernel knows: one call between codes and codes.

quantize(f(dequantize(x), g(dequantize(y), w)))   ->   UnitCodes(x, y)

Only what has no convolution or linear: those have kernels of their own, and the rest follows them.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.rule_parts import quantized, writes_of
from fxquant.backends.x86_layer_rules import put
from fxquant.graph.edit import Editor
from fxquant.graph.extract import extract
from fxquant.graph.info import info
from fxquant.graph.op_table import is_op, op_named, op_names, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import is_given
from fxquant.patterns.boundary import DEQUANTIZE
from fxquant.patterns.expr import op
from fxquant.patterns.match import Match
from fxquant.patterns.rule import Rule


class UnitCodes(nn.Module):
    """A user's unit on codes: its ops in float, in one call.

    Args:
        body: the unit between codes and codes; returns a tuple of one.
    """

    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *given: Tensor) -> Tensor:
        """Codes, and float tensors where the unit reads some."""
        result: Any = self.body(*given)
        codes: Tensor = result[0]
        return codes


def _members(last: Node) -> list[Node]:
    """The unit that ends at ``last``."""
    label, found, todo = info(last).unit, {last: None}, [last]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found and info(source).unit == label:
                found[source] = None
                todo.append(source)
    return sorted(found)


def _is_a_unit(node: Node) -> str | None:
    if info(node).custom is None:
        return "it belongs to no pattern of the user's"
    members = _members(node)
    kinds = [found.kind for member in members if (found := op_of(member)) is not None]
    if len(members) < 2 or Kind.CONTRACT in kinds:
        return "there are kernels for its parts"
    if any(is_given(member) for member in members[:-1]):
        return "others read what is inside"
    codes = [s for member in members for s in member.all_input_nodes if is_op(s, DEQUANTIZE)]
    return None if codes else "it reads no codes"


def _lower(match: Match, editor: Editor) -> None:
    members = _members(match.node("op"))
    inside = dict.fromkeys(members)
    inputs: dict[Node, str] = {}
    for member in members:
        for source in member.all_input_nodes:
            codes = source.args[0] if is_op(source, DEQUANTIZE) else source
            if source not in inside and isinstance(codes, Node) and codes.op != "get_attr":
                inputs.setdefault(codes, f"given_{len(inputs)}")
    module = UnitCodes(extract((match.root,), inputs))
    like = match.node("op")
    origins = tuple(dict.fromkeys(name for member in members for name in info(member).origins))
    writes, path = writes_of(match), info(members[0]).path
    made = put(match, editor, module, tuple(inputs), writes, path=path, like=like)
    editor.annotate(made, origins=origins)


_ANY: Final = tuple(name for name in op_names() if op_named(name).kind is not Kind.BOUNDARY)

UNIT_RULES: Final = (
    Rule("x86-unit", quantized(op(_ANY, name="op", check=_is_a_unit)), _lower, (), priority=-20),
)
