"""How codes flow: which values carry the same codes, and who reads them as codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch.fx import Graph, Node

from fxquant.graph.fills import fill_of
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import Unit, tensor_sources, units
from fxquant.spec import FloatDtype, QSpec, Scheme

ROW_DIMS: Final = {"linear": 1, "conv1d": 2, "conv2d": 3, "conv3d": 4}
"""What a dynamic op sums over: a token, or channels and pixels of one sample; trailing dimensions
that share a scale at run time."""


def moves_codes(node: Node) -> bool:
    """Whether an int8 op hands codes on untouched: a view, a selection, a max pool, a split."""
    op = op_of(node)
    # A unit of a user's pattern computes as a whole, whatever its last op is.
    if op is None or info(node).custom is not None:
        return False
    if op.name == "interpolate":
        return bool(argument(node, "mode") in ("nearest", "nearest-exact"))
    if op.name == "where":
        return not isinstance(argument(node, "other"), Node)
    return op.kind in (Kind.MOVE, Kind.SPLIT, Kind.PICK)


def gives_indices(node: Node) -> bool:
    """Whether the result says where elements are: it counts, whatever the scale."""
    op = op_of(node)
    if op is None or op.name != "getitem":
        return op is not None and op.kind is Kind.INDEX
    source = node.args[0]
    maker = op_of(source) if isinstance(source, Node) else None
    # Of what an op picks, the values stand first and the indices second.
    return maker is not None and maker.kind is Kind.PICK and bool(node.args[1] != 0)


def rescaled_by(node: Node) -> float | None:
    """The factor of a product with a positive number: the same codes, with another scale.

    ``None`` for everything else.
    """
    if not is_op(node, "mul", "div") or info(node).unit is not None:
        return None
    number = node.args[1]
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if not 0 < number < math.inf:
        return None
    return float(number) if is_op(node, "mul") else 1.0 / number


def wanted_int8(node: Node) -> bool:
    """Whether the decision so far is int8 with ranges known beforehand: it reads codes."""
    decision, config = info(node).decision, info(node).config
    if decision is None or not decision.int8:
        return False
    return config is None or config.scheme == "static"


def wanted(node: Node, scheme: Scheme) -> bool:
    """Whether the decision so far is int8 by ``scheme``: one that reads and writes float."""
    decision, config = info(node).decision, info(node).config
    return decision is not None and decision.int8 and config is not None and config.scheme == scheme


def asks_half(node: Node) -> bool:
    """Whether the op was asked to stay float, and to compute in 16 bits."""
    config = info(node).config
    return config is not None and config.scheme == "float" and config.float_dtype != "float32"


def float_dtype(node: Node) -> torch.dtype:
    """What the op was asked to compute in where it is not int8, or to write where it is."""
    config = info(node).config
    return _FLOATS[config.float_dtype] if config is not None else torch.float32


_FLOATS: Final[dict[FloatDtype, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def root_of(node: Node) -> Node:
    """The value whose codes ``node`` carries: itself, or what was moved to make it."""
    while wanted_int8(node) and moves_codes(node):
        sources = tensor_sources(node)
        if not sources:
            return node
        node = sources[0]
    return node


class Flow:
    """The int8 units of a graph and the values between them.

    Args:
        graph: an annotated graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.units = units(graph)
        self._unit_of = {node: unit for unit in self.units for node in unit.nodes}

    def unit_of(self, node: Node) -> Unit | None:
        """The unit that ``node`` belongs to."""
        return self._unit_of.get(node)

    def int8_units(self) -> Iterator[Unit]:
        """Units decided to run in int8, in graph order."""
        return (unit for unit in self.units if wanted_int8(unit.output))

    def arithmetic_units(self) -> Iterator[Unit]:
        """The int8 units that compute, rather than move codes."""
        for unit in self.int8_units():
            if not moves_codes(unit.output) and not gives_indices(unit.output):
                yield unit

    def read_as_codes(self, node: Node) -> bool:
        """Whether an int8 op that computes reads ``node``, maybe through moves."""
        own = info(node).unit
        # Members of its own unit read the value itself.
        todo = [user for user in node.users if own is None or info(user).unit != own]
        seen: set[str] = set()
        while todo:
            user = todo.pop()
            if user.name in seen or not wanted_int8(user):
                continue
            seen.add(user.name)
            if gives_indices(user):
                continue
            if not moves_codes(user):
                return True
            todo.extend(user.users)
        return False


def is_join(node: Node) -> bool:
    """Whether ``node`` puts tensors side by side."""
    op = op_of(node)
    if op is None or info(node).custom is not None:
        return False
    return op.kind is Kind.JOIN and not moves_codes(node)


def sites(graph: Graph) -> dict[Node, QSpec]:
    """The values to observe and how each will be quantized, in graph order."""
    flow = Flow(graph)
    found: dict[Node, QSpec] = {}
    for unit in flow.arithmetic_units():
        config = info(unit.head).config
        if config is None or config.activation is None:
            continue
        for edge in unit.inputs:
            found.setdefault(root_of(edge.source), config.activation)
        calls = unit.custom is not None and unit.custom.kernel is not None
        for output in unit.outputs:
            # A kernel of the user's writes codes, whoever reads them.
            if calls or flow.read_as_codes(output):
                found.setdefault(output, config.result or config.activation)
    for unit in flow.int8_units():
        config = info(unit.head).config
        # Should no code stand for the constant that it puts in, its readers need its range.
        if config is None or config.activation is None:
            continue
        if fill_of(unit.output) and flow.read_as_codes(unit.output):
            found.setdefault(unit.output, config.result or config.activation)
    for value in found:
        config = info(value).config
        if wanted_int8(value) and config is not None and config.result is not None:
            found[value] = config.result
    return {node: found[node] for node in graph.nodes if node in found}
