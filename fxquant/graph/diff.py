"""What differs between two graphs, node by node.

Nodes are matched by provenance, then module path, then structure, never by their names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from fxquant.graph.align import align, side_of
from fxquant.graph.changes import ChangeKind, NodeChange, describe
from fxquant.graph.state import GraphState, NodeState, graph_state
from fxquant.graph.text import shown, shown_in_markdown

__all__ = [
    "ChangeKind",
    "GraphDiff",
    "GraphState",
    "NodeChange",
    "NodeState",
    "diff_states",
    "graph_state",
]

_SYMBOLS: Final[dict[ChangeKind, str]] = {
    "added": "+",
    "removed": "-",
    "fused": ">",
    "replaced": "~",
    "requantized": "~",
    "changed": "~",
}
_LINE: Final = 400
_PATH: Final = 60


@dataclass(frozen=True)
class GraphDiff:
    """The differences of two graphs; false if there are none.

    Args:
        changes: what changed, in the order of the second graph.
        same: the nodes of the second graph that did not change.

    Example:
        >>> import torch.fx
        >>> a = graph_state(torch.fx.symbolic_trace(torch.nn.ReLU()).graph)
        >>> print(diff_states(a, a))
        no differences: 3 nodes unchanged
    """

    changes: tuple[NodeChange, ...]
    same: tuple[NodeState, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def unchanged(self) -> int:
        """How many nodes did not change."""
        return len(self.same)

    def only(self, path: str) -> GraphDiff:
        """The part of the diff inside one module.

        Args:
            path: a module path; ``layer1.0`` takes in ``layer1.0.conv1``, not ``layer1.01``.
        """
        return GraphDiff(
            tuple(c for c in self.changes if any(_under(n, path) for n in (*c.before, *c.after))),
            tuple(node for node in self.same if _under(node, path)),
        )

    def __str__(self) -> str:
        return "\n".join([*(_text(change) for change in self.changes), self.summary])

    @property
    def summary(self) -> str:
        """One line: how many changes of each kind."""
        kept = f"{self.unchanged} nodes unchanged"
        if not self.changes:
            return f"no differences: {kept}"
        count = Counter(change.kind for change in self.changes)
        return ", ".join(f"{count[kind]} {kind}" for kind in _SYMBOLS if count[kind]) + f"; {kept}"

    def to_markdown(self) -> str:
        """The diff as a list in Markdown, one item a change; names show as text."""
        items = [_item(change) for change in self.changes]
        return "\n".join([*items, *([""] if items else []), self.summary])

    def to_dict(self) -> dict[str, Any]:
        """The diff in plain types that JSON can hold."""
        return {
            "changes": [
                {
                    "kind": change.kind,
                    "path": change.path,
                    "before": [_plain(node) for node in change.before],
                    "after": [_plain(node) for node in change.after],
                    "detail": change.detail,
                }
                for change in self.changes
            ],
            "unchanged": self.unchanged,
        }


def diff_states(a: GraphState, b: GraphState) -> GraphDiff:
    """What has to change in ``a`` to get ``b``.

    The values of weights are not part of a state, so they are not compared.
    """
    left, right = side_of(a), side_of(b)
    aligned = align(left, right)
    changes: list[tuple[float, NodeChange]] = []
    same: list[tuple[float, NodeState]] = []
    stood = -1.0
    for (_, of_b), change in describe(left, right, aligned):
        # Listed at its first node; what went, behind what stood before it.
        stood = place = of_b[0] if of_b else stood
        if change is None:
            same.append((place, right.nodes[of_b[0]]))
        else:
            changes.append((place if of_b else place + 0.5, change))
    changes.sort(key=lambda entry: entry[0])
    same.sort(key=lambda entry: entry[0])
    return GraphDiff(tuple(c for _, c in changes), tuple(node for _, node in same))


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


def _text(change: NodeChange) -> str:
    path = shown(change.path, _PATH) or "(no path)"
    head = f"{_SYMBOLS[change.kind]} {change.kind} {path}: {shown(_what(change), _LINE)}"
    return f"{head}\n    {shown(change.detail, _LINE)}" if change.detail else head


def _item(change: NodeChange) -> str:
    path = shown_in_markdown(change.path, _PATH) or "(no path)"
    head = f"- **{change.kind}** {path}: {shown_in_markdown(_what(change), _LINE)}"
    return f"{head}; {shown_in_markdown(change.detail, _LINE)}" if change.detail else head


def _what(change: NodeChange) -> str:
    if change.before and change.after and change.kind in ("fused", "replaced"):
        return f"{_sum(change.before)} -> {_sum(change.after)}"
    return (change.after or change.before)[-1].line  # constants stand before their reader


def _sum(nodes: tuple[NodeState, ...]) -> str:
    ops = [node for node in nodes if node.op != "get_attr"]
    one_unit = len(nodes) > 1 and len({node.unit for node in nodes}) == 1 and nodes[0].unit
    return ("+" if one_unit else " + ").join(node.what for node in ops or nodes)
