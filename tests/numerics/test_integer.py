"""Bounds that must hold for every input, and the exact references against plain integer loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import QParamError
from fxquant.numerics.affine import QParams, dequantize, dequantize_weight, quantize
from fxquant.numerics.integer import (
    INT32_MAX,
    ConvGeometry,
    accumulator_bound,
    conv_reference,
    fits_int32,
    linear_reference,
    pair_saturates,
)

CODES = st.lists(st.lists(st.integers(-127, 127), min_size=3, max_size=3), min_size=1, max_size=3)


@given(CODES, st.sampled_from((1, 2)))
def test_the_bound_is_the_worst_of_all_inputs(codes: list[list[int]], most: int) -> None:
    w = torch.tensor(codes).to(torch.int8)
    inputs = torch.tensor(list(itertools.product((-most, 0, most), repeat=3)))
    assert accumulator_bound(w, most) == int((inputs @ w.long().t()).abs().max())


def test_the_bound_does_not_overflow_itself() -> None:
    w = torch.full((2, 70_000), 127, dtype=torch.int8)
    assert accumulator_bound(w, 255) == 70_000 * 127 * 255 == 2_266_950_000
    assert not fits_int32(w, 255)
    # What happens if one does it all the same, as a check that the bound matters.
    assert int(torch.tensor(70_000 * 127 * 255).to(torch.int32)) == -2_028_017_296


def test_the_bound_is_sharp() -> None:
    w = torch.full((1, 66_311), 127, dtype=torch.int8)
    room = INT32_MAX - 66_311 * 127 * 255
    assert fits_int32(w, 255, bias_max_abs=room) and not fits_int32(w, 255, bias_max_abs=room + 1)


def test_the_bound_takes_the_output_channel_axis() -> None:
    w = torch.tensor([[1, 2, 3], [4, 5, -60]]).to(torch.int8)
    assert accumulator_bound(w, 1, axis=0) == 69
    assert accumulator_bound(w, 1, axis=1) == 63
    assert accumulator_bound(torch.zeros(0, 3, dtype=torch.int8), 255) == 0


def any_pair_saturates(row: list[int], quant_max: int) -> bool:
    """Try every pair of elements with every input that can be extreme."""
    inputs = (0, quant_max)
    return any(
        not -(2**15) <= a * row[i] + b * row[j] < 2**15
        for i, j in itertools.permutations(range(len(row)), 2)
        for a in inputs
        for b in inputs
    )


@given(
    st.lists(st.integers(-128, 127), min_size=2, max_size=6),
    st.sampled_from((127, 128, 129, 200, 255)),
)
def test_a_pair_saturates_if_any_neighbours_could(row: list[int], quant_max: int) -> None:
    w = torch.tensor([row]).to(torch.int8)
    assert bool(pair_saturates(w, quant_max)) == any_pair_saturates(row, quant_max)


def test_seven_bits_never_saturate() -> None:
    w = torch.full((2, 4, 3, 3), -128, dtype=torch.int8)
    assert not pair_saturates(w, 127).any() and pair_saturates(w, 255).all()


def test_saturation_of_shapes() -> None:
    w = torch.tensor([[1, 127, 127], [1, 2, 3]]).to(torch.int8)
    assert pair_saturates(w, axis=0).tolist() == [True, False]
    assert pair_saturates(w, axis=1).tolist() == [False, True, True]
    assert pair_saturates(torch.tensor([[127]]).to(torch.int8)).tolist() == [False]
    assert pair_saturates(torch.zeros(2, 0, dtype=torch.int8)).tolist() == [False, False]


X_Q = QParams.per_tensor(0.1, 117, 0, 255, torch.uint8)
OUT_Q = QParams.per_tensor(0.5, 100, 0, 255, torch.uint8)


def weight_q(channels: int, axis: int = 0) -> QParams:
    scale = torch.linspace(0.01, 0.05, channels)
    return QParams(scale, torch.zeros(channels).int(), -127, 127, torch.int8, axis)


def codes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def weights_of(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def test_linear_is_the_sum_by_hand() -> None:
    x, w, w_q, bias = codes_of(2, 5), weights_of(3, 5), weight_q(3), torch.randn(3)
    got = linear_reference(x, X_Q, w, w_q, OUT_Q, bias=bias, activation=torch.relu)
    for n, o in itertools.product(range(2), range(3)):
        total = sum((int(x[n, i]) - 117) * int(w[o, i]) for i in range(5))
        real = max(total * X_Q.scale_value * float(w_q.scale[o]) + float(bias[o]), 0.0)
        # The same numbers multiplied in another order: a few float64 roundings.
        assert float(got.real[n, o]) == pytest.approx(real, rel=1e-14, abs=1e-14)
        code = min(max(round(float(got.real[n, o]) / 0.5) + 100, 0), 255)
        assert int(got.codes[n, o]) == code
    assert got.codes.dtype == torch.uint8 and got.real.dtype == torch.float64


def test_conv_is_the_sum_by_hand() -> None:
    x, w, w_q = codes_of(1, 4, 5, 6), weights_of(6, 2, 3, 2), weight_q(6)
    geometry = ConvGeometry(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    got = conv_reference(x, X_Q, w, w_q, OUT_Q, geometry=geometry).real
    assert got.shape == (1, 6, 3, 4)
    for o, i, j in itertools.product(range(6), range(3), range(4)):
        total = 0
        for c, a, b in itertools.product(range(2), range(3), range(2)):
            row, column = 2 * i + a - 1, j + 2 * b
            if 0 <= row < 5:  # The padding holds the real 0, which adds nothing.
                total += (int(x[0, o // 3 * 2 + c, row, column]) - 117) * int(w[o, c, a, b])
        real = total * X_Q.scale_value * float(w_q.scale[o])
        assert float(got[0, o, i, j]) == pytest.approx(real, rel=1e-14)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_equals_the_float_convolution_of_what_the_codes_mean(dims: int) -> None:
    size = (7, 6, 5)[:dims]
    x, w, w_q, bias = (
        codes_of(2, 4, *size),
        weights_of(6, 4, *(3,) * dims),
        weight_q(6),
        torch.randn(6),
    )
    geometry = ConvGeometry(stride=2, padding=1)
    got = conv_reference(x, X_Q, w, w_q, OUT_Q, bias=bias, geometry=geometry, activation=F.silu)
    convs: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
    real_x = dequantize(x, X_Q.scale_value, 117).double()
    real_w = dequantize_weight(w, w_q.scale, 0).double()
    expected = F.silu(convs[dims - 1](real_x, real_w, bias.double(), 2, 1))
    # The operands were rounded to float32 once; the sums of 108 products are float64.
    assert torch.allclose(got.real, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_conv_equals_the_float_one(groups: int) -> None:
    x, w = codes_of(1, 4, 5, 5), weights_of(4, 3, 3, 3)
    w_q, bias = weight_q(3, axis=1), torch.randn(3 * groups)
    geometry = ConvGeometry(stride=2, padding=1, groups=groups, transposed=True, output_padding=1)
    got = conv_reference(x, X_Q, w, w_q, OUT_Q, bias=bias, geometry=geometry).real
    module = nn.ConvTranspose2d(4, 3 * groups, 3, 2, 1, 1, groups).double()
    with torch.no_grad():
        module.weight.copy_(dequantize_weight(w, w_q.scale, 1))
        assert module.bias is not None
        module.bias.copy_(bias)
        expected = module(dequantize(x, X_Q.scale_value, 117).double())
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-5)


def test_a_per_tensor_weight_and_empty_batches() -> None:
    w_q = QParams.per_tensor(0.02, 0, -127, 127, torch.int8)
    many = QParams(torch.full((3,), 0.02), torch.zeros(3).int(), -127, 127, torch.int8, 0)
    x, w = codes_of(2, 5), weights_of(3, 5)
    one = linear_reference(x, X_Q, w, w_q, OUT_Q)
    assert torch.equal(one.real, linear_reference(x, X_Q, w, many, OUT_Q).real)
    assert linear_reference(x[:0], X_Q, w, w_q, OUT_Q).codes.shape == (0, 3)


def test_the_codes_are_the_real_numbers_quantized() -> None:
    got = linear_reference(codes_of(50, 20), X_Q, weights_of(8, 20), weight_q(8), OUT_Q)
    assert torch.equal(got.codes, quantize(got.real, 0.5, 100, 0, 255, torch.uint8))
    assert (got.codes.double() - 100 - got.real / 0.5).abs()[
        (got.codes > 0) & (got.codes < 255)
    ].max() <= 0.5


def test_channels_with_zero_points_are_refused() -> None:
    zeros = torch.ones(3, dtype=torch.int32)
    w_q = QParams(torch.ones(3), zeros, -127, 127, torch.int8, axis=0)
    with pytest.raises(QParamError, match="zero point 0"):
        linear_reference(codes_of(1, 5), X_Q, weights_of(3, 5), w_q, OUT_Q)
