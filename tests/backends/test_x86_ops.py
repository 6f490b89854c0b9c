"""Ops on plain codes against float64: sums, products, affine, tables, averages."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.x86_ops import GateCodes, NormCodes, PairCodes, TableCodes
from fxquant.backends.x86_pools import AdaptiveMaxPoolCodes, MaxPoolCodes
from fxquant.backends.x86_reduce import AverageCodes
from fxquant.graph.info import QType
from fxquant.numerics.lut import make_table
from tests.backends.oracles import (
    assert_layout_is_no_matter,
    assert_within,
    fitting,
    int8,
    qparams,
    real,
    some_codes,
    uint8,
)

# Vectorised loops take 32 or 64 codes at a time and leave a tail; both parts must be right.
SIZES = ((1,), (63,), (64,), (131,), (3, 7, 11), (2, 3, 9, 9))

PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
}


def pair_of(
    name: str,
    a: Tensor,
    b: Tensor,
    types: tuple[QType, QType],
    *,
    zero: int = 99,
    relu: bool = False,
) -> tuple[PairCodes, Tensor, QType]:
    """The op, its float64 result and the type it is written in."""
    exact = PAIRS[name](real(a, types[0]), real(b, types[1]))
    exact = exact.relu() if relu else exact
    writes = fitting(exact, zero)
    return PairCodes(name, relu, *types, writes), exact, writes


@pytest.mark.parametrize("relu", (False, True), ids=("plain", "relu"))
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_match_float64(name: str, shape: tuple[int, ...], relu: bool) -> None:
    types = (uint8(0.05, 100), uint8(0.031, 140))
    a, b = some_codes(*shape), some_codes(*shape, seed=1)
    op, exact, writes = pair_of(name, a, b, types, zero=40, relu=relu)
    assert_within(op(a, b), exact, writes)


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_codes(name: str) -> None:
    """All 65,536 of them, so also those from 128 up, which torch's own qadd reads as negative."""
    every = torch.arange(256).to(torch.uint8)
    a, b = every.repeat_interleave(256), every.repeat(256)
    for zeros in ((0, 0), (128, 3), (255, 255)):
        types = (uint8(0.05, zeros[0]), uint8(0.031, zeros[1]))
        op, exact, writes = pair_of(name, a, b, types)
        assert_within(op(a, b), exact, writes)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("zeros", list(itertools.product((0, 255), repeat=3)), ids=str)
def test_pairs_with_extreme_zero_points(name: str, zeros: tuple[int, int, int]) -> None:
    types = (uint8(0.05, zeros[0]), uint8(0.031, zeros[1]))
    a, b = some_codes(131), some_codes(131, seed=1)
    exact = PAIRS[name](real(a, types[0]), real(b, types[1]))
    # The sign the result has is fixed by the zero points; the other end of the codes is unused.
    zero = zeros[2] if bool((exact > 0).any()) == (zeros[2] == 0) else 128
    op, exact, writes = pair_of(name, a, b, types, zero=zero)
    assert_within(op(a, b), exact, writes)


def test_pairs_write_and_read_int8() -> None:
    types = (int8(0.05, 3), int8(0.031, -20))
    a, b = some_codes(131, qtype=types[0]), some_codes(131, qtype=types[1], seed=1)
    for name in PAIRS:
        exact = PAIRS[name](real(a, types[0]), real(b, types[1]))
        writes = fitting(exact, -7, int8())
        assert_within(PairCodes(name, False, *types, writes)(a, b), exact, writes)


@pytest.mark.parametrize("alpha", (0.5, -2.0, 3.0))
@pytest.mark.parametrize("name", ("add", "sub"))
def test_alpha(name: str, alpha: float) -> None:
    types = (uint8(0.05, 100), uint8(0.031, 140))
    a, b = some_codes(131), some_codes(131, seed=1)
    exact = real(a, types[0]) + (alpha if name == "add" else -alpha) * real(b, types[1])
    writes = fitting(exact, 99)
    assert_within(PairCodes(name, False, *types, writes, alpha)(a, b), exact, writes)


