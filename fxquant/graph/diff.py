"""What differs between two graphs, node by node.

Nodes are matched by provenance, then module path, then structure, never by their names.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from fxquant.collector import collector_paused
from fxquant.graph.align import align, side_of
from fxquant.graph.changes import ChangeKind, NodeChange, describe
from fxquant.graph.merged import merged_networkx
from fxquant.graph.state import GraphState, NodeState, graph_state
from fxquant.graph.text import shown, shown_in_markdown

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "ChangeKind",
    "GraphDiff",
    "GraphState",
    "NodeChange",
    "NodeState",
    "diff_states",
    "graph_state",
]

SYMBOLS: Final[dict[ChangeKind, str]] = {
    "added": "+",
    "removed": "-",
    "fused": ">",
    "replaced": "~",
    "requantized": "~",
    "changed": "~",
}
_COLORS: Final[dict[ChangeKind, int]] = {
    "added": 32,
    "removed": 31,
    "fused": 35,
    "replaced": 33,
    "requantized": 36,
    "changed": 33,
}
"""Of terminals: the numbers of the ANSI standard."""
_NOTHING: Final = GraphState(())
_LINE: Final = 400
_PATH: Final = 60


@dataclass(frozen=True)
class GraphDiff:
    """The differences of two graphs; false if there are none.

    Args:
        changes: what changed, in the order of the second graph.
        same: the nodes of the second graph that did not change.
        pairs: names of the nodes that did not change, in the first and in the second graph.
        before: the first graph, edges and all.
        after: the second graph.
        noise: SQNR of values of the second graph against float, by the name of the node; empty
            where nothing was measured.

    Example:
        >>> import torch.fx
        >>> a = graph_state(torch.fx.symbolic_trace(torch.nn.ReLU()).graph)
        >>> print(diff_states(a, a))
        no differences: 3 nodes unchanged
    """

    changes: tuple[NodeChange, ...]
    same: tuple[NodeState, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    before: GraphState = _NOTHING
    after: GraphState = _NOTHING
    noise: tuple[tuple[str, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def unchanged(self) -> int:
        """How many nodes did not change."""
        return len(self.same)

    def only(self, path: str) -> Self:
        """The part of the diff inside one module.

        Args:
            path: a module path; ``layer1.0`` takes in ``layer1.0.conv1``, not ``layer1.01``.
        """
        same = tuple(node for node in self.same if _under(node, path))
        names = {node.name for node in same}
        return dataclasses.replace(
            self,
            changes=tuple(c for c in self.changes if _any_under(c, path)),
            same=same,
            pairs=tuple(pair for pair in self.pairs if pair[1] in names),
        )

    def with_noise(self, noise: Mapping[str, float]) -> Self:
        """The same with measured values.

        Args:
            noise: SQNR in decibels by the names of nodes of the second graph.
        """
        return dataclasses.replace(self, noise=tuple(noise.items()))

    def sqnr(self, change: NodeChange) -> float | None:
        """SQNR in decibels of what a change makes, if it was measured."""
        return _measured(change, dict(self.noise))

    def __str__(self) -> str:
        return self.to_text(color=False)

    def to_text(self, *, color: bool | Literal["auto"] = "auto") -> str:
        """The diff for a terminal, a line or two a change.

        Args:
            color: whether to write colours; ``"auto"``: if standard output is a terminal.
        """
        paint = sys.stdout.isatty() if color == "auto" else color
        noise = dict(self.noise)
        lines = [_text(change, noise, paint) for change in self.changes]
        return "\n".join([*lines, f"\x1b[1m{self.summary}\x1b[0m" if paint else self.summary])

    @property
    def summary(self) -> str:
        """One line: how many changes of each kind."""
        kept = f"{self.unchanged} node{'s' * (self.unchanged != 1)} unchanged"
        if not self.changes:
            return f"no differences: {kept}"
        count = Counter(change.kind for change in self.changes)
        return ", ".join(f"{count[kind]} {kind}" for kind in SYMBOLS if count[kind]) + f"; {kept}"

    def to_markdown(self) -> str:
        """The diff as a list in Markdown, one item a change; names show as text."""
        noise = dict(self.noise)
        items = [_item(change, noise) for change in self.changes]
        return "\n".join([*items, *([""] if items else []), self.summary])

    def to_dict(self) -> dict[str, Any]:
        """The diff in plain types that JSON can hold; an infinite SQNR is ``None``."""
        noise = dict(self.noise)
        return {
            "changes": [
                {
                    "kind": change.kind,
                    "path": change.path,
                    "before": [_plain(node) for node in change.before],
                    "after": [_plain(node) for node in change.after],
                    "detail": change.detail,
                    "sqnr": _finite(_measured(change, noise)),
                }
                for change in self.changes
            ],
            "unchanged": self.unchanged,
        }

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Both graphs as one MultiDiGraph.

        What did not change, and what was changed one to one, is one node with the states
        ``before`` and ``after``; the rest are nodes of one graph. ``status`` of a node is ``same``
        or the kind of its change, ``change`` the place of that in ``changes``. Every use of a value
        is an edge with its ``place`` and a ``status``: ``same``, ``added`` or ``removed``.
        """
        return merged_networkx(self.before, self.after, self.pairs, self.changes)


