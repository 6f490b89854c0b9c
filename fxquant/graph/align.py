"""Which node of one graph is which node of another: by provenance, then path, then structure.

Every step treats both graphs alike, so aligning ``b`` with ``a`` gives the mirrored pairs, and
every step is about linear in the number of nodes. Names of nodes play no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from fxquant.graph.state import Argument, GraphState, Group, NodeState, Ref

NOWHERE: Final = -1


class Sets:
    """Disjoint sets of the numbers from 0 to ``count - 1``."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        """The number that stands for the set of ``item``."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def union(self, items: Iterable[int]) -> None:
        """Make one set of the sets of ``items``."""
        roots = {self.find(item) for item in items}
        if roots:
            least = min(roots)
            for root in roots:
                self._parent[root] = least


@dataclass(frozen=True)
class Side:
    """One of two graphs, indexed.

    Args:
        nodes: its nodes.
        reads: for each node, ``(place, index of the node read)``.
        users: for each node, ``(place, index of the user)``.
        constant: for each node, whether it is an attribute or computed from attributes alone.
    """

    nodes: tuple[NodeState, ...]
    reads: list[list[tuple[str, int]]]
    users: list[list[tuple[str, int]]]
    constant: list[bool]


def side_of(state: GraphState) -> Side:
    """Index the edges of a graph; each use is one, so ``a * a`` has two."""
    place_of = {node.name: index for index, node in enumerate(state.nodes)}
    reads: list[list[tuple[str, int]]] = [[] for _ in state.nodes]
    users: list[list[tuple[str, int]]] = [[] for _ in state.nodes]
    constant: list[bool] = []
    for index, node in enumerate(state.nodes):
        for where, value in node.places:
            for place, name in _flat(where, value):
                reads[index].append((place, place_of[name]))
                users[place_of[name]].append((place, index))
        sources = [constant[source] for _, source in reads[index]]
        constant.append(node.op == "get_attr" or (_is_call(node) and any(sources) and all(sources)))
    return Side(state.nodes, reads, users, constant)


def _is_call(node: NodeState) -> bool:
    return node.op not in ("placeholder", "get_attr", "output")


def _flat(where: str, value: Argument) -> Iterable[tuple[str, str]]:
    if isinstance(value, Ref):
        yield where, value.name
    elif isinstance(value, Group):
        for number, item in enumerate(value.items):
            yield from _flat(f"{where}.{number}", item)


@dataclass(frozen=True)
class Kin:
    """Which nodes may be relatives, by one kind of evidence.

    Args:
        a: for each node of one graph the number of its family, or :data:`NOWHERE`.
        b: the same for the other graph.
    """

    a: list[int]
    b: list[int]


@dataclass(frozen=True)
class Alignment:
    """How two graphs correspond.

    Args:
        to_b: for each node of one graph its partner in the other, or :data:`NOWHERE`.
        to_a: the same the other way.
        kin: families by provenance, then by path.
        origins: for each node of one graph, and of the other, the origins that are its own.
    """

    to_b: list[int]
    to_a: list[int]
    kin: tuple[Kin, Kin]
    origins: tuple[list[frozenset[str]], list[frozenset[str]]]


def align(a: Side, b: Side) -> Alignment:
    """Find the partner of every node that has one."""
    found = _Partners(a, b)
    shared = _shared_origins(a.nodes, b.nodes)
    own_a = own_origins([node.origins for node in a.nodes], shared)
    own_b = own_origins([node.origins for node in b.nodes], shared)
    by_origin = _kin_by_origin(own_a, own_b)
    found.search(by_origin)
    by_path = _kin_by_path(a.nodes, b.nodes, by_origin)
    found.search(by_path)
    rest = Kin(_outside(by_origin.a, by_path.a), _outside(by_origin.b, by_path.b))
    found.search(rest, in_order=False)
    found.spread(rest, _any)
    return Alignment(found.to_b, found.to_a, (by_origin, by_path), (own_a, own_b))


def _outside(*families: list[int]) -> list[int]:
    return [0 if max(numbers) == NOWHERE else NOWHERE for numbers in zip(*families, strict=True)]


