"""The same answer as looking at every value."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.numerics.finite import all_finite

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_stands(bad: float, dtype: torch.dtype) -> None:
    for place in (0, 1, 4097, 9_998, 9_999):
        values = torch.ones(10_000, dtype=dtype)
        assert all_finite(values)
        values[place] = bad
        assert not all_finite(values)
        assert not all_finite(values.view(100, 100).t())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_that_overflows_is_no_reason(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert all_finite(torch.full((64,), most, dtype=dtype))
    assert not all_finite(torch.tensor([most, most, math.nan], dtype=dtype))


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


def test_no_value_and_no_float() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.arange(3)) and all_finite(torch.tensor([True]))
    assert all_finite(torch.ones(2, dtype=torch.complex64))
    assert not all_finite(torch.tensor([complex(math.inf, 0)]))