SHAPES = (
    ((2, 3, 5, 5), (2, 3, 1, 1)),
    ((2, 3, 1, 1), (2, 3, 5, 5)),
    ((2, 3, 5, 5), (5,)),
    ((1,), (2, 3, 5, 5)),
    ((2, 3, 1, 5), (2, 1, 5, 1)),
    ((4, 1), (1, 17)),
)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_broadcast(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    types = (uint8(0.05, 100), uint8(0.031, 140))
    a, b = some_codes(*shapes[0]), some_codes(*shapes[1], seed=1)
    op, exact, writes = pair_of(name, a, b, types)
    kept = a.clone(), b.clone()
    assert_within(op(a, b), exact, writes)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_one_value(name: str) -> None:
    a = some_codes(131)
    types = (uint8(0.05, 100), uint8(0.05, 100))
    op, exact, writes = pair_of(name, a, a.clone(), types)
    assert_within(op(a, a), exact, writes)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_layouts_and_empty(name: str) -> None:
    types = (uint8(0.05, 100), uint8(0.031, 140))
    a, b = some_codes(3, 4, 6, 7), some_codes(1, 4, 6, 7, seed=1)
    op, _, _ = pair_of(name, a, b, types)
    assert_layout_is_no_matter(lambda x: op(x, b), a)
    assert_layout_is_no_matter(lambda x: op(b, x), a)
    assert op(a[:0], b).shape == (0, 4, 6, 7)


# Batch norm


@pytest.mark.parametrize("relu", (False, True), ids=("plain", "relu"))
@pytest.mark.parametrize("zeros", [(0, 128), (128, 0), (255, 77), (113, 30)], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 3, 5), (1, 3, 1, 1), (2, 64, 4, 4), (3, 1, 7, 9)])
def test_norm_matches_float64(shape: tuple[int, ...], zeros: tuple[int, int], relu: bool) -> None:
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    scale[0] = -1.5  # trained networks have some
    reads, codes = uint8(0.04, zeros[0]), some_codes(*shape)
    exact = real(codes, reads) * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1)
    exact = exact.relu() if relu else exact
    writes = fitting(exact, zeros[1])
    op = NormCodes(scale, shift, reads, writes, relu)
    assert_within(op(codes), exact, writes)


def test_norm_layouts_and_empty() -> None:
    codes, reads = some_codes(3, 6, 5, 7), uint8(0.04, 100)
    op = NormCodes(torch.randn(6), torch.randn(6), reads, uint8(0.05, 90), False)
    assert_layout_is_no_matter(op, codes)
    assert op(codes[:0]).shape == (0, 6, 5, 7)


def test_norm_state_is_scale_and_shift() -> None:
    op = NormCodes(torch.randn(6), torch.randn(6), uint8(), uint8(), False)
    assert set(op.state_dict()) == {"scale", "shift"}


# Tables


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "silu": F.silu,
    "halves": lambda x: x / 2,
}


