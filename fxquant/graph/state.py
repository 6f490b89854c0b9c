"""A graph as plain data: what a snapshot keeps, and what diffs compare.

Tensors are not kept: a weight shows as its dtype and shape, and two graphs that differ only in
the values of weights have equal states.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxquant.graph.info import QType, info
from fxquant.graph.view import what
from fxquant.text import harmless


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value of another node.

    Args:
        name: the node that makes it.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Group:
    """An argument that holds other arguments.

    Args:
        kind: ``tuple``, ``list``, ``slice`` or ``dict``.
        items: what it holds; of a dict, keys and values by turns.
    """

    kind: str
    items: tuple[Argument, ...]


Argument: TypeAlias = "Ref | Group | str"
"""One argument; a constant is its exact text, so that ``1``, ``1.0`` and ``True`` differ."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node of a :class:`GraphState`.

    Args:
        name: the node's name.
        op: ``placeholder``, ``get_attr``, ``call_function``, ``call_method``, ``call_module`` or
            ``output``.
        what: what it calls, in one word.
        target: full name of the function, or the path of the module or attribute.
        args: positional arguments.
        kwargs: keyword arguments as ``(name, value)``.
        setup: constants of the standard module it calls; dtype and shape of an attribute.
        path: where the op lives in the user's model.
        source: the user's line.
        origins: names of the captured nodes it comes from.
        rules: the rules that made or changed it.
        unit: label of the fused unit it belongs to.
        reads: for a lowered op, the types of its tensor arguments.
        writes: for a lowered op, the type of its value.
        qtype: the quantized type chosen for its value.
        int8: whether it was decided that it computes on codes; ``None`` before the decision, and
            of integers, for which there is none to make.
    """

    name: str
    op: str
    what: str
    target: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    setup: str = ""
    path: str = ""
    source: str = ""
    origins: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    unit: str | None = None
    reads: tuple[QType | None, ...] | None = None
    writes: QType | None = None
    qtype: QType | None = None
    int8: bool | None = None

    @property
    def line(self) -> str:
        """Its line of canonical text, as :func:`fxquant.graph.view.render_node` writes it."""
        if self.op == "output":
            return f"return {show_argument(self.args[0])}"
        if self.op in ("placeholder", "get_attr"):
            return f"%{self.name} = {self.what}({harmless(self.target)})"
        where = f"[{harmless(self.target)}]" if self.op == "call_module" else ""
        given = [show_argument(value) for value in self.args]
        given += [f"{name}={show_argument(value)}" for name, value in self.kwargs]
        tail = f"  # unit {self.unit}" if self.unit else ""
        tail += "" if self.writes is None else f"  # -> {self.writes}"
        return f"%{self.name} = {self.what}{where}({', '.join(given)}){tail}"

    @property
    def places(self) -> tuple[tuple[str, Argument], ...]:
        """Every argument with the name of its place: ``argument 0``, ``alpha``."""
        numbered = tuple((f"argument {place}", value) for place, value in enumerate(self.args))
        return numbered + self.kwargs

    @property
    def refs(self) -> tuple[str, ...]:
        """Names of the nodes it reads, in order, with repeats."""
        return tuple(refs_in((*self.args, *(value for _, value in self.kwargs))))


@dataclass(frozen=True)
class GraphState:
    """A graph as it was at one moment, as immutable plain data.

    Args:
        nodes: its nodes, in execution order.
    """

    nodes: tuple[NodeState, ...]

    @property
    def text(self) -> str:
        """Canonical text, as :func:`fxquant.graph.view.render` writes it."""
        return "\n".join(node.line for node in self.nodes)

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 of structure and types; the names of nodes do not enter it."""
        place = {node.name: index for index, node in enumerate(self.nodes)}
        units: dict[str, int] = {}
        hasher = hashlib.sha256()
        for node in self.nodes:
            unit = None if node.unit is None else units.setdefault(node.unit, len(units))
            arguments = sorted((name, repr(_placed(arg, place))) for name, arg in node.places)
            facts = (node.op, node.what, node.target, node.setup, arguments, unit)
            hasher.update(repr((facts, node.reads, node.writes, node.qtype, node.int8)).encode())
        return hasher.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphState:
        # Immutable all the way down; a copied model shares the states of its history.
        return self


def refs_in(arguments: tuple[Argument, ...]) -> Iterator[str]:
    """Names of the nodes inside arguments, in order, with repeats."""
    for value in arguments:
        if isinstance(value, Ref):
            yield value.name
        elif isinstance(value, Group):
            yield from refs_in(value.items)


_FLOAT: Final = re.compile(r"-?(\d+\.\d*(e[+-]?\d+)?|\d+e[+-]?\d+)")
"""The exact text of a float constant; strings stand in quotes."""


def show_argument(value: Argument) -> str:
    """An argument as a person would write it; nodes carry a ``%``, floats have 9 digits."""
    if isinstance(value, str):
        return f"{float(value):.9g}" if _FLOAT.fullmatch(value) else value
    if isinstance(value, Ref):
        return f"%{value.name}"
    parts = [show_argument(item) for item in value.items]
    if value.kind == "slice":
        return ":".join(parts)
    if value.kind == "dict":
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return "{" + ", ".join(f"{_key(key)}: {item}" for key, item in pairs) + "}"
    if value.kind == "list":
        return f"[{', '.join(parts)}]"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _key(text: str) -> str:
    return text[1:-1] if text[:1] in ("'", '"') else text


_INPUTS: Final = {"placeholder": "input", "get_attr": "attribute"}


