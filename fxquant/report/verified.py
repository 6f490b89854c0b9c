"""What verify found: the difference of every op, in codes, and whether that is small enough."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fxquant.report.tables import markdown_table, table

MOST_CODES: Final = 1
"""A float32 sum in the trained model and an exact integer sum may round to neighbours."""

FLOAT_TOLERANCE: Final = 1e-4
"""Of the largest value, where an op writes float: a few thousand products summed in float32."""

_COLUMNS: Final = ("path", "op", "kernel", "worst", "equal", "float error", "values")
_NUMBERS: Final = _COLUMNS[3:]


@dataclass(frozen=True)
class OpVerified:
    """One op of a converted model beside the op that was trained, both on the same inputs.

    Args:
        path: where it stands in the user's model.
        op: its canonical ops, or ``quantize`` where a float value becomes codes.
        kernel: what runs it.
        worst: the largest difference in codes; ``None`` if it writes float.
        equal: the share of equal codes, 0 to 1; ``None`` if it writes float.
        float_error: the largest difference as a share of the largest value; ``None`` if it writes
            codes.
        values: how many values were compared.
        why: why none were; empty where some were.
    """

    path: str
    op: str
    kernel: str
    worst: int | None = None
    equal: float | None = None
    float_error: float | None = None
    values: int = 0
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it computes what was trained; true where nothing could be compared."""
        if self.worst is not None:
            return self.worst <= MOST_CODES
        return self.float_error is None or self.float_error <= FLOAT_TOLERANCE


@dataclass(frozen=True)
class Verification:
    """A converted model against the model that was trained, op by op.

    Args:
        rows: the ops, in the order in which they run.
        batches: how many batches both ran on.

    Example:
        >>> made = Verification((OpVerified("fc", "linear", "reference", 0, 1.0, None, 8),), 1)
        >>> made.ok, made.worst
        (True, 0)
    """

    rows: tuple[OpVerified, ...]
    batches: int

    def __iter__(self) -> Iterator[OpVerified]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ok(self) -> bool:
        """Whether every op agrees: to one code, or in float to 1e-4 of the largest value."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> int:
        """The largest difference of any op, in codes."""
        return max((row.worst for row in self.rows if row.worst is not None), default=0)

    @property
    def failures(self) -> tuple[OpVerified, ...]:
        """The ops that do not agree."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def _outcome(self) -> str:
        count = len(self.failures)
        if not count:
            return "ok"
        return f"{count} op{'s' * (count != 1)} differ{'s' * (count == 1)}"

    @property
    def summary(self) -> str:
        """The outcome in a line or two."""
        batches = f"{self.batches} batch{'es' * (self.batches != 1)}"
        compared = [row for row in self.rows if not row.why]
        lines = [
            f"{self._outcome}: {len(compared)} ops "
            f"compared, at most {self.worst} code{'s' * (self.worst != 1)} of difference; {batches}"
        ]
        if len(compared) < len(self.rows):
            lines.append(f"{len(self.rows) - len(compared)} were not compared: see .why")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The outcome in plain types that JSON can hold; a float error of infinity is ``None``."""
        return {
            "ok": self.ok,
            "worst": self.worst,
            "batches": self.batches,
            "ops": [
                {
                    "path": row.path,
                    "op": row.op,
                    "kernel": row.kernel,
                    "ok": row.ok,
                    "worst": row.worst,
                    "equal": row.equal,
                    "float_error": _finite(row.float_error),
                    "values": row.values,
                    "why": row.why,
                }
                for row in self.rows
            ],
        }

    def to_markdown(self) -> str:
        """The ops as a table in GitHub's Markdown, and the summary."""
        rows = [_cells(row) for row in self.rows]
        return f"{markdown_table(_COLUMNS, rows, right=_NUMBERS)}\n\n{self.summary}"

    def __str__(self) -> str:
        rows = [_cells(row) for row in self.rows]
        return f"{table(_COLUMNS, rows, right=_NUMBERS)}\n\n{self.summary}"


def _cells(row: OpVerified) -> tuple[str, ...]:
    return (
        row.path,
        row.op,
        row.kernel,
        "" if row.worst is None else str(row.worst),
        "" if row.equal is None else f"{row.equal:.4%}",
        "" if row.float_error is None else f"{row.float_error:.2g}",
        str(row.values) if row.values else "",
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
