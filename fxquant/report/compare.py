"""Compare: how far each op of a quantized model is from float, and what that does to the output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.calibration.binding import bind_batch, moved
from fxquant.calibration.data import (
    as_batches,
    check_options,
    is_function,
    refuse_empty,
    transformed,
)
from fxquant.errors import ConfigError, TraceError
from fxquant.graph.capture import capture
from fxquant.graph.counterparts import last_origins
from fxquant.graph.edit import Editor
from fxquant.graph.recurrent_layers import as_called
from fxquant.graph.state import graph_state
from fxquant.numerics.agreement import Agreement
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.unshare import Unshare
from fxquant.record import OpRecord, Record, record_of
from fxquant.report.meter import Measured, Meter
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
            that its readers take; ``None``: see ``why``.
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

    Example:
        >>> output = Agreement(30.0, 0.9995, 0.25)
        >>> print(Comparison((), output, 2).summary)
        output: 30.00 dB SQNR, cosine 0.9995, largest error 0.25; 2 batches
    """

    rows: tuple[OpComparison, ...]
    output: Agreement
    batches: int

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

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.summary}"


def compare_models(
    model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> Comparison:
    """See :func:`fxquant.report.api.compare`."""
    made, record = _converted(model, quantized)
    check_options(data, transform, max_batches)
    if is_function(data):
        raise ConfigError(
            "compare() feeds the same batches to two models: pass the batches, not a function that "
            "feeds one"
        )
    meter, ops, results = None, record.ops, list[Node | None]()
    for args, kwargs in _calls(made, data, transform, max_batches):
        if meter is None:
            captured = captured_again(model, record, args, kwargs)
            results = last_origins([op.origins for op in ops], captured.graph)
            wanted = dict.fromkeys(node for node in results if node is not None)
            meter = Meter(captured, made, wanted)
            weights = [weight_agreement(op.origins, captured, made) for op in ops]
        meter.feed(args, kwargs)
    if meter is None:
        refuse_empty(data)
    rows = [
        _row(op, node, meter, weight)
        for op, node, weight in zip(ops, results, weights, strict=True)
    ]
    return Comparison(tuple(sorted(rows, key=_rank)), meter.output, meter.batches)


def _converted(model: nn.Module, quantized: nn.Module) -> tuple[GraphModule, Record]:
    for name, given in (("the float model", model), ("the quantized model", quantized)):
        if not isinstance(given, nn.Module):
            raise ConfigError(
                f"compare() got a {type(given).__name__} as {name}: call compare(model, "
                "quantized, data)"
            )
    record = record_of(quantized)
    if not record.ops or not isinstance(quantized, GraphModule):
        raise ConfigError(
            "this model is not converted yet, and computes in float: pass what convert() returned"
        )
    return quantized, record


def _calls(
    quantized: nn.Module, data: Any, transform: Callable[[Any], Any] | None, most: int | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each batch, on the model's device."""
    devices = {tensor.device for tensor in (*quantized.parameters(), *quantized.buffers())}
    device = devices.pop() if len(devices) == 1 else None
    batches: Iterable[Any] = as_batches(data)
    iterator = iter(batches)
    place = 0
    while most is None or place < most:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield moved(bind_batch(quantized, transformed(transform, batch, place), place), device)
        place += 1


def captured_again(
    model: nn.Module, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> GraphModule:
    """The float model's graph as the quantized model was made from, ready to be walked.

    Args:
        model: the float model; it is copied.
        record: the quantized model's memory.
        args: positional arguments of one call.
        kwargs: keyword arguments of one call.

    Raises:
        ConfigError: the quantized model was not made from ``model``.
    """
    first = record.snapshots[0].state
    tried: list[str] = []
    for example in ((args, kwargs), ((), {})):
        try:
            module = capture(as_called(model), *example, evaluate=True).module
        except TraceError as error:
            tried.append(str(error).splitlines()[0])
            continue
        nodes = graph_state(module.graph).nodes
        if [n.line for n in nodes] == [n.line for n in first.nodes[: len(nodes)]]:
            # Ops that write in place have no gradient; their canonical form has.
            for step in (Functionalize(), Unshare(), Canonicalize()):
                step.run(Editor(module))
            return module.eval()
        tried.append("its graph is another one")
    raise ConfigError(
        f"the quantized model was not made from this {type(model).__name__} ({tried[0]}): pass the "
        "float model that quantize() or prepare() was given, with data it can run on"
    )


def _row(op: OpRecord, real: Node | None, meter: Meter, weight: float | None) -> OpComparison:
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