@pytest.mark.parametrize("dtype", (uint8, int8), ids=("uint8", "int8"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tables_hold_every_code(name: str, dtype: Callable[..., QType]) -> None:
    reads = dtype(0.03, 100)
    codes = torch.arange(reads.quant_min, reads.quant_max + 1).to(reads.dtype)
    exact = FUNCTIONS[name](real(codes, reads))
    writes = fitting(exact, 7)
    op = TableCodes(make_table(FUNCTIONS[name], qparams(reads), qparams(writes)), name, writes)
    assert_within(op(codes), exact, writes)


@pytest.mark.parametrize("shape", [*SIZES, (0, 5), ()], ids=str)
def test_tables_of_any_shape(shape: tuple[int, ...]) -> None:
    codes = some_codes(*shape)
    table = torch.arange(255, -1, -1).to(torch.uint8)
    op = TableCodes(table, "mirror", uint8())
    assert torch.equal(op(codes), 255 - codes)
    assert op(codes).dtype == torch.uint8


def test_tables_layouts() -> None:
    op = TableCodes(torch.arange(255, -1, -1).to(torch.uint8), "mirror", uint8())
    assert_layout_is_no_matter(op, some_codes(3, 4, 5, 6))


# Averages


def avg_options(**changes: Any) -> dict[str, Any]:
    base = {
        "kernel_size": 2, "stride": None, "padding": 0, "ceil_mode": False,
        "count_include_pad": True,
    }  # fmt: skip
    return base | changes


AVERAGES: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("avg_pool1d", avg_options(kernel_size=3), (2, 5, 67)),
    ("avg_pool2d", avg_options(), (2, 5, 10, 11)),
    ("avg_pool2d", avg_options(kernel_size=(3, 2), stride=1), (2, 5, 10, 11)),
    ("avg_pool3d", avg_options(), (2, 3, 4, 6, 8)),
    ("adaptive_avg_pool1d", {"output_size": 5}, (2, 5, 33)),
    ("adaptive_avg_pool2d", {"output_size": 1}, (2, 70, 7, 7)),
    ("adaptive_avg_pool2d", {"output_size": (3, 5)}, (2, 5, 9, 11)),
    ("adaptive_avg_pool3d", {"output_size": 2}, (2, 3, 5, 6, 7)),
    ("mean", {"dim": (2, 3), "keepdim": False}, (2, 70, 7, 7)),
    ("mean", {"dim": [2, 3], "keepdim": True}, (2, 5, 56, 56)),
    ("mean", {"dim": -1, "keepdim": False}, (2, 5, 9, 11)),
    ("mean", {"dim": 1, "keepdim": False}, (2, 100, 9)),
    ("mean", {"dim": None, "keepdim": False}, (2, 5, 9)),
)


@pytest.mark.parametrize("zeros", [(0, 0), (255, 255), (113, 90)], ids=str)
@pytest.mark.parametrize(("name", "options", "shape"), AVERAGES)
def test_averages_match_float64(
    name: str, options: dict[str, Any], shape: tuple[int, ...], zeros: tuple[int, int]
) -> None:
    reads, codes = uint8(0.05, zeros[0]), some_codes(*shape)
    average = torch.mean if name == "mean" else getattr(F, name)
    exact = average(real(codes, reads), **options)
    writes = fitting(exact, zeros[1])
    op = AverageCodes(name, options, reads, writes)
    assert_within(op(codes), exact, writes)


def test_average_layouts_and_empty() -> None:
    codes = some_codes(3, 4, 6, 8)
    op = AverageCodes("avg_pool2d", avg_options(), uint8(), uint8(0.05, 3))
    assert_layout_is_no_matter(op, codes)
    assert op(codes[:0]).shape == (0, 4, 3, 4)


def test_averages_of_very_many_codes_do_not_drift() -> None:
    """A sum past 2**24 rounds in float32, yet the average must stay within the tolerance."""
    codes = some_codes(1, 2, 512, 512)
    reads = uint8(0.05, 0)
    exact = real(codes, reads).mean((2, 3))
    writes = uint8(0.05, 3)
    options = {"dim": (2, 3), "keepdim": False}
    assert_within(AverageCodes("mean", options, reads, writes)(codes), exact, writes)


GATES = ((1, 6, 40, 40), (3, 6, 40, 40), (2, 33, 17, 31), (1, 6, 8, 8), (2, 6, 3, 3), (1, 7, 1, 1))


@pytest.mark.parametrize("first", (True, False), ids=("picture first", "gate first"))
@pytest.mark.parametrize("zeros", ((120, 0), (0, 200), (255, 130)), ids=str)
@pytest.mark.parametrize("shape", GATES, ids=str)
def test_gates_match_float64(shape: tuple[int, ...], zeros: tuple[int, int], first: bool) -> None:
    """Gates of either sign, and as large as can be; each sample has its own."""
    types = (uint8(0.05, zeros[0]), uint8(0.004, zeros[1]))
    a = some_codes(*shape)
    b = some_codes(*shape[:2], 1, 1, seed=1)
    exact = real(a, types[0]) * real(b, types[1])
    writes = fitting(exact, 99)
    op = GateCodes(*types, writes) if first else GateCodes(types[1], types[0], writes)
    made = op(a, b) if first else op(b, a)
    assert_within(made, exact, writes)
    spread = a.contiguous(memory_format=torch.channels_last)
    assert torch.equal(op(spread, b) if first else op(b, spread), made)


def test_every_code_with_every_gate() -> None:
    every = torch.arange(256).to(torch.uint8)
    a = every.view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    b = every.view(1, 256, 1, 1)
    types = (uint8(0.05, 128), uint8(0.031, 3))
    exact = real(a, types[0]) * real(b, types[1])
    writes = fitting(exact, 120)
    assert_within(GateCodes(*types, writes)(a, b), exact, writes)


def test_gates_of_other_shapes_are_products_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    types = (uint8(0.05, 120), uint8(0.004, 7))
    shapes = ((2, 6, 40, 40), (2, 1, 40, 40), (1, 6, 1, 1), (6, 1, 1), (2, 6, 1, 40), (40,))
    a = some_codes(2, 6, 40, 40)
    for shape in shapes:
        b = some_codes(*shape, seed=1)
        exact = real(a, types[0]) * real(b, types[1])
        writes = fitting(exact, 99)
        assert_within(GateCodes(*types, writes)(a, b), exact, writes)
    assert GateCodes(*types, uint8())(a[:0], some_codes(0, 6, 1, 1)).shape == (0, 6, 40, 40)


WINDOWS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 2},
    {"kernel_size": (2, 3), "stride": (1, 2)},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    {"kernel_size": 2, "divisor_override": 3},
    {"kernel_size": 3, "padding": 1, "divisor_override": 7, "count_include_pad": False},
    {"kernel_size": 5, "stride": 5},
)


