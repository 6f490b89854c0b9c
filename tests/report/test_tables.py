"""Tables: every cell as it was given, on one line."""

from __future__ import annotations

import pytest

from fxquant.report.tables import CELL, table

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "two\nlines\r\n",
    "tab\there",
    "\u202egnp.exe",
    "zero\u200bwidth",
    "lone \ud800",
    "n" * 10_000,
    "\n" * 10_000,
)


def test_numbers_stay_as_they_are_written() -> None:
    text = table(("a", "b"), [("1.10", 1), ("1e5", True), ("007", None)])
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["1.10", "1"],
        ["1e5", "True"],
        ["007", "None"],
    ]


@pytest.mark.parametrize("cell", HOSTILE)
def test_hostile_cells_are_one_short_printable_line(cell: str) -> None:
    lines = table(("name", "next"), [(cell, "end"), ("plain", "end")]).split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert max(len(line.rstrip()) for line in lines if "-" not in line) <= CELL + 2 + len("next")
    assert lines[2].endswith("end")
    assert lines[2].index("end") == lines[3].index("end")


def test_harmless_markup_is_text() -> None:
    assert "<img src=x onerror=alert(1)>" in table(("name",), [(HOSTILE[0],)])


def test_columns_align_where_asked() -> None:
    text = table(("op", "n"), [("a", "1"), ("bb", "100")], right=("n",))
    assert text.splitlines()[2:] == ["a       1", "bb    100"]


def test_no_rows_give_the_headers() -> None:
    assert table(("op", "n"), [], right=("n",)).splitlines()[0].split() == ["op", "n"]
