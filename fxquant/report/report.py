"""Report: what became of every op of a model, and what that comes to."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

from fxquant.graph.info import QType
from fxquant.graph.text import shown
from fxquant.record import OpRecord, Record, Timing
from fxquant.report.cards import cards, fed
from fxquant.report.compare import Comparison
from fxquant.report.html.fragment import fragment
from fxquant.report.html.page import saved
from fxquant.report.html.report_page import Table, report_page
from fxquant.report.ops import coverage, mac_coverage, runs_in, weight_coverage
from fxquant.report.tables import table

_COLUMNS: Final = (
    "path", "op", "runs", "MACs", "in", "weight", "out", "scale", "zero point", "kernel",
    "why float",
)  # fmt: skip
_NUMBERS: Final = ("MACs", "scale", "zero point")
_MOST_PATHS: Final = 8
_NAME: Final = 60
_RUNS: Final = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "stored": "stored weights",
    "int8": "int8",
}
"""What :func:`runs_in` says, for people."""
_IN: Final = {
    "bfloat16": "in bfloat16",
    "float16": "in float16",
    "stored": "with stored weights",
    "int8": "in int8",
}


class Report:
    """What became of every op of a model.

    Args:
        record: the memory of a model that fxquant made.

    Example:
        >>> print(Report(Record("static")))
        nothing is converted yet: calibrate the model and call convert()
        mode static
    """

    def __init__(self, record: Record) -> None:
        self._record = record

    @property
    def ops(self) -> tuple[OpRecord, ...]:
        """What became of each op, in graph order; a fused unit counts once."""
        return self._record.ops

    @property
    def coverage(self) -> float:
        """The share of ops that compute on int8 codes, in 16 bits or with stored weights, 0 to 1.

        Every op counts, those included that can only run in float; a fused unit counts once,
        and a question about a shape is no op.
        """
        return coverage(self.ops)

    @property
    def weight_coverage(self) -> float:
        """The share of weight elements that are integers, 0 to 1; 1 without weights."""
        return weight_coverage(self.ops)

    @property
    def mac_coverage(self) -> float:
        """The share of multiply-accumulates that int8 ops do, 0 to 1; 1 where there are none.

        Counted on the first batch of calibration: convolutions, linears, products of matrices,
        attention and recurrent layers, in float ones too. Ops whose work is not known (``macs``
        of their row is ``None``) are left out.
        """
        return mac_coverage(self.ops)

    @property
    def ratio(self) -> float:
        """Bytes of the converted model per byte of the float one; 0 if either is unknown."""
        record = self._record
        return record.bytes_after / record.bytes_before if record.bytes_before else 0.0

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """One dict per op, in plain types."""
        return tuple(_row(op) for op in self.ops)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types that JSON can hold; the keys are stable."""
        record = self._record
        timing = record.timing
        return {
            "mode": record.mode,
            "backend": record.backend,
            "capture": record.rung,
            "parts": [{"path": p.path, "capture": p.rung, "why": p.why} for p in record.parts],
            "coverage": self.coverage,
            "weight_coverage": self.weight_coverage,
            "mac_coverage": self.mac_coverage,
            "bytes_before": record.bytes_before,
            "bytes_after": record.bytes_after,
            "unseen": list(record.unseen),
            "clipped": {seen.path: seen.clipped for seen in record.observers},
            "timing": None
            if timing is None
            else {"float_ms": timing.float_ms, "quantized_ms": timing.quantized_ms},
            "ops": list(self.rows),
        }

    @property
    def table(self) -> str:
        """The ops as a table, one row each."""
        rows = [_cells(op) for op in self.ops]
        return table(_COLUMNS, rows, right=_NUMBERS)

    @property
    def summary(self) -> str:
        """What the ops come to: coverage, sizes, calibration, speed; one line each."""
        record = self._record
        lines = [*self._coverage_lines(), _made_by(record), *_parts(record)]
        if record.observers:
            worst = max(record.observers, key=lambda seen: seen.clipped)
            lines.append(
                f"calibrated at {len(record.observers)} places, at most {worst.clipped:.3%} of "
                f"the values clipped (at {shown(worst.path, _NAME) or 'the input'})"
            )
        if record.unseen:
            lines.append(f"never reached by calibration: {_paths(record.unseen)}")
        if record.timing is not None:
            lines.append(_speed(record, record.timing))
        return "\n".join(lines)

    def _coverage_lines(self) -> list[str]:
        if not self.ops:
            return ["nothing is converted yet: calibrate the model and call convert()"]
        every, counts = len(self.ops), self._counts()
        said = [f"{_RUNS[kind]}: {n} of {every} ops ({n / every:.1%})" for kind, n in counts]
        weights = sum(op.weights for op in self.ops)
        if weights and self.weight_coverage:
            said.append(f"{self.weight_coverage:.1%} of {weights} weight elements")
        macs = sum(op.macs or 0 for op in self.ops)
        if macs and self.mac_coverage:
            said.append(f"{self.mac_coverage:.1%} of {macs} multiply-accumulates")
        lines = [", ".join(said)]
        before, after = self._record.bytes_before, self._record.bytes_after
        if before and after:
            lines.append(f"size: {before} -> {after} bytes ({self.ratio:.3f}x)")
        return lines

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.summary}" if self.ops else self.summary

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        comparison: Comparison | None = None,
        title: str = "Quantization report",
    ) -> str:
        """One self-contained page: sizes, coverage, every op and why, and what calibration saw.

        It works offline and runs nothing but its own script; names of modules are text in it.

        Args:
            path: the file to write, whole or not at all; ``None`` writes none.
            comparison: what ``compare`` returned, to show where the error comes from.
            title: the heading.

        Returns:
            The page.

        Raises:
            OSError: the file cannot be written.
        """
        record = self._record
        rows = [_cells(op) for op in self.ops]
        tables: list[Table] = [("Ops", "", _COLUMNS, rows, _NUMBERS)]
        if comparison is not None:
            tables.insert(0, ("Where the error comes from", comparison.summary, *comparison.cells))
        page = report_page(
            title, _made_by(record), cards(record), tables, record.observers, self.summary
        )
        return saved(page, path)

    def _repr_html_(self) -> str:
        return fragment(_COLUMNS, [_cells(op) for op in self.ops], self.summary, _NUMBERS)

    def __repr__(self) -> str:
        said = [f"{n} of {len(self.ops)} ops {_IN[kind]}" for kind, n in self._counts()]
        return f"Report({', '.join(said)})"

    def _counts(self) -> list[tuple[str, int]]:
        """How many ops run in each way that is not float; int8 in any case."""
        counts = [(kind, sum(runs_in(op) == kind for op in self.ops)) for kind in _RUNS]
        return [(kind, n) for kind, n in counts if n] or [("int8", 0)]