@pytest.mark.parametrize("zero", (0, 131, 255))
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_averages_of_windows_are_convolutions(window: dict[str, Any], zero: int) -> None:
    reads, codes = uint8(0.05, zero), some_codes(1, 32, 48, 47)
    options = avg_options(**window)
    exact = F.avg_pool2d(real(codes, reads), **options)
    writes = fitting(exact, {0: 0, 131: 99, 255: 255}[zero])
    op = AverageCodes("avg_pool2d", options, reads, writes)
    made = op(codes)
    assert list(op._convs) == [32], "it ran as a convolution"
    assert_within(made, exact, writes)
    # Other shapes, and copies, which make the convolution anew.
    assert_within(
        op(codes[:, :, :40]), F.avg_pool2d(real(codes[:, :, :40], reads), **options), writes
    )
    assert torch.equal(copy.deepcopy(op)(codes), made)
    assert not op.state_dict()


@pytest.mark.parametrize(
    "window",
    (
        {"kernel_size": 3, "ceil_mode": True},
        {"kernel_size": 3, "padding": 1, "count_include_pad": False},
        {"kernel_size": 7},
    ),
    ids=str,
)
def test_other_windows_are_averaged_in_float(window: dict[str, Any]) -> None:
    reads, codes = uint8(0.05, 131), some_codes(1, 32, 48, 47)
    options = avg_options(**window)
    exact = F.avg_pool2d(real(codes, reads), **options)
    writes = fitting(exact, 99)
    op = AverageCodes("avg_pool2d", options, reads, writes)
    assert_within(op(codes), exact, writes)
    assert not op._convs


@pytest.mark.parametrize("ratio", (1.0, 0.5, 2.0, 1 / 3, 0.6))
def test_averages_that_lie_on_ties_are_rounded_by_the_rule(ratio: float) -> None:
    """With a simple ratio of scales every fourth average of 2 x 2 codes is a tie."""
    reads, codes = uint8(0.05, 3), some_codes(4, 64, 2, 2)
    writes = uint8(0.05 * ratio, 3)
    made = AverageCodes("adaptive_avg_pool2d", {"output_size": 1}, reads, writes)(codes)
    steps = (codes.float().mean((2, 3), keepdim=True) - 3) * (0.05 / writes.scale)
    assert torch.equal(made, (steps.round() + 3).clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("side", (2, 7, 32))
def test_averages_of_a_sample_do_not_depend_on_its_batch(side: int) -> None:
    reads, codes = uint8(0.05, 131), some_codes(40, 16, side, side)
    for name, options in (
        ("avg_pool2d", avg_options()),
        ("adaptive_avg_pool2d", {"output_size": 1}),
        ("mean", {"dim": (2, 3), "keepdim": False}),
    ):
        op = AverageCodes(name, options, reads, uint8(0.0131, 120))
        assert torch.equal(torch.cat([op(sample) for sample in codes.split(1)]), op(codes))


def test_a_few_averages_take_one_call() -> None:
    reads, codes = uint8(0.05, 131), some_codes(2, 64, 7, 9)
    exact = real(codes, reads).mean((2, 3), keepdim=True)
    for zero in (0, 99, 255):
        writes = fitting(exact, zero)
        op = AverageCodes("adaptive_avg_pool2d", {"output_size": 1}, reads, writes)
        assert op._ends is not None
        assert_within(op(codes), exact, writes)


# All of them


def every_op() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    image = some_codes(2, 6, 8, 8)
    table = torch.arange(255, -1, -1).to(torch.uint8)
    whole_window: dict[str, Any] = {
        "kernel_size": 2, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
    }  # fmt: skip
    return {
        "gate": (GateCodes(uint8(), uint8(), uint8(0.1, 3)), (image, image[:, :, :1, :1])),
        "pair": (PairCodes("mul", True, uint8(), uint8(), uint8(0.1, 3)), (image, image)),
        "norm": (NormCodes(torch.randn(6), torch.randn(6), uint8(), uint8(), True), (image,)),
        "table": (TableCodes(table, "mirror", uint8()), (image,)),
        "max pool": (MaxPoolCodes(2, whole_window), (image,)),
        "selection": (AdaptiveMaxPoolCodes(2, {"output_size": 2}), (image,)),
        "average": (AverageCodes("avg_pool2d", avg_options(), uint8(), uint8()), (image,)),
    }


@pytest.mark.parametrize("name", every_op())
def test_copies_and_pickles_give_the_same_codes(name: str) -> None:
    op, inputs = every_op()[name]
    wanted = op(*inputs)
    assert torch.equal(copy.deepcopy(op)(*inputs), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(op))(*inputs), wanted)
    assert "uint8" in repr(op) or name in ("max pool", "selection")
