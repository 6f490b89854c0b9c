"""The one rule: I2 to I5 and I15, its edges, and how torch.fx sees it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import QParamError
from fxquant.numerics.affine import (
    QParams,
    dequantize,
    dequantize_weight,
    fake_quantize,
    quantize,
    quantize_weight,
)
from tests.numerics.oracles import Case, cases, quantize_all

Quantize = Callable[[Tensor, float, int, int, int, torch.dtype], Tensor]

U = 2.0**-24  # Half a unit in the last place of a float32: one rounding.
PLAIN = Case(0.1, 3, 0, 255, torch.uint8)


def run(x: Tensor, case: Case, fn: Quantize = quantize) -> Tensor:
    return fn(x, case.scale, case.zero_point, case.quant_min, case.quant_max, case.dtype)


def back(codes: Tensor, case: Case) -> Tensor:
    return dequantize(codes, case.scale, case.zero_point)


def ties(case: Case) -> Tensor:
    """Every tie between two codes, 1 ulp to either side, every code, and far outside."""
    halves = np.arange(2 * (case.quant_min - 3), 2 * (case.quant_max + 3) + 1) - 2 * case.zero_point
    exact = (halves.astype(np.float64) / 2 * case.scale).astype(np.float32)
    up, down = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))
    far = np.array([0.0, -0.0, 1e30, -1e30, 3.4e38, -3.4e38, np.inf, -np.inf], dtype=np.float32)
    return torch.from_numpy(np.concatenate((exact, up, down, far)))


def check_rule(fn: Quantize, case: Case) -> None:
    """I5: the rounding rule at ties and 1 ulp around them, exactly."""
    x = ties(case)
    assert torch.equal(run(x, case, fn), quantize_all(x, case))


@given(cases())
def test_rounds_half_to_even_at_every_tie_and_beside_it(case: Case) -> None:
    check_rule(quantize, case)


def plain(x: Tensor, s: float, z: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(x / s) + z).clamp(low, high).to(torch.int32).to(dtype)


MUTANTS: dict[str, Quantize] = {
    "multiplies by the reciprocal": lambda x, s, z, a, b, d: plain(x * (1 / s), 1.0, z, a, b, d),
    "rounds half up": lambda x, s, z, a, b, d: (
        ((x / s + 0.5).floor() + z).clamp(a, b).to(torch.int32).to(d)
    ),
    "truncates": lambda x, s, z, a, b, d: ((x / s).trunc() + z).clamp(a, b).to(torch.int32).to(d),
    "adds the zero point before rounding": lambda x, s, z, a, b, d: (
        (x / s + z).round().clamp(a, b).to(torch.int32).to(d)
    ),
    "clamps after the cast": lambda x, s, z, a, b, d: (
        (torch.round(x / s) + z).to(torch.int32).clamp(a, b).to(d)
    ),
    "forgets the lower bound": lambda x, s, z, a, b, d: plain(x, s, z, a - 1, b, torch.int16).to(d),
    "scale off by one ulp": lambda x, s, z, a, b, d: plain(
        x, float(np.nextafter(np.float32(s), np.float32(1e30))), z, a, b, d
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_rule_check_notices(name: str) -> None:
    with pytest.raises(AssertionError):
        for case in (Case(0.1, 3, 0, 255, torch.uint8), Case(0.37, -8, -127, 127, torch.int8)):
            check_rule(MUTANTS[name], case)


def test_the_rule_check_accepts_a_plain_implementation() -> None:
    check_rule(plain, PLAIN)


@given(cases())
def test_every_code_survives_the_round_trip(case: Case) -> None:
    codes = torch.tensor(list(case.codes())).to(case.dtype)
    assert torch.equal(run(back(codes, case), case), codes)


@given(cases(), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_is_monotone_and_saturates(case: Case, numbers: list[float]) -> None:
    x = torch.tensor([-torch.inf, *sorted(numbers), torch.inf])
    codes = run(x, case).to(torch.int32)
    assert bool((codes.diff() >= 0).all())
    assert (int(codes[0]), int(codes[-1])) == (case.quant_min, case.quant_max)


@given(cases(), st.lists(st.floats(-1.2, 1.2), min_size=1, max_size=50))
def test_the_error_is_at_most_half_a_step(case: Case, shares: list[float]) -> None:
    s = float(np.float32(case.scale))
    low = (case.quant_min - case.zero_point) * s
    high = (case.quant_max - case.zero_point) * s
    x = (torch.tensor(shares, dtype=torch.float64) * max(-low, high)).to(torch.float32)
    exact = x.to(torch.float64)
    got = back(run(x, case), case).to(torch.float64)
    nearest = exact.clamp(low, high)
    # s/2 for the code, and float32 rounding of the quotient (in steps) and of the product. A
    # product below the normal range is rounded to a multiple of 2**-149 instead.
    slack = 4 * U * s + 4 * U * exact.abs() + 2.0**-149
    inside = (exact >= low) & (exact <= high)
    assert bool(((got - nearest).abs() <= s / 2 * inside + slack).all())


def test_zero_is_exact_and_has_no_sign() -> None:
    for case in (PLAIN, Case(0.37, -8, -127, 127, torch.int8)):
        zero = back(run(torch.tensor([0.0, -0.0]), case), case)
        assert zero.tolist() == [0.0, 0.0] and not torch.signbit(zero).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_in_enough_precision(dtype: torch.dtype) -> None:
    x = (torch.randn(500, dtype=torch.float64) * 10).to(dtype)
    assert torch.equal(run(x, PLAIN), quantize_all(x, PLAIN))


def test_float64_is_not_rounded_to_float32_first() -> None:
    x = torch.tensor([0.5 + 1e-12, 0.5 - 1e-12], dtype=torch.float64)
    assert quantize(x, 1.0, 0, 0, 255, torch.uint8).tolist() == [1, 0]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, [2, 6, 4, 6], in every layout there is."""
    wide = torch.empty(2, 6, 4, 12)
    wide[..., ::2] = x
    offset = torch.empty(x.numel() + 3)[3:].view(x.shape)
    offset.copy_(x)
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": wide[..., ::2],
        "storage offset": offset,
        "flipped twice": x.flip(2).flip(2),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 6, 4, 6)))
