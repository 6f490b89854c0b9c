"""History: every pass that made a model, what it changed, and the graph before and after."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from fxquant.errors import ConfigError
from fxquant.graph.edit import Edit
from fxquant.record import Record, Snapshot
from fxquant.report.diff import ModelDiff, diff_models
from fxquant.report.html.fragment import fragment
from fxquant.report.tables import markdown_table, table

_COLUMNS: Final = ("pass", "stage", "nodes", "edits", "rules", "ms")
_NUMBERS: Final = ("nodes", "edits", "ms")
_CELL: Final = 120
"""Characters of the longest cell: all rules of a pass stand in one."""


class History:
    """The passes that made a model, in order; the first is the capture.

    ``history["fuse"]``, ``history[-1]`` and a loop give snapshots.

    Args:
        record: the memory of a model that fxquant made.

    Example:
        >>> len(History(Record("static")))
        0
    """

    def __init__(self, record: Record) -> None:
        self._snapshots = tuple(record.snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, key: int | str) -> Snapshot:
        """A pass by its place, or the first of a name.

        Raises:
            ConfigError: no pass has that name.
            IndexError: there are not so many passes.
        """
        return self._snapshots[self._place(key) if isinstance(key, str) else key]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, in order."""
        return tuple(snapshot.name for snapshot in self._snapshots)

    def _place(self, name: str) -> int:
        names = self.names
        if name in names:
            return names.index(name)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"no pass is called {name!r}{hint} The passes were {', '.join(names)}")

    def before(self, name: str) -> str:
        """Canonical text of the graph that a pass was given; empty for the capture.

        Raises:
            ConfigError: no pass has that name.
        """
        place = self._place(name)
        return self._snapshots[place - 1].state.text if place else ""

    def after(self, name: str) -> str:
        """Canonical text of the graph that a pass left.

        Raises:
            ConfigError: no pass has that name.
        """
        return self._snapshots[self._place(name)].state.text

    def diff(self, name: str) -> ModelDiff:
        """What a pass changed; empty for the capture.

        Raises:
            ConfigError: no pass has that name.
        """
        place = self._place(name)
        return diff_models(self._snapshots[max(place - 1, 0)].state, self._snapshots[place].state)

    def near(self, rule: str | None = None) -> tuple[tuple[str, str, str], ...]:
        """Places where a rule nearly fitted.

        Args:
            rule: only this rule; ``None`` for all.

        Returns:
            ``(rule, path, reason)`` of each, in the order of the passes.
        """
        return tuple(
            miss
            for snapshot in self._snapshots
            for miss in snapshot.near
            if rule is None or miss[0] == rule
        )

    def to_dict(self) -> dict[str, Any]:
        """The passes in plain types that JSON can hold; the keys are stable.

        ``graph`` is the canonical text of the graph that a pass left, ``None`` where it left the
        graph as it was.
        """
        passes = []
        last = None
        for snapshot in self._snapshots:
            passes.append(
                {
                    "name": snapshot.name,
                    "stage": snapshot.stage.name.lower(),
                    "seconds": snapshot.seconds,
                    "nodes": len(snapshot.state.nodes),
                    "edits": [_edit(edit) for edit in snapshot.edits],
                    "near": [
                        {"rule": rule, "path": path, "why": why}
                        for rule, path, why in snapshot.near
                    ],
                    "graph": None if snapshot.state is last else snapshot.state.text,
                }
            )
            last = snapshot.state
        return {"passes": passes}

    def to_markdown(self) -> str:
        """The passes as a table in GitHub's Markdown."""
        return markdown_table(_COLUMNS, self._rows(), right=_NUMBERS, limit=_CELL)

    def __str__(self) -> str:
        lines = [table(_COLUMNS, self._rows(), right=_NUMBERS, limit=_CELL)]
        misses = len(self.near())
        if misses:
            lines.append(f"\n{misses} near misses of rules: see .near()")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        misses = len(self.near())
        notes = f"{misses} near misses of rules: see .near()" if misses else ""
        return fragment(_COLUMNS, self._rows(), notes, _NUMBERS)

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (
                snapshot.name,
                snapshot.stage.name.lower(),
                len(snapshot.state.nodes),
                len(snapshot.edits),
                _rules(snapshot),
                f"{snapshot.seconds * 1e3:.1f}",
            )
            for snapshot in self._snapshots
        ]

    def __repr__(self) -> str:
        return f"History({', '.join(self.names)})"


def _rules(snapshot: Snapshot) -> str:
    fired = Counter(edit.rule for edit in snapshot.edits)
    return ", ".join(f"{rule} {count}" for rule, count in fired.items())


def _edit(edit: Edit) -> dict[str, Any]:
    return {
        "rule": edit.rule,
        "line": edit.line,
        "path": edit.path,
        "removed": list(edit.removed),
        "added": list(edit.added),
        "changed": list(edit.changed),
        "origins": list(edit.origins),
        "note": edit.note,
    }
