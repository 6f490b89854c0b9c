"""The page of a graph diff: both graphs as one drawing, and the details of every block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final, TypeAlias

from fxquant.collector import collector_paused
from fxquant.graph.changes import ChangeKind
from fxquant.graph.diff import SYMBOLS, GraphDiff
from fxquant.graph.state import NodeState
from fxquant.graph.text import shown
from fxquant.report.html.layout import Layout, Link, Placed, lay_out
from fxquant.report.html.page import rendered

WIDE, PITCH, GAP, LANE, MARGIN = 300, 330, 30, 13, 16
"""Pixels: a block, a column, between rows, a lane, at the sides."""
ASIDE: Final = 40
"""Pixels that an edge in a lane leaves and ends beside the straight ones."""
_PLAIN, _LINE, _BAR = 30, 23, 18
"""Pixels: a block of one line, one more line, the bar."""
_CHARACTER: Final = 7.3
_PATH, _OP, _TEXT, _QUERY = 36, 26, 400, 200
"""Characters shown at most: of a path, an op, a line of details; and searched in."""
_MOST_LINES: Final = 12
_FULL: Final = 60.0
"""Decibels of a full bar."""
_TYPES: Final = {
    "uint8": ("int8", "u8"),
    "int8": ("int8", "i8"),
    "float32": ("float", "f32"),
    "bfloat16": ("half", "bf"),
    "float16": ("half", "f16"),
}
_KINDS: Final[tuple[ChangeKind, ...]] = (
    *("fused", "replaced", "requantized", "changed", "added", "removed"),
)


def diff_page(diff: GraphDiff, title: str = "Graph diff") -> str:
    """The page as one string.

    Args:
        diff: what to draw.
        title: its heading.
    """
    with collector_paused():  # thousands of small objects, as in diffs themselves
        return _page(diff, title)


def _page(diff: GraphDiff, title: str) -> str:
    layout = lay_out(diff)
    noise = dict(diff.noise)
    blocks = [_block(index, each, noise) for index, each in enumerate(layout.blocks)]
    left = MARGIN + LANE * layout.lanes + 8
    for made, placed in zip(blocks, layout.blocks, strict=True):
        made["x"] = left + placed.column * PITCH
    pills = [_pill(number, run, layout, blocks) for number, run in enumerate(layout.runs)]
    height = _place_rows(blocks, pills)
    if blocks:
        next(b for b in blocks if not b["off"] or len(pills) == len(blocks))["tab"] = 0
    count = Counter(change.kind for change in diff.changes)
    return rendered(
        "diff.html.j2",
        title=shown(title, _TEXT),
        summary=diff.summary,
        kinds=[
            {"name": kind, "symbol": SYMBOLS[kind], "count": count[kind]}
            for kind in _KINDS
            if count[kind]
        ],
        measured=bool(noise),
        width=left + layout.columns * PITCH,
        height=height,
        gap=GAP,
        wide=WIDE,
        lane=LANE,
        left=left,
        aside=ASIDE,
        edges=_edges(layout, blocks, pills, left),
        pills=pills,
        blocks=[SimpleNamespace(**made) for made in blocks],  # faster in templates than dicts
        details=[_details(index, each, noise) for index, each in enumerate(layout.blocks)],
    )


def _block(index: int, placed: Placed, noise: dict[str, float]) -> dict[str, Any]:
    block, change = placed.block, placed.block.change
    kind = "same" if change is None else change.kind
    path = next((n.path for n in (*block.after, *block.before) if n.path), "")
    before, after = _ops(block.before), _ops(block.after)
    symbol = "" if change is None else SYMBOLS[change.kind]
    made: dict[str, Any] = {
        "index": index,
        "kind": kind,
        "symbol": symbol,
        "indent": 26 if symbol else 12,
        "run": placed.run,
        "layer": placed.layer,
        "off": " off" if placed.run >= 0 else "",
        "tab": -1,
        "chips": [],
        "notes": [],
        "tags": [],
        "noise": None,
        "h": _PLAIN,
    }
    now = _what(block.after or block.before)
    title = shown(path, _PATH) or now
    if change is None:
        # One line: the path's end says most, and the op beside it.
        room = _PATH - min(len(now), 14)
        title = f"{shown(now, 14)}  {shown(path, max(room, 8))}" if path else shown(now, _PATH)
    else:
        _fill(made, before, after)
    made["path"] = title
    dtype = _dtype(block.after or block.before)
    if dtype:
        made["tags"].append({"kind": dtype[0], "text": dtype[1], "x": WIDE - 34, "y": 8, "w": 26})
    value = next((noise[n.name] for n in reversed(block.after) if n.name in noise), None)
    if value is not None and change is not None:
        made["noise"] = {**_bar(value), "x": 12, "y": made["h"] + 2}
        made["h"] += _BAR
    told = " ".join([kind, path, *before, "to" if before and after else "", *after])
    made["label"] = shown(told, _QUERY)
    made["query"] = shown(" ".join(dict.fromkeys((path, *before, *after))), _QUERY).lower()
    return made


def _fill(made: dict[str, Any], before: list[str], after: list[str]) -> None:
    """The ops of a change: what it was, and below it what it is."""
    lines = [(before, "", "")] if before and after != before else []
    if after:
        lines.append((after, " new", "\N{RIGHTWARDS ARROW}" if lines else ""))
    for ops, new, lead in lines:
        y = made["h"] - 2
        x = 12.0
        if lead:
            made["notes"].append({"x": 12, "y": y + 13, "text": lead})
            x += 18
        for place, op in enumerate(ops):
            text = shown(op, _OP)
            width = round(len(text) * _CHARACTER + 10)
            if (x + width > WIDE - 40 and place < len(ops) - 1) or x + width > WIDE - 8:
                made["notes"].append({"x": round(x), "y": y + 13, "text": f"+{len(ops) - place}"})
                break
            made["chips"].append({"x": round(x), "y": y, "w": width, "text": text, "new": new})
            x += width + 5
        made["h"] += _LINE


def _ops(nodes: Sequence[NodeState]) -> list[str]:
    calls = [node.what for node in nodes if node.op != "get_attr"]
    return calls or [node.what for node in nodes]


def _what(nodes: Sequence[NodeState]) -> str:
    return _ops(nodes)[-1] if nodes else ""


def _dtype(nodes: Sequence[NodeState]) -> tuple[str, str] | None:
    """The kind of type that a block gives, and its sign."""
    typed = next((n.writes for n in reversed(nodes) if n.writes is not None), None)
    if typed is not None:
        name = str(typed.dtype).removeprefix("torch.")
        return _TYPES.get(name, ("other", name[:3]))
    # What a kernel makes has a type where it is codes; of the kinds of float no node tells.
    decided = next((n for n in reversed(nodes) if n.int8 is not None), None)
    if decided is None:
        return None
    return ("int8", "i8") if decided.int8 and decided.reads is None else ("float", "f")


def _bar(value: float) -> dict[str, Any]:
    share = min(max(value, 0.0), _FULL) / _FULL if math.isfinite(value) else float(value > 0)
    kind = "good" if value >= 35 else "fair" if value >= 20 else "poor"
    text = "exact" if value == math.inf else f"{value:.1f} dB"
    return {"w": max(2, round(120 * share)), "kind": kind, "text": text}


def _pill(
    number: int, run: list[int], layout: Layout, blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    first = layout.blocks[run[0]]
    nodes = sum(len(layout.blocks[index].block.after) for index in run)
    ends = [_end(layout.blocks[index]) for index in (run[0], run[-1])]
    label = shown(" \N{HORIZONTAL ELLIPSIS} ".join(dict.fromkeys(ends)), 22)
    return {
        "run": number,
        "layer": first.layer,
        "x": blocks[run[0]]["x"],
        "h": _PLAIN,
        "count": nodes,
        "label": label,
    }


def _end(placed: Placed) -> str:
    nodes = placed.block.after or placed.block.before
    return next((node.path for node in nodes if node.path), _what(nodes))


def _place_rows(blocks: list[dict[str, Any]], pills: list[dict[str, Any]]) -> int:
    """Give every layer that shows something a row; returns the height of all."""
    heights: dict[int, int] = {}
    for each in (*(b for b in blocks if not b["off"]), *pills):
        heights[each["layer"]] = max(heights.get(each["layer"], 0), each["h"])
    rows: dict[int, tuple[int, int, int]] = {}
    y = 10
    for row, layer in enumerate(sorted(heights)):
        rows[layer] = (y, row, y + heights[layer])
        y += heights[layer] + GAP
    for each in (*blocks, *pills):
        each["y"], each["row"], each["floor"] = rows.get(each["layer"], (0, 0, 0))
    return y


def _edges(
    layout: Layout, blocks: list[dict[str, Any]], pills: list[dict[str, Any]], left: int
) -> list[tuple[str, str, str]]:
    """Paths of the folded drawing; the page's script draws them anew when something unfolds."""
    drawn: set[tuple[int, int, str]] = set()
    made = []

    def shown_for(index: int) -> dict[str, Any]:
        run = blocks[index]["run"]
        return pills[run] if run >= 0 else blocks[index]

    for link in layout.links:
        source, target = shown_for(link.source), shown_for(link.target)
        key = (id(source), id(target), link.status)
        off = source is target or key in drawn
        drawn.add(key)
        made.append(
            (
                link.status + (" off" if off else ""),
                f"{link.source} {link.target} {link.lane}",
                "" if off else _way(link, source, target, left),
            )
        )
    return made


