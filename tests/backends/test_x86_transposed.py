"""Transposed convolutions as convolutions, against exact sums in float64."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86_layers import PostOp
from fxquant.backends.x86_transposed import TransposedGeometry, X86ConvTranspose
from fxquant.graph.info import QType
from fxquant.numerics.integer import ConvGeometry, conv_reference
from fxquant.numerics.qparams import QParams
from tests.backends.lockstep import check_ops
from tests.backends.oracles import (
    assert_layout_is_no_matter,
    assert_within,
    fitting,
    qparams,
    some_codes,
    uint8,
    weight_codes,
)


@dataclass(frozen=True)
class Case:
    """A transposed convolution."""

    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (2, 2)
    padding: tuple[int, ...] = (0, 0)
    output_padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    channels: tuple[int, int] = (6, 8)
    bias: bool = True
    zeros: tuple[int, int] = (113, 97)

    @property
    def geometry(self) -> TransposedGeometry:
        return TransposedGeometry(
            self.stride, self.padding, self.output_padding, self.dilation, self.groups
        )


CASES: Final[dict[str, Case]] = {
    "U-Net": Case(kernel=(2, 2)),
    "overlapping": Case(),
    "stride 1": Case(stride=(1, 1)),
    "padded": Case(padding=(1, 1), output_padding=(1, 1)),
    "padded more": Case(kernel=(4, 4), padding=(1, 1)),
    "odd": Case(kernel=(5, 2), stride=(3, 2), padding=(2, 0), output_padding=(1, 0)),
    "dilated": Case(dilation=(2, 1), stride=(1, 2)),
    "dilated and strided": Case(dilation=(2, 3), stride=(2, 2), padding=(1, 2)),
    "stride past kernel": Case(kernel=(1, 2), stride=(3, 3)),
    "grouped": Case(groups=2),
    "depthwise": Case(groups=6, channels=(6, 6)),
    "no bias": Case(bias=False),
    "gaps": Case(kernel=(2, 2), output_padding=(0, 1)),
    "wide gaps": Case(kernel=(1, 2), stride=(4, 3), output_padding=(3, 2)),
    "line": Case((3,), (2,), (1,), (1,), (1,)),
    "line, grouped": Case((4,), (3,), (0,), (2,), (2,), groups=2),
    "cube": Case((3, 2, 3), (2, 2, 1), (1, 0, 1), (1, 0, 0), (1, 1, 2)),
    "cube, depthwise": Case(
        (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0), (1, 1, 1), groups=6, channels=(6, 6)
    ),
    "zero point 0": Case(zeros=(0, 0)),
    "zero point 255": Case(zeros=(255, 255)),
}


def pair(
    case: Case, post: PostOp | None = None, activation: Any = None
) -> tuple[X86ConvTranspose, Tensor, Tensor, QType]:
    """The layer, its input, the float64 result and its type."""
    cin, cout = case.channels
    shape = (cin, cout // case.groups, *case.kernel)
    weight = weight_codes(*shape, pairs=cin > case.groups)
    scale = 0.002 + 0.006 * torch.rand(cout // case.groups)
    bias = 2 * torch.randn(cout) if case.bias else None
    zero = torch.zeros(scale.numel(), dtype=torch.int32)
    weight_q = QParams(scale, zero, -127, 127, torch.int8, 1)
    reads, x = uint8(0.03, case.zeros[0]), some_codes(2, cin, *(7, 6, 4)[: len(case.kernel)])
    exact = conv_reference(
        x, qparams(reads), weight, weight_q, qparams(uint8()), bias=bias,
        geometry=ConvGeometry(
            case.stride, case.padding, case.dilation, case.groups, True, case.output_padding
        ),
        activation=activation,
    ).real  # fmt: skip
    writes = fitting(exact, case.zeros[1])
    layer = X86ConvTranspose(weight, scale, bias, reads, writes, post or PostOp(), case.geometry)
    return layer, x, exact, writes


@pytest.mark.parametrize("name", CASES)
def test_transposed_convolutions_match_float64(name: str) -> None:
    case = CASES[name]
    layer, x, exact, writes = pair(case)
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("name", ("relu", "hardswish"))
def test_with_an_activation(name: str) -> None:
    layer, x, exact, writes = pair(Case(), PostOp(name), getattr(F, name))
    assert_within(layer(x), exact, writes)


def test_layouts_empty_batches_and_copies() -> None:
    layer, x, exact, writes = pair(Case(padding=(1, 1), output_padding=(1, 0)))
    assert_layout_is_no_matter(layer, torch.cat([x, x.flip(0)])[:3])
    assert layer(x[:0]).shape == (0, *exact.shape[1:])
    assert layer(x[:0]).dtype == writes.dtype
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


LAYERS: Final[dict[str, nn.Module]] = {
    "plain": nn.ConvTranspose2d(8, 8, 2, stride=2),
    "odd": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    "grouped": nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=4),
    "dilated": nn.ConvTranspose2d(8, 4, 3, dilation=2),
    "gaps": nn.ConvTranspose2d(8, 4, 1, stride=2, output_padding=1),
}


@pytest.mark.parametrize("act", (None, nn.ReLU(), nn.SiLU(), nn.Sigmoid()), ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_between_other_layers(name: str, act: nn.Module | None) -> None:
    layer = LAYERS[name]
    middle = [layer] if act is None else [layer, act]
    tail = nn.Conv2d(
        layer.get_parameter("weight").shape[1] * int(getattr(layer, "groups", 1)), 3, 1
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *middle, tail).eval()
    found = check_ops(model, *(torch.randn(3, 3, 9, 8) for _ in range(2)))
    assert "X86ConvTranspose" in found.kernels
    assert fxquant.report(found.lowered).weight_coverage == 1.0
    for shape in ((1, 3, 4, 11), (0, 3, 9, 8)):
        x = torch.randn(shape)
        assert found.lowered(x).shape == model(x).shape


RANKS: Final[dict[str, tuple[nn.Module, tuple[int, ...]]]] = {
    "line": (nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1, groups=2), (3, 8, 11)),
    "cube": (nn.ConvTranspose3d(8, 8, 2, stride=2), (2, 8, 4, 5, 3)),
    "cube, dilated": (nn.ConvTranspose3d(8, 8, 2, dilation=2, groups=8), (2, 8, 4, 5, 3)),
}


@pytest.mark.parametrize("act", (None, nn.ReLU(), nn.GELU()), ids=str)
@pytest.mark.parametrize("name", RANKS)
def test_lines_and_cubes(name: str, act: nn.Module | None) -> None:
    layer, shape = RANKS[name]
    model = nn.Sequential(layer, *([] if act is None else [act]), copy.deepcopy(layer)).eval()
    found = check_ops(model, *(torch.randn(shape) for _ in range(2)))
    assert "X86ConvTranspose" in found.kernels
    assert fxquant.report(found.lowered).coverage == 1.0
    x = torch.randn(1, *shape[1:])
    assert found.lowered(x).shape == model(x).shape
    assert found.lowered(x[0]).shape == model(x[0]).shape
