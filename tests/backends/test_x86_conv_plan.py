"""Convolutions that kernels with AMX get wrong as they are: each is right as the plan gives it.

The plans are made as for a processor with AMX, whatever runs the tests: they must be right on any.
"""

from __future__ import annotations

import dataclasses
import os
import random
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import recipes
from fxquant.backends import x86_conv_plan
from fxquant.backends.x86 import X86
from fxquant.backends.x86_conv_plan import Geometry, Plan, plan_of
from fxquant.backends.x86_dynamic import X86DynamicConv
from fxquant.backends.x86_layers import PostOp, X86Conv, X86ConvSum
from fxquant.backends.x86_pairs import has_avx512_kernels, has_tiles
from fxquant.backends.x86_stem import X86Stem, can_read_floats
from tests.backends.oracles import assert_within, fitting, some_codes, uint8, weight_codes
from tests.end_to_end.test_op_rows import ON_CODES

ROUNDING = 1e-5
"""Of the largest result: the sum is exact, and a few float32 operations (2**-24) follow, one of
which takes away what the zero point adds, up to some thirty times the result."""


@dataclass(frozen=True)
class Walk:
    """A convolution of random codes and weights."""

    weight: tuple[int, ...]
    sides: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    zero: int = 0

    @property
    def geometry(self) -> Geometry:
        """How it walks: by 1, without padding, unless it says otherwise."""
        rank = len(self.sides)
        ones = (1,) * rank
        padding = self.padding or (0,) * rank
        return Geometry(self.stride or ones, padding, self.dilation or ones, self.groups)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, weight, its scale, and the bias."""
        generator = torch.Generator().manual_seed(0)
        weight = weight_codes(*self.weight, generator=generator)
        scale = torch.rand(self.weight[0], generator=generator) * 0.01 + 0.001
        bias = torch.randn(self.weight[0], generator=generator)
        codes = some_codes(2, self.weight[1] * self.groups, *self.sides, qtype=uint8())
        return codes, weight, scale, bias

    def exact(self) -> Tensor:
        """The result in float64."""
        codes, weight, scale, bias = self.tensors()
        g, conv = self.geometry, (F.conv1d, F.conv2d, F.conv3d)[len(self.sides) - 1]
        real = (codes.double() - self.zero) * 0.05
        weights = weight.double() * scale.double().view(-1, *(1,) * (weight.dim() - 1))
        made: Tensor = conv(
            real, weights, bias.double(), g.stride, g.padding, g.dilation, self.groups
        )
        return made

    def layer(self, kind: type[X86Conv] = X86Conv, **options: Any) -> X86Conv:
        """An int8 layer that computes it; float results unless ``writes`` is given."""
        codes, weight, scale, bias = self.tensors()
        writes = options.pop("writes", None)
        reads, shape = uint8(0.05, self.zero), tuple(codes.shape)
        return kind(weight, scale, bias, reads, writes, PostOp(), self.geometry, shape, **options)


WALKS = {
    # Models that have them, where there are any.
    "patches of 32x32 pixels (CLIP ViT-B/32)": Walk((24, 4, 32, 32), (96, 96), (32, 32)),
    "keys of SegFormer-B0 and PVTv2-B0": Walk((32, 32, 8, 8), (32, 32), (8, 8)),
    "positions of a small wav2vec2": Walk((64, 16, 16), (79,), padding=(8,), groups=4, zero=100),
    "groups of 24 (RegNet)": Walk((48, 24, 3, 3), (28, 28), padding=(1, 1), groups=2, zero=7),
    "more outputs than a block": Walk((120, 3, 2), (33,), groups=3, zero=128),
    "a column (ERFNet)": Walk((16, 16, 3, 1), (20, 64), padding=(1, 0), zero=128),
    "a long column": Walk((16, 24, 8, 1), (20, 64)),
    "a row of 256": Walk((17, 16, 16), (33,)),
    "strided rows": Walk((16, 48, 1, 4), (9, 20), (4, 4)),
    "one column of results": Walk((16, 16, 1, 7), (17, 8), (2, 2)),
    "one column, padded": Walk((17, 7, 7, 2), (33, 2), (4, 4), (1, 1), zero=7),
    "padding past the kernel": Walk((15, 1, 3, 1), (8, 17), padding=(3, 1), zero=128),
    "dilated, padded by less": Walk(
        (4, 48, 8, 3), (32, 78), padding=(4, 2), dilation=(2, 2), zero=128
    ),
    "nothing read": Walk((8, 17, 7, 11), (1, 33), (3, 3), (7, 0), (2, 1)),
    "nothing read by two": Walk((16, 24, 2, 6), (1, 3), (2, 2), (1, 6), (2, 1)),
    "a volume of one layer": Walk((40, 31, 3, 3, 3), (1, 17, 17), padding=(1, 1, 1)),
    "layers left out": Walk((24, 16, 1, 4, 4), (17, 8, 8), (4, 4, 4)),
    "layers left out, padded": Walk((16, 32, 2, 1, 8), (14, 9, 8), (4, 4, 4), (1, 1, 1), zero=7),
    # Those that are wrong without AMX.
    "one channel, one column": Walk((17, 1, 1, 7), (3, 8), (1, 2)),
    "one value": Walk((1, 16, 16), (16,), (16,), zero=128),
    "groups of one channel": Walk((120, 1, 1, 4), (3, 5), (4, 4), groups=3, zero=128),
    "one column, dilated and padded": Walk(
        (40, 48, 4, 2), (10, 2), (3, 1), (2, 1), dilation=(1, 3), zero=128
    ),
    "one layer of one channel": Walk((24, 1, 3, 2, 3), (1, 10, 1), (2, 4, 3), (1, 1, 3)),
    # Those that are wrong without AVX512, now and then.
    "shortcuts of 24 channels (RegNetX-002)": Walk((56, 24, 1, 1), (32, 32), (2, 2), zero=9),
    "shortcuts of 40 channels": Walk((32, 40, 1, 1), (15, 14), (2, 2)),
    "single values of a row": Walk((24, 8, 1), (28,), (2,), zero=128),
}


MACHINES = ["as on this machine"]
MACHINES += [] if has_tiles() else ["as with AMX"]
MACHINES += ["as without AVX512"] if has_avx512_kernels() else []


@pytest.fixture(params=MACHINES)
def _planned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as with AMX":
        monkeypatch.setattr(x86_conv_plan, "has_tiles", lambda: True)
    if request.param == "as without AVX512":
        monkeypatch.setattr(x86_conv_plan, "has_avx512_kernels", lambda: False)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Equal but for the rounding of floats."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert float(error) < ROUNDING


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("name", WALKS)
def test_known_shapes_match_float64(name: str) -> None:
    walk = WALKS[name]
    codes, exact = walk.tensors()[0], walk.exact()
    assert_close(walk.layer()(codes), exact)
    writes = fitting(exact, 97)
    assert_within(walk.layer(writes=writes)(codes), exact, writes)


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("name", [name for name, w in WALKS.items() if len(w.sides) == 2])
def test_known_sums_match_float64(name: str) -> None:
    walk = WALKS[name]
    codes, exact = walk.tensors()[0], walk.exact()
    other, read = some_codes(*exact.shape, seed=1), uint8(float(exact.std()) / 60, 9)
    total = exact + (other.double() - 9) * read.scale
    writes = fitting(total, 97)
    assert_within(walk.layer(X86ConvSum, writes=writes, other=read)(codes, other), total, writes)


@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("name", WALKS)
def test_known_shapes_match_float64_when_quantized_at_run_time(name: str) -> None:
    walk = WALKS[name]
    codes, weight, scale, bias = walk.tensors()
    spec = fxquant.QSpec("uint8", granularity="row", observer="runtime")
    layer = X86DynamicConv(weight, scale, bias, spec, walk.geometry)
    x = (codes.float() - walk.zero) * 0.05
    # The rounding of the activations to 8 bits is the error that is left.
    exact = walk.exact()
    noise = (layer(x).double() - exact).pow(2).sum() / exact.pow(2).sum()
    assert float(noise) < 1e-3


@pytest.mark.skipif(not has_tiles(), reason="kernels without AMX get them right")
@pytest.mark.skipif(
    bool(os.environ.get("ONEDNN_MAX_CPU_ISA")), reason="other kernels are asked for"
)
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another oneDNN may not")
@pytest.mark.parametrize("name", list(WALKS)[:11])
def test_the_kernels_get_them_wrong_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see without plans; those that overwrite memory are left out."""
    monkeypatch.setattr(x86_conv_plan, "has_tiles", lambda: False)
    walk = WALKS[name]
    exact = walk.exact()
    error = (walk.layer()(walk.tensors()[0]).double() - exact).abs().max() / exact.abs().max()
    assert not float(error) < 100 * ROUNDING


@pytest.mark.parametrize("name", [name for name, w in WALKS.items() if max(w.weight[2:]) == 1])
def test_steps_are_right_every_time(name: str) -> None:
    """Where threads write over what another has gathered, one call proves nothing."""
    walk = WALKS[name]
    layer, codes = walk.layer(), walk.tensors()[0].repeat(2, *(1,) * (len(walk.sides) + 1))
    exact = walk.exact().repeat(2, *(1,) * (len(walk.sides) + 1))
    for _ in range(200):
        assert_close(layer(codes), exact)


def _random_walk(rng: random.Random) -> Walk:
    """A convolution with an output, of sizes around those where kernels change their ways."""
    rank = rng.choice((1, 2, 2, 2, 3))
    groups = rng.choice((1, 1, 1, 2, 3, 8))
    inputs = rng.choice((1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64))
    outputs = rng.choice((1, 3, 8, 16, 17, 24, 32, 40, 64))
    wide = (1, 2, 3, 4, 5, 7, 8, 16) if rank == 1 else (1, 2, 3, 4, 5, 7, 8)
    kernel = [rng.choice(wide if rank < 3 else (1, 2, 3, 4)) for _ in range(rank)]
    dilation = [rng.choice((1, 1, 1, 2, 3)) for _ in range(rank)]
    stride = [rng.choice((1, 1, 2, 3, 4, k)) for k in kernel]
    ways = [(0, k // 2, d * (k - 1) // 2, k) for k, d in zip(kernel, dilation, strict=True)]
    padding = [rng.choice(way) for way in ways]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    sides = [low + rng.choice((0, 1, 2, 5, 9, 16)) for low in least]
    return Walk(
        (groups * outputs, inputs, *kernel), tuple(sides), tuple(stride), tuple(padding),
        tuple(dilation), groups, rng.choice((0, 7, 128)),
    )  # fmt: skip


def _check_random(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        walk = _random_walk(rng)
        layer, exact = walk.layer(), walk.exact()
        # Where the kernel meets padding alone the result is the bias, and the zero point's part
        # is rounded: an eighth of a code times the largest weight is far less than a wrong sum.
        floor = 0.05 * walk.zero * 1.27
        for _ in range(3):  # what threads make of each other's memory differs from call to call
            got = layer(walk.tensors()[0]).double()
            error = (got - exact).abs().max() / max(float(exact.abs().max()), floor)
            assert float(error) < ROUNDING, walk


@pytest.mark.usefixtures("_planned")
def test_random_shapes_match_float64() -> None:
    _check_random(120, seed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_planned")
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_random_shapes_match_float64(seed: int) -> None:
    _check_random(1500, seed)


def _plan(weight: tuple[int, ...], zero: int = 0, **walk: Any) -> Plan:
    rank = len(weight) - 2
    ones, none = (1,) * rank, (0,) * rank
    geometry = Geometry(
        walk.get("stride", ones), walk.get("padding", none), walk.get("dilation", ones),
        walk.get("groups", 1),
    )  # fmt: skip
    return plan_of(weight, geometry, zero, tiles=True)


@pytest.mark.parametrize(
    ("weight", "walk"),
    [
        ((64, 64, 3, 3), {"padding": (1, 1), "zero": 128}),
        ((128, 64, 1, 1), {"stride": (2, 2), "zero": 128}),
        ((32, 1, 3, 3), {"padding": (1, 1), "groups": 32, "zero": 128}),
        ((128, 4, 3, 3), {"padding": (1, 1), "groups": 32}),
        ((192, 96, 2, 2), {"zero": 128}),
        ((256, 256, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
        ((16, 16, 3), {"padding": (1,), "zero": 3}),
        ((64, 64, 3, 3, 3), {"padding": (1, 1, 1), "zero": 3}),
    ],
)
def test_usual_convolutions_are_given_as_they_are(
    weight: tuple[int, ...], walk: dict[str, Any]
) -> None:
    plan = _plan(weight, **walk)
    assert plan.plain
    assert plan.zero_point == plan.reads


def test_without_tiles_only_padding_is_written() -> None:
    changed = []
    for name, walk in WALKS.items():
        plan = plan_of(walk.weight, walk.geometry, walk.zero, tiles=False)
        assert not any(plan.taps)
        changed += [name] if plan.fill else []
    assert changed == [
        "a column (ERFNet)",
        "padding past the kernel",
        "dilated, padded by less",
        "nothing read",
        "nothing read by two",
        "a volume of one layer",
        "layers left out, padded",
        "one column, dilated and padded",
        "one layer of one channel",
    ]


def test_a_plan_says_what_the_layer_writes() -> None:
    plan = _plan((48, 24, 3, 3), 7, padding=(1, 2), groups=2)
    assert plan.fill == (2, 2, 1, 1)
    assert (plan.zero_point, plan.reads, plan.geometry.padding) == (0, 7, (0, 0))
    assert plan.shape((1, 48, 14, 14)) == [1, 48, 16, 18]
    assert plan.codes(torch.ones(1, 48, 2, 2, dtype=torch.uint8))[0, 0, 0, 0] == 7
    assert _plan((32, 32, 8, 8), stride=(8, 8)).taps == (0, 1)
    # 9 columns and a stride of 24 share a 3: 96 channels are no multiple of 64, nor are 288.
    assert _plan((32, 32, 8, 8), stride=(24, 24)).taps == (0, 1)
    assert _plan((16, 24, 8, 1)).taps == (0, 1)
    assert _plan((24, 16, 1, 4, 4), stride=(4, 4, 4)).taps == (3, 0, 0)
    # Rows that may meet no input, and borders of dilated kernels that lose a zero point.
    assert _plan((16, 24, 2, 6), padding=(1, 6), dilation=(2, 1)).fill == (6, 6, 1, 1)
    assert _plan((4, 48, 3, 3), 9, padding=(2, 2), dilation=(2, 2)).fill == (2, 2, 2, 2)


def test_without_avx512_the_layer_steps() -> None:
    def stepped(weight: tuple[int, ...], zero: int = 3, **walk: Any) -> tuple[int, ...]:
        rank = len(weight) - 2
        ones = (1,) * rank
        geometry = Geometry(
            walk.get("stride", (2,) * rank), walk.get("padding", (0,) * rank), ones,
            walk.get("groups", 1),
        )  # fmt: skip
        assert not plan_of(weight, geometry, zero, wide=True).step
        assert not plan_of(weight, geometry, 0, size=2, wide=False).step
        plan = plan_of(weight, geometry, zero, wide=False)
        if plan.step:
            assert (plan.plain, plan.narrow, plan.zero_point, plan.reads) == (False, 0, zero, zero)
            assert (plan.geometry.stride, plan.step) == (ones, geometry.stride)
        return plan.step

    assert stepped((56, 24, 1, 1)) == (2, 2)
    assert stepped((56, 24, 1, 1), stride=(1, 3)) == (1, 3)
    assert stepped((24, 8, 1)) == (2,)
    never: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((56, 48, 1, 1), {}),
        ((56, 24, 3, 3), {}),
        ((56, 24, 1, 1), {"stride": (1, 1)}),
        ((56, 24, 1, 1), {"padding": (1, 0)}),
        ((56, 24, 1, 1), {"groups": 2}),
        ((56, 24, 1, 1, 1), {}),
    ]
    assert [stepped(weight, **walk) for weight, walk in never] == [()] * len(never)
    plan = plan_of((56, 24, 1, 1), Geometry((2, 3), (0, 0), (1, 1), 1), 0, wide=False)
    assert plan.shape((1, 24, 5, 6)) == [1, 24, 3, 2]
    codes = torch.arange(30, dtype=torch.uint8).view(1, 1, 5, 6)
    assert plan.codes(codes).flatten().tolist() == [0, 3, 12, 15, 24, 27]


def test_the_zero_point_goes_into_the_bias_exactly() -> None:
    plan = _plan((2, 3, 2), 9, groups=2)
    weight = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[-1, 0], [0, 0], [0, 0]]]).to(torch.int8)
    scale = torch.tensor([0.5, 0.25])
    bias = plan.bias(None, weight, scale, 0.1)
    assert bias is not None
    assert bias.tolist() == pytest.approx([-21 * 0.5 * 0.1 * 9, 0.25 * 0.1 * 9])
    told = _plan((64, 64, 3, 3), 9)
    assert told.bias(None, weight, scale, 0.1) is None


def test_first_layers_that_need_taps_read_codes() -> None:
    large, usual = torch.zeros(8, 3, 32, 32), torch.zeros(8, 3, 16, 16)
    none, ones = (0, 0), (1, 1)
    assert not can_read_floats(large, Geometry((32, 32), none, ones, 1))
    assert can_read_floats(usual, Geometry((16, 16), none, ones, 1))


@pytest.fixture
def _on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is small is faster in float, and would stay there.
    made = dataclasses.replace(X86(), costs=ON_CODES)
    monkeypatch.setitem(recipes._BACKENDS, "x86", lambda: made)


@pytest.mark.usefixtures("_planned", "_on_codes")
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(3, 32, 32, stride=32), (2, 3, 64, 96)),
        (nn.Conv2d(3, 32, 7, stride=2, padding=3), (2, 3, 33, 2)),
        (nn.Sequential(nn.SiLU(), nn.Conv2d(48, 80, 3, padding=1, groups=2)), (2, 48, 9, 9)),
        (nn.Sequential(nn.SiLU(), nn.Conv2d(24, 56, 1, stride=2)), (4, 24, 28, 28)),
        (nn.Conv2d(3, 24, 1, stride=3), (4, 3, 28, 28)),
        (nn.Sequential(nn.SiLU(), nn.ConvTranspose2d(48, 80, 4, 2, 1, groups=2)), (2, 48, 9, 9)),
        (nn.Sequential(nn.SiLU(), nn.ConvTranspose1d(24, 48, 9, 3, 2)), (2, 24, 9)),
    ],
)
def test_quantized_models_are_right(
    model: nn.Module, shape: tuple[int, ...], mode: Literal["static", "dynamic"]
) -> None:
    torch.manual_seed(0)
    model, x = model.eval(), torch.randn(shape)
    data = [x] if mode == "static" else None
    q = fxquant.quantize(model, data, mode=mode, backend="x86", example_inputs=x)
    want = model(x)
    assert 10 * torch.log10(want.pow(2).sum() / (q(x) - want).pow(2).sum()) > 35


def test_a_first_layer_of_one_column() -> None:
    walk = Walk((8, 3, 7, 7), (33, 2), (2, 2), (3, 3))
    _, weight, scale, bias = walk.tensors()
    x = torch.rand(2, 3, 33, 2)
    layer = X86Stem(weight, scale, bias, uint8(1 / 255, 0), None, PostOp(), walk.geometry, None)
    real = (weight.double() * scale.double().view(-1, 1, 1, 1)).float()
    want = F.conv2d((x * 255).round() / 255, real, bias, 2, 3)
    assert torch.allclose(layer(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
