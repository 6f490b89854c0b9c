"""Elementwise ops that depend on one tensor become one op, for which one table will do.

    x * sigmoid(x)                                   ->   silu(x), an op that kernels know
    0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3)))  ->   gelu(x, approximate="tanh")
    tanh(3 * x) - x                                  ->   unary(x), a chain of steps

Which of the known ops a chain is, is found by computing both in float64 on a dense grid.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.graph.chain import Earlier, Step, UnaryChain
from fxquant.graph.edit import Editor
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of, op_named, op_names, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import tensor_sources
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

UNARY: Final = tuple(name for name in op_names() if op_named(name).kind is Kind.UNARY)
PAIRS: Final = ("add", "sub", "mul", "div", "maximum", "minimum")

KNOWN: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("silu", {}),
    ("gelu", {"approximate": "none"}),
    ("gelu", {"approximate": "tanh"}),
    ("hardswish", {}),
    ("mish", {}),
    ("hardsigmoid", {}),
)
"""Ops that people write out by hand, and that kernels know by name."""

_AGREE: Final = 1e-9
_LONGEST: Final = 64
"""How many ops one chain may have; nobody writes more, and searching is bounded."""


@dataclass(frozen=True)
class Region:
    """Elementwise nodes that depend on one value.

    Args:
        source: the value.
        nodes: the nodes, in graph order; only the last is read outside.
    """

    source: Node
    nodes: tuple[Node, ...]


def is_elementwise(node: Node) -> bool:
    """Whether every result of ``node`` depends on one element of each tensor, and on constants."""
    return bool(_elements(node))


def _elements(node: Node) -> tuple[Node, ...]:
    """The tensors whose elements an elementwise ``node`` reads; none if it is no such op."""
    found = op_of(node)
    record = info(node)
    if found is None or record.pinned or record.opaque:
        return ()
    # Inside a unit of a user's pattern a chain is one op too; a kernel stands for all of it.
    if record.unit is not None and (record.custom is None or record.custom.kernel is not None):
        return ()
    if found.name not in PAIRS and found.name not in UNARY:
        return ()
    if found.name == "rrelu" and node.kwargs.get("training"):
        return ()
    tensors = dict.fromkeys(_tensors(node))
    # What is read and is no such tensor must be a constant: a mask or a computed number is none.
    others = [other for other in node.all_input_nodes if other not in tensors]
    return tuple(tensors) if all(constant_number(n) is not None for n in others) else ()


def _tensors(node: Node) -> list[Node]:
    """The tensors that ``node`` reads, without constants of one element."""
    return [
        source
        for source in tensor_sources(node)
        if info(source).value not in ("scalar", "sizes") and constant_number(source) is None
    ]


def constant_number(node: Node) -> float | None:
    """The value of a parameter or buffer that is a single number, or ``None``."""
    held = held_tensor(node)
    if held is None or held.is_meta or held.numel() != 1 or held.dim() > 1:
        return None
    return float(held.detach()) if held.is_floating_point() else None


_Known = dict[Node, tuple[Node | None, list[Node]]]


def _bases(node: Node, known: _Known, floor: Node | None = None) -> list[Node]:
    """The values that all of ``node`` depends on, elementwise; nearest first.

    Args:
        node: the node.
        known: what was found before, and down to which node.
        floor: nothing that stands before it is looked for: long residual chains end there.
    """
    if floor is not None and node < floor:
        return []
    low, done = known.get(node, (node, None))
    if done is not None and (low is None or (floor is not None and not floor < low)):
        return done
    known[node] = (None, [])
    found: list[Node] | None = None
    if len(known) <= _LONGEST:
        # The last one computed reaches back the least, and what it cannot reach is no common base.
        for source in sorted(_elements(node), reverse=True):
            least = floor if found is None else found[-1]
            reach = [source, *_bases(source, known, least)]
            found = reach if found is None else [n for n in found if n in set(reach)]
            if not found:
                break
    known[node] = (floor, found or [])
    return found or []


def find_region(root: Node) -> Region | Reject:
    """The largest region that ends at ``root``, or what stands in the way."""
    bases = _bases(root, {})
    if not bases:
        names = " and ".join(f"%{source.name}" for source in dict.fromkeys(_tensors(root)))
        return Reject(f"it mixes {names}", root)
    miss = Reject("there is only one op", root)
    for source in reversed(bases):
        inside = _between(source, root)
        leak = _leak(inside, root)
        if leak is not None:
            miss = leak
        elif len(inside) > 1:
            order = sorted(inside)
            return Region(source, tuple(order))
    return miss


def region_inside(root: Node, members: Collection[Node]) -> Region | None:
    """The largest region that ends at ``root``, all of it and its source among ``members``."""
    for source in reversed(_bases(root, {})):
        inside = _between(source, root)
        among = source in members and all(node in members for node in inside)
        if among and _leak(inside, root) is None:
            return Region(source, tuple(sorted(inside)))
    return None


def _between(source: Node, root: Node) -> dict[Node, None]:
    found: dict[Node, None] = {}
    todo = [root]
    while todo:
        node = todo.pop()
        if node is source or node in found:
            continue
        found[node] = None
        todo.extend(_tensors(node))
    return found


def _leak(inside: dict[Node, None], root: Node) -> Reject | None:
    for node in inside:
        outside = [user for user in node.users if user not in inside]
        if node is not root and outside:
            return Reject(f"%{node.name} is also read by %{outside[0].name}", node, len(inside))
        if info(node).unit != info(root).unit:
            return Reject(f"%{node.name} belongs to another unit", node, len(inside))
        if (info(node).config is None) != (info(root).config is None):
            return Reject(f"%{node.name} is configured otherwise", node, len(inside))
    return None


def is_whole(match: Match) -> Reject | None:
    """The region must end here: what a larger one would take in, it takes."""
    root = match.root
    region = find_region(root)
    if isinstance(region, Reject):
        return region
    for user in root.users:
        larger = find_region(user) if is_elementwise(user) else None
        if isinstance(larger, Region) and root in larger.nodes:
            return Reject(f"it is a part of what ends at %{user.name}", user)
    return None


def chain_of(region: Region) -> UnaryChain:
    """The region as a module of its own."""
    places: dict[Node, int] = {region.source: 0}
    steps: list[Step] = []
    for node in region.nodes:
        _append(node, places, steps)
        places[node] = len(steps)
    return UnaryChain(tuple(steps))


def _append(node: Node, places: dict[Node, int], steps: list[Step]) -> None:
    found = op_of(node)
    if found is None:
        raise TypeError(f"%{node.name} is not canonical")
    if node.op == "call_module":
        inner = module_of(node)
        if isinstance(inner, UnaryChain):
            shift = len(steps)
            source = places[_tensors(node)[0]]
            for step in inner.steps:
                args = tuple(_moved(a, source, shift) for a in step.args)
                steps.append(Step(step.name, step.function, args, step.kwargs))
            return
    if not callable(node.target):
        raise TypeError(f"%{node.name} calls no function")
    args = tuple(_given(value, places) for value in node.args)
    steps.append(Step(found.name, node.target, args, dict(node.kwargs)))


def _moved(value: Any, source: int, shift: int) -> Any:
    if not isinstance(value, Earlier):
        return value
    return Earlier(source) if value.index == 0 else Earlier(value.index + shift)


def _given(value: Any, places: dict[Node, int]) -> Any:
    if not isinstance(value, Node):
        return value
    if value in places:
        return Earlier(places[value])
    # A tensor, since `torch.div(2.0, x)` does not exist; without dimensions it keeps x's dtype.
    return torch.tensor(constant_number(value), dtype=torch.float64)


def _grid() -> Tensor:
    dense = torch.linspace(-30.0, 30.0, 60_001, dtype=torch.float64)
    far = torch.logspace(1.5, 5.0, 200, dtype=torch.float64)
    return torch.cat([dense, far, -far])


def known_as(chain: UnaryChain) -> tuple[str, dict[str, Any]] | None:
    """The op of the table that computes the same, and its options; ``None`` if there is none."""
    key = tuple((step.function, _fixed(step.args), _fixed(step.kwargs)) for step in chain.steps)
    if key not in _RECOGNIZED:
        if len(_RECOGNIZED) >= _MOST_RECOGNIZED:
            _RECOGNIZED.clear()
        _RECOGNIZED[key] = _recognize(chain)
    return _RECOGNIZED[key]


_RECOGNIZED: dict[Hashable, tuple[str, dict[str, Any]] | None] = {}
"""What chains were found to be: a model spells one activation in many places."""
_MOST_RECOGNIZED: Final = 256


def _fixed(value: Any) -> Hashable:
    """Arguments of a step as a key; a step's tensors are numbers."""
    if isinstance(value, Tensor):
        return ("tensor", float(value))
    if isinstance(value, Mapping):
        return tuple((name, _fixed(held)) for name, held in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_fixed, value))
    return (type(value).__name__, value) if isinstance(value, Hashable) else repr(value)


