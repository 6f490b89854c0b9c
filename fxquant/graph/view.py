"""Reading a graph: fused units, canonical text, and the networkx view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Graph, Node

from fxquant.graph.info import CustomUnit, info
from fxquant.graph.op_table import module_of, op_of
from fxquant.graph.ops import Kind, Op
from fxquant.lazy import lazy_module
from fxquant.text import harmless

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = lazy_module("networkx")


_NUMBERS: Final = ("scalar", "sizes")


@dataclass(frozen=True)
class Edge:
    """One use of a value.

    Args:
        user: the node that reads it.
        source: the node that makes it.
    """

    user: Node
    source: Node


@dataclass(frozen=True)
class Unit:
    """Nodes that run as one op.

    Args:
        nodes: the members, in graph order.
        inputs: the edges that enter, each with the tensor that is read.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Edge, ...]

    @property
    def head(self) -> Node:
        """The member that names the unit: its convolution or linear, else its first node."""
        return next((n for n in self.nodes if _contracts(n)), self.nodes[0])

    @property
    def output(self) -> Node:
        """The member that others read; the last one, where a user's pattern has several."""
        return self.nodes[-1]

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The members that others read, in graph order."""
        given = [n for n in self.nodes[:-1] if is_given(n)]
        return (*given, self.nodes[-1])

    @property
    def custom(self) -> CustomUnit | None:
        """The user's pattern that made the unit."""
        return info(self.nodes[-1]).custom


def is_given(node: Node) -> bool:
    """Whether a member of a unit is an output of the user's pattern that made the unit."""
    record = info(node)
    return record.custom is not None and record.part is not None and bool(record.part.gives)


def flat_nodes(value: Any) -> Iterator[Node]:
    """Every node inside an argument, in order, with repeats."""
    found: list[Node] = []
    _collect((value,), found)
    return iter(found)


def _collect(values: Iterable[Any], found: list[Node]) -> None:
    for value in values:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)
        elif isinstance(value, slice):
            _collect((value.start, value.stop, value.step), found)


def tensor_sources(node: Node) -> tuple[Node, ...]:
    """The nodes a canonical call reads as tensors, in argument order, with repeats."""
    op = op_of(node)
    return () if op is None else _read_by(node, op)


def _read_by(node: Node, op: Op) -> tuple[Node, ...]:
    given = node.args if node.op == "call_module" else node.args[: len(op.tensors)]
    found: list[Node] = []
    _collect(given, found)
    return tuple(found)


def on_integers(node: Node) -> bool:
    """Whether a call makes integers or booleans of integers: positions, masks, indices."""
    return info(node).integral and all(
        info(source).integral or info(source).value in _NUMBERS for source in node.all_input_nodes
    )


def constant_values(graph: Graph) -> dict[Node, None]:
    """The values that depend on parameters and buffers alone, and on sizes at most."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        kind = node.op
        if kind == "get_attr":
            found[node] = None
        elif (
            kind == "call_function" and found and not found.keys().isdisjoint(node.all_input_nodes)
        ):
            sources = tensor_sources(node)
            if sources and all(source in found for source in sources):
                found[node] = None
    return found


def labelled(graph: Graph) -> dict[str, list[Node]]:
    """The members of every unit of several nodes, by its label, in graph order."""
    labels = {info(node).unit for node in graph.nodes}
    members: dict[str, list[Node]] = {}
    for node in graph.nodes:
        record = info(node)
        label = record.unit or node.name
        if label in labels and record.value not in _NUMBERS and op_of(node) is not None:
            members.setdefault(label, []).append(node)
    return members


def units(graph: Graph) -> tuple[Unit, ...]:
    """The fused units of a graph, in graph order of their outputs; a lone op is a unit too.

    A constant that arithmetic reads is no input: a layer's scale or a learned position stays in
    float, where it is exact. What is joined with codes, or multiplied as a matrix, is one.
    """
    constants = constant_values(graph)
    members: dict[str, dict[Node, Op]] = {}
    for node in graph.nodes:
        record = info(node)
        op = op_of(node) if record.value not in _NUMBERS else None
        if op is not None:
            members.setdefault(record.unit or node.name, {})[node] = op
    found: dict[Node, Unit] = {}
    for inside in members.values():
        edges = tuple(
            [
                Edge(node, source)
                for node, op in inside.items()
                for source in _read_by(node, op)
                if source not in inside and not (source in constants and op.kind is Kind.ARITH)
            ]
        )
        found[next(reversed(inside))] = Unit(tuple(inside), edges)
    return tuple([found[node] for node in graph.nodes if node in found])


def single_user(node: Node) -> Node | None:
    """The only user of ``node``, or ``None``; ``a + a`` counts as one user."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def positions(graph: Graph) -> dict[Node, int]:
    """Where each node stands."""
    return {node: place for place, node in enumerate(graph.nodes)}


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        inner = ", ".join(_text(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"{_text(value.start)}:{_text(value.stop)}:{_text(value.step)}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float):
        return f"{value:.9g}"
    return repr(value)


def what(node: Node) -> str:
    """What a node calls, in one word: the canonical op, else the target's own name."""
    op = op_of(node)
    if op is not None:
        return op.name
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return node.op if node.op in ("placeholder", "output") else str(node.target)


def render_node(node: Node) -> str:
    """One line of canonical text: ``%add = add(%a, %b, alpha=1)``."""
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name} = input({node.target})"
    if node.op == "get_attr":
        return f"%{node.name} = attribute({harmless(str(node.target))})"
    where = f"[{harmless(str(node.target))}]" if node.op == "call_module" else ""
    given = [_text(value) for value in node.args]
    given += [f"{name}={_text(value)}" for name, value in node.kwargs.items()]
    record = info(node)
    tail = f"  # unit {record.unit}" if record.unit else ""
    if record.writes is not None:
        tail += f"  # -> {record.writes}"
    return f"%{node.name} = {what(node)}{where}({', '.join(given)}){tail}"


def render(graph: Graph) -> str:
    """The canonical text of a graph: one line a node, the same for the same graph."""
    return "\n".join(render_node(node) for node in graph.nodes)


def around(node: Node, lines: int = 5) -> str:
    """The canonical text of the nodes around ``node``, which is marked with ``>``."""
    before: list[Node] = []
    walk = node.prev
    while walk.op != "root" and len(before) < lines:
        before.append(walk)
        walk = walk.prev
    after: list[Node] = []
    walk = node.next
    while walk.op != "root" and len(after) < lines:
        after.append(walk)
        walk = walk.next
    text = [f"  {render_node(n)}" for n in reversed(before)]
    return "\n".join([*text, f"> {render_node(node)}", *(f"  {render_node(n)}" for n in after)])


def to_networkx(graph: Graph) -> nx.MultiDiGraph[str]:
    """The dataflow as a MultiDiGraph: ``a * a`` has two edges, each with its argument place."""
    view: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for node in graph.nodes:
        view.add_node(node.name, op=what(node), path=info(node).path)
        arguments: Iterable[Any] = (*node.args, *node.kwargs.values())
        for place, source in enumerate(flat_nodes(tuple(arguments))):
            view.add_edge(source.name, node.name, place=place)
    return view


def _contracts(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.kind is Kind.CONTRACT
