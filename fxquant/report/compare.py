"""Compare: how far each op of a quantized model is from float, and what that does to the output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.counterparts import as_made, last_origins
from fxquant.numerics.agreement import Agreement
from fxquant.record import OpRecord, Record
from fxquant.report.html.fragment import fragment
from fxquant.report.meter import Measured
from fxquant.report.metered import Feed, Metered, metered
from fxquant.report.ops import runs_in
from fxquant.report.tables import markdown_table, table
from fxquant.report.weights import weight_agreement

_COLUMNS: Final = (
    *("path", "op", "runs", "share", "own dB", "dB", "cosine", "max error", "weight dB"),
)
_NUMBERS: Final = ("share", "own dB", "dB", "cosine", "max error", "weight dB")


@dataclass(frozen=True)
class OpComparison:
    """One op of a quantized model against float.

    Args:
        path: where it stands in the user's model.
        op: the canonical ops of its unit, or the name of the user's pattern.
        runs: ``int8``, ``bfloat16`` or ``float``.
        accumulated: of its result, with the errors of all ops before it, and rounded to the type
            that its readers take, if all of them read codes; ``None``: see ``why``.
        own: of its result, against the float op on the same inputs, which are those that it has in
            the quantized model: what it adds by itself; ``None``: see ``why``.
        share: the share of the output's error that its own error makes, to first order: 1.0 is
            all of it, a negative one makes it smaller; ``None`` where the float model has no
            gradient.
        weight_sqnr: SQNR of its weight in decibels, up to one factor for each output channel;
            ``None`` where there is none, or none that can be told.
        why: why nothing was measured; empty where something was.
    """

    path: str
    op: str
    runs: str
    accumulated: Agreement | None
    own: Agreement | None
    share: float | None
    weight_sqnr: float | None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """A quantized model against its float original, op by op.

    Args:
        rows: the ops, those first that add most to the error of the output.
        output: how the outputs of the models agree.
        batches: how many batches both ran on.
        note: what to know of the figures, if anything.

    Example:
        >>> output = Agreement(30.0, 0.9995, 0.25)
        >>> print(Comparison((), output, 2).summary)
        output: 30.00 dB SQNR, cosine 0.9995, largest error 0.25; 2 batches
    """

    rows: tuple[OpComparison, ...]
    output: Agreement
    batches: int
    note: str = ""

    def __iter__(self) -> Iterator[OpComparison]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def worst(self, count: int = 5) -> tuple[OpComparison, ...]:
        """The ops that add most to the error of the output, the worst first."""
        return self.rows[:count]

    @property
    def explained(self) -> float | None:
        """The sum of all shares: 1.0 where the error is small enough for first order to hold."""
        shares = [row.share for row in self.rows if row.share is not None]
        return sum(shares) if shares else None

    @property
    def table(self) -> str:
        """The ops as a table, the worst first."""
        return table(_COLUMNS, [_cells(row) for row in self.rows], right=_NUMBERS)

    @property
    def summary(self) -> str:
        """How the outputs agree, and what the figures of the table stand for."""
        made, batches = self.output, f"{self.batches} batch{'es' * (self.batches != 1)}"
        lines = [
            f"output: {_number(made.sqnr, '.2f')} dB SQNR, cosine {_number(made.cosine, '.6g')}, "
            f"largest error {made.max_error:.4g}; {batches}"
        ]
        if self.explained is not None:
            lines.append(
                f"share: of the output's error, to first order (together {self.explained:.1%}); "
                "own: what the op adds by itself; dB: with the errors of all ops before it"
            )
        left = sum(row.accumulated is None for row in self.rows)
        if left:
            lines.append(f"{left} ops were not measured: see .why of their rows")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The comparison in plain types that JSON can hold; an infinite SQNR is ``None``."""
        return {
            "output": _agreement(self.output),
            "batches": self.batches,
            "explained": self.explained,
            "ops": [
                {
                    "path": row.path,
                    "op": row.op,
                    "runs": row.runs,
                    "share": row.share,
                    "own": _agreement(row.own),
                    "accumulated": _agreement(row.accumulated),
                    "weight_sqnr": _finite(row.weight_sqnr),
                    "why": row.why,
                }
                for row in self.rows
            ],
        }

    def to_markdown(self) -> str:
        """The ops as a table in GitHub's Markdown, the worst first, and the summary."""
        rows = [_cells(row) for row in self.rows]
        return f"{markdown_table(_COLUMNS, rows, right=_NUMBERS)}\n\n{self.summary}"

    @property
    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
        """The table as data: headers, rows of text, and which columns are numbers."""
        return _COLUMNS, [_cells(row) for row in self.rows], _NUMBERS

    def _repr_html_(self) -> str:
        headers, rows, right = self.cells
        return fragment(headers, rows, self.summary, right)

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.summary}"