def test_the_layout_does_not_change_the_codes(layout: str) -> None:
    x = torch.randn(2, 6, 4, 6) * 10
    view = layouts(x)[layout]
    assert torch.equal(run(view, PLAIN), quantize_all(x, PLAIN))
    assert torch.equal(back(run(view, PLAIN), PLAIN), back(run(x, PLAIN), PLAIN))


def test_expanded_and_empty_tensors() -> None:
    row = torch.randn(1, 5)
    assert torch.equal(run(row.expand(4, 5), PLAIN), run(row, PLAIN).expand(4, 5))
    assert run(torch.empty(0, 5), PLAIN).shape == (0, 5)
    assert back(torch.empty(0, 5, dtype=torch.uint8), PLAIN).dtype == torch.float32
    assert int(run(torch.tensor(1.0), PLAIN)) == 13


@pytest.mark.parametrize(
    ("shape", "form"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
)
def test_keeps_the_memory_format(shape: tuple[int, ...], form: torch.memory_format) -> None:
    codes = run(torch.randn(shape).to(memory_format=form), PLAIN)
    assert codes.is_contiguous(memory_format=form)
    assert back(codes, PLAIN).is_contiguous(memory_format=form)


def test_leaves_its_inputs_alone() -> None:
    x = torch.randn(100, requires_grad=True)
    before = x.detach().clone()
    codes = run(x, PLAIN)
    kept = codes.clone()
    back(codes, PLAIN)
    weight = torch.randn(4, 5)
    dequantize_weight(torch.ones(4, 5, dtype=torch.int8), weight[:, 0].contiguous(), 0)
    assert torch.equal(x.detach(), before) and torch.equal(codes, kept)
    assert not codes.requires_grad


def per_channel(axis: int, channels: int) -> QParams:
    scale = torch.rand(channels) + 0.01
    return QParams(scale, torch.zeros_like(scale).int(), -127, 127, torch.int8, axis)


@pytest.mark.parametrize("axis", [0, 1, 3, -1])
def test_weights_per_channel_equal_each_channel_alone(axis: int) -> None:
    w = torch.randn(4, 5, 3, 6) * 20
    qparams = per_channel(axis, w.shape[axis])
    codes = quantize_weight(w, qparams)
    values = dequantize_weight(codes, qparams.scale, axis)
    for index, scale in enumerate(qparams.scale.tolist()):
        case = Case(scale, 0, -127, 127, torch.int8)
        alone = quantize_all(w.select(axis, index), case)
        assert torch.equal(codes.select(axis, index), alone)
        assert torch.equal(values.select(axis, index), dequantize(alone, scale, 0))
    assert torch.equal(fake_quantize(w, qparams), values)


def test_weights_per_tensor() -> None:
    w = torch.randn(4, 5)
    qparams = QParams.per_tensor(0.05, 0, -127, 127, torch.int8)
    codes = quantize_weight(w, qparams)
    assert torch.equal(codes, quantize_all(w, Case(qparams.scale_value, 0, -127, 127, torch.int8)))
    assert torch.equal(dequantize_weight(codes, qparams.scale, None), fake_quantize(w, qparams))


def test_channels_with_a_zero_point() -> None:
    zeros = torch.tensor([0, 100, 255], dtype=torch.int32)
    qparams = QParams(torch.tensor([0.1, 0.2, 0.3]), zeros, 0, 255, torch.uint8, axis=1)
    x = torch.randn(7, 3) * 10
    for index in range(3):
        one = QParams.per_tensor(
            float(qparams.scale[index]), int(zeros[index]), 0, 255, torch.uint8
        )
        assert torch.equal(fake_quantize(x, qparams)[:, index], fake_quantize(x[:, index], one))


@pytest.mark.parametrize("axis", [1, 2, -3])
def test_a_wrong_channel_axis_is_an_error(axis: int) -> None:
    with pytest.raises(QParamError, match="4 scales on axis"):
        quantize_weight(torch.randn(4, 5), per_channel(axis, 4))


@given(cases())
def test_fake_quantize_is_the_round_trip(case: Case) -> None:
    x = ties(case)
    assert torch.equal(fake_quantize(x, case.qparams()), back(run(x, case), case))


class Uses(nn.Module):
    """Calls all three graph functions the way converted graphs do."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.arange(-10, 10).view(4, 5).to(torch.int8)
        self.w = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", torch.rand(4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize(x, 0.1, 3, 0, 255, torch.uint8)
        weight = dequantize_weight(self.w, self.get_buffer("scale"), 0)
        return nn.functional.linear(dequantize(codes, 0.1, 3), weight)


def test_fx_records_one_node_each_and_pickling_keeps_them() -> None:
    model = Uses()
    traced = torch.fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        node.type = None  # fx cannot pickle the string that annotations are in this file
    traced.recompile()
    again = pickle.loads(pickle.dumps(traced))
    x = torch.randn(2, 5)
    for graph_module in (traced, again):
        targets = [n.target for n in graph_module.graph.nodes if n.op == "call_function"]
        assert targets == [quantize, dequantize_weight, dequantize, nn.functional.linear]
        assert torch.equal(graph_module(x), model(x))
