"""The figures at the top of a report's page."""

from __future__ import annotations

from fxquant.record import Record
from fxquant.report.html.report_page import Card
from fxquant.report.ops import coverage, mac_coverage, weight_coverage


def cards(record: Record) -> list[Card]:
    """Figures of the whole model, for the top of a page."""
    ops, share = record.ops, coverage(record.ops)
    found: list[Card] = [("ops converted", f"{share:.0%}", share, f"{len(ops)} ops")]
    if any(op.int8 for op in ops):
        work = f"{_short(sum(op.macs or 0 for op in ops))}MACs"
        stored = f"{_short(sum(op.weights for op in ops))}elements"
        in_codes = mac_coverage(ops), weight_coverage(ops)
        if in_codes[0]:
            found.append(("work in int8", f"{in_codes[0]:.1%}", in_codes[0], work))
        found.append(("weights as integers", f"{in_codes[1]:.1%}", in_codes[1], stored))
    if record.bytes_before:
        ratio = record.bytes_after / record.bytes_before
        sizes = f"{_short(record.bytes_before)}B to {_short(record.bytes_after)}B"
        found.append(("size", f"{ratio:.1%}", min(ratio, 1.0), sizes))
    if record.timing is not None and record.timing.float_ms:
        timing = record.timing
        times = f"{timing.float_ms:.3f} ms to {timing.quantized_ms:.3f} ms, {fed(record)}"
        ratio = timing.quantized_ms / timing.float_ms
        found.append(("time", f"{ratio:.2f}x", None, times))
    return found


def _short(number: int) -> str:
    """A number in three or four digits, with the letter of its thousands."""
    value, letters = float(number), ["", "k", "M", "G", "T"]
    while value >= 1000 and len(letters) > 1:
        value /= 1000
        letters.pop(0)
    return f"{value:.4g} {letters[0]}" if letters[0] else f"{number} "


def fed(record: Record) -> str:
    """What both models were timed on."""
    return "the example" if record.mode == "dynamic" else "batch 1"
