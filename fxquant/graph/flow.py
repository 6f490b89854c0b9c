"""How codes flow: which values carry the same codes, and who reads them as codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Graph, Node

from fxquant.graph.fills import fill_of
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, op_named, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import Unit, tensor_sources, units
from fxquant.spec import DEFAULT_WEIGHT, FloatDtype, Granularity, QSpec, Scheme

ROW_DIMS: Final = {
    "linear": 1,
    **{f"conv{rank}d": rank + 1 for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": rank + 1 for rank in (1, 2, 3)},
}
"""What a dynamic op sums over: a token, or channels and pixels of one sample; trailing dimensions
that share a scale at run time."""


@dataclass(frozen=True)
class Rows:
    """How a value is quantized at run time.

    Args:
        spec: what its rows are to become.
        dims: how many trailing dimensions make a row.
        by_column: whether the rows are those of the value transposed.
    """

    spec: QSpec
    dims: int = 1
    by_column: bool = False


def rows_read(node: Node) -> tuple[Rows, ...]:
    """How a dynamic op quantizes its first arguments; empty if it is none.

    The right factor of a product stands where a weight does: it is quantized as one, with a scale
    for each of its columns.
    """
    op, config = op_of(node), info(node).config
    if op is None or config is None or config.activation is None or not wanted(node, "dynamic"):
        return ()
    if op.name == "matmul":
        weight = config.weight or DEFAULT_WEIGHT
        granularity: Granularity = "tensor" if weight.granularity == "tensor" else "row"
        right = QSpec(weight.dtype, weight.bits, weight.symmetric, granularity, "runtime")
        return Rows(config.activation), Rows(right, by_column=True)
    if op.name not in ROW_DIMS:
        return ()
    return (Rows(config.activation, ROW_DIMS[op.name]),)


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


def gates(picture: tuple[int, ...], gate: tuple[int, ...]) -> bool:
    """Whether a tensor has one number for each channel of a picture: squeeze-and-excitation's.

    Args:
        picture: the shape of what it is multiplied with.
        gate: its shape.

    Example:
        >>> gates((2, 8, 7, 7), (2, 8, 1, 1)), gates((2, 8, 7, 7), (2, 1, 7, 7))
        (True, False)
    """
    return len(picture) == _PICTURE and gate == (*picture[:2], 1, 1) and picture != gate


_PICTURE: Final = 4


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


def asked_as_product(node: Node) -> bool:
    """Whether an override names the function of a product, or the attention that it comes from."""
    names = {getattr(function, "__name__", "") for function in op_named("matmul").functions}
    asked = info(node).configured_by.removeprefix("override ").partition(".")[0]
    return asked in names or asked == "scaled_dot_product_attention"


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
