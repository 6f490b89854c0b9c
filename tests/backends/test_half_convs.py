"""Convolutions of 16 bits against float64, in shapes that kernels with AMX get wrong."""

from __future__ import annotations

import copy
import io
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends import x86_conv_plan
from fxquant.backends.half_convs import PlannedConv1d, PlannedConv2d, PlannedConv3d, planned
from fxquant.backends.x86_pairs import has_tiles

CONVS = {
    "rows of 128 numbers": (nn.Conv1d(8, 16, 8), (2, 8, 24)),
    "in groups": (nn.Conv1d(32, 96, 32, groups=4), (2, 32, 79)),
    "strided rows": (nn.Conv2d(48, 24, 32, stride=8), (1, 48, 80, 32)),
    "a long row, padded": (nn.Conv2d(8, 24, (1, 16), stride=4, padding=(0, 8)), (2, 8, 17, 63)),
    "the same sides": (nn.Conv2d(8, 16, (1, 17), padding="same", dilation=(2, 1)), (2, 8, 9, 33)),
    "one column": (nn.Conv2d(52, 32, (1, 4), stride=2), (1, 52, 9, 4)),
    "layers left out": (nn.Conv3d(16, 24, (1, 4, 4), stride=4), (1, 16, 17, 8, 8)),
    "no batch": (nn.Conv1d(8, 16, 8), (8, 24)),
}
ROUNDING = 2**-7
"""Half of a bfloat16's last place, of the largest value: sums are made in float32."""


@pytest.fixture(params=["as on this machine", *([] if has_tiles() else ["as with AMX"])])
def _planned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as with AMX":
        monkeypatch.setattr(x86_conv_plan, "has_tiles", lambda: True)


def error(made: Tensor, conv: nn.Module, x: Tensor) -> float:
    exact = copy.deepcopy(conv).double()(x.double())
    assert made.shape == exact.shape and made.dtype == x.dtype
    return float((made.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("name", CONVS)
def test_known_shapes_match_float64(name: str) -> None:
    torch.manual_seed(0)
    conv, shape = copy.deepcopy(CONVS[name][0]).bfloat16(), CONVS[name][1]
    x = torch.randn(shape).bfloat16()
    layer = planned(conv)
    if name != "the same sides":
        assert isinstance(layer, PlannedConv1d | PlannedConv2d | PlannedConv3d)
    with torch.no_grad():
        assert error(layer(x), conv, x) < ROUNDING
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        again = torch.load(stored, weights_only=False)
        assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # the user's own stays what it was


@pytest.mark.skipif(not has_tiles(), reason="kernels without AMX get them right")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="other kernels are asked for")
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another oneDNN may not")
@pytest.mark.parametrize("name", list(CONVS)[:4])
def test_the_kernels_get_them_wrong_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    conv, shape = copy.deepcopy(CONVS[name][0]).bfloat16(), CONVS[name][1]
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        assert not error(conv(x), conv, x) < 10 * ROUNDING


@pytest.mark.usefixtures("_planned")
def test_random_shapes_match_float64() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(100):
        rank, groups = rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 2, 4))
        inputs, outputs = rng.choice((2, 4, 6, 8, 12, 16, 24, 32)), rng.choice((3, 8, 17, 32, 40))
        kernel = [rng.choice((1, 2, 4, 8, 16) if rank < 3 else (1, 2, 4)) for _ in range(rank)]
        stride = tuple(rng.choice((1, 2, 4, k)) for k in kernel)
        sides = [k + rng.choice((0, 1, 3, 8, 12)) for k in kernel]
        padding = tuple(rng.choice((0, k // 2)) for k in kernel)
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        conv = kind(
            groups * inputs, groups * outputs, tuple(kernel), stride, padding, groups=groups
        ).bfloat16()
        x = torch.randn(2, groups * inputs, *sides).bfloat16()
        with torch.no_grad():
            assert error(planned(conv)(x), conv, x) < ROUNDING, conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 3, padding=1).bfloat16(),
        nn.Conv2d(8, 16, (1, 17)),
        nn.Conv2d(8, 16, (1, 8), padding=(0, 3), padding_mode="reflect").bfloat16(),
    ],
)
def test_other_convolutions_stay_what_they_are(conv: nn.Module) -> None:
    assert planned(conv) is conv


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("backend", ["x86", "reference"])
def test_models_of_bfloat16_are_right(backend: str) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv1d(8, 16, 8), nn.ReLU(), nn.Conv1d(16, 4, 4)),
        torch.randn(2, 8, 40),
    )
    q = fxquant.quantize(model.eval(), mode="bfloat16", example_inputs=x, backend=backend)
    assert fxquant.report(q).rows[0]["op"] == "conv1d+relu"
    assert isinstance(q.get_submodule("0"), PlannedConv1d)
    with torch.no_grad():
        want = model(x)
        assert float((q(x) - want).pow(2).sum() / want.pow(2).sum()) < 1e-4
