"""I1: scales and zero points are usable or refused; how they are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import QParamError
from fxquant.numerics.affine import QParams, choose_qparams, dequantize, fake_quantize
from fxquant.spec import QSpec
from tests.numerics.oracles import TINY, specs

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@given(FLOATS, FLOATS, specs())
def test_whatever_the_range_the_qparams_are_usable(a: float, b: float, spec: QSpec) -> None:
    low, high = min(a, b), max(a, b)
    q = choose_qparams(scalar(low), scalar(high), spec)
    scale, zero = q.scale_value, q.zero_point_value
    assert math.isfinite(scale) and scale >= TINY
    assert spec.quant_min <= zero <= spec.quant_max
    assert float(dequantize(torch.tensor([zero]).to(q.dtype), scale, zero)) == 0.0
    if spec.symmetric:
        assert zero == (2 ** (spec.bits - 1) if spec.dtype == "uint8" else 0)


@given(FLOATS, FLOATS, specs())
def test_the_range_is_covered_to_half_a_step(a: float, b: float, spec: QSpec) -> None:
    q = choose_qparams(scalar(min(a, b)), scalar(max(a, b)), spec)
    low, high = (float(end) for end in q.representable())
    # Half a step because the zero point is rounded, and a hair because the scale is.
    slack = q.scale_value * (0.5 + 1e-4)
    assert low - slack <= min(a, b, 0.0) and max(a, b, 0.0) <= high + slack


@given(FLOATS, FLOATS, specs())
def test_the_scale_is_the_float64_formula_rounded_once(a: float, b: float, spec: QSpec) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    if spec.symmetric:
        half = 2 ** (spec.bits - 1) - 1
        exact = max(-low, high) / half
    else:
        exact = (high - low) / (2**spec.bits - 1)
    got = choose_qparams(scalar(min(a, b)), scalar(max(a, b)), spec).scale_value
    assert got == (float(np.float32(max(exact, TINY))) if exact else 1.0)


@pytest.mark.parametrize("spec", [QSpec(), QSpec(symmetric=True), QSpec("int8", symmetric=True)])
def test_the_whole_range_of_float32_does_not_overflow(spec: QSpec) -> None:
    q = choose_qparams(scalar(-3e38), scalar(3e38), spec)
    got = fake_quantize(torch.tensor([-3e38, 0.0, 3e38]), q)
    assert torch.isfinite(got).all()
    assert (got - torch.tensor([-3e38, 0.0, 3e38])).abs().max() <= q.scale_value * 0.51


def test_a_constant_zero_has_scale_one() -> None:
    q = choose_qparams(scalar(0.0), scalar(0.0), QSpec())
    assert (q.scale_value, q.zero_point_value) == (1.0, 0)


def test_a_range_too_small_for_float32_has_the_smallest_scale() -> None:
    q = choose_qparams(scalar(-1e-40), scalar(1e-40), QSpec())
    assert q.scale_value == TINY
    assert fake_quantize(torch.tensor([1e-40, -1e-40]), q).tolist() == [0.0, 0.0]


def test_a_range_far_from_zero_is_widened_to_it() -> None:
    q = choose_qparams(scalar(100.0), scalar(101.0), QSpec())
    assert q.zero_point_value == 0
    assert q.scale_value == pytest.approx(101 / 255, rel=1e-7)


def test_channels_are_chosen_one_by_one() -> None:
    low, high = torch.tensor([-1.0, 0.0, -3e38]), torch.tensor([0.5, 0.0, 3e38])
    spec = QSpec("int8", symmetric=True, granularity="channel")
    q = choose_qparams(low, high, spec, axis=0)
    alone = [choose_qparams(a, b, spec).scale_value for a, b in zip(low, high, strict=True)]
    assert q.scale.tolist() == alone and q.per_channel and q.axis == 0


@pytest.mark.parametrize(
    ("low", "high"),
    [(math.nan, 1.0), (0.0, math.nan), (-math.inf, 1.0), (0.0, math.inf), (1.0, 0.5)],
)
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(QParamError, match="finite and in ascending order"):
        choose_qparams(scalar(low), scalar(high), QSpec())


def test_ends_of_different_length_are_refused() -> None:
    with pytest.raises(QParamError, match="2 entries and high 3"):
        choose_qparams(torch.zeros(2), torch.zeros(3), QSpec(), axis=0)


def test_a_float64_range_past_float32_is_refused() -> None:
    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    with pytest.raises(QParamError, match=r"scale\[0\] is inf"):
        choose_qparams(scalar(-1e300), scalar(1e300), QSpec())


@pytest.mark.parametrize(
    "scale", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-39, TINY * 0.999]
)
def test_an_unusable_scale_is_named(scale: float) -> None:
    scales = torch.ones(5)
    scales[2] = scale
    with pytest.raises(QParamError, match=r"scale\[2\].*finite, normal .* and positive"):
        QParams(scales, torch.zeros(5, dtype=torch.int32), -128, 127, torch.int8, axis=0)


@pytest.mark.parametrize(("zero", "dtype"), [(-1, "u"), (256, "u"), (-129, "i"), (128, "i")])
def test_a_zero_point_that_is_no_code_is_named(zero: int, dtype: str) -> None:
    low, high, kind = (0, 255, torch.uint8) if dtype == "u" else (-128, 127, torch.int8)
    with pytest.raises(QParamError, match=rf"zero_point\[0\] is {zero}.*from {low} to {high}"):
        QParams.per_tensor(1.0, zero, low, high, kind)


def test_a_zero_point_past_int32_is_refused() -> None:
    with pytest.raises(QParamError, match="int32"):
        QParams.per_tensor(1.0, 2**40, 0, 255, torch.uint8)


@pytest.mark.parametrize("good", [TINY, 1.0, 3.4e38])
def test_the_smallest_and_largest_scale_are_usable(good: float) -> None:
    assert QParams.per_tensor(good, 0, 0, 255, torch.uint8).scale_value == float(np.float32(good))


ONE = torch.ones(1)
ZERO = torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE, ZERO, 0, 256, torch.uint8), "do not fit"),
        ((ONE, ZERO, -129, 127, torch.int8), "do not fit"),
        ((ONE, ZERO, 5, 5, torch.uint8), "ascending"),
        ((ONE, ZERO, 0, 255, torch.int32), "torch.uint8 or torch.int8"),
        ((ONE.double(), ZERO, 0, 255, torch.uint8), "must be torch.float32"),
        ((ONE, ZERO.long(), 0, 255, torch.uint8), "torch.int32"),
        ((torch.tensor(1.0), torch.tensor(0).int(), 0, 255, torch.uint8), "must be \\[1\\]"),
        ((torch.ones(2), ZERO, 0, 255, torch.uint8), "zero_point \\(1,\\)"),
        ((torch.ones(0), ZERO[:0], 0, 255, torch.uint8), "must be \\[1\\]"),
        ((torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8), "pass the channel axis"),
    ],
)
def test_malformed_qparams_are_refused(
    arguments: tuple[Tensor, Tensor, int, int, torch.dtype], message: str
) -> None:
    with pytest.raises(QParamError, match=message):
        QParams(*arguments)


def test_one_value_of_many_channels_is_an_error() -> None:
    q = QParams(torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8, axis=1)
    with pytest.raises(QParamError, match="2 channels on axis 1"):
        _ = q.scale_value
    with pytest.raises(QParamError, match="zero point"):
        _ = q.zero_point_value


BASE = QParams(torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8, axis=0)
NEXT = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()


def test_same_as_accepts_an_equal_copy() -> None:
    again = QParams(torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8, axis=0)
    assert BASE.same_as(again) and again.same_as(BASE)


@pytest.mark.parametrize(
    "other",
    [
        QParams(torch.tensor([1.0, NEXT]), torch.zeros(2).int(), 0, 255, torch.uint8, axis=0),
        QParams(torch.ones(2), torch.tensor([0, 1]).int(), 0, 255, torch.uint8, axis=0),
        QParams(torch.ones(2), torch.zeros(2).int(), 0, 127, torch.uint8, axis=0),
        QParams(torch.ones(2), torch.zeros(2).int(), -1, 255 - 128, torch.int8, axis=0),
        QParams(torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8, axis=1),
        QParams(torch.ones(3), torch.zeros(3).int(), 0, 255, torch.uint8, axis=0),
    ],
    ids=["1 ulp of scale", "zero point", "last code", "type", "axis", "channels"],
)
def test_same_as_notices_the_smallest_difference(other: QParams) -> None:
    assert not BASE.same_as(other) and not other.same_as(BASE)
