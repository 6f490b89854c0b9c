"""Which nodes changed together, and how: the entries of a graph diff."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from fxquant.graph.align import NOWHERE, Alignment, Side
from fxquant.graph.groups import Members, group_changes
from fxquant.graph.info import QType
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_STORED,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
)
from fxquant.graph.state import Argument, Group, NodeState, Ref, show_argument

ChangeKind = Literal["added", "removed", "fused", "replaced", "requantized", "changed"]

_BOUNDARY: Final = (QUANTIZE, DEQUANTIZE, DEQUANTIZE_WEIGHT, DEQUANTIZE_STORED, RUN_TIME)
_MOST_NAMES: Final = 4


@dataclass(frozen=True)
class NodeChange:
    """One difference between two graphs.

    Args:
        kind: ``added``, ``removed``; ``fused``, several ops became one unit (or, in the mirrored
            diff, one unit became several); ``replaced``, other ops do the work; ``requantized``,
            the same op with other types; ``changed``, the same op with other arguments.
        before: the nodes concerned in the first graph.
        after: the nodes concerned in the second graph.
        detail: what changed, such as ``argument 1: %x -> %y; scale 0.1 -> 0.2``.
    """

    kind: ChangeKind
    before: tuple[NodeState, ...]
    after: tuple[NodeState, ...]
    detail: str = ""

    @property
    def path(self) -> str:
        """Module path of the place."""
        return next((node.path for node in (*self.after, *self.before) if node.path), "")


def describe(a: Side, b: Side, aligned: Alignment) -> Iterator[tuple[Members, NodeChange | None]]:
    """Every group of nodes, with its change if it has one."""
    groups = group_changes(a, b, aligned)
    teller = _Teller(a, b, aligned, groups)
    for group in groups:
        yield group, teller.change(*group)


class _Teller:
    """Says what changed in a group.

    Two arguments read the same value if its makers are partners, or the last of two groups that
    do the same work. Where a node was put in between or taken out, that node is the change, and
    its readers are not.
    """

    def __init__(self, a: Side, b: Side, aligned: Alignment, groups: Sequence[Members]) -> None:
        self.a, self.b, self.to_b = a, b, aligned.to_b
        value_a: list[Hashable] = [("a", index) for index in range(len(a.nodes))]
        value_b: list[Hashable] = [("b", index) for index in range(len(b.nodes))]
        for i, j in enumerate(aligned.to_b):
            if j != NOWHERE:
                value_a[i] = value_b[j] = ("pair", i)
        for number, (of_a, of_b) in enumerate(groups):
            if of_a and of_b:
                for side, members, value in ((a, of_a, value_a), (b, of_b, value_b)):
                    for index in _results(side, members):
                        value[index] = ("group", number)
        self.value_a = _through(a, value_a, {i for of_a, of_b in groups if not of_b for i in of_a})
        self.value_b = _through(b, value_b, {j for of_a, of_b in groups if not of_a for j in of_b})

    def change(self, of_a: list[int], of_b: list[int]) -> NodeChange | None:
        """The change of one group, ``None`` if there is none."""
        before = tuple(self.a.nodes[i] for i in of_a)
        after = tuple(self.b.nodes[j] for j in of_b)
        if not of_a:
            return NodeChange("added", (), after, _readers(self.b, of_b[-1]))
        if not of_b:
            return NodeChange("removed", before, (), _readers(self.a, of_a[-1]))
        details = list(self._details(of_a, of_b))
        if len(of_a) == len(of_b) == 1 and not details and self.to_b[of_a[0]] == of_b[0]:
            return None
        return NodeChange(self._kind(of_a, of_b), before, after, "; ".join(details))

    def _kind(self, of_a: list[int], of_b: list[int]) -> ChangeKind:
        main_a = [i for i in of_a if not self.a.constant[i]] or of_a
        main_b = [j for j in of_b if not self.b.constant[j]] or of_b
        if len(main_a) > 1 or len(main_b) > 1:
            pieces = [_pieces(self.a, main_a), _pieces(self.b, main_b)]
            return "fused" if min(pieces) == 1 < max(pieces) else "replaced"
        x, y = self.a.nodes[main_a[0]], self.b.nodes[main_b[0]]
        if x.what != y.what:
            return "replaced"
        if self._differences(x, y) and (x.what not in _BOUNDARY or self._edges_differ(x, y)):
            return "changed"
        return "requantized" if _type_changes(x, y) or x.what in _BOUNDARY else "changed"

    def _differences(self, x: NodeState, y: NodeState) -> list[str]:
        found = []
        if x.op != y.op:
            found.append(f"{x.op} -> {y.op}")
        if x.what != y.what:
            found.append(f"{x.what} -> {y.what}")
        if x.target != y.target:
            found.append(f"target {x.target} -> {y.target}")
        if x.setup != y.setup:
            found.append(f"setup {x.setup or 'none'} -> {y.setup or 'none'}")
        places_x, places_y = dict(x.places), dict(y.places)
        for place in sorted({**places_x, **places_y}, key=_natural):
            old, new = places_x.get(place), places_y.get(place)
            if _valued(old, self.value_a) != _valued(new, self.value_b):
                found.append(f"{place}: {_show(old)} -> {_show(new)}")
        return found

    def _edges_differ(self, x: NodeState, y: NodeState) -> bool:
        return [self.value_a[name] for name in x.refs] != [self.value_b[name] for name in y.refs]

    def _details(self, of_a: list[int], of_b: list[int]) -> Iterator[str]:
        inside = set(of_b)
        several = len(of_a) + len(of_b) > 2
        for i in of_a:
            j = self.to_b[i]
            if j in inside:
                x, y = self.a.nodes[i], self.b.nodes[j]
                for text in (*_type_changes(x, y), *self._differences(x, y)):
                    yield f"%{y.name} {text}" if several else text
        if not several and self.to_b[of_a[0]] != NOWHERE:
            return  # its arguments are told place by place
        old, new = _inputs(self.a, of_a), _inputs(self.b, of_b)
        values_old = {self.value_a[name] for name in old}
        values_new = {self.value_b[name] for name in new}
        gone = [name for name in old if self.value_a[name] not in values_new]
        come = [name for name in new if self.value_b[name] not in values_old]
        if gone:
            yield f"no longer reads {_names(gone)}"
        if come:
            yield f"now reads {_names(come)}"


def _results(side: Side, members: list[int]) -> Iterator[int]:
    """The members of a group that hold its result: its last, before and after conversion."""
    last = max(members)
    yield last
    while side.nodes[last].what in (QUANTIZE, DEQUANTIZE) and side.reads[last]:
        last = side.reads[last][0][1]
        if last not in members:
            return
        yield last


def _through(side: Side, value: list[Hashable], alone: set[int]) -> dict[str, Hashable]:
    """The value each name stands for; an added node of one input stands for that input."""
    for index in sorted(alone):
        sources = {source for _, source in side.reads[index]}
        if len(sources) == 1:
            value[index] = value[sources.pop()]
    return {node.name: value[index] for index, node in enumerate(side.nodes)}


def _valued(argument: Argument | None, value: dict[str, Hashable]) -> Any:
    if isinstance(argument, Ref):
        return ("%", value[argument.name])
    if isinstance(argument, Group):
        return (argument.kind, tuple(_valued(item, value) for item in argument.items))
    return argument


def _natural(place: str) -> tuple[int, int, str]:
    number = place.removeprefix("argument ")
    return (0, int(number), "") if number.isdecimal() else (1, 0, place)


def _show(argument: Argument | None) -> str:
    if isinstance(argument, str):
        return argument  # exact: a float may differ in its last place
    return "none" if argument is None else show_argument(argument)


def _pieces(side: Side, members: list[int]) -> int:
    """How many ops these nodes are: a unit is one, and what one captured node became is one."""
    nodes = [side.nodes[index] for index in members]
    units = Counter(node.unit for node in nodes)
    return len(
        {
            node.unit if node.unit and units[node.unit] > 1 else node.origins or node.name
            for node in nodes
        }
    )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"%{name}" for name in names[:_MOST_NAMES]) + more


def _readers(side: Side, index: int) -> str:
    readers = dict.fromkeys(side.nodes[user].name for _, user in side.users[index])
    return f"read by {_names(list(readers))}" if readers else "read by nobody"


def _inputs(side: Side, members: list[int]) -> list[str]:
    sources = {source for index in members for _, source in side.reads[index]}
    return [side.nodes[source].name for source in sorted(sources - set(members))]


def _type_changes(x: NodeState, y: NodeState) -> list[str]:
    found = []
    if x.int8 is not y.int8:
        found.append(f"{_decided(x.int8)} -> {_decided(y.int8)}")
    if x.reads != y.reads:
        old, new = x.reads or (), y.reads or ()
        for place, (p, q) in enumerate(itertools.zip_longest(old, new)):
            found += [f"input {place}: {text}" for text in _type_change(p, q)]
        if len(old) != len(new):
            found.append(f"{len(old)} typed inputs -> {len(new)}")
    found += _type_change(x.writes, y.writes) + _type_change(x.qtype, y.qtype)
    # The type of a value is often recorded twice, as chosen and as written.
    return list(dict.fromkeys(found))


def _decided(int8: bool | None) -> str:
    return "undecided" if int8 is None else "int8" if int8 else "float"


def _type_change(old: QType | None, new: QType | None) -> list[str]:
    if old is None or new is None:
        return [] if old is new else [f"type {old or 'float'} -> {new or 'float'}"]
    pairs = ((field.name, getattr(old, field.name), getattr(new, field.name)) for field in _FIELDS)
    return [f"{name} {p} -> {q}".replace("torch.", "") for name, p, q in pairs if p != q]


_FIELDS: Final = dataclasses.fields(QType)
