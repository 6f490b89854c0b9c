"""Search the range to quantize by the mean squared error it causes.

A wide range spends its few codes on rare large values, a narrow one clips them; the least squared
error lies between. The error of a range is computed from a histogram as if the values of a bin
were spread evenly over it. A value at distance r from its code costs r^2, one clipped to the last
code at c costs (x - c)^2; with step s, integrated from 0 to t:

    G(t) = n s^3 / 12 + r^3 / 3 + o^3 / 3
    n = round(u / s),  r = u - n s,  o = t - u,  where u is t clipped to the first and last code

so a bin from a to b that holds c values costs ``c (G(b) - G(a)) / (b - a)``, whatever the ratio of
bin width and step. G is this simple because 0 always is a code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.qparams import QParams, choose_qparams, steps_from_range
from fxquant.spec import QSpec

# Ten octaves down from the full range in half-octave steps, then finer around the best, to 3 %.
_COARSE: Final = tuple(2.0 ** (-i / 2) for i in range(21))
_ZOOMS: Final = (1 / 6, 1 / 24)
_COARSE_BINS: Final = 128
_WIDTHS: Final = (16, 32, 64, 136, 256, 512, 1032, 2056)
"""To how many edges histograms are padded: few lengths, so that many are searched together."""

_AT_ONCE: Final = 2**16
"""How many numbers are worked on together: half a megabyte stays in the cache."""


@dataclass(frozen=True)
class _Jumps:
    """Histograms as the edges at which their density jumps; all else cancels out.

    Args:
        edges: [B, N] float64, padded.
        jumps: [B, N] float64, by how much the density drops there; 0 where padded.
    """

    edges: Tensor
    jumps: Tensor

    def error(self, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
        """The summed squared error, [B, M], of quantizing each histogram with M ranges, [B, M].

        Every step is rounded for itself and every sum has one of a few lengths, so the result
        for one histogram does not depend on which others are worked on with it.
        """
        scale, zero_point = steps_from_range(low, high, spec)
        step = scale.to(torch.float64).unsqueeze(2)
        least = (spec.quant_min - zero_point).unsqueeze(2) * step
        most = (spec.quant_max - zero_point).unsqueeze(2) * step
        edges = self.edges.unsqueeze(1)
        # Two calls in place take half the time of clamp().
        inside = torch.maximum(edges, least)
        torch.minimum(inside, most, out=inside)
        total = (edges - inside).pow_(3)
        code = (inside * step.reciprocal()).round_()
        total.add_(inside.sub_(code * step).pow_(3)).add_(code.mul_(step**3 / 4))
        return total.mul_(self.jumps.unsqueeze(1)).sum(2) / 3


def _jumps(counts: Tensor, edges: Tensor) -> tuple[_Jumps, list[int]]:
    """Sum by parts; also says to which of ``_WIDTHS`` each row was filled.

    Summing c (G(b) - G(a)) by parts needs G only once per edge, and only where density jumps: a
    small tensor fills few of the bins.
    """
    density = counts / edges.diff()
    jump = torch.nn.functional.pad(density, (1, 0)) - torch.nn.functional.pad(density, (0, 1))
    row, column = (jump != 0).nonzero().unbind(1)
    used = torch.bincount(row, minlength=len(jump))
    place = torch.arange(len(row)) - (used.cumsum(0) - used)[row]
    filled = used.tolist()
    packed = jump.new_zeros(2, len(jump), _padded(max(filled)))
    packed[0, row, place] = edges[row, column]
    packed[1, row, place] = jump[row, column]
    return _Jumps(packed[0], packed[1]), [_padded(count) for count in filled]


def _padded(count: int) -> int:
    return next((width for width in _WIDTHS if width >= count), -8 * (-count // 8))


def expected_error(counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    """Return the summed squared error of quantizing a histogram with each of M ranges.

    Args:
        counts: [K] float64, how many values each bin holds.
        edges: [K + 1] float64, ascending.
        low: [M] float64, at most 0, the lower ends.
        high: [M] float64, at least 0, the upper ends.
        spec: dtype, bits and symmetry.
    """
    jumps, _ = _jumps(counts.unsqueeze(0), edges.unsqueeze(0))
    return jumps.error(low.unsqueeze(0), high.unsqueeze(0), spec)[0]


def search_range(
    counts: Tensor, edges: Tensor, low: float, high: float, spec: QSpec
) -> tuple[float, float]:
    """Return the range inside ``low..high`` with the least expected squared error.

    Args:
        counts: [K] float64, how many values each bin holds, without the exact zeros.
        edges: [K + 1] float64, ascending.
        low: the true minimum, at most 0.
        high: the true maximum, at least 0.
        spec: dtype, bits and symmetry.
    """
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    found = search_ranges(counts.unsqueeze(0), edges.unsqueeze(0), ends[0], ends[1], spec)
    return float(found[0]), float(found[1])


def search_ranges(
    counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, spec: QSpec
) -> tuple[Tensor, Tensor]:
    """Return what :func:`search_range` does for each of B histograms, to the last bit.

    Args:
        counts: [B, K] float64, how many values each bin holds, without the exact zeros.
        edges: [B, K + 1] float64, ascending.
        low: [B] float64, the true minima, at most 0.
        high: [B] float64, the true maxima, at least 0.
        spec: dtype, bits and symmetry.

    Example:
        >>> edges = torch.arange(257.0).double().expand(2, 257)
        >>> ends = torch.zeros(2).double(), torch.tensor([200.0, 100.0]).double()
        >>> search_ranges(torch.zeros(2, 256).double(), edges, *ends, QSpec())[1].tolist()
        [200.0, 100.0]
    """
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    group = max(1, counts.shape[1] // _COARSE_BINS)
    shares = torch.ones(2, len(counts), dtype=torch.float64)
    sides = list(zip((low != 0).tolist(), (high != 0).tolist(), strict=True))
    merged = counts.view(len(counts), -1, group).sum(2)
    steps = (0.0, *_ZOOMS)
    views = (_jumps(merged, edges[:, ::group]), *[_jumps(counts, edges)] * len(_ZOOMS))
    for zoom, (jumps, widths) in zip(steps, views, strict=True):
        for rows, side, width in _alike(sides, widths, spec.symmetric):
            some = _Jumps(jumps.edges[rows, :width], jumps.jumps[rows, :width])
            tried = _candidates(shares[:, rows], side, zoom, spec.symmetric)
            error = some.error(tried[0] * low[rows, None], tried[1] * high[rows, None], spec)
            # Of equals the first, which is the widest.
            best = error.masked_fill_(tried.sum(0) == 0, math.inf).argmin(1)
            shares[:, rows] = tried[:, torch.arange(len(rows)), best]
    return shares[0] * low, shares[1] * high


def _alike(
    sides: list[tuple[bool, bool]], widths: list[int], symmetric: bool
) -> Iterator[tuple[list[int], tuple[bool, bool], int]]:
    """Rows that are searched together, with their sides (is there a low, a high) and width."""
    groups: dict[tuple[tuple[bool, bool], int], list[int]] = {}
    for row, (side, width) in enumerate(zip(sides, widths, strict=True)):
        if any(side):
            groups.setdefault((side, width), []).append(row)
    for (side, width), rows in groups.items():
        tried = (len(_COARSE) + 1) ** (sum(side) if not symmetric else 1)
        count = max(1, _AT_ONCE // (tried * width))
        for start in range(0, len(rows), count):
            yield rows[start : start + count], side, width


def _candidates(best: Tensor, side: tuple[bool, bool], zoom: float, symmetric: bool) -> Tensor:
    """Shares of the full range to try, [low and high, R, M], wider ones first.

    Args:
        best: [2, R], the shares found so far.
        side: whether the range reaches below 0, and above.
        zoom: the step between neighbours in octaves; 0 for the whole coarse ladder.
        symmetric: whether both ends have the same share.
    """
    ladder = torch.tensor([*_COARSE, 0.0], dtype=torch.float64).expand(best.shape[1], -1)
    around = torch.arange(-3, 4, dtype=torch.float64).mul_(-zoom).exp2_()
    ends = [
        torch.zeros(len(share), 1, dtype=torch.float64)
        if not there
        else (share.unsqueeze(1) * around).clamp_(max=1.0)
        if zoom
        else ladder
        for share, there in zip(best, side, strict=True)
    ]
    if best.shape[1] == 1:
        # Several that were cut down to the full range are one and the same.
        ends = [shares[:, max(0, int((shares == 1.0).sum()) - 1) :] for shares in ends]
    if symmetric:
        return torch.stack((ends[1], ends[1]))
    pairs = torch.broadcast_tensors(ends[0].unsqueeze(2), ends[1].unsqueeze(1))
    return torch.stack([shares.flatten(1) for shares in pairs])


def weight_qparams(w: Tensor, spec: QSpec, axis: int) -> QParams:
    """Choose the qparams of a weight from its exact values.

    At 8 bits the range covers every value. Below, where covering the largest value costs more
    than clipping it, the range of each channel (or of the tensor) is searched for the least
    squared error, on the weights themselves.

    Args:
        w: the weight, any floating dtype.
        spec: dtype, bits, symmetry and granularity.
        axis: the output-channel axis; used only where ``spec.granularity`` is ``"channel"``.

    Raises:
        QParamError: the weight holds NaN or infinity, or has no channels.

    Example:
        >>> spec = QSpec("int8", symmetric=True, granularity="channel")
        >>> weight_qparams(torch.tensor([[1.27, 0.0], [0.0, 2.54]]), spec, axis=0).scale
        tensor([0.0100, 0.0200])
    """
    rows = w.detach().to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    channel = axis if spec.granularity == "channel" else None
    rows = rows.reshape(1, -1) if channel is None else rows.movedim(channel, 0).flatten(1)
    if rows.shape[1]:
        low, high = rows.amin(1), rows.amax(1)  # several times as fast as aminmax on CPU
    else:
        low = high = rows.new_zeros(rows.shape[0])
    if spec.bits < 8 and rows.numel() and bool((low.isfinite() & high.isfinite()).all()):
        low, high = _clip_rows(rows, low.clamp(max=0.0), high.clamp(min=0.0), spec)
    return choose_qparams(low, high, spec, channel)


def _clip_rows(rows: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Return, per row, the share of its range that quantizes it with the least squared error."""
    # A few rows at a time, whose dozens of trials stay in the cache.
    count = max(1, _AT_ONCE // max(1, rows.shape[1]))
    parts = zip(rows.split(count), low.split(count), high.split(count), strict=True)
    share = torch.cat([_best_share(*part, spec) for part in parts])
    return low * share, high * share


def _best_share(rows: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    share = torch.ones_like(low)
    least, _ = _row_error(rows, low, high, spec)
    # Four octaves down in quarter octaves, then finer around the best, to 1 %.
    for steps, octaves in ((range(1, 17), 1 / 4), (range(-3, 4), 1 / 16), (range(-3, 4), 1 / 64)):
        centre = share.clone()
        for step in steps:
            tried = (centre * 2.0 ** (-step * octaves)).clamp(max=1.0)
            if bool((tried == centre).all()):
                continue  # their errors are known
            error, clipped = _row_error(rows, low * tried, high * tried, spec)
            better = error < least
            share, least = share.where(~better, tried), least.where(~better, error)
            if bool((clipped > least).all()):
                break  # a narrower range clips more
    return share


def _row_error(rows: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """The squared error of each row, and what of it at least comes from clipped values."""
    scale, zero_point = steps_from_range(low.to(torch.float64), high.to(torch.float64), spec)
    step = scale.to(rows.dtype).unsqueeze(1)
    steps = (rows / step).round_()
    if spec.symmetric:
        # The middle of the code range is the same for all rows: numbers clamp faster than tensors.
        middle = int(zero_point[0])
        steps.clamp_(spec.quant_min - middle, spec.quant_max - middle)
    else:
        least, most = ((end - zero_point).unsqueeze(1) for end in (spec.quant_min, spec.quant_max))
        steps.clamp_(least, most)
    # addcmul in place would be one pass less, but the product must round as dequantize does.
    # torch adds float32 by halves, which keeps 6 digits; adding in float64 takes ten times as long.
    error = steps.mul_(step).sub_(rows).square_().sum(1).to(torch.float64)
    if not spec.symmetric:
        # Ends are moved to whole codes, and narrower ranges need not lie inside wider ones.
        return error, error.new_full(error.shape, -math.inf)
    # What is not clipped is at most half a step off; a little more, for float32.
    return error, error - 0.2501 * rows.shape[1] * scale.to(torch.float64) ** 2
