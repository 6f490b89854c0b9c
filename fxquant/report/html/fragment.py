"""What notebooks show: a table without style or script, which the notebook's own page styles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from fxquant.graph.text import shown
from fxquant.report.html.page import rendered

_MOST: Final = 200
_CELL: Final = 120
_NOTES: Final = 2_000


def fragment(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: str,
    right: Collection[str] = (),
) -> str:
    """A table as a piece of HTML.

    Args:
        headers: names of the columns.
        rows: the cells; their ``str`` is shown, whatever markup it holds. Of many rows the first
            ones are shown.
        notes: lines below the table.
        right: headers of the columns to align on the right.

    Example:
        >>> "&lt;b&gt;" in fragment(["op"], [["<b>"]], "one op")
        True
    """
    lines = [shown(line, _NOTES) for line in notes.split("\n")]
    if len(rows) > _MOST:
        lines.insert(0, f"and {len(rows) - _MOST} rows more: print it, or use .to_dict()")
    return rendered(
        "fragment.html.j2",
        headers=[(shown(header, _CELL), header in right) for header in headers],
        rows=[
            [
                (shown(str(cell), _CELL), header in right)
                for header, cell in zip(headers, row, strict=True)
            ]
            for row in rows[:_MOST]
        ],
        notes="\n".join(lines),
    )
