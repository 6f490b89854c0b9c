"""Marking nodes as one unit: they run as one op, with no quantization between them."""

from __future__ import annotations

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import op_named, op_names
from fxquant.graph.ops import Kind
from fxquant.patterns.match import Match, Reject
from fxquant.spec import QConfig

ACTIVATIONS = tuple(
    name
    for name in op_names()
    if op_named(name).kind is Kind.UNARY and op_named(name).target is not None
)
"""Every elementwise function of one tensor may end a unit; a chain of them runs as a table."""


def one_wish(match: Match) -> Reject | None:
    """All members must be wanted by one scheme: an override may split a unit."""
    first = info(match.root)
    for node in match.nodes[1:]:
        record = info(node)
        if _wish(record.config) != _wish(first.config):
            return Reject(
                f"{record.configured_by} says {_wish(record.config)} for %{node.name}, "
                f"{first.configured_by} says {_wish(first.config)} for %{match.root.name}",
                node,
            )
    return None


def _wish(config: QConfig | None) -> str:
    scheme = "float" if config is None else config.scheme
    return "int8" if scheme == "static" else scheme.replace("_", "-")


def memory_is_free(match: Match) -> Reject | None:
    """Nothing writes in place into a value inside the unit."""
    for node in match.nodes[1:]:
        if info(node).pinned:
            return Reject(info(node).pinned, node)
    return None


def no_users_unit(match: Match) -> Reject | None:
    """What a user's pattern has taken is its own."""
    for node in match.nodes:
        custom = info(node).custom
        if custom is not None:
            return Reject(f"%{node.name} belongs to pattern {custom.name!r}", node)
    return None


def group(match: Match, editor: Editor) -> None:
    """Give all matched nodes the label of the unit: the name of the node called ``head``."""
    label = match.node("head").name
    for node in reversed(match.nodes):
        editor.annotate(node, unit=label)


CHECKS = (no_users_unit, one_wish, memory_is_free)