class _Refs(dict[Node, Ref]):
    """One Ref a node, made when first asked for."""

    def __missing__(self, node: Node) -> Ref:
        made = self[node] = Ref(node.name)
        return made


Known: TypeAlias = dict[Node, tuple[tuple[object, ...], NodeState]]
"""States of nodes, each with all that it was read from; modules and tensors not kept alive by it:
what a pass replaces is often a weight, and the next one makes another of its memory."""


def graph_state(graph: Graph, known: Known | None = None) -> GraphState:
    """The present state of ``graph`` as plain data; nothing in it refers to the graph.

    Args:
        graph: any torch.fx graph, with or without fxquant's records.
        known: what an earlier call wrote here, or an empty dict to start with; nodes that are as
            they were share their state, which saves time and memory. (Passes replace modules
            and never change them.)

    Example:
        >>> import torch.fx
        >>> graph_state(torch.fx.symbolic_trace(torch.nn.ReLU()).graph).text.splitlines()[0]
        '%input_1 = input(input)'
    """
    # One name a function and one Ref a node, however often they are used: a snapshot of a large
    # graph is made after every pass.
    targets: dict[int, str] = {}
    refs = _Refs()
    states = []
    for node in graph.nodes:
        attached = _attached(node)
        facts = (node.op, node.target, node.args, node.kwargs, info(node), attached)
        old = known.get(node) if known is not None else None
        if old is not None and all(map(operator.is_, (*old[0][:-1], _alive(old[0][-1])), facts)):
            states.append(old[1])
            continue
        state = _node_state(node, targets, refs)
        if known is not None:
            known[node] = ((*facts[:-1], _weakly(attached)), state)
        states.append(state)
    return GraphState(tuple(states))


def _node_state(node: Node, targets: dict[int, str], refs: _Refs) -> NodeState:
    record = info(node)
    target = node.target
    if isinstance(target, str):
        named = target
    else:
        named = targets.get(id(target)) or targets.setdefault(id(target), _full_name(target))
    at_target = named if node.op in ("call_module", "get_attr", "placeholder") else ""
    return NodeState(
        name=node.name,
        op=node.op,
        what=_INPUTS.get(node.op) or what(node),
        target=named,
        args=tuple([_argument(value, refs) for value in node.args]),
        kwargs=tuple([(key, _argument(value, refs)) for key, value in node.kwargs.items()]),
        setup=_setup(_attached(node)),
        path=record.path or at_target,
        source=record.source,
        origins=record.origins,
        rules=record.rules,
        unit=record.unit,
        reads=record.reads,
        writes=record.writes,
        qtype=record.qtype,
        int8=None if record.decision is None or record.integral else record.decision.int8,
    )


def _argument(value: Any, refs: dict[Node, Ref]) -> Argument:
    if isinstance(value, Node):
        return refs[value]
    kind = ""
    items: tuple[Any, ...] = ()
    if isinstance(value, tuple):
        kind, items = "tuple", value
    elif isinstance(value, list):
        kind, items = "list", tuple(value)
    elif isinstance(value, slice):
        kind, items = "slice", (value.start, value.stop, value.step)
    elif isinstance(value, dict):
        kind, items = "dict", tuple(part for pair in value.items() for part in pair)
    if kind:
        return Group(kind, tuple(_argument(item, refs) for item in items))
    return _constant(value)


_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def _constant(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        return _full_name(value)
    # What does not define a repr of its own shows its address, which no two runs share.
    return _ADDRESS.sub("", repr(value))


def _full_name(function: Any) -> str:
    name = getattr(function, "__qualname__", None)
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(function)
    if name is None:
        return _ADDRESS.sub("", repr(function))
    module = getattr(function, "__module__", None)
    full = f"{module}.{name}" if module else str(name)
    # Where a builtin is implemented is no help to a reader: the name that users write is.
    return next(
        (full.replace(own, public, 1) for own, public in _PUBLIC.items() if full.startswith(own)),
        full,
    )


_PUBLIC: Final = {
    "torch._VariableFunctionsClass.": "torch.",
    "_VariableFunctionsClass.": "torch.",
    "torch._C._nn.": "torch.nn.functional.",
    "_operator.": "operator.",
    "fxquant.graph.tensor_methods.": "torch.Tensor.",
}


def _attached(node: Node) -> Any:
    """The module or tensor that a node names; ``None`` where it names none."""
    owner = node.graph.owning_module
    if node.op not in ("call_module", "get_attr") or not isinstance(owner, GraphModule):
        return None
    found: Any = owner
    for part in str(node.target).split("."):
        # Modules are found first where they are kept: asking for the attribute takes longer.
        inner = found._modules.get(part) if isinstance(found, nn.Module) else None
        found = getattr(found, part, None) if inner is None else inner
    return found


def _weakly(found: Any) -> Any:
    return weakref.ref(found) if isinstance(found, nn.Module | torch.Tensor) else found


def _alive(held: Any) -> Any:
    return held() if isinstance(held, weakref.ref) else held


def _setup(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return _tensor(found)
    # Only torch's own: a user's extra_repr may be slow, may raise, may change from run to run.
    standard = isinstance(found, nn.Module) and type(found).__module__.startswith("torch.nn.")
    return found.extra_repr() if standard else ""


def _tensor(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _placed(value: Argument, place: dict[str, int]) -> Any:
    if isinstance(value, Ref):
        return ("%", place[value.name])
    if isinstance(value, Group):
        return (value.kind, [_placed(item, place) for item in value.items])
    return value
