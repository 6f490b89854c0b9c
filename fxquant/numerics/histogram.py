"""The default observer: a histogram of fixed size that follows the data, and the best range in it.

The bins are ``2**e`` wide and lie at whole multiples of that, so a histogram that must cover more
doubles its bins by adding up pairs, and the result is exactly what those bins would have counted
from the start. Which bins are in use follows from the smallest and largest value alone: the order
of the data does not matter. Bin k holds the x with ``trunc(x / 2**e) == k``: bin 0 lies on both
sides of 0, for the many zeros of a ReLU, which are represented exactly and cause no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from fxquant.errors import ConfigError
from fxquant.numerics.error_search import search_ranges
from fxquant.numerics.observer import CHUNK, Observer
from fxquant.numerics.qparams import QParams, choose_many
from fxquant.spec import QSpec

BINS: Final = 2048
WHOLE: Final = 2**17
"""A tensor of up to this many values is counted whole, a larger one by a regular sample."""

SAMPLED: Final = 2**20
"""The largest sample; up to three times as many values it is every third."""

_TOGETHER: Final = 64
"""How many histograms are searched at a time: together they take a megabyte."""

_REPORT_BINS: Final = 64
_SMALLEST_EXPONENT: Final = -126  # Its reciprocal is the largest power of two that float32 has.


@dataclass(frozen=True)
class _Findings:
    """What a histogram tells once it is full.

    Args:
        key: what it had counted by then.
        qparams: those of the range of least error.
        clipped: share of the values outside that range by more than half a step.
        counts: the values in each of 64 equal bins, for reports.
    """

    key: tuple[object, ...]
    qparams: QParams
    clipped: float
    counts: tuple[int, ...]


class HistogramObserver(Observer):
    """Count values in 2,048 bins and choose the range of least mean squared error.

    The range grows with the data by doubling the bins; minimum and maximum are exact. A tensor of
    more than 131,072 values adds every third (from 3 million on, about a million in all), weighing
    as many as they stand for, and the extremes of every 131,072. The stride has no common factor
    with the tensor's size, so no channel, row or column is left out; which values it hits depends
    on the memory format.

    Args:
        spec: as for every observer; ``granularity`` must be ``"tensor"``.
        path: as for every observer.
        axis: not used.

    Raises:
        ConfigError: one scale per channel is asked for.

    Example:
        >>> observer = HistogramObserver(QSpec(), "conv1")
        >>> _ = observer(torch.linspace(0, 1, 1000))
        >>> observer.summary().clipped < 0.01
        True
    """

    kind: ClassVar[str] = "histogram"
    bins: Tensor
    grid: Tensor

    def __init__(self, spec: QSpec, path: str, axis: int | None = None) -> None:
        super().__init__(spec, path, axis)
        self._found: _Findings | None = None
        if self.axis is not None:
            raise ConfigError(
                f"{path}: the histogram observer has one scale per tensor; for one per channel "
                "use observer='minmax' or 'moving_average'"
            )
        # bins[i] counts the x with trunc(x / 2**e) == first + i.
        self.register_buffer("bins", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("grid", torch.tensor([_SMALLEST_EXPONENT, 0]))  # e, first

    def _observe(self, values: Tensor, lows: Tensor, highs: Tensor) -> int:
        exponent, first = grid_for(
            min(*lows.tolist(), float(self.low), 0.0),
            max(*highs.tolist(), float(self.high), 0.0),
        )
        self._regrid(exponent, first)
        stride = sample_stride(values.numel())
        # A sample misses what is rare, and the range hangs on the rarest: count those for sure.
        samples = [(values[::stride], stride)] + [(ends, 1) for ends in (lows, highs) if stride > 1]
        for sample, weight in samples:
            for chunk in sample.split(CHUNK):
                # A power of two scales exactly, and the cast truncates: two passes are exact.
                place = chunk.mul(math.ldexp(1.0, -exponent)).to(torch.int16).sub_(first)
                self.bins.add_(torch.bincount(place, minlength=BINS), alpha=weight)
        return 0

    def _regrid(self, exponent: int, first: int) -> None:
        """Move to bins that are as wide or wider; every old bin lies inside one new bin."""
        old_exponent, old_first = self.grid.tolist()
        if (exponent, first) == (old_exponent, old_first):
            return
        if self.seen:
            place, counts = _moved(self.bins, (old_exponent, old_first), (exponent, first))
            self.bins.zero_().index_add_(0, place, counts)
        self.grid.copy_(torch.tensor([exponent, first], device="cpu"))

    def _forget(self) -> None:
        super()._forget()
        self.bins.zero_()
        self.grid.copy_(torch.tensor([_SMALLEST_EXPONENT, 0], device="cpu"))

    def _take_in(self, seen: dict[str, Tensor]) -> None:
        if int(seen["tally"][1]):
            exponent, first = grid_for(
                min(float(seen["low"]), float(self.low), 0.0),
                max(float(seen["high"]), float(self.high), 0.0),
            )
            self._regrid(exponent, first)
            theirs = seen["grid"].tolist()
            bins = seen["bins"].to(self.bins.device)
            self.bins.index_add_(0, *_moved(bins, (theirs[0], theirs[1]), (exponent, first)))
        super()._take_in(seen)

    def qparams(self) -> QParams:
        """Choose the qparams of least squared error for everything seen so far.

        Raises:
            CalibrationError: nothing was seen.
        """
        self._need_values()
        return self._findings().qparams

    def _findings(self) -> _Findings:
        # The search costs a millisecond, and reports ask again for what conversion has found.
        if self._found is None or self._found.key != self._key():
            search_together((self,))
        assert self._found is not None
        return self._found

    def _key(self) -> tuple[object, ...]:
        return (*self.tally.tolist(), self.spec)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return counts [2048] and their edges [2049], float64, on the CPU."""
        counts, edges = _histograms((self,))
        return counts[0], edges[0]

    def _clipped(self, qparams: QParams, counted: float) -> float:
        del qparams, counted
        return self._findings().clipped

    def _report_counts(self) -> tuple[int, ...]:
        return self._findings().counts


