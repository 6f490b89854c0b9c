"""Slow numpy implementations of the numbers, written without looking at the fast ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fxquant.numerics.qparams import QParams
from fxquant.spec import QSpec

Floats = NDArray[np.float64]

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Case:
    """One per-tensor quantization."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def codes(self) -> range:
        return range(self.quant_min, self.quant_max + 1)

    def qparams(self) -> QParams:
        return QParams.per_tensor(
            self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype
        )


def round_half_even(x: float) -> int:
    """Python's own rounding of a float is exact and half to even."""
    return round(x)


def quantize_one(x: float, case: Case, single: bool = True) -> int:
    """The rule on one number; the division is rounded to float32 unless ``single`` is off."""
    if math.isinf(x):
        return case.quant_max if x > 0 else case.quant_min
    steps = x / case.scale
    if single:
        with np.errstate(over="ignore", under="ignore"):
            steps = float(np.float32(x) / np.float32(case.scale))
    if math.isinf(steps):
        return case.quant_max if steps > 0 else case.quant_min
    return min(max(round_half_even(steps) + case.zero_point, case.quant_min), case.quant_max)


def quantize_all(x: Tensor, case: Case) -> Tensor:
    """The rule, one number at a time, in the same shape."""
    single = x.dtype != torch.float64
    flat = [quantize_one(v, case, single) for v in x.to(torch.float64).flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int64).reshape(x.shape).to(case.dtype)


def scales() -> st.SearchStrategy[float]:
    """Usable scales: normal float32 of every size, small ones included."""
    return st.floats(TINY, 2.0**119, width=32)


@st.composite
def cases(draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4, 7, 8)) -> Case:
    """Any spec, any usable scale, any zero point that is a code."""
    spec = draw(specs(bits))
    zero_point = draw(st.integers(spec.quant_min, spec.quant_max))
    dtype = torch.uint8 if spec.dtype == "uint8" else torch.int8
    return Case(draw(scales()), zero_point, spec.quant_min, spec.quant_max, dtype)


def specs(bits: tuple[int, ...] = (2, 3, 4, 7, 8)) -> st.SearchStrategy[QSpec]:
    """Every per-tensor spec."""
    return st.builds(
        QSpec,
        dtype=st.sampled_from(("uint8", "int8")),
        bits=st.sampled_from(bits),
        symmetric=st.booleans(),
    )


def quantization_error(x: Floats, low: float, high: float, spec: QSpec) -> float:
    """Summed squared error of quantizing ``x`` to the range, in float64, without any histogram."""
    low, high = min(low, 0.0), max(high, 0.0)
    least, most = spec.quant_min, spec.quant_max
    if spec.symmetric:
        zero = 2 ** (spec.bits - 1) if spec.dtype == "uint8" else 0
        scale = float(np.float32(max(-low, high) / min(zero - least, most - zero)))
    else:
        scale = float(np.float32((high - low) / (most - least)))
        zero = min(max(round(least - low / scale), least), most)
    codes = np.clip(np.round(x / scale) + zero, least, most)
    return float(np.sum(((codes - zero) * scale - x) ** 2))


def best_error(x: Floats, spec: QSpec, shares: Floats) -> float:
    """The least error over every pair of shares of the range of ``x``: brute force."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if spec.symmetric:
        wide = max(-low, high)
        return min(quantization_error(x, -wide * s, wide * s, spec) for s in shares)
    lows = shares * low if low else np.zeros(1)
    highs = shares * high if high else np.zeros(1)
    return min(quantization_error(x, a, b, spec) for a in lows for b in highs if a < b)
