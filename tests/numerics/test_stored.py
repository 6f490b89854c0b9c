"""Stored weights: packing, ranges by channel and group, and tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import QParamError
from fxquant.numerics.stored import (
    StoredWeight,
    dequantize_stored,
    pack_nibbles,
    store_weight,
    unpack_nibbles,
)
from fxquant.spec import Granularity, QSpec


def spec(bits: int, group: int = 0, *, symmetric: bool = True, dtype: str = "int8") -> QSpec:
    granularity: Granularity = "group" if group else "channel"
    kind = "int8" if dtype == "int8" else "uint8"
    return QSpec(kind, bits, symmetric, granularity, "minmax", group)  # type: ignore[arg-type]  # a literal, chosen


def real(held: StoredWeight, shape: tuple[int, ...]) -> Tensor:
    parts = (held.codes, held.scale, held.zero_point, held.group_size)
    return dequantize_stored(*parts, shape, held.packed)


def decibels(exact: Tensor, found: Tensor) -> float:
    exact, found = exact.double(), found.double()
    return 10 * math.log10(float((exact**2).sum() / ((exact - found) ** 2).sum()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 19), st.integers(0, 2**20))
def test_packing_loses_nothing(rows: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, width), generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(width / 2))
    assert torch.equal(unpack_nibbles(packed, width), codes.to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 41),
    st.sampled_from([0, 8, 16, 32]),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["int8", "uint8"]),
    st.integers(0, 2**20),
)
def test_every_weight_is_a_code_times_the_scale_of_its_group(
    rows: int, width: int, group: int, bits: int, symmetric: bool, dtype: str, seed: int
) -> None:
    """Against the formula, written out element by element in float64."""
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    asked = spec(bits, group, symmetric=symmetric, dtype=dtype)
    held = store_weight(w, asked)
    codes = unpack_nibbles(held.codes, width) if held.packed else held.codes
    middle = 8 if held.packed and held.zero_point is None else 0
    for r in range(rows):
        for k in range(0, width, 7):
            g = k // held.group_size
            zero = middle if held.zero_point is None else int(held.zero_point[r, g])
            exact = (int(codes[r, k]) - zero) * float(held.scale[r, g])
            assert float(real(held, (rows, width))[r, k]) == pytest.approx(exact, rel=1e-6)
    steps = held.scale.repeat_interleave(held.group_size, 1)[:, :width]
    if bits == 8:  # no range is clipped there: at most half a step, and one of the zero point's
        assert bool(((real(held, (rows, width)) - w).abs() <= steps * 1.01).all())


@pytest.mark.parametrize(("bits", "group", "least"), [(8, 0, 30.0), (8, 32, 40.0), (4, 32, 18.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_normal_weights_keep_their_signal(
    bits: int, group: int, least: float, symmetric: bool
) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    held = store_weight(w, spec(bits, group, symmetric=symmetric))
    assert decibels(w, real(held, (64, 256))) >= least


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_stay_zero(bits: int, group: int) -> None:
    w = torch.randn(3, 20)
    w[1] = 0.0
    w[2, 8:16] = 0.0
    made = real(store_weight(w, spec(bits, group)), (3, 20))
    assert not made[1].any()
    assert not group or not made[2, 8:16].any()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_magnitude_does_not_matter(factor: float) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).double()
    made = real(store_weight((w * factor).float(), spec(8, 32)), (4, 64))
    assert decibels(w, made.double() / factor) > 40


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(QParamError, match="finite"):
        store_weight(torch.tensor([[1.0, float("nan")]]), spec(8))
    with pytest.raises(QParamError, match="nothing to store"):
        store_weight(torch.empty(0, 4), spec(8))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    held = store_weight(torch.randn(2, 16), spec(4, 8))
    with pytest.raises(QParamError, match="do not make a weight"):
        dequantize_stored(held.codes, held.scale, None, 8, (2, 18), True)


def test_a_transposed_weight_and_a_last_group_that_is_not_full() -> None:
    w = torch.randn(20, 6).t()
    held = store_weight(w, spec(4, 8))
    assert held.codes.shape == (6, 10)
    assert held.scale.shape == (6, 3)
    assert decibels(w, real(held, (6, 20))) > 18