def compare_models(model: nn.Module, quantized: nn.Module, feed: Feed) -> Comparison:
    """See :func:`fxquant.report.api.compare`."""
    run = metered("compare", model, quantized, feed, _results)
    ops = run.record.ops
    results = _by_op(run.captured, run.record, run.made)
    rows = [_row(op, node, run) for op, node in zip(ops, results, strict=True)]
    note = _TRAINED if run.record.mode == "qat" and not _has_weights_of(run.made, model) else ""
    ranked = tuple(sorted(rows, key=_rank))
    return Comparison(ranked, run.meter.output, run.meter.batches, note)


_TRAINED: Final = (
    "the quantized model was trained: what changed its weights counts as error here, unless the "
    "float model has them too: model.load_state_dict(prepared.state_dict(), strict=False)"
)


def _has_weights_of(made: nn.Module, model: nn.Module) -> bool:
    """Whether a model in training still holds the weights of the float model, by their names."""
    held, wanted = dict(made.named_parameters()), dict(model.named_parameters())
    return all(name in held and torch.equal(held[name], real) for name, real in wanted.items())


def _by_op(captured: GraphModule, record: Record, made: GraphModule) -> list[Node | None]:
    found = last_origins([op.origins for op in record.ops], captured.graph)
    return as_made(found, captured.graph, made.graph)


def _results(captured: GraphModule, record: Record, made: GraphModule) -> list[Node]:
    return [node for node in _by_op(captured, record, made) if node is not None]


def _row(op: OpRecord, real: Node | None, run: Metered) -> OpComparison:
    meter = run.meter
    weight = weight_agreement(op.origins, run.captured, run.made)
    found: Measured | None = None if real is None else meter.measured(real)
    runs = runs_in(op)
    if found is None:
        why = _INNER if real is None else _NOT_FLOAT if meter.counterpart(real) else _NO_TWIN
        return OpComparison(op.path, op.op, runs, None, None, None, weight, why)
    return OpComparison(op.path, op.op, runs, found.accumulated, found.own, found.share, weight)


_INNER: Final = "it is inside of something that is compared as a whole"
_NOT_FLOAT: Final = "its result is no tensor of floating-point numbers"
_NO_TWIN: Final = "no value of the quantized model has the shape of its float result"


def _rank(row: OpComparison) -> tuple[int, float]:
    """The worst first: by share of the output's error, or else by the noise it adds."""
    if row.share is not None:
        return (0, -row.share)
    return (1, row.own.sqnr) if row.own is not None else (2, 0.0)


def _cells(row: OpComparison) -> tuple[str, ...]:
    made, own = row.accumulated, row.own
    return (
        row.path,
        row.op,
        row.runs,
        _number(None if row.share is None else row.share, ".1%"),
        _number(None if own is None else own.sqnr, ".1f"),
        _number(None if made is None else made.sqnr, ".1f"),
        _number(None if made is None else made.cosine, ".6f"),
        _number(None if made is None else made.max_error, ".3g"),
        _number(row.weight_sqnr, ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "exact" if value == math.inf else format(value, form).replace("-0.0%", "0.0%")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _agreement(made: Agreement | None) -> dict[str, float | None] | None:
    if made is None:
        return None
    return {key: _finite(value) for key, value in dataclasses.asdict(made).items()}