def _way(link: Link, source: dict[str, Any], target: dict[str, Any], left: int) -> str:
    x, y = source["x"] + WIDE // 2, source["y"] + source["h"]
    to_x, to_y = target["x"] + WIDE // 2, target["y"]
    floor = source["floor"]  # of its whole row: a line across must not meet a taller neighbour
    if target["row"] == source["row"] + 1:
        half = (to_y - floor) // 2
        return f"M{x} {y}V{floor}C{x} {floor + half} {to_x} {to_y - half} {to_x} {to_y - 2}"
    lane = max(0, link.lane)
    k = 7 + lane % 3 * 3
    across = left - LANE * (lane + 1)
    return f"M{x - ASIDE} {y}V{floor + k}H{across}V{to_y - k}H{to_x - ASIDE}V{to_y - 2}"


Details: TypeAlias = tuple[int, str, list[tuple[str, str]], list[tuple[str, str, str]]]
"""Number of the block, heading, facts, and pieces: a sentence, or a heading and lines."""


def _details(index: int, placed: Placed, noise: dict[str, float]) -> Details:
    block, change = placed.block, placed.block.change
    nodes = block.after or block.before
    unique: Callable[[str], list[str]] = lambda name: list(  # noqa: E731 - used thrice below
        dict.fromkeys(v for n in nodes for v in (getattr(n, name),) if v)
    )
    facts = []
    sources = unique("source")
    if sources:
        facts.append(("written", shown(", ".join(sources), _TEXT)))
    if change is not None:
        rules = list(dict.fromkeys(rule for node in nodes for rule in node.rules))
        if rules:
            facts.append(("by rules", shown(", ".join(rules), _TEXT)))
    types = list(dict.fromkeys(str(n.writes) for n in nodes if n.writes is not None))
    if types:
        facts.append(("gives", shown(", ".join(types), _TEXT)))
    value = next((noise[n.name] for n in reversed(block.after) if n.name in noise), None)
    if value is not None:
        facts.append(("SQNR", "exact" if value == math.inf else f"{value:.2f} dB"))
    both = change is not None
    kind = "unchanged" if change is None else f"{SYMBOLS[change.kind]} {change.kind}"
    parts = [
        ("" if change is None else shown(change.detail, _TEXT), "", ""),
        ("", "before", _lines(block.before) if both else ""),
        ("", "after" if both else "the node", _lines(block.after)),
    ]
    return (
        index,
        f"{kind} {shown(_end(placed), _TEXT)}",
        facts,
        [part for part in parts if any(part[::2])],
    )


def _lines(nodes: Sequence[NodeState]) -> str:
    lines = [shown(node.line, _TEXT) for node in nodes[:_MOST_LINES]]
    if len(nodes) > _MOST_LINES:
        lines.append(f"and {len(nodes) - _MOST_LINES} more")
    return "\n".join(lines)
