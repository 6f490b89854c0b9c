"""The one place that makes tables of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from tabulate import tabulate

from fxquant.graph.text import shown, shown_in_markdown

CELL: Final = 60
"""Characters a cell may have; the middle of longer text gives way to ``...``."""


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Collection[str] = (),
    limit: int = CELL,
) -> str:
    """Rows as aligned text; every cell is one harmless line, whatever it holds.

    Args:
        headers: names of the columns.
        rows: the cells; their ``str`` is shown as it is, never read as a number.
        right: headers of the columns to align on the right.
        limit: most characters of a cell.

    Example:
        >>> print(table(("op", "ms"), [("conv", "1.10"), ("add", "10.2")], right=("ms",)))
        op      ms
        ----  ----
        conv  1.10
        add   10.2
    """
    cells = [[shown(str(cell), limit) for cell in row] for row in rows]
    sides = ["right" if header in right else "left" for header in headers]
    return tabulate(
        cells,
        headers=[shown(header, limit) for header in headers],
        tablefmt="simple",
        disable_numparse=True,
        colalign=sides if cells else None,
    )


def markdown_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Collection[str] = (),
    limit: int = CELL,
) -> str:
    """Rows as a table in GitHub's Markdown; a cell shows its text, whatever markup it holds.

    Args:
        headers: names of the columns.
        rows: the cells; their ``str`` is shown as it is, never read as a number.
        right: headers of the columns to align on the right.
        limit: most characters that a cell shows.

    Example:
        >>> print(markdown_table(("op", "ms"), [("a|b", "1.10")], right=("ms",)))
        | op   |   ms |
        |:-----|-----:|
        | a\\|b | 1.10 |
    """
    cells = [[shown_in_markdown(str(cell), limit) for cell in row] for row in rows]
    sides = ["right" if header in right else "left" for header in headers]
    return tabulate(
        cells,
        headers=[shown_in_markdown(header, limit) for header in headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=sides if cells else None,
    )
