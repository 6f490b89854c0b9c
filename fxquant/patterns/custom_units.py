"""Units of users' patterns: which matches can run as one op, and how they are marked.

A unit computes in float between the codes it reads and the codes it writes. Where that would cost
time, a second unit begins:

- a convolution or linear that reads what another op inside has made: on codes it is faster;
- what depends elementwise on one value inside, in a way that no kernel has as its own: on codes it
  is one table, ``conv(x) -> y * tanh(3 * y)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Final

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.info import CustomUnit, UnitPart, info
from fxquant.graph.op_table import is_op, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import flat_nodes, tensor_sources, what
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.unary import Region, region_inside

NOT_IN_A_UNIT: Final = {
    Kind.SHAPE: "it answers a question about a shape",
    Kind.SPLIT: "it gives a tuple of tensors",
    Kind.PICK: "it gives values and indices",
    Kind.INDEX: "it gives indices, which are no codes",
}
"""Kinds of ops that cannot be a member of a unit, and why."""


@dataclasses.dataclass(frozen=True)
class Names:
    """How a pattern calls what it matches.

    Args:
        ops: names of the matched ops that are outputs, in the pattern's order; of each output the
            ops that may be its last one, those that may be missing in front.
        inputs: names of its tensor inputs.
        numbers: names of its numbers.
        roles: names of the parameters that are modules.
    """

    ops: tuple[tuple[str, ...], ...]
    inputs: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    def called(self, match: Match, node: Node) -> str:
        """The name of a parameter for a matched module, else the node's own name."""
        return next((role for role in self.roles if match.bound.get(role) is node), node.name)

    def outputs(self, match: Match) -> tuple[Node, ...]:
        """The matched nodes that the pattern returns."""
        return tuple(
            match.node(next(name for name in names if match.has(name))) for names in self.ops
        )


def is_closed(names: Names) -> Callable[[Match], Reject | None]:
    """Others may read only what the pattern returns."""

    def check(match: Match) -> Reject | None:
        inside, given = dict.fromkeys(match.nodes), dict.fromkeys(names.outputs(match))
        for node in match.nodes:
            others = [user for user in node.users if user not in inside]
            if node not in given and others:
                called = names.called(match, node)
                why = f"`{called}` has a second user: `{others[0].name}`"
                hint = f"; to allow that, return `{called}` as an output too"
                return Reject(why + hint, node)
        return None

    return check


def is_convex(match: Match) -> Reject | None:
    """Nothing that goes in may depend on what comes out: one op cannot run in two halves."""
    inside = dict.fromkeys(match.nodes)
    first = min(match.nodes)
    todo = [s for n in match.nodes for s in n.all_input_nodes if s not in inside]
    seen = dict.fromkeys(todo)
    while todo:
        node = todo.pop()
        if node in inside:
            return Reject(f"an input depends on its own `{node.name}`", node)
        if node < first:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen[source] = None
                todo.append(source)
    return None


def is_free(match: Match) -> Reject | None:
    """No two units share an op."""
    for node in match.nodes:
        custom = info(node).custom
        if custom is not None:
            return Reject(f"`{node.name}` belongs to pattern {custom.name!r} already", node)
    return None


def can_be_a_unit(match: Match) -> Reject | None:
    """Its members must give one tensor each."""
    for node in match.nodes:
        found = op_of(node)
        why = NOT_IN_A_UNIT.get(found.kind) if found is not None else "it is not canonical"
        if why is not None:
            return Reject(f"{what(node)} `{node.name}` cannot be inside a unit: {why}", node)
        if info(node).value in ("scalar", "sizes"):
            return Reject(f"`{node.name}` is a number computed in every call", node)
    return None