def _moved(bins: Tensor, old: tuple[int, int], new: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the bins in use lie among bins that are as wide or wider, and their counts."""
    used = bins.nonzero().view(-1)
    # From 12 doublings on everything is in bin 0, whatever their number.
    merged = 2 ** min(new[0] - old[0], 12)
    place = (used + old[1]).div(merged, rounding_mode="trunc")
    return place - new[1], bins[used]


def search_together(observers: Iterable[HistogramObserver]) -> None:
    """Search the ranges of many observers at once, each as it would be alone, to the last bit.

    One search is some hundred small tensor operations; together they share those. What is found
    is kept by the observers, who are asked for it as before.

    Args:
        observers: those that saw nothing, or nothing new since the last search, are passed over.
    """
    alike: dict[QSpec, list[HistogramObserver]] = {}
    for observer in observers:
        key = observer._key()
        if observer.seen and (observer._found is None or observer._found.key != key):
            alike.setdefault(observer.spec, []).append(observer)
    for spec, group in alike.items():
        for start in range(0, len(group), _TOGETHER):
            _search(group[start : start + _TOGETHER], spec)


def _search(observers: Sequence[HistogramObserver], spec: QSpec) -> None:
    counts, edges = _histograms(observers)
    ends = [torch.stack((o.low, o.high)).flatten().tolist() for o in observers]
    low, high = torch.tensor(ends, dtype=torch.float64).unbind(1)
    # Bin 0 holds the zeros: whatever the range, they cost nothing.
    weighed = counts.masked_fill((edges[:, :-1] < 0.0) & (edges[:, 1:] > 0.0), 0.0)
    found = search_ranges(weighed, edges, low.clamp(max=0.0), high.clamp(min=0.0), spec)
    chosen = choose_many(*found, spec)
    clipped = _clipped(counts, edges, (low, high), chosen).tolist()
    merged = _report_counts(counts, edges, low, high)
    for place, observer in enumerate(observers):
        observer._found = _Findings(observer._key(), chosen[place], clipped[place], merged[place])


def _histograms(observers: Sequence[HistogramObserver]) -> tuple[Tensor, Tensor]:
    """Counts [B, 2048] and edges [B, 2049] of several observers, float64, on the CPU."""
    grids = [observer.grid.tolist() for observer in observers]
    first = torch.tensor([[grid[1]] for grid in grids], dtype=torch.float64)
    wide = torch.tensor([[math.ldexp(1.0, grid[0])] for grid in grids], dtype=torch.float64)
    places = first + torch.arange(BINS + 1, dtype=torch.float64)
    # Bin 0 reaches down to -1, and so every bin below it lies one lower than its number.
    places -= (places <= 0).to(torch.float64)
    counts = torch.stack([observer.bins.cpu() for observer in observers])
    return counts.to(torch.float64), places * wide


def _clipped(
    counts: Tensor, edges: Tensor, seen: tuple[Tensor, Tensor], chosen: Sequence[QParams]
) -> Tensor:
    """The share [B] of the values that lie outside the chosen range by more than half a step."""
    # The outermost bins reach beyond the data: what is spread over them must not.
    edges = edges.clamp(seen[0].unsqueeze(1), seen[1].unsqueeze(1))
    half = torch.tensor([[qparams.scale_value / 2] for qparams in chosen], dtype=torch.float64)
    low, high = (
        torch.stack(ends) for ends in zip(*map(QParams.representable, chosen), strict=True)
    )
    wide = edges.diff()
    inside = edges.clamp(low - half, high + half).diff() / wide
    # A bin without width is that of a constant, which no range chosen from it leaves out.
    inside = inside.where(wide > 0, 1.0)
    return (1.0 - (counts * inside).sum(1) / counts.sum(1)).clamp(min=0.0)


def _report_counts(
    counts: Tensor, edges: Tensor, low: Tensor, high: Tensor
) -> list[tuple[int, ...]]:
    """The counts in 64 equal bins from the least to the largest value; a constant has one bin."""
    middle = (edges[:, :-1] + edges[:, 1:]) / 2
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    place = (middle - low) / (high - low) * _REPORT_BINS
    place = place.nan_to_num().floor_().clamp_(0, _REPORT_BINS - 1)
    merged = torch.zeros(len(counts), _REPORT_BINS, dtype=torch.float64)
    merged.scatter_add_(1, place.to(torch.int64), counts)
    constant = (low == high).flatten().tolist()
    rows = merged.to(torch.int64).tolist()
    return [(sum(row),) if same else tuple(row) for row, same in zip(rows, constant, strict=True)]


def grid_for(low: float, high: float) -> tuple[int, int]:
    """Return ``(e, first)``: the finest bins of which 2,048 cover ``low..high``, and the first.

    Args:
        low: at most 0, finite.
        high: at least 0, finite.

    Example:
        >>> grid_for(-1.0, 2046.0), grid_for(-1.0, 2047.0)
        ((0, -1), (1, 0))
    """
    # frexp says 0 of 0.0, so the tiniest range there is stands in for none at all.
    exponent = max(
        math.frexp(max(high - low, math.ulp(0.0) * BINS) / BINS)[1] - 1, _SMALLEST_EXPONENT
    )
    while True:
        first = math.trunc(math.ldexp(low, -exponent))
        last = math.trunc(math.ldexp(high, -exponent))
        if last - first < BINS:
            return exponent, first
        exponent += 1


def sample_stride(count: int) -> int:
    """Return the stride of the sample of ``count`` values; coprime to ``count``.

    Example:
        >>> sample_stride(2**17), sample_stride(2**18), sample_stride(2**18 * 3)
        (1, 3, 5)
    """
    if count <= WHOLE:
        return 1
    stride = max(3, -(-count // SAMPLED))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride
