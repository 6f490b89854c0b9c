"""Quantizing into pixel order gives the codes of the one rule, in another order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.numerics.affine import quantize
from fxquant.numerics.pixels import PACKABLE, PACKED_CHANNELS, quantize_pixels


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PACKABLE),
    st.integers(1, 3),
    st.integers(1, 9),
    st.floats(1e-6, 1e6),
    st.integers(0, 255),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_codes_are_those_of_quantize(
    channels: int, batch: int, side: int, scale: float, zero: int, last: bool, seed: int
) -> None:
    steps = torch.randn(batch, channels, side, 7, generator=torch.Generator().manual_seed(seed))
    x = (steps * 100).round_().div_(2) * scale  # many exact halves, some out of range
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    codes = quantize_pixels(x, scale, zero, 0, 255)
    assert codes.shape == (batch, PACKED_CHANNELS, side, 7)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes[:, :channels], quantize(x, scale, zero, 0, 255, torch.uint8))
    assert not codes[:, channels:].any()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 2 * 3 * 5 * 5).view(2, 3, 5, 5).to(dtype)
    codes = quantize_pixels(x, 0.25, 128, 2, 250)
    assert torch.equal(codes[:, :3], quantize(x, 0.25, 128, 2, 250, torch.uint8))


def test_infinities_saturate() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 1e38]).view(1, 3, 1, 1)
    assert quantize_pixels(x, 0.1, 7, 1, 254).flatten().tolist() == [254, 1, 254, 0]