def _recognize(chain: UnaryChain) -> tuple[str, dict[str, Any]] | None:
    x = _grid()
    with torch.no_grad():
        found = chain(x)
        for name, options in KNOWN:
            wanted = op_named(name).target(x, **options)  # type: ignore[misc]  # the options are of many types
            if bool(((found - wanted).abs() <= _AGREE * (1.0 + wanted.abs())).all()):
                return name, options
    return None


def _fuse(match: Match, editor: Editor) -> None:
    root = match.root
    region = find_region(root)
    if isinstance(region, Reject):
        return
    chain = chain_of(region)
    known = known_as(chain)
    if known is not None:
        name, options = known
        made = editor.call(op_named(name), (region.source,), options, like=root, before=root)
    else:
        path = editor.add_module(info(root).path or root.name, chain)
        made = editor.call_module(path, (region.source,), like=root, before=root)
    editor.replace(root, made, *reversed(region.nodes[:-1]))


def _written(root: Node) -> tuple[Region, str, dict[str, Any]] | Reject:
    """The known op that ends at ``root``, written out by hand; of several the smallest."""
    miss = Reject("it is no known op written out", root)
    for source in _bases(root, {}):
        inside = _between(source, root)
        leak = _leak(inside, root)
        if leak is not None:
            miss = leak
            continue
        region = Region(source, tuple(sorted(inside)))
        known = known_as(chain_of(region)) if len(inside) > 1 else None
        if known is not None:
            return region, *known
    return miss


def is_written(match: Match) -> Reject | None:
    """What ends here must be a known op."""
    found = _written(match.root)
    return found if isinstance(found, Reject) else None


def _spell(match: Match, editor: Editor) -> None:
    root, found = match.root, _written(match.root)
    if isinstance(found, Reject):
        return
    region, name, options = found
    made = editor.call(op_named(name), (region.source,), options, like=root, before=root)
    editor.replace(root, made, *reversed(region.nodes[:-1]))


WRITTEN_OUT: Final = (
    Rule("name-known-op", op(("mul", "div"), var("x"), name="op"), _spell, (is_written,)),
)
"""Run before users' patterns: ``x * sigmoid(x)`` is ``silu(x)`` for them, in part of a chain too.

All known ops that people write out end in a product or a quotient.
"""

RULES: Final = (
    Rule(
        "fuse-unary",
        op((*UNARY, *PAIRS), var("x"), name="op"),
        _fuse,
        (is_whole,),
        priority=-1,
    ),
)