def _made_by(record: Record) -> str:
    parts = [f"mode {record.mode}"]
    if record.backend:
        parts.append(f"backend {record.backend}")
    if record.rung:
        parts.append(f"captured by {record.rung}")
    return ", ".join(parts)


def _parts(record: Record) -> list[str]:
    """Which way each part was captured, where there was more to it than tracing."""
    if not record.parts or not record.parts[0].why:
        return []
    lines = [f"not traced as a whole: {record.parts[0].why}"]
    for part in record.parts[1:]:
        why = f": {part.why}" if part.why else ""
        by = part.rung if part.place == "" else f"captured by {part.rung}"
        lines.append(f"  {shown(part.path, _NAME)} {by}{why}")
    return lines


def _speed(record: Record, timing: Timing) -> str:
    real, codes = timing.float_ms, timing.quantized_ms
    ratio = f" ({codes / real:.2f}x)" if real else ""
    return f"one forward of {fed(record)}: {real:.3f} ms in float, {codes:.3f} ms converted{ratio}"


def _paths(paths: tuple[str, ...]) -> str:
    listed = ", ".join(shown(path, _NAME) or "(the input)" for path in paths[:_MOST_PATHS])
    more = len(paths) - _MOST_PATHS
    return f"{listed} and {more} more" if more > 0 else listed


def _dtype(qtype: QType | None) -> str:
    return "float" if qtype is None else _plain(qtype.dtype)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cells(op: OpRecord) -> tuple[str, ...]:
    writes = op.writes
    return (
        op.path,
        op.op,
        runs_in(op),
        "?" if op.macs is None else str(op.macs or ""),
        ", ".join(_dtype(qtype) for qtype in op.reads),
        op.weight,
        _dtype(writes),
        "" if writes is None else f"{writes.scale:.6g}",
        "" if writes is None else str(writes.zero_point),
        op.kernel,
        op.why if runs_in(op) == "float" else "",
    )


def _row(op: OpRecord) -> dict[str, Any]:
    return {
        "path": op.path,
        "op": op.op,
        "runs": runs_in(op),
        "why": op.why,
        "by": op.by,
        "kernel": op.kernel,
        "in": [_type(qtype) for qtype in op.reads],
        "weight": op.weight,
        "weight_elements": op.weights,
        "macs": op.macs,
        "out": _type(op.writes),
        "source": op.source,
        "origins": list(op.origins),
    }


def _type(qtype: QType | None) -> dict[str, Any] | None:
    if qtype is None:
        return None
    return {
        "dtype": _plain(qtype.dtype),
        "scale": qtype.scale,
        "zero_point": qtype.zero_point,
        "quant_min": qtype.quant_min,
        "quant_max": qtype.quant_max,
    }
