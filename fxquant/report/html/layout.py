"""Where the blocks of a diff are drawn: layer by layer, chains in one column, long edges in lanes.

Nothing here knows of HTML. Layers are those of the longest path; a block stands under the deepest
block that it reads, so that chains are straight; an edge that passes over a layer runs in a lane
beside the columns, one lane for each value, the shortest nearest.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from fxquant.graph.diff import GraphDiff, GraphState
from fxquant.graph.merged import Block, blocks_of, uses

SHORTEST_RUN: Final = 4
"""Unchanged blocks in a row from which on they are folded into one."""


@dataclass
class Placed:
    """A block and its place.

    Args:
        block: the nodes.
        layer: its row in the unfolded drawing.
        column: its column.
        run: the number of the run it is folded into; -1 if it is always shown.
    """

    block: Block
    layer: int = 0
    column: int = 0
    run: int = -1


@dataclass(frozen=True)
class Link:
    """What one block reads of another.

    Args:
        source: the place of the block that is read.
        target: the place of the block that reads.
        status: ``same``, ``added``, ``removed`` or ``changed``: more or less often.
        count: how often in the second graph, or in the first where the second does not.
        lane: its lane; -1 where it goes straight down.
    """

    source: int
    target: int
    status: str
    count: int
    lane: int = -1


@dataclass
class Layout:
    """A drawing without sizes.

    Args:
        blocks: in the order of the second graph.
        links: the edges between them.
        runs: the members of each run.
        columns: how many columns there are.
        lanes: how many lanes there are.
    """

    blocks: list[Placed]
    links: list[Link]
    runs: list[list[int]] = field(default_factory=list)
    columns: int = 1
    lanes: int = 0


def lay_out(diff: GraphDiff) -> Layout:
    """Place the blocks of a diff.

    Args:
        diff: of two graphs, or a part of such a diff.
    """
    blocks = _with_constants_inside(
        blocks_of(diff.before, diff.after, diff.pairs, diff.changes), diff
    )
    placed = [Placed(block) for block in blocks]
    links = _links(blocks, diff)
    forward = [link for link in links if link.source < link.target]
    _layers(placed, forward)
    columns = _columns(placed, forward)
    runs = _runs(placed)
    lanes, drawn = _lanes(placed, links)
    return Layout(placed, drawn, runs, columns, lanes)


def _is_constant(block: Block) -> bool:
    return all(node.op == "get_attr" for node in (*block.before, *block.after))


def _with_constants_inside(blocks: list[Block], diff: GraphDiff) -> list[Block]:
    """A weight that one block reads is drawn inside of it."""
    readers: dict[int, set[int]] = defaultdict(set)
    for link in _links(blocks, diff):
        readers[link.source].add(link.target)
    inside: dict[int, list[int]] = defaultdict(list)
    for index, block in enumerate(blocks):
        if block.change is None and _is_constant(block) and len(readers[index]) == 1:
            inside[next(iter(readers[index]))].append(index)
    gone = {index for members in inside.values() for index in members}
    return [
        Block(
            (*(n for i in inside.get(index, ()) for n in blocks[i].before), *block.before),
            (*(n for i in inside.get(index, ()) for n in blocks[i].after), *block.after),
            block.change,
        )
        for index, block in enumerate(blocks)
        if index not in gone
    ]


def _links(blocks: Sequence[Block], diff: GraphDiff) -> list[Link]:
    at_before = {node.name: i for i, block in enumerate(blocks) for node in block.before}
    at_after = {node.name: i for i, block in enumerate(blocks) for node in block.after}
    old, new = _edges(diff.before, at_before), _edges(diff.after, at_after)
    found = []
    for (source, target), count in (old | new).items():
        was, now = old[source, target], new[source, target]
        status = "same" if was == now else "added" if not was else "changed" if now else "removed"
        found.append(Link(source, target, status, now or count))
    return sorted(found, key=lambda link: (link.source, link.target))


def _edges(state: GraphState, at: dict[str, int]) -> Counter[tuple[int, int]]:
    return Counter(
        (at[source], at[node.name])
        for node in state.nodes
        if node.name in at
        for _, source in uses(node)
        if source in at and at[source] != at[node.name]
    )


def _layers(placed: list[Placed], forward: Sequence[Link]) -> None:
    """The longest path to each block; constants stand right above what reads them first."""
    into: dict[int, list[int]] = defaultdict(list)
    out: dict[int, list[int]] = defaultdict(list)
    for link in forward:
        into[link.target].append(link.source)
        out[link.source].append(link.target)
    for index, each in enumerate(placed):  # in topological order: links go forward
        each.layer = 1 + max((placed[source].layer for source in into[index]), default=-1)
    for index, each in enumerate(placed):
        if not into[index] and out[index] and _is_constant(each.block):
            each.layer = max(0, min(placed[target].layer for target in out[index]) - 1)


def _columns(placed: list[Placed], forward: Sequence[Link]) -> int:
    """Give each block a column in its layer; returns how many there are."""
    depth = [0] * len(placed)
    into: dict[int, list[int]] = defaultdict(list)
    for link in reversed(forward):
        depth[link.source] = max(depth[link.source], depth[link.target] + 1)
    for link in forward:
        into[link.target].append(link.source)
    rows: dict[int, list[int]] = defaultdict(list)
    for index, each in enumerate(placed):
        rows[each.layer].append(index)
    most = 1
    for layer in sorted(rows):
        wishes = []
        for index in rows[layer]:
            parents = into[index]
            deepest = max(parents, key=lambda p: (placed[p].layer, -placed[p].column), default=None)
            middle = sum(placed[p].column for p in parents) / len(parents) if parents else 0.0
            wish = placed[deepest].column if deepest is not None else 0
            wishes.append((-depth[index], wish, middle, index))
        # Who has most below it comes first: the main way stays straight, side ways give way.
        taken: set[int] = set()
        for _, wish, _, index in sorted(wishes):
            placed[index].column = next(c for c in _nearest(wish) if c not in taken)
            taken.add(placed[index].column)
        most = max(most, *(column + 1 for column in taken))
    return most


def _nearest(column: int) -> Iterator[int]:
    yield column
    step = 1
    while True:
        yield column + step
        if column >= step:
            yield column - step
        step += 1


def _runs(placed: list[Placed]) -> list[list[int]]:
    """Fold unchanged blocks that follow one another; inputs and outputs stay."""
    runs: list[list[int]] = []
    run: list[int] = []
    for index in range(len(placed) + 1):
        block = placed[index].block if index < len(placed) else None
        if block is not None and block.change is None and not _is_border(block):
            run.append(index)
            continue
        if len(run) >= SHORTEST_RUN:
            for member in run:
                placed[member].run = len(runs)
            runs.append(run)
        run = []
    return runs


def _is_border(block: Block) -> bool:
    return any(node.op in ("placeholder", "output") for node in (*block.before, *block.after))


def _lanes(placed: Sequence[Placed], links: Sequence[Link]) -> tuple[int, list[Link]]:
    """Lanes for what does not go from one layer to the next; a value has one lane."""
    spans: dict[int, tuple[int, int]] = {}
    for link in links:
        top, end = placed[link.source].layer, placed[link.target].layer
        if end != top + 1:
            low, high = spans.get(link.source, (top, top))
            spans[link.source] = (min(low, end), max(high, end))
    lane_of: dict[int, int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (last layer, lane)
    count = 0
    for source, (low, high) in sorted(spans.items(), key=lambda item: (item[1], item[0])):
        while busy and busy[0][0] < low:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, count)
            count += 1
        lane_of[source] = heapq.heappop(free)
        heapq.heappush(busy, (high, lane_of[source]))
    drawn = [
        Link(
            link.source,
            link.target,
            link.status,
            link.count,
            lane_of[link.source]
            if placed[link.target].layer != placed[link.source].layer + 1
            else -1,
        )
        for link in links
    ]
    return count, drawn
