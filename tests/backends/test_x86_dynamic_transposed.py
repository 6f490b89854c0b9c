"""Dynamic transposed convolutions on x86 kernels: exact sums, samples that stand alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86 import X86
from fxquant.backends.x86_dynamic_transposed import X86DynamicConvTranspose
from fxquant.numerics.dynamic import quantize_rows
from fxquant.spec import ROWS, QSpec
from tests.backends.test_x86_transposed import CASES, Case

SYMMETRIC = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
WHOLE = QSpec("uint8", observer="runtime")

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(case: Case, spec: QSpec = ROWS) -> X86DynamicConvTranspose:
    inputs, outputs = case.channels
    g = torch.Generator().manual_seed(1)
    shape = (inputs, outputs // case.groups, *case.kernel)
    # Up to 63: exact on processors that add products in pairs of 16 bits.
    weight = torch.randint(-63, 64, shape, generator=g, dtype=torch.int8)
    scale = numbers(shape[1], seed=2).abs() * 0.01 + 0.001
    bias = numbers(outputs, seed=3) if case.bias else None
    return X86DynamicConvTranspose(weight, scale, bias, spec, case.geometry)


def picture(case: Case, batch: int = 3) -> Tensor:
    return numbers(batch, case.channels[0], *(7, 6, 4)[: len(case.kernel)]) + 0.5


def exact(layer: X86DynamicConvTranspose, x: Tensor) -> Tensor:
    """The same in float64, from the codes that the numerics give."""
    rank, g = x.dim() - 2, layer.geometry
    codes, scale, zero_point = quantize_rows(x, layer.spec, rank + 1)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    weight = layer.weight.double() * layer.weight_scale.double().view(-1, *(1,) * rank)
    real = (codes.double() - zero_point) * scale.double()
    bias = None if layer.bias is None else layer.bias.double()
    return conv(real, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)


@pytest.mark.parametrize("spec", [ROWS, SYMMETRIC, WHOLE], ids=["rows", "symmetric", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, spec: QSpec) -> None:
    layer, x = layer_of(CASES[name], spec), picture(CASES[name])
    found, wanted = layer(x), exact(layer, x)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # The integer sum is exact; what is rounded to float32 is larger than what is left of it.
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    if spec is not WHOLE:
        assert torch.equal(layer(x[1:2]), found[1:2])
        assert torch.equal(layer(x[1]), found[1])
        assert torch.equal(layer(x.flip(0)), found.flip(0))
    assert layer(x[:0]).shape == found[:0].shape


def test_bad_samples_touch_no_other_and_zeros_give_the_bias() -> None:
    layer, x = layer_of(Case()), picture(Case(), 4)
    clean = layer(x)
    x[1, 2, 3, 0], x[2] = math.nan, 0.0
    found = layer(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 3]], clean[[0, 3]])
    assert layer.bias is not None
    assert torch.equal(found[2], layer.bias.view(-1, 1, 1).expand_as(found[2]))


def test_copies_pickles_and_state() -> None:
    layer, x = layer_of(Case(groups=2)), picture(Case(groups=2))
    wanted = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), wanted)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    other = layer_of(Case(groups=2))
    other.weight.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), wanted)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), wanted)
