"""Dynamic layers on x86 kernels: exact sums, rows that do not see each other, copies."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86 import X86
from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_dynamic import X86DynamicConv, X86DynamicLinear
from fxquant.numerics.dynamic import quantize_rows
from fxquant.spec import ROWS, QSpec

SYMMETRIC = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
SIGNED = QSpec("int8", granularity="row", observer="runtime")
WHOLE = QSpec("uint8", observer="runtime")
SPECS = (ROWS, SYMMETRIC, SIGNED, WHOLE, QSpec("uint8", 7, False, "row", "runtime"))

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 1) -> Tensor:
    # Up to 63: exact on processors that add products in pairs of 16 bits.
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-63, 64, shape, generator=g, dtype=torch.int8)


def linear(
    outputs: int = 24, inputs: int = 40, spec: QSpec = ROWS, bias: bool = True
) -> X86DynamicLinear:
    scale = numbers(outputs, seed=2).abs() * 0.01 + 0.001
    return X86DynamicLinear(
        codes(outputs, inputs), scale, numbers(outputs, seed=3) if bias else None, spec
    )


def exact(
    layer: X86DynamicLinear | X86DynamicConv, x: Tensor, dims: int, op: Callable[..., Tensor]
) -> Tensor:
    """The same in float64, from the codes that the numerics give."""
    found, scale, zero_point = quantize_rows(x, layer.spec, dims)
    total = op((found.double() - zero_point), layer.weight.double())
    channel = (-1, *(1,) * (dims - 1))
    total = total * layer.weight_scale.double().view(channel) * scale.double()
    return total if layer.bias is None else total + layer.bias.double().view(channel)


def close(found: Tensor, wanted: Tensor) -> None:
    # The integer sum is exact. It, the zero point's share and their difference are rounded to
    # float32 once each, up to 128 * 40 * 63 codes against sums of some thousand: 2**-24 * 100.
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (7, 40), (2, 3, 40), (2, 3, 4, 40)])
def test_linear_against_float64(spec: QSpec, bias: bool, shape: tuple[int, ...]) -> None:
    if spec is WHOLE and len(shape) == 1:
        pytest.skip("one row is the whole")
    layer, x = linear(spec=spec, bias=bias), numbers(*shape) + 0.5
    close(layer(x), exact(layer, x, 1, F.linear))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("shape", "weight", "walk"),
    [
        ((2, 4, 19), (6, 4, 3), Geometry((2,), (1,), (1,), 1)),
        ((3, 4, 9, 8), (6, 4, 3, 3), Geometry((1, 1), (1, 2), (1, 1), 1)),
        ((2, 4, 9, 8), (6, 2, 3, 3), Geometry((2, 1), (0, 0), (1, 2), 2)),
        ((2, 6, 7, 7), (6, 1, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 6)),
        ((2, 4, 5, 6, 7), (6, 4, 3, 3, 3), Geometry((1, 1, 2), (1, 1, 1), (1, 1, 1), 1)),
    ],
)
def test_conv_against_float64(
    spec: QSpec, shape: tuple[int, ...], weight: tuple[int, ...], walk: Geometry
) -> None:
    rank = len(shape) - 2
    scale = numbers(weight[0], seed=2).abs() * 0.01 + 0.001
    layer = X86DynamicConv(codes(*weight), scale, numbers(weight[0], seed=3), spec, walk)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]

    def op(a: Tensor, w: Tensor) -> Tensor:
        return conv(a, w, None, walk.stride, walk.padding, walk.dilation, walk.groups)

    x = numbers(*shape) + 0.5
    close(layer(x), exact(layer, x, rank + 1, op))
    if spec is not WHOLE:
        assert torch.equal(layer(x[1]), layer(x)[1])
    assert layer(x[:0]).shape == op(x[:0].double(), layer.weight.double()).shape
    if rank == 2:
        assert torch.equal(layer(x.to(memory_format=torch.channels_last)), layer(x))


@pytest.mark.parametrize("spec", [ROWS, SYMMETRIC])
@pytest.mark.parametrize("size", [(24, 40), (33, 7), (257, 300), (768, 768)])
def test_a_row_is_the_same_alone_and_in_any_batch(spec: QSpec, size: tuple[int, int]) -> None:
    layer, x = linear(*size, spec=spec), numbers(67, size[1]) * 3 + 1
    together = layer(x)
    for place in (0, 1, 31, 66):
        assert torch.equal(layer(x[place : place + 1])[0], together[place])
        assert torch.equal(layer(x[place]), together[place])
    order = torch.randperm(67, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layer(x[order]), together[order])
    assert torch.equal(layer(x[:17]), together[:17])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_are_nan_and_zero_rows_give_the_bias(bad: float) -> None:
    layer, x = linear(), numbers(4, 40)
    clean = layer(x)
    x[1, 3] = bad
    x[2] = 0.0
    found = layer(x)
    assert found[1].isnan().all()
    assert layer.bias is not None and torch.equal(found[2], layer.bias)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])


def test_stacked_layers_are_each_of_them() -> None:
    one, two = linear(24), linear(16)
    assert one.bias is not None and two.bias is not None
    weight, scale, bias = (
        torch.cat(pair)
        for pair in (
            (one.weight, two.weight),
            (one.weight_scale, two.weight_scale),
            (one.bias, two.bias),
        )
    )
    both = X86DynamicLinear(weight, scale, bias, ROWS, (24, 16))
    x = numbers(3, 5, 40)
    first, second = both(x)
    assert torch.equal(first, one(x)) and torch.equal(second, two(x))


def test_copies_pickles_and_state() -> None:
    layer, x = linear(), numbers(3, 40)
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    other = X86DynamicLinear(codes(24, 40, seed=9), torch.ones(24), torch.zeros(24), ROWS)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), wanted)


def test_odd_inputs() -> None:
    layer = linear()
    assert layer(torch.zeros(0, 40)).shape == (0, 24)
    assert layer(torch.zeros(2, 0, 40)).shape == (2, 0, 24)
    x = numbers(40, 6)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))
    with torch.inference_mode():
        assert torch.equal(layer(x.t()), layer(x.t().contiguous()))
    assert torch.equal(layer(x.t().bfloat16()), layer(x.t().bfloat16().float()))
