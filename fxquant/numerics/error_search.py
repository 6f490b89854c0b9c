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

from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.qparams import QParams, choose_qparams, steps_from_range
from fxquant.spec import QSpec

# Ten octaves down from the full range in half-octave steps, then finer around the best, to 3 %.
_COARSE: Final = tuple(2.0 ** (-i / 2) for i in range(21))
_ZOOMS: Final = (1 / 6, 1 / 24)
_COARSE_BINS: Final = 128


def expected_error(counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    """Return the summed squared error of quantizing a histogram with each of M ranges.

    Args:
        counts: [K] float64, how many values each bin holds.
        edges: [K + 1] float64, ascending.
        low: [M] float64, at most 0, the lower ends.
        high: [M] float64, at least 0, the upper ends.
        spec: dtype, bits and symmetry.
    """
    scale, zero_point = steps_from_range(low, high, spec)
    step = scale.to(torch.float64).unsqueeze(1)
    least = (spec.quant_min - zero_point).unsqueeze(1) * step
    most = (spec.quant_max - zero_point).unsqueeze(1) * step
    # Summing c (G(b) - G(a)) by parts needs G only once per edge, and only where density jumps:
    # a small tensor fills few of the bins.
    density = counts / edges.diff()
    jump = torch.nn.functional.pad(density, (1, 0)) - torch.nn.functional.pad(density, (0, 1))
    edges, jump = edges[jump != 0], jump[jump != 0]
    inside = edges.clamp(least, most)
    over = edges - inside
    code = (inside / step).round_()
    rest = inside.addcmul_(code, step, value=-1.0)
    total = code.mul_(step**3 / 12)
    total.add_(rest.pow_(3), alpha=1 / 3).add_(over.pow_(3), alpha=1 / 3)
    return total @ jump


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
    if spec.symmetric:
        low, high = -max(-low, high), max(-low, high)
    lows = torch.tensor([*_COARSE, 0.0] if low else [0.0], dtype=torch.float64)
    highs = torch.tensor([*_COARSE, 0.0] if high else [0.0], dtype=torch.float64)
    group = max(1, counts.numel() // _COARSE_BINS)
    best = _best_pair(counts.view(-1, group).sum(1), edges[::group], lows, highs, (low, high), spec)
    for zoom in _ZOOMS:
        around = torch.arange(-3, 4, dtype=torch.float64).mul_(-zoom).exp2_()
        lows, highs = ((around * share).clamp_(max=1.0).unique() for share in best)
        best = _best_pair(counts, edges, lows.flip(0), highs.flip(0), (low, high), spec)
    return best[0] * low, best[1] * high


def _best_pair(
    counts: Tensor,
    edges: Tensor,
    lows: Tensor,
    highs: Tensor,
    full: tuple[float, float],
    spec: QSpec,
) -> tuple[float, float]:
    """Try every pair of shares of the full range; of equals the first, which is the widest."""
    same = spec.symmetric
    pairs = torch.stack((highs, highs), 1) if same else torch.cartesian_prod(lows, highs)
    pairs = pairs[pairs.sum(1) > 0]
    error = expected_error(counts, edges, pairs[:, 0] * full[0], pairs[:, 1] * full[1], spec)
    share_low, share_high = pairs[int(error.argmin())].tolist()
    return share_low, share_high


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
        low, high = rows.aminmax(dim=1)
    else:
        low = high = rows.new_zeros(rows.shape[0])
    if spec.bits < 8 and rows.numel() and bool((low.isfinite() & high.isfinite()).all()):
        low, high = _clip_rows(rows, low.clamp(max=0.0), high.clamp(min=0.0), spec)
    return choose_qparams(low, high, spec, channel)


def _clip_rows(rows: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Return, per row, the share of its range that quantizes it with the least squared error."""
    share = torch.ones_like(low)
    least = _row_error(rows, low, high, spec)
    # Four octaves down in quarter octaves, then finer around the best, to 1 %.
    for steps, octaves in ((range(1, 17), 1 / 4), (range(-3, 4), 1 / 16), (range(-3, 4), 1 / 64)):
        centre = share.clone()
        for step in steps:
            tried = (centre * 2.0 ** (-step * octaves)).clamp(max=1.0)
            error = _row_error(rows, low * tried, high * tried, spec)
            better = error < least
            share, least = share.where(~better, tried), least.where(~better, error)
    return low * share, high * share


def _row_error(rows: Tensor, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    scale, zero_point = steps_from_range(low.to(torch.float64), high.to(torch.float64), spec)
    step = scale.to(rows.dtype).unsqueeze(1)
    least, most = ((end - zero_point).unsqueeze(1) for end in (spec.quant_min, spec.quant_max))
    steps = (rows / step).round_().clamp_(least, most)
    # addcmul in place would be one pass less, but the product must round as dequantize does.
    return steps.mul_(step).sub_(rows).square_().sum(1, dtype=torch.float64)
