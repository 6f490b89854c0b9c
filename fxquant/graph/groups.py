"""Which nodes of two aligned graphs changed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from fxquant.graph.align import NOWHERE, Alignment, Sets, Side
from fxquant.graph.state import NodeState

Members = tuple[list[int], list[int]]


def group_changes(a: Side, b: Side, aligned: Alignment) -> list[Members]:
    """Sort the nodes of both graphs into groups that changed, or stayed, together.

    Returns:
        For each group its nodes in the first and in the second graph, as indices.
    """
    count = len(a.nodes)
    sets = Sets(count + len(b.nodes))
    for i, j in enumerate(aligned.to_b):
        if j != NOWHERE:
            sets.union((i, count + j))
    lone_a, lone_b = _absorb(aligned, sets)
    constants = (_take_constants(a, lone_a), _take_constants(b, lone_b))
    for kin in aligned.kin:
        _join_leftovers(kin.a, kin.b, lone_a, lone_b, sets)
    for members in _regrouped(a.nodes, b.nodes, (aligned.to_b, aligned.to_a)):
        sets.union(members)
    for members in _regrouped(b.nodes, a.nodes, (aligned.to_a, aligned.to_b)):
        sets.union(count + index for index in members)
    _join_readers(a, constants[0], sets, 0)
    _join_readers(b, constants[1], sets, count)
    groups: dict[int, Members] = {}
    for number in range(count + len(b.nodes)):
        of_a, of_b = groups.setdefault(sets.find(number), ([], []))
        (of_a if number < count else of_b).append(number if number < count else number - count)
    return list(groups.values())


def _absorb(aligned: Alignment, sets: Sets) -> tuple[set[int], set[int]]:
    """Add a node without a partner to the pair that took over its origins; return the others."""
    lone_a, lone_b = _lone(aligned.to_b), _lone(aligned.to_a)
    own_a, own_b = aligned.origins
    for i, heir in _heirs(own_a, own_b, aligned.to_b):
        sets.union((i, heir))
        lone_a.discard(i)
    for j, heir in _heirs(own_b, own_a, aligned.to_a):
        sets.union((len(own_a) + j, len(own_a) + heir))
        lone_b.discard(j)
    return lone_a, lone_b


def _take_constants(side: Side, lone: set[int]) -> list[int]:
    """Take the constants out of ``lone``; last first."""
    constants = sorted((index for index in lone if side.constant[index]), reverse=True)
    lone.difference_update(constants)
    return constants


def _join_readers(side: Side, constants: list[int], sets: Sets, offset: int) -> None:
    """A new constant, such as a weight in codes, is part of the change of what reads it."""
    for index in constants:
        readers = {sets.find(offset + user) for _, user in side.users[index]}
        if len(readers) == 1:
            sets.union((offset + index, *readers))


def _lone(partner: list[int]) -> set[int]:
    return {index for index, other in enumerate(partner) if other == NOWHERE}


def _heirs(
    mine: Sequence[frozenset[str]], theirs: Sequence[frozenset[str]], partner: list[int]
) -> Iterator[tuple[int, int]]:
    """For nodes without a partner, the node of the same graph whose partner got their origins."""
    pairs_of: dict[str, list[int]] = defaultdict(list)
    for index, other in enumerate(partner):
        for origin in theirs[other] if other != NOWHERE else ():
            pairs_of[origin].append(index)
    known: dict[frozenset[str], int] = {}
    for index, origins in enumerate(mine):
        if partner[index] != NOWHERE or not origins:
            continue
        if origins not in known:
            able = [
                (len(theirs[partner[pair]]), pair)
                for pair in pairs_of[min(origins)]
                if origins <= theirs[partner[pair]] and not origins <= mine[pair]
            ]
            known[origins] = min(able)[1] if able else NOWHERE
        if known[origins] != NOWHERE:
            yield index, known[origins]


def _join_leftovers(
    kin_a: list[int], kin_b: list[int], lone_a: set[int], lone_b: set[int], sets: Sets
) -> None:
    """What stands in one graph for a place, stands for what is there in the other."""
    families: dict[int, Members] = defaultdict(lambda: ([], []))
    for i in lone_a:
        families[kin_a[i]][0].append(i)
    for j in lone_b:
        families[kin_b[j]][1].append(len(kin_a) + j)
    families.pop(NOWHERE, None)
    for gone, come in families.values():
        if gone and come:
            sets.union((*gone, *come))


def _units(nodes: Sequence[NodeState], matters: Sequence[bool]) -> list[str | None]:
    """For each node the label of its unit, if the unit has two members that matter."""
    count: dict[str | None, int] = defaultdict(int)
    for node, counts in zip(nodes, matters, strict=True):
        count[node.unit] += counts
    return [node.unit if count[node.unit] > 1 else None for node in nodes]


def _regrouped(
    here: Sequence[NodeState], there: Sequence[NodeState], aligned: tuple[list[int], list[int]]
) -> Iterator[list[int]]:
    """The members of every unit of one graph that is not one unit of the other graph."""
    partner, back = aligned
    label = _units(here, [other != NOWHERE for other in partner])
    label_there = _units(there, [other != NOWHERE for other in back])
    members: dict[str, list[int]] = defaultdict(list)
    for index, unit in enumerate(label):
        if unit is not None and partner[index] != NOWHERE:
            members[unit].append(index)
    for inside in members.values():
        units = {label_there[partner[index]] for index in inside}
        if len(units) > 1 or None in units:
            yield inside
