"""Two graphs as one: what a drawing of their differences, and networkx, are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from fxquant.graph.changes import NodeChange
from fxquant.graph.state import Argument, GraphState, Group, NodeState, Ref
from fxquant.lazy import lazy_module

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = lazy_module("networkx")

EdgeStatus = Literal["same", "added", "removed"]
SAME: Final = "same"


@dataclass(frozen=True)
class Block:
    """Nodes of both graphs that stayed, or changed, together.

    Args:
        before: those of the first graph.
        after: those of the second graph.
        change: the change, ``None`` where there is none.
    """

    before: tuple[NodeState, ...]
    after: tuple[NodeState, ...]
    change: NodeChange | None = None


def uses(node: NodeState) -> Iterator[tuple[str, str]]:
    """Every use of a value by ``node``: the place of it, and the name of the value."""
    for place, value in node.places:
        yield from _uses(place, value)


def _uses(place: str, value: Argument) -> Iterator[tuple[str, str]]:
    if isinstance(value, Ref):
        yield place, value.name
    elif isinstance(value, Group):
        for number, item in enumerate(value.items):
            yield from _uses(f"{place}.{number}", item)


def blocks_of(
    before: GraphState,
    after: GraphState,
    pairs: Sequence[tuple[str, str]],
    changes: Sequence[NodeChange],
) -> list[Block]:
    """The unchanged pairs and the changes, in the order of the second graph.

    Args:
        before: the first graph.
        after: the second graph.
        pairs: names of the nodes that did not change.
        changes: what changed.
    """
    old = {node.name: node for node in before.nodes}
    new = {node.name: node for node in after.nodes}
    place = {node.name: index for index, node in enumerate(after.nodes)}
    made = [Block((old[a],), (new[b],)) for a, b in pairs if a in old and b in new]
    made += [Block(change.before, change.after, change) for change in changes]
    old_place = {node.name: index for index, node in enumerate(before.nodes)}
    # What went stands behind what stood before it.
    stands = [-1] * len(before.nodes)
    for block in made:
        for node in block.before if block.after else ():
            stands[old_place[node.name]] = max(place[n.name] for n in block.after)
    for index in range(1, len(stands)):
        stands[index] = stands[index - 1] if stands[index] < 0 else stands[index]
    return sorted(
        made,
        key=lambda block: (
            (place[block.after[-1].name], 0)
            if block.after
            else (stands[old_place[block.before[-1].name]], 1)
        ),
    )


def merged_networkx(
    before: GraphState,
    after: GraphState,
    pairs: Sequence[tuple[str, str]],
    changes: Sequence[NodeChange],
) -> nx.MultiDiGraph[str]:
    """See :meth:`fxquant.graph.diff.GraphDiff.to_networkx`."""
    view: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    number = {id(change): index for index, change in enumerate(changes)}
    key_a: dict[str, str] = {}
    key_b: dict[str, str] = {}
    for block in blocks_of(before, after, pairs, changes):
        status = SAME if block.change is None else block.change.kind
        place = None if block.change is None else number[id(block.change)]
        if len(block.before) == len(block.after) == 1:
            key = f"both:{block.after[0].name}"
            key_a[block.before[0].name] = key_b[block.after[0].name] = key
            _add(view, key, block.before[0], block.after[0], status, place)
            continue
        for node in block.before:
            key_a[node.name] = f"before:{node.name}"
            _add(view, key_a[node.name], node, None, status, place)
        for node in block.after:
            key_b[node.name] = f"after:{node.name}"
            _add(view, key_b[node.name], None, node, status, place)
    old = _edges(before, key_a)
    new = _edges(after, key_b)
    both = old & new
    status_of: tuple[tuple[EdgeStatus, Counter[tuple[str, str, str]]], ...] = (
        ("same", both),
        ("removed", old - both),
        ("added", new - both),
    )
    for kind, edges in status_of:
        for (source, user, at), count in edges.items():
            for _ in range(count):
                view.add_edge(source, user, place=at, status=kind)
    return view


def _add(
    view: nx.MultiDiGraph[str],
    key: str,
    before: NodeState | None,
    after: NodeState | None,
    status: str,
    change: int | None,
) -> None:
    node = after or before
    assert node is not None
    view.add_node(
        key,
        op=node.what,
        path=node.path,
        status=status,
        change=change,
        before=before,
        after=after,
    )


def _edges(state: GraphState, key: dict[str, str]) -> Counter[tuple[str, str, str]]:
    """Every use, with how often it is; nodes outside of a part of a diff have no key."""
    return Counter(
        (key[source], key[node.name], place)
        for node in state.nodes
        if node.name in key
        for place, source in uses(node)
        if source in key
    )
