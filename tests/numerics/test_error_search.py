"""The closed form of the error against plain sums, and the clipping of weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import QParamError
from fxquant.numerics.affine import choose_qparams, dequantize_weight, quantize_weight
from fxquant.numerics.error_search import (
    expected_error,
    search_range,
    search_ranges,
    weight_qparams,
)
from fxquant.spec import QSpec
from tests.numerics.oracles import quantization_error, specs

SPREAD = 4000


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    st.floats(0.05, 2.0),
    st.floats(0.0, 1.5),
    st.integers(-8, 2),
    specs((2, 3, 4, 8)),
)
def test_the_closed_form_is_the_sum_over_evenly_spread_values(
    counts: list[int], low: float, high: float, start: int, spec: QSpec
) -> None:
    edges = np.cumsum([start, *(1 + (i % 3) for i in range(len(counts)))]) * 0.25
    spread = (np.arange(SPREAD) + 0.5) / SPREAD
    values = [a + (b - a) * spread for a, b in itertools.pairwise(edges)]
    wanted = sum(
        count * quantization_error(v, -low, high, spec) / SPREAD
        for count, v in zip(counts, values, strict=True)
    )
    got = expected_error(
        torch.tensor(counts, dtype=torch.float64),
        torch.from_numpy(edges),
        torch.tensor([-low], dtype=torch.float64),
        torch.tensor([high], dtype=torch.float64),
        spec,
    )
    # 4,000 points stand for an integral, and the scale of the fast one is rounded to float32.
    assert float(got) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_many_ranges_at_once_are_each_alone() -> None:
    counts, edges = torch.rand(50, dtype=torch.float64), torch.linspace(-1, 2, 51).double()
    low, high = -torch.rand(7, dtype=torch.float64), 2 * torch.rand(7, dtype=torch.float64)
    together = expected_error(counts, edges, low, high, QSpec())
    alone = [
        expected_error(counts, edges, low[i : i + 1], high[i : i + 1], QSpec()) for i in range(7)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-9, atol=0)


def test_of_equally_good_ranges_the_widest_is_taken() -> None:
    counts, edges = torch.zeros(256, dtype=torch.float64), torch.arange(257).double()
    assert search_range(counts, edges, 0.0, 200.0, QSpec()) == (0.0, 200.0)


@pytest.mark.parametrize("spec", [QSpec(), QSpec("int8", symmetric=True), QSpec(bits=3)])
def test_many_histograms_at_once_are_each_alone_to_the_last_bit(spec: QSpec) -> None:
    counts = torch.randint(0, 50, (40, 512)).double()
    for row in range(40):  # from full to nearly empty, and some with one bin or none
        counts[row, torch.rand(512) < row / 38] = 0.0
    edges = (torch.arange(513) - 256.0).double() * torch.rand(40, 1).double()
    edges[::3] -= edges[::3, :1]
    edges[1::5] -= edges[1::5, -1:]
    low, high = edges[:, 0], edges[:, -1]
    together = search_ranges(counts, edges, low, high, spec)
    alone = [
        search_range(c, e, a, b, spec)
        for c, e, a, b in zip(counts, edges, low.tolist(), high.tolist(), strict=True)
    ]
    assert list(zip(*(ends.tolist() for ends in together), strict=True)) == alone
    assert len(set(alone)) == 40


CHANNEL = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")


def low_bits(bits: int, granularity: str = "channel") -> QSpec:
    return QSpec(
        "int8",
        bits=bits,
        symmetric=True,
        granularity="channel" if granularity == "channel" else "tensor",
        observer="minmax",
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_at_8_bits_every_weight_is_covered(axis: int) -> None:
    w = torch.randn(6, 4, 3, 5)
    q = weight_qparams(w, CHANNEL, axis)
    rows = w.movedim(axis, 0).flatten(1)
    assert q.same_as(choose_qparams(rows.amin(1), rows.amax(1), CHANNEL, axis))
    error = dequantize_weight(quantize_weight(w, q), q.scale, axis) - w
    assert error.abs().max() <= q.scale.max() * 0.5001


def test_per_tensor_weights() -> None:
    w = torch.randn(6, 4)
    q = weight_qparams(w, QSpec("int8", symmetric=True, observer="minmax"), 0)
    assert q.axis is None and q.scale_value == pytest.approx(float(w.abs().max()) / 127, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_below_8_bits_the_range_is_the_best_of_brute_force(bits: int, granularity: str) -> None:
    w = torch.randn(5, 200) * torch.tensor([1.0, 0.1, 10.0, 1.0, 1e-3]).view(5, 1)
    w[3, 0] = 12.0
    spec = low_bits(bits, granularity)
    q = weight_qparams(w, spec, 0)
    rows = w.double() if granularity == "channel" else w.double().reshape(1, -1)
    for row, scale in zip(rows, q.scale.tolist(), strict=True):
        numbers = row.numpy()
        wide = float(np.abs(numbers).max())
        best = min(
            quantization_error(numbers, -wide * share, wide * share, spec)
            for share in np.linspace(0.02, 1, 200)
        )
        got = quantization_error(numbers, -scale * spec.quant_max, scale * spec.quant_max, spec)
        # Steps of 1 % over a function that is not smooth: with 200 weights it has dents.
        assert got <= 1.06 * best


def test_a_dead_channel_and_a_constant_one_are_fine() -> None:
    w = torch.tensor([[0.0, 0.0], [0.5, 0.5], [-2.0, 1.0]])
    for bits in (4, 8):
        q = weight_qparams(w, low_bits(bits), 0)
        assert float(q.scale[0]) == 1.0
        values = dequantize_weight(quantize_weight(w, q), q.scale, 0)
        assert values[0].tolist() == [0.0, 0.0]
        assert values[1].tolist() == pytest.approx([0.5, 0.5], rel=0.07)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_not_finite_names_its_channel(bad: float, bits: int) -> None:
    w = torch.ones(3, 4)
    w[2, 1] = bad
    with pytest.raises(QParamError, match="index 2"):
        weight_qparams(w, low_bits(bits), 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_without_inputs_is_fine(bits: int) -> None:
    assert weight_qparams(torch.zeros(3, 0), low_bits(bits), 0).scale.tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types(dtype: torch.dtype) -> None:
    w = torch.randn(3, 4).to(dtype)
    same = weight_qparams(w.to(torch.float64), CHANNEL, 0)
    assert weight_qparams(w, CHANNEL, 0).same_as(same)