def group_custom(unit: CustomUnit, names: Names) -> Callable[[Match, Editor], None]:
    """A rewrite that marks a match as units of a user's pattern."""

    def rewrite(match: Match, editor: Editor) -> None:
        given = {node: place for place, node in enumerate(names.outputs(match))}
        whole = unit.kernel is not None
        tables = {} if whole else _tables(match)
        stages = dict.fromkeys(match.nodes, 0) if whole else _stages(match, tables)
        stages = _with_layers(stages)
        last = max(stages.values())
        called = _called(unit.name, stages, tables)
        numbers = tuple((name, match.bound[name]) for name in names.numbers if match.has(name))
        for node in sorted(match.nodes):
            stage = stages[node]
            if stage < 0:
                continue
            crosses = any(stages.get(user, stage) != stage for user in node.users)
            gives = (given[node],) if node in given else (-1,) if crosses else ()
            part = UnitPart(
                dataclasses.replace(unit, name=called[stage]),
                next((role for role in names.roles if match.bound.get(role) is node), ""),
                _reads(match, node, names),
                gives,
                numbers,
            )
            label = f"{match.root.name}_{stage}" if last else match.root.name
            editor.annotate(node, unit=label, part=part)

    return rewrite


def _called(name: str, stages: Mapping[Node, int], tables: Collection[Node]) -> dict[int, str]:
    """The name of each stage: tables are called so, and the others numbered if there are more."""
    others = sorted({stage for node, stage in stages.items() if node not in tables} - {-1})
    found = dict.fromkeys(stages.values(), f"{name} (table)" if others else name)
    for place, stage in enumerate(others, start=1):
        found[stage] = f"{name} ({place} of {len(others)})" if len(others) > 1 else name
    return found


def _reads(match: Match, node: Node, names: Names) -> tuple[tuple[int, str], ...]:
    """Which of the arguments of ``node`` are inputs of the pattern."""
    flat = list(flat_nodes(node.args))
    return tuple(
        (place, name)
        for place, source in enumerate(flat)
        for name in names.inputs
        if match.bound.get(name) is source
    )


def _with_layers(stages: dict[Node, int]) -> dict[Node, int]:
    """Ops that only prepare what a layer reads are left to themselves: stage -1.

    They have int8 forms of their own, which move or join codes where a unit would compute.
    """
    first = [node for node, stage in stages.items() if stage == 0]
    kinds = [found.kind for node in first if (found := op_of(node)) is not None]
    if max(stages.values()) == 0 or Kind.CONTRACT in kinds:
        return stages
    return {node: stage - 1 for node, stage in stages.items()}


def _stages(match: Match, tables: Mapping[Node, Region]) -> dict[Node, int]:
    """In which unit each member runs: one that multiplies by a weight reads codes, tables too."""
    stages: dict[Node, int] = {}
    for node in sorted(match.nodes):
        table = tables.get(node)
        before = [
            stages[source] + (table is not None and source is table.source)
            for source in tensor_sources(node)
            if source in stages
        ]
        found = op_of(node)
        again = found is not None and found.kind is Kind.CONTRACT and bool(before)
        stages[node] = max(before, default=0) + again
    return stages


def _tables(match: Match) -> dict[Node, Region]:
    """The members that are to be tables of codes, each with all that is in its table.

    A single op right after a layer is part of the layer's kernel, or no slower in float.
    """
    found: dict[Node, Region] = {}
    layers = _layers(match)
    for root in sorted(match.nodes, reverse=True):
        config = info(root).config
        static = config is not None and config.scheme == "static"
        region = region_inside(root, match.nodes) if static and root not in found else None
        if region is None or region.source not in layers or len(region.nodes) == 1:
            continue
        # What goes on in float with others would have to be made float again.
        readers = [op_of(user) for user in root.users if user in match.nodes]
        if all(op is not None and op.kind is Kind.CONTRACT for op in readers):
            found.update(dict.fromkeys(region.nodes, region))
    return found


def _layers(match: Match) -> dict[Node, None]:
    """The members whose value a kernel writes as codes: layers, with their norms and sums.

    Without a layer, sums and products of two tensors.
    """
    found: dict[Node, None] = {}
    for node in sorted(match.nodes):
        op, sources = op_of(node), tensor_sources(node)
        ends = is_op(node, "batch_norm", "add") and any(source in found for source in sources)
        if ends or (op is not None and op.kind is Kind.CONTRACT):
            found[node] = None
    pairs = [n for n in match.nodes if is_op(n, "add", "sub", "mul") and len(tensor_sources(n)) > 1]
    return found or dict.fromkeys(pairs)
