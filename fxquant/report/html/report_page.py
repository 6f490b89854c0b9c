"""The page of a report: sizes, coverage, every op, what the observers saw, where the error is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

from fxquant.graph.text import shown
from fxquant.numerics.observer import ObserverSummary
from fxquant.report.html.page import rendered

_CELL, _QUERY, _PATH = 240, 300, 80
_WIDE, _TALL, _BOTTOM = 256.0, 64.0, 70.0
"""Pixels of a histogram."""
_BAR: Final = 150

Card = tuple[str, str, float | None, str]
"""Name, value, share from 0 to 1 or ``None``, a remark."""
Table = tuple[str, str, Sequence[str], Sequence[Sequence[object]], Collection[str]]
"""Heading, a sentence, headers, rows, headers of the columns that stand on the right."""


def report_page(
    title: str,
    made_by: str,
    cards: Sequence[Card],
    tables: Sequence[Table],
    observers: Sequence[ObserverSummary],
    notes: str,
) -> str:
    """The page as one string.

    Args:
        title: its heading.
        made_by: one line below it.
        cards: figures of the whole model.
        tables: tables with one row per op.
        observers: what calibration saw; those with a histogram are drawn.
        notes: text at the end.
    """
    return rendered(
        "report.html.j2",
        title=shown(title, _CELL),
        made_by=shown(made_by, _CELL),
        cards=[
            (name, value, None if share is None else round(_BAR * share), shown(note, _CELL))
            for name, value, share, note in cards
        ],
        tables=[_table(*each) for each in tables],
        figures=[_figure(each) for each in observers if sum(each.counts)],
        notes="\n".join(shown(line, _CELL) for line in notes.split("\n")),
    )


def _table(
    name: str,
    text: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: Collection[str],
) -> Any:
    made = []
    for row in rows:
        cells = [shown(str(cell), _CELL) for cell in row]
        query = shown(" ".join(cells), _QUERY).lower()
        made.append((query, [(c, h in right) for h, c in zip(headers, cells, strict=True)]))
    return name, text, [(header, header in right) for header in headers], made


def _figure(seen: ObserverSummary) -> dict[str, Any]:
    """A histogram whose highest bar is full height; rare values still show a line."""
    span = (seen.high - seen.low) or 1.0
    most = max(seen.counts)
    each = span / len(seen.counts)
    bars = []
    for place, count in enumerate(seen.counts):
        if not count:
            continue
        middle = seen.low + (place + 0.5) * each
        clipped = middle < seen.range_low - each or middle > seen.range_high + each
        height = max(1.0, _TALL * count / most)
        x = _WIDE * place / len(seen.counts)
        bars.append((round(x, 1), round(_BOTTOM - height, 1), round(height, 1), _kind(clipped)))
    lines = [_WIDE * (edge - seen.low) / span for edge in (seen.range_low, seen.range_high)]
    text = (
        f"{seen.low:.4g} to {seen.high:.4g}, {seen.clipped:.3%} clipped; codes stand for "
        f"{seen.range_low:.4g} to {seen.range_high:.4g}"
    )
    path = shown(seen.path, _PATH) or "(the input)"
    return {
        "path": path,
        "text": text,
        "label": f"Histogram of {path}: {text}",
        "bars": bars,
        "lines": [round(x, 1) for x in lines if 0 <= x <= _WIDE],
    }


def _kind(clipped: bool) -> str:
    return "out" if clipped else "hist"