def diff_states(a: GraphState, b: GraphState) -> GraphDiff:
    """What has to change in ``a`` to get ``b``.

    The values of weights are not part of a state, so they are not compared.
    """
    # Tens of thousands of small objects that live on: the collector would look at all of them
    # again and again, which made a diff of large graphs take more than linear time.
    with collector_paused():
        return _diff_states(a, b)


def _diff_states(a: GraphState, b: GraphState) -> GraphDiff:
    left, right = side_of(a), side_of(b)
    aligned = align(left, right)
    changes: list[tuple[float, NodeChange]] = []
    same: list[tuple[float, NodeState]] = []
    pairs: list[tuple[str, str]] = []
    stood = -1.0
    for (of_a, of_b), change in describe(left, right, aligned):
        # Listed at its first node; what went, behind what stood before it.
        stood = place = of_b[0] if of_b else stood
        if change is None:
            same.append((place, right.nodes[of_b[0]]))
            pairs.append((left.nodes[of_a[0]].name, right.nodes[of_b[0]].name))
        else:
            changes.append((place if of_b else place + 0.5, change))
    changes.sort(key=lambda entry: entry[0])
    same.sort(key=lambda entry: entry[0])
    kept = tuple(node for _, node in same)
    return GraphDiff(tuple(c for _, c in changes), kept, tuple(pairs), a, b)


def _any_under(change: NodeChange, path: str) -> bool:
    return any(_under(node, path) for node in (*change.before, *change.after))


def _under(node: NodeState, path: str) -> bool:
    return not path or node.path == path or node.path.startswith(f"{path}.")


def _plain(node: NodeState) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.what,
        "path": node.path,
        "line": node.line,
        "source": node.source,
        "origins": list(node.origins),
        "rules": list(node.rules),
        "unit": node.unit,
        "int8": node.int8,
        "type": None if node.writes is None else str(node.writes),
    }


def _measured(change: NodeChange, noise: Mapping[str, float]) -> float | None:
    return next((noise[n.name] for n in reversed(change.after) if n.name in noise), None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _decibels(change: NodeChange, noise: Mapping[str, float]) -> str:
    value = _measured(change, noise)
    if value is None:
        return ""
    return "; exact" if value == math.inf else f"; SQNR {value:.1f} dB"


def _text(change: NodeChange, noise: Mapping[str, float], paint: bool) -> str:
    path = shown(change.path, _PATH) or "(no path)"
    mark = f"{SYMBOLS[change.kind]} {change.kind}"
    if paint:
        mark = f"\x1b[{_COLORS[change.kind]}m{mark}\x1b[0m"
    head = f"{mark} {path}: {shown(_what(change), _LINE)}{_decibels(change, noise)}"
    return f"{head}\n    {shown(change.detail, _LINE)}" if change.detail else head


def _item(change: NodeChange, noise: Mapping[str, float]) -> str:
    path = shown_in_markdown(change.path, _PATH) or "(no path)"
    head = f"- **{change.kind}** {path}: {shown_in_markdown(_what(change), _LINE)}"
    head += _decibels(change, noise)
    return f"{head}; {shown_in_markdown(change.detail, _LINE)}" if change.detail else head


def _what(change: NodeChange) -> str:
    if change.before and change.after and change.kind in ("fused", "replaced"):
        return f"{_sum(change.before)} -> {_sum(change.after)}"
    return (change.after or change.before)[-1].line  # constants stand before their reader


def _sum(nodes: tuple[NodeState, ...]) -> str:
    ops = [node for node in nodes if node.op != "get_attr"]
    one_unit = len(nodes) > 1 and len({node.unit for node in nodes}) == 1 and nodes[0].unit
    return ("+" if one_unit else " + ").join(node.what for node in ops or nodes)