def _shared_origins(a: Sequence[NodeState], b: Sequence[NodeState]) -> frozenset[str]:
    """Captured nodes that both graphs know, and mean the same by.

    The same name can come from two captures of different models: it is then found at different
    paths, and says nothing.
    """
    paths = (_paths_by_origin(a), _paths_by_origin(b))
    known = {origin for node in a for origin in node.origins}
    known &= {origin for node in b for origin in node.origins}
    return frozenset(
        origin
        for origin in known
        if not (origin in paths[0] and origin in paths[1]) or paths[0][origin] & paths[1][origin]
    )


def _paths_by_origin(nodes: Sequence[NodeState]) -> dict[str, set[str]]:
    # Only nodes of a single origin: what was merged keeps the path of one of its parts.
    paths: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        if len(node.origins) == 1 and node.path:
            paths[node.origins[0]].add(node.path)
    return paths


def own_origins(nodes: Sequence[Sequence[str]], shared: frozenset[str]) -> list[frozenset[str]]:
    """Origins of each node, without those that it only has from what it reads.

    A fused op takes in the conversion of its input, and with it the origins of what makes that
    input. So an origin belongs to the first node that has it, and to those that have no origin
    which that node has not.

    Args:
        nodes: origins of the nodes, in graph order.
        shared: the origins that count.
    """
    sets = [frozenset(origins) for origins in nodes]
    first: dict[str, frozenset[str]] = {}
    for origins in sets:
        for origin in origins:
            first.setdefault(origin, origins)
    return [
        frozenset(origin for origin in origins & shared if origins <= first[origin])
        for origins in sets
    ]


def _kin_by_origin(a: Sequence[frozenset[str]], b: Sequence[frozenset[str]]) -> Kin:
    sets = Sets(len(a) + len(b))
    members: dict[str, list[int]] = defaultdict(list)
    for number, origins in enumerate((*a, *b)):
        for origin in origins:
            members[origin].append(number)
    for together in members.values():
        sets.union(together)
    family = [sets.find(number) if origins else NOWHERE for number, origins in enumerate((*a, *b))]
    return Kin(family[: len(a)], family[len(a) :])


def _kin_by_path(a: Sequence[NodeState], b: Sequence[NodeState], earlier: Kin) -> Kin:
    def paths(nodes: Sequence[NodeState], family: list[int]) -> list[str]:
        taken = zip(nodes, family, strict=True)
        return [node.path if number == NOWHERE else "" for node, number in taken]

    in_a, in_b = paths(a, earlier.a), paths(b, earlier.b)
    both = set(in_a) & set(in_b) - {""}
    number = {path: index for index, path in enumerate(dict.fromkeys(in_a)) if path in both}
    return Kin([number.get(p, NOWHERE) for p in in_a], [number.get(p, NOWHERE) for p in in_b])


Label = Callable[[NodeState], Hashable]


def _strict(node: NodeState) -> Hashable:
    return (node.op, node.what, node.target)


def _loose(node: NodeState) -> Hashable:
    return (_any(node), node.what)


def _any(node: NodeState) -> Hashable:
    return "call" if _is_call(node) else node.op


