"""Norms, averages and float arithmetic on codes against float64, unrounded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.x86_norms import StatisticsCodes
from fxquant.backends.x86_real import (
    AffineCodes,
    RealCodes,
    SlopeCodes,
    SoftmaxCodes,
)
from fxquant.backends.x86_reduce import AverageCodes
from fxquant.graph.info import QType
from fxquant.numerics.affine import quantize
from fxquant.numerics.rounding import round_steps_
from tests.backends.oracles import (
    assert_layout_is_no_matter,
    assert_within,
    fitting,
    int8,
    real,
    some_codes,
    uint8,
)

READS = (uint8(0.05, 117), uint8(0.031, 0), int8(0.07, -9))
Make = Callable[[QType, QType], nn.Module]


def norm(name: str, module: Callable[[], nn.Module]) -> tuple[Make, Callable[[Tensor], Tensor]]:
    torch.manual_seed(5)
    made = module()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return lambda r, w: StatisticsCodes(name, made, r, w), copy.deepcopy(made).double()


def affine(shape: tuple[int, ...], **more: Any) -> tuple[Make, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    factor, term = (torch.randn(shape, generator=generator) for _ in range(2))
    along = (-1, 1, 1) if more.get("channels") else shape
    exact = lambda x: x * factor.double().view(along) + term.double().view(along)  # noqa: E731
    return lambda r, w: AffineCodes(factor, term, r, w, **more), exact


def average(name: str, function: Callable[..., Tensor], **options: Any) -> Any:
    return lambda r, w: AverageCodes(name, options, r, w), lambda x: function(x, **options)


SLOPE = torch.tensor([0.3, -0.2, 1.5, 0.0, 0.25, -1.0])
EXACT: dict[str, tuple[Make, Callable[[Tensor], Tensor]]] = {
    "layer_norm": norm("layer_norm", lambda: nn.LayerNorm((8, 9))),
    "layer_norm plain": norm("layer_norm", lambda: nn.LayerNorm(9, elementwise_affine=False)),
    "group_norm": norm("group_norm", lambda: nn.GroupNorm(3, 6)),
    "instance_norm": norm("instance_norm", lambda: nn.InstanceNorm2d(6, eps=1e-3)),
    "instance_norm affine": norm("instance_norm", lambda: nn.InstanceNorm2d(6, affine=True)),
    "rms_norm": norm("rms_norm", lambda: nn.RMSNorm(9, eps=1e-2)),
    "affine": affine((6, 8, 9)),
    "affine of channels": affine((6,), channels=True),
    "softmax": (lambda r, w: SoftmaxCodes("softmax", 1, r, w), lambda x: x.softmax(1)),
    "log_softmax": (lambda r, w: SoftmaxCodes("log_softmax", 3, r, w), lambda x: x.log_softmax(3)),
    "glu": (lambda r, w: RealCodes("glu", {"dim": 1}, (r,), w), lambda x: F.glu(x, 1)),
    "prelu": (lambda r, w: SlopeCodes(SLOPE, r, w), lambda x: F.prelu(x, SLOPE.double())),
    "normalize": (
        lambda r, w: RealCodes("normalize", {"p": 2.0, "dim": 1, "eps": 1e-12}, (r,), w),
        lambda x: F.normalize(x),
    ),
    "sum": average("sum", torch.sum, dim=(2,), keepdim=False),
    "bilinear": average("interpolate", F.interpolate, size=(5, 11), mode="bilinear"),
    "bicubic": average("interpolate", F.interpolate, size=(5, 11), mode="bicubic"),
    "padded": average("avg_pool2d", F.avg_pool2d, kernel_size=3, stride=2, padding=1),
    "divisor": average("avg_pool2d", F.avg_pool2d, kernel_size=2, divisor_override=3),
}


@pytest.mark.parametrize("reads", READS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_within_a_rounding_of_float64(name: str, reads: QType) -> None:
    make, exact = EXACT[name]
    codes = some_codes(3, 6, 8, 9, qtype=reads)
    with torch.no_grad():
        wanted = exact(real(codes, reads))
    for zero_point in (128, 252 if name == "log_softmax" else 3):  # logarithms are negative
        writes = fitting(wanted, zero_point)
        assert_within(make(reads, writes)(codes), wanted, writes)


@pytest.mark.parametrize("name", EXACT)
def test_layouts_copies_and_pickles_are_no_matter(name: str) -> None:
    make, _ = EXACT[name]
    kernel, codes = make(uint8(), uint8(0.04, 101)), some_codes(3, 6, 8, 9)
    if not name.startswith(("instance", "group", "layer", "rms", "softmax", "log", "norm", "bi")):
        # Float sums depend on the order they are taken in, which follows the layout.
        assert_layout_is_no_matter(kernel, codes)
    wanted = kernel(codes)
    assert torch.equal(copy.deepcopy(kernel)(codes), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(codes), wanted)
    assert "uint8" in repr(kernel)


@pytest.mark.parametrize("name", EXACT)
def test_layouts_change_a_code_by_one_at_most(name: str) -> None:
    make, _ = EXACT[name]
    kernel, codes = make(uint8(), uint8(0.04, 101)), some_codes(3, 6, 8, 9)
    last = codes.contiguous(memory_format=torch.channels_last)
    difference = (kernel(last).int() - kernel(codes).int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) <= 1e-3


PAIRS: dict[str, Callable[..., Tensor]] = {
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_codes_and_floats(name: str, relu: bool) -> None:
    a, b = uint8(0.05, 117), int8(0.02, 4)
    codes = some_codes(3, 6, 8, 9, qtype=a)
    other = some_codes(6, 1, 9, qtype=b, seed=1)
    other[other == b.zero_point] += 1  # nothing is divided by zero
    for given, reads in (((codes, other), (a, b)), ((codes, real(other, b).float()), (a, None))):
        exact = PAIRS[name](real(codes, a), real(other, b))
        writes = fitting(exact, 90)
        wanted = exact.clamp(min=0) if relu else exact
        assert_within(RealCodes(name, {}, reads, writes, relu)(*given), wanted, writes)


def test_a_sum_of_very_many_codes_is_exact() -> None:
    """100,000 codes of 255 pass 2**24, where float32 begins to drop ones."""
    reads, codes = uint8(1.0, 0), torch.full((2, 100_001), 255, dtype=torch.uint8)
    codes[1] -= 1
    writes = QType(1000.0, 0, 0, 255, torch.uint8)
    out = AverageCodes("sum", {"dim": 1, "keepdim": False}, reads, writes)(codes)
    assert_within(out, real(codes, reads).sum(1).clamp(max=255_000), writes)
    writes = QType(1 / 255, 0, 0, 255, torch.uint8)
    centred = AverageCodes("sum", {"dim": None, "keepdim": False}, uint8(1e-3, 254), writes)
    assert int(centred(codes)) == 255  # 100,001 * 0.001, past the end


def test_a_single_picture_of_an_instance_norm() -> None:
    norm = nn.InstanceNorm2d(6)
    codes, writes = some_codes(6, 8, 9), uint8(0.03, 128)
    kernel = StatisticsCodes("instance_norm", norm, uint8(), writes)
    with torch.no_grad():
        assert_within(kernel(codes), norm.double()(real(codes, uint8())), writes)


def test_an_rms_norm_has_a_default_of_its_own() -> None:
    norm = nn.RMSNorm(9, elementwise_affine=False)
    reads, writes = uint8(1e-4, 120), uint8(0.03, 128)
    codes = some_codes(40, 9, qtype=reads)
    exact = norm.float()(real(codes, reads).float())
    assert_within(StatisticsCodes("rms_norm", norm, reads, writes)(codes), exact, writes)


@pytest.mark.parametrize("zero_point", (0, 1, 127, 128, 255))
@pytest.mark.parametrize("relu", (False, True))
def test_rounding_is_the_one_rule(zero_point: int, relu: bool) -> None:
    halves = torch.arange(-600, 600) / 2
    given = torch.cat([halves, torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 1e-30])])
    wanted = quantize(given.relu() if relu else given, 1.0, zero_point, 0, 255, torch.uint8)
    assert torch.equal(
        round_steps_(given.clone(), zero_point, 0, 255, torch.uint8, relu=relu), wanted
    )
    signed = quantize(given, 1.0, zero_point - 128, -128, 127, torch.int8)
    assert torch.equal(round_steps_(given.clone(), zero_point - 128, -128, 127, torch.int8), signed)
