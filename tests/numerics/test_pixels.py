"""Quantizing into pixel order gives the codes of the one rule, in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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
    assert torch.equal(x, kept)
    down, right = seed % 3, seed // 3 % 4
    padded = quantize_pixels(x, scale, zero, 0, 255, (down, right))
    assert padded.shape == (batch, PACKED_CHANNELS, side + 2 * down, 7 + 2 * right)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    wanted = F.pad(codes[:, :channels], (right, right, down, down), value=zero)
    assert torch.equal(padded[:, :channels], wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 2 * 3 * 5 * 5).view(2, 3, 5, 5).to(dtype)
    codes = quantize_pixels(x, 0.25, 128, 2, 250)
    assert torch.equal(codes[:, :3], quantize(x, 0.25, 128, 2, 250, torch.uint8))


def test_infinities_saturate() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 1e38]).view(1, 3, 1, 1)
    assert quantize_pixels(x, 0.1, 7, 1, 254).flatten().tolist()[:3] == [254, 1, 254]


@pytest.mark.parametrize("zero", [0, 1, 128, 255])
@pytest.mark.parametrize("limits", [(0, 255), (3, 200)])
def test_every_tie_around_every_code(zero: int, limits: tuple[int, int]) -> None:
    halves = torch.arange(-700, 700).float().div_(2)
    near = torch.stack([halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)])
    x = near.view(1, 3, 35, 40)
    wanted = quantize(x, 1.0, zero, *limits, torch.uint8)
    assert torch.equal(quantize_pixels(x, 1.0, zero, *limits)[:, :3], wanted)
    rule = x.round().add(zero).clamp(*limits).to(torch.uint8)
    assert torch.equal(wanted, rule)