class _Partners:
    """Pairs found so far."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self.to_b = [NOWHERE] * len(a.nodes)
        self.to_a = [NOWHERE] * len(b.nodes)
        numbers: dict[Hashable, int] = {}
        up = (_above(a, numbers), _above(b, numbers))
        down = (_below(a, numbers), _below(b, numbers))
        both = tuple(list(zip(u, d, strict=True)) for u, d in zip(up, down, strict=True))
        self._views: tuple[tuple[Sequence[Hashable], ...], ...] = (both, up, down)

    def search(self, kin: Kin, *, in_order: bool = True) -> None:
        """Pair relatives: same surroundings first, then neighbours of pairs, then by order."""
        for label in (_strict, _loose):
            for view_a, view_b in self._views:
                self._pair_equal(kin, label, view_a, view_b)
            self.spread(kin, label)
            if in_order:
                nothing = [None] * max(len(self.to_a), len(self.to_b))
                self._pair_equal(kin, label, nothing, nothing)

    def _pair_equal(
        self, kin: Kin, label: Label, view_a: Sequence[Hashable], view_b: Sequence[Hashable]
    ) -> None:
        waiting: dict[Hashable, list[int]] = defaultdict(list)
        for j, node in enumerate(self.b.nodes):
            if self.to_a[j] == NOWHERE and kin.b[j] != NOWHERE:
                waiting[kin.b[j], label(node), view_b[j]].append(j)
        for partners in waiting.values():
            partners.reverse()
        for i, node in enumerate(self.a.nodes):
            if self.to_b[i] == NOWHERE and kin.a[i] != NOWHERE:
                partners = waiting.get((kin.a[i], label(node), view_a[i]), [])
                if partners:
                    self._join(i, partners.pop())

    def spread(self, kin: Kin, label: Label) -> None:
        """Pair relatives that stand in the same place beside a pair, as long as there are any."""
        frontier = [(i, j) for i, j in enumerate(self.to_b) if j != NOWHERE]
        while frontier:
            wishes = {wish for pair in frontier for wish in self._neighbours(*pair, kin, label)}
            of_a: dict[int, list[int]] = defaultdict(list)
            of_b: dict[int, list[int]] = defaultdict(list)
            for i, j in wishes:
                of_a[i].append(j)
                of_b[j].append(i)
            # Only undisputed wishes, so that the outcome depends on no order.
            frontier = sorted(
                (i, found[0])
                for i, found in of_a.items()
                if len(found) == 1 and len(of_b[found[0]]) == 1
            )
            for i, j in frontier:
                self._join(i, j)

    def _neighbours(self, i: int, j: int, kin: Kin, label: Label) -> Iterable[tuple[int, int]]:
        for edges_a, edges_b in (
            (self.a.reads[i], self.b.reads[j]),
            (self.a.users[i], self.b.users[j]),
        ):
            free: dict[Hashable, list[int]] = defaultdict(list)
            for place, m in edges_b:
                if self.to_a[m] == NOWHERE and kin.b[m] != NOWHERE:
                    free[place, kin.b[m], label(self.b.nodes[m])].append(m)
            for place, n in edges_a if free else ():
                if self.to_b[n] == NOWHERE and kin.a[n] != NOWHERE:
                    for m in free.get((place, kin.a[n], label(self.a.nodes[n])), ())[:2]:
                        yield n, m

    def _join(self, i: int, j: int) -> None:
        self.to_b[i] = j
        self.to_a[j] = i


def _number(numbers: dict[Hashable, int], key: Hashable) -> int:
    return numbers.setdefault(key, len(numbers))


def _own(node: NodeState) -> Hashable:
    path_only = node.op in ("call_module", "get_attr")
    return (node.op, node.what, "" if path_only else node.target, node.setup)


def _above(side: Side, numbers: dict[Hashable, int]) -> list[int]:
    """For each node a number that stands for all it is computed from."""
    above: list[int] = []
    at: dict[str, int] = {}
    for node in side.nodes:
        places = sorted(node.places, key=itemgetter(0))  # keywords may come in any order
        arguments = tuple((place, _numbered(value, at)) for place, value in places)
        above.append(_number(numbers, ("above", _own(node), arguments)))
        at[node.name] = above[-1]
    return above


def _numbered(value: Argument, at: dict[str, int]) -> Any:
    if isinstance(value, Ref):
        return at[value.name]
    if isinstance(value, Group):
        return (value.kind, tuple(_numbered(item, at) for item in value.items))
    return value


def _below(side: Side, numbers: dict[Hashable, int]) -> list[int]:
    """For each node a number that stands for all that is computed from it."""
    below = [0] * len(side.nodes)
    for index in reversed(range(len(side.nodes))):
        users = tuple(sorted((place, below[user]) for place, user in side.users[index]))
        below[index] = _number(numbers, ("below", _own(side.nodes[index]), users))
    return below
