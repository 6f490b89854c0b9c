"""Quantization at run time: the rule, row by row; rows do not see each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import QParamError
from fxquant.numerics.affine import quantize
from fxquant.numerics.dynamic import qdq_rows, quantize_at_run_time, quantize_rows, row_qparams
from fxquant.spec import ROWS, QSpec

SIGNED = QSpec("int8", granularity="row", observer="runtime")
SYMMETRIC = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
MIDDLE = QSpec("uint8", symmetric=True, granularity="row", observer="runtime")
NARROW = QSpec("uint8", bits=7, granularity="row", observer="runtime")
SPECS = (ROWS, SIGNED, SYMMETRIC, MIDDLE, NARROW, QSpec("int8", 4, True, "row", "runtime"))
WHOLE = QSpec("uint8", observer="runtime")

specs = st.sampled_from(SPECS)
numbers = st.floats(-(2.0**127), 2.0**127, width=32)
rows = st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=6).map(
    lambda lists: torch.tensor(lists, dtype=torch.float32)
)


def spans(x: Tensor, spec: QSpec) -> np.ndarray:
    """The range of each row that is to be covered, in float64, with 0 in it."""
    wide = x.double().numpy()
    low, high = np.minimum(wide.min(-1), 0), np.maximum(wide.max(-1), 0)
    return 2 * np.maximum(-low, high) if spec.symmetric else high - low


@given(rows, specs)
@settings(max_examples=200, deadline=None)
def test_codes_follow_the_one_rule(x: Tensor, spec: QSpec) -> None:
    codes, scale, zero_point = quantize_rows(x, spec)
    for row, found, s, z in zip(x, codes, scale, zero_point, strict=True):
        wanted = quantize(
            row, float(s), int(z), spec.quant_min, spec.quant_max, codes.dtype
        )  # clamps everything, where quantize_rows relies on what cannot be
        assert torch.equal(found, wanted)


@given(rows, specs)
@settings(max_examples=200, deadline=None)
def test_the_numbers_lie_within_half_a_step(x: Tensor, spec: QSpec) -> None:
    back = qdq_rows(x, spec).double()
    scale, zero_point = row_qparams(x, spec)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert ((zero_point >= spec.quant_min) & (zero_point <= spec.quant_max)).all()
    # Half a step for the rounding; asymmetric ends may both round up, and one is then clamped by
    # up to a whole step. Scale and quotient are float32: 2**-20 of the 255 steps.
    error = (back - x.double()).abs()
    step = scale.double()
    assert (error <= (0.5 if spec.symmetric else 1.0) * step * (1 + 2**-12)).all()
    steps = spec.quant_max - spec.quant_min
    if spec.symmetric and spec.dtype == "uint8":
        steps = 2 * (spec.quant_max - (1 << (spec.bits - 1)))
    tiny = torch.finfo(torch.float32).tiny
    wide = np.maximum(spans(x, spec) / steps, tiny)
    assert np.allclose(step.flatten().numpy(), wide, rtol=2**-21, atol=0)


@given(rows, specs)
@settings(deadline=None)
def test_numbers_are_those_of_the_codes(x: Tensor, spec: QSpec) -> None:
    codes, scale, zero_point = quantize_rows(x, spec)
    assert torch.equal(qdq_rows(x, spec), (codes.float() - zero_point) * scale)


@given(rows, specs, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_rows_do_not_see_each_other(x: Tensor, spec: QSpec, random: object) -> None:
    codes, scale, zero_point = quantize_rows(x, spec)
    alone = [quantize_rows(row, spec) for row in x]
    assert torch.equal(codes, torch.stack([a[0] for a in alone]))
    assert torch.equal(scale, torch.stack([a[1] for a in alone]))
    assert torch.equal(zero_point, torch.stack([a[2] for a in alone]))
    order = torch.tensor(sorted(range(len(x)), key=lambda i: (i * 7919) % 13))
    assert torch.equal(quantize_rows(x[order], spec)[0], codes[order])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(spec: QSpec, bad: float) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    clean = qdq_rows(x, spec)
    x[2, 5] = bad
    found = qdq_rows(x, spec)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])
    scale, zero_point = row_qparams(x, spec)
    assert scale[2].isnan().all() and zero_point[2].item() in range(-128, 256)
    assert torch.equal(quantize_rows(x, spec)[1].isnan(), scale.isnan())


@pytest.mark.parametrize("spec", [*SPECS, WHOLE])
def test_zeros_stay_zeros(spec: QSpec) -> None:
    x = torch.zeros(3, 8)
    codes, scale, zero_point = quantize_rows(x, spec)
    assert torch.equal(qdq_rows(x, spec), x)
    assert torch.equal((codes.float() - zero_point) * scale, x)
    mixed = torch.tensor([[0.0, 1.0, -3.0]])
    assert qdq_rows(mixed, spec)[0, 0] == 0.0


def test_a_row_may_span_more_than_float32() -> None:
    x = torch.tensor([[3e38, -3e38, 0.0]])
    found = qdq_rows(x, ROWS)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, x, rtol=0.01)


def test_samples_are_rows_of_several_dimensions() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    scale, zero_point = row_qparams(x, ROWS, dims=3)
    assert scale.shape == zero_point.shape == (3, 1, 1, 1)
    assert torch.equal(qdq_rows(x, ROWS, 3).flatten(1), qdq_rows(x.flatten(1), ROWS))
    assert torch.equal(qdq_rows(x[0], ROWS, 3), qdq_rows(x, ROWS, 3)[0])
    last = x.to(memory_format=torch.channels_last)
    codes = quantize_rows(last, ROWS, 3)[0]
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, quantize_rows(x, ROWS, 3)[0])


def test_one_scale_for_the_whole_tensor() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    scale, zero_point = row_qparams(x, WHOLE)
    assert scale.shape == zero_point.shape == (1, 1, 1)
    flat = row_qparams(x.flatten(), ROWS)
    assert torch.equal(scale.flatten(), flat[0]) and torch.equal(zero_point.flatten(), flat[1])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
@pytest.mark.parametrize("spec", [ROWS, WHOLE])
def test_empty_tensors(shape: tuple[int, ...], spec: QSpec) -> None:
    codes, scale, zero_point = quantize_rows(torch.zeros(shape), spec)
    assert codes.shape == shape == qdq_rows(torch.zeros(shape), spec).shape
    assert scale.shape == zero_point.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_taken_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = qdq_rows(x, ROWS)
    assert found.dtype == torch.float32
    assert torch.equal(found, qdq_rows(x.float(), ROWS))


def test_the_input_is_not_touched_and_may_lie_anywhere() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    for spec in SPECS:
        assert torch.equal(qdq_rows(x.t(), spec), qdq_rows(x.t().contiguous(), spec))
        assert torch.equal(
            quantize_rows(x[:, ::2], spec)[0], quantize_rows(x[:, ::2].clone(), spec)[0]
        )
    assert torch.equal(x, before)


def test_too_few_dimensions() -> None:
    with pytest.raises(QParamError, match="3 dimensions"):
        row_qparams(torch.zeros(4, 4), ROWS, dims=3)


def test_torch_fx_records_one_node() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return quantize_at_run_time(x, 1, "uint8", 8, False, True)

    traced = torch.fx.symbolic_trace(Net())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        quantize_at_run_time
    ]
    x = torch.randn(3, 8)
    assert torch.equal(traced(x), qdq_rows(x, ROWS))


def test_columns_are_the_rows_of_the_transposed() -> None:
    spec = QSpec("int8", symmetric=True, granularity="row", observer="runtime")

    def by_column(x: Tensor) -> Tensor:
        return quantize_at_run_time(x, 1, "int8", 8, True, True, by_column=True)

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_column(x), qdq_rows(x.mT, spec).mT)
    x[1, 2, 3] = math.inf
    bad = by_column(x).isnan()
    assert bad[1, :, 3].all() and int(bad.sum()) == 5
    assert torch.equal(by_column(x[0, 0]), qdq_rows(x[0, 0], spec))


def test_eight_bits_keep_thirty_decibels() -> None:
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    for spec in (ROWS, SYMMETRIC):
        noise = (qdq_rows(x, spec) - x).double().pow(2).mean()
        # Rows of 768 reach to 3.3 sigma: a step of 6.5/255, whose square over 12 is 43 dB down.
        assert 10 * math.log10(x.double().pow(2).mean() / noise) > 40
