"""Fake-quantization: its values are those of the rule, its gradients those that autograd finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.affine import QParams, fake_quantize
from fxquant.numerics.fake_quant import fake_quantize_trained
from fxquant.numerics.observer import CHUNK

ENDS = ((0, 255), (-127, 127), (0, 15), (-7, 7), (-1, 1))
steps = st.floats(1e-4, 1e4).map(lambda s: float(torch.tensor(s)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Values, scales and zero points, of which some values are clipped and some are ties."""
    low, high = draw(st.sampled_from(ENDS))
    channels = draw(st.sampled_from((1, 3)))
    scale = torch.tensor([draw(steps) for _ in range(channels)]).view(-1, 1)
    zero = torch.tensor([float(draw(st.integers(low, high))) for _ in range(channels)]).view(-1, 1)
    units = draw(
        st.lists(
            st.one_of(
                st.integers(2 * low - 3, 2 * high + 3).map(lambda n: n / 2),  # ties
                st.floats(1.5 * low - 2, 1.5 * high + 2),
            ),
            min_size=6,
            max_size=6,
        )
    )
    x = torch.tensor(units).view(3, 2) * scale
    return x, scale, zero, low, high


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_forward_is_the_rule_to_the_last_bit(case: Any) -> None:
    x, scale, zero, low, high = case
    axis = 0 if scale.numel() > 1 else None
    dtype = torch.uint8 if low == 0 else torch.int8
    qparams = QParams(scale.flatten(), zero.flatten().int(), low, high, dtype, axis)
    made = fake_quantize_trained(x, scale, zero, low, high)
    assert torch.equal(made, fake_quantize(x, qparams))


def straight_through(
    x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int
) -> tuple[Tensor, ...]:
    """The rule in ops that autograd knows, rounding passed as if it were not there.

    Where a value is clipped its code is a constant; else it is the value, in steps.
    """
    steps = x / scale
    rounded = steps + (steps.round() - steps).detach()
    codes = rounded + zero
    kept = torch.where(codes < low, low, torch.where(codes > high, high, codes))
    return ((kept - zero) * scale,)


def gradients(function: Any, x: Tensor, scale: Tensor, zero: Tensor, *ends: int) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in (x, scale, zero)]
    made = function(*leaves, *ends)
    made = made[0] if isinstance(made, tuple) else made
    weights = torch.linspace(-1.0, 2.0, made.numel(), dtype=made.dtype).view_as(made)
    (made * weights).sum().backward()
    return [torch.zeros_like(each) if each.grad is None else each.grad for each in leaves]


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_gradients_are_those_of_autograd_through_the_same_rule(case: Any) -> None:
    x, scale, zero, low, high = case
    found = gradients(fake_quantize_trained, x, scale, zero, low, high)
    wide = [each.double() for each in (x, scale, zero)]
    wanted = gradients(straight_through, *wide, low, high)
    steps = wide[0] / wide[1]
    # Nearer to a tie than float32 can tell, the two may round to neighbours.
    if bool(((steps - steps.floor() - 0.5).abs() < 1e-5).any()):
        exact = (x / scale).double() == steps
        if not bool(exact.all()):
            return
    for mine, theirs in zip(found, wanted, strict=True):
        size = float(theirs.abs().max()) + high
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * size)


def test_each_gradient_has_the_value_that_the_papers_give() -> None:
    x = torch.tensor([0.26, -9.0, 9.0, 0.0])
    found = []
    for place in range(4):
        values = x.clone().requires_grad_()
        scale, zero = (torch.tensor([each], requires_grad=True) for each in (0.5, 3.0))
        leaves = (values, scale, zero)
        fake_quantize_trained(values, scale, zero, 0, 15)[place].backward()
        found.append([float(leaf.grad.sum()) for leaf in leaves])  # type: ignore[union-attr]  # it has one
    # By x, by the step, by the zero point: inside, below, above, on a code.
    assert found[0] == pytest.approx([1.0, round(0.52) - 0.52, 0.0], abs=1e-6)
    assert found[1] == [0.0, 0 - 3, -0.5]
    assert found[2] == [0.0, 15 - 3, -0.5]
    assert found[3] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_gradients_of_the_step_are_scaled_and_those_of_the_values_are_not(share: float) -> None:
    x = torch.randn(64)
    found = []
    for factor in (1.0, share):
        values, scale = x.clone().requires_grad_(), torch.tensor([0.1], requires_grad=True)
        fake_quantize_trained(values, scale, torch.zeros(1), -7, 7, factor).sum().backward()
        assert values.grad is not None and scale.grad is not None
        found.append((values.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1] * share)


def test_nothing_is_learned_where_no_gradient_is_asked_for() -> None:
    x = torch.randn(8, requires_grad=True)
    scale, zero = torch.tensor([0.1]), torch.tensor([0])
    fake_quantize_trained(x, scale, zero, 0, 15).sum().backward()
    assert scale.grad is None and set(x.grad.unique().tolist()) <= {0.0, 1.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "slice"])
def test_pieces_and_layouts_give_the_same(layout: str) -> None:
    x = torch.randn(3, 8, 101, 101, generator=torch.Generator().manual_seed(0))
    assert x.numel() > CHUNK
    given_x = {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "slice": torch.cat((x, x), 3)[..., : x.shape[3]],
    }[layout]
    scale, zero = torch.tensor([0.013]), torch.tensor([7])
    made = fake_quantize_trained(given_x, scale, zero, 0, 255)
    # One scale for each channel takes the other way of computing.
    wide = fake_quantize_trained(x, scale.expand(8).view(1, 8, 1, 1), zero, 0, 255)
    assert torch.equal(made, wide)
    if layout in ("contiguous", "channels last"):
        assert made.stride() == given_x.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_they_went_in(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype).requires_grad_()
    made = fake_quantize_trained(x, torch.tensor([0.1]), torch.tensor([3]), 0, 15)
    assert made.dtype == dtype
    made.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    if dtype != torch.float64:
        wide = fake_quantize_trained(
            x.detach().float(), torch.tensor([0.1]), torch.tensor([3]), 0, 15
        )
        assert torch.equal(made, wide.to(dtype))


def test_the_input_is_left_and_nan_is_no_code() -> None:
    x = torch.tensor([0.3, math.nan, math.inf, -math.inf])
    before = x.clone()
    made = fake_quantize_trained(x, torch.tensor([0.5]), torch.tensor([0]), 0, 15)
    assert torch.equal(x[0], before[0]) and math.isnan(x[1])
    assert made[0] == 0.5 and made[2] == 7.5 and made[3] == 0.0
    assert math.isnan(made[1])
