"""Codes of weights: of 8 bits where pairs of products fit, else only as coarse as they ask for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import QParamError
from fxquant.numerics.affine import quantize_weight
from fxquant.numerics.integer import pair_saturates
from fxquant.numerics.integer_weights import integer_weight
from fxquant.numerics.observers import weight_qparams
from fxquant.spec import DEFAULT_WEIGHT, QSpec

PER_TENSOR = QSpec("int8", symmetric=True, granularity="tensor", observer="minmax")
ROWS = st.lists(
    st.lists(st.floats(-4, 4, width=32), min_size=5, max_size=5), min_size=1, max_size=6
)


@given(ROWS, st.sampled_from([DEFAULT_WEIGHT, PER_TENSOR]), st.integers(0, 1))
def test_no_pair_saturates_and_no_scale_is_coarser_than_need_be(
    rows: list[list[float]], spec: QSpec, axis: int
) -> None:
    weight = torch.tensor(rows).movedim(0, axis)
    codes, scale = integer_weight(weight, spec, axis, fit_pairs=True)
    wide, wide_scale = integer_weight(weight, spec, axis)
    assert not bool(pair_saturates(codes, axis=axis).any())
    over = pair_saturates(wide, axis=axis)
    if spec is PER_TENSOR:
        over = over.any(0, keepdim=True)
    assert torch.equal(scale[~over], wide_scale[~over])
    assert bool((scale[over] > wide_scale[over]).all())
    # Two weights of the largest size: 2 / 127.5 against 1 / 127.
    assert bool((scale <= wide_scale * (2 * 127 / 127.5 + 1e-6)).all())
    step = scale if spec is PER_TENSOR else scale.view([-1, 1] if axis == 0 else [1, -1])
    # Half a step of rounding; float32 division may move the middle between two codes a little.
    assert bool(((codes * step - weight).abs() <= 0.50001 * step).all())


def test_without_the_need_codes_are_those_of_eight_bits() -> None:
    weight = torch.randn(7, 5, 3, 3)
    codes, scale = integer_weight(weight, DEFAULT_WEIGHT, 0)
    qparams = weight_qparams(weight, DEFAULT_WEIGHT, 0)
    assert torch.equal(codes, quantize_weight(weight, qparams))
    assert torch.equal(scale, qparams.scale)


def test_fewer_bits_need_no_care() -> None:
    spec, weight = QSpec("int8", 7, True, "channel", "minmax"), torch.ones(2, 4)
    for fit in (False, True):
        codes, scale = integer_weight(weight, spec, 0, fit_pairs=fit)
        assert codes.tolist() == [[63] * 4] * 2
        assert scale.tolist() == pytest.approx([1 / 63] * 2)


def test_codes_lie_in_memory_as_they_are_read() -> None:
    weight = torch.randn(6, 4).t()
    assert integer_weight(weight, DEFAULT_WEIGHT, 0, fit_pairs=True)[0].is_contiguous()


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(QParamError):
        integer_weight(torch.tensor([[1.0, float("nan")]]), DEFAULT_WEIGHT, 0, fit_pairs=True)
