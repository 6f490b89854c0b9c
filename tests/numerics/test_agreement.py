"""How far tensors are from one another: against plain float64 formulas, infinities included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.agreement import Agreement, AgreementSums, decibels, weight_sqnr


def agreement(*pairs: tuple[Tensor, Tensor]) -> Agreement:
    """What several pairs come to."""
    sums = AgreementSums()
    for real, other in pairs:
        sums.add(real, other)
    return sums.agreement


@given(st.integers(0, 1000), st.integers(1, 5))
def test_a_stream_is_as_one_tensor(seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(60, generator=generator)
    other = real + 0.1 * torch.randn(60, generator=generator)
    made = agreement(*zip(real.chunk(parts), other.chunk(parts), strict=True))
    a, b = real.double(), other.double()
    sqnr = 10 * math.log10(float((a @ a) / ((b - a) @ (b - a))))
    # The same sums in float64, added in another order.
    assert made.sqnr == pytest.approx(sqnr, abs=1e-9)
    assert made.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-12)
    assert made.max_error == float((b - a).abs().max())


def test_equal_tensors_agree_exactly() -> None:
    x = torch.tensor([1.0, -math.inf, math.nan, 3e38])
    assert agreement((x, x.clone())) == Agreement(math.inf, 1.0, 0.0)
    assert agreement((torch.zeros(3), torch.zeros(3))) == Agreement(math.inf, 1.0, 0.0)
    assert agreement((torch.zeros(0), torch.zeros(0))) == Agreement(math.inf, 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_finite_in_one_only_is_an_infinite_error(bad: float) -> None:
    made = agreement((torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])))
    assert made == Agreement(-math.inf, 0.0, math.inf)


def test_infinities_that_agree_leave_the_rest_to_be_compared() -> None:
    real = torch.tensor([-math.inf, 3.0, 4.0])
    made = agreement((real, torch.tensor([-math.inf, 3.0, 4.5])))
    assert made.sqnr == pytest.approx(20.0)


def test_large_numbers_do_not_overflow() -> None:
    made = agreement((torch.tensor([3e38, 1.0]), torch.tensor([3e38, 2.0])))
    assert made.cosine == 1.0
    assert 700 < made.sqnr < math.inf


def test_noise_without_signal() -> None:
    assert decibels(0.0, 1.0) == -math.inf
    assert agreement((torch.zeros(2), torch.ones(2))).cosine == 0.0


def test_a_factor_for_each_channel_is_no_noise_and_all_else_is() -> None:
    weight = torch.randn(4, 300, 3, 3, generator=torch.Generator().manual_seed(0))
    folded = weight * torch.tensor([0.5, 3.0, -1.0, 1e-3]).view(-1, 1, 1, 1)
    assert weight_sqnr(weight, folded) == math.inf
    noisy = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert weight_sqnr(weight, noisy) == pytest.approx(40.0, abs=1.0)  # 1 : 0.01 is 40 dB
    assert weight_sqnr(torch.zeros(2, 2), torch.ones(2, 2)) == pytest.approx(0.0)
