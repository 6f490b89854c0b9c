"""Max pools of codes, by kernel and by slices: they are exact."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxquant.backends import x86_pools
from fxquant.backends.x86_pools import AdaptiveMaxPoolCodes, MaxPoolCodes
from fxquant.graph.info import QType
from tests.backends.oracles import assert_layout_is_no_matter, int8, some_codes, uint8


def pool_options(**changes: Any) -> dict[str, Any]:
    base = {"kernel_size": 2, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    return base | changes


POOLS: tuple[dict[str, Any], ...] = (
    {},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": 2, "padding": 1},
    {"kernel_size": (2, 3), "dilation": (3, 2)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "stride": 1, "padding": 2},
    {"kernel_size": [3, 3], "stride": [2, 2]},
    {"kernel_size": (3,), "stride": (2,)},
    {"kernel_size": 2, "stride": []},
)


@pytest.mark.parametrize("dtype", (uint8, int8), ids=("uint8", "int8"))
@pytest.mark.parametrize("options", POOLS, ids=str)
def test_max_pool_is_exact(options: dict[str, Any], dtype: Callable[..., QType]) -> None:
    full = pool_options(**options)
    op = MaxPoolCodes(2, full)
    for shape in ((2, 3, 9, 11), (1, 65, 17, 16), (3, 18, 20)):
        codes = some_codes(*shape, qtype=dtype())
        wanted = F.max_pool2d(codes.double(), **full)
        assert torch.equal(op(codes).double(), wanted)
        assert op(codes).dtype == codes.dtype


@pytest.mark.parametrize("options", POOLS, ids=str)
@pytest.mark.parametrize("channels", [8, 32, 65, 128])
def test_max_pool_by_kernel_and_by_slices(
    options: dict[str, Any], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = pool_options(**options)
    codes = some_codes(2, channels, 9, 11).contiguous(memory_format=torch.channels_last)
    wanted = F.max_pool2d(codes.double(), **full)
    op = MaxPoolCodes(2, full)
    assert torch.equal(op(codes).double(), wanted)
    assert op(codes).data_ptr() != codes.data_ptr()
    assert torch.equal(pickle.loads(pickle.dumps(op))(codes), op(codes))
    monkeypatch.setattr(x86_pools, "has_max_pool", lambda: False)
    assert torch.equal(MaxPoolCodes(2, full)(codes).double(), wanted)


@pytest.mark.parametrize("options", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 9, 11), (1, 3, 70, 66)])  # by kernel, by slices
def test_max_pools_compile(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    op = MaxPoolCodes(2, pool_options(**options))
    codes = some_codes(*shape).contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled: Any = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.equal(compiled(codes), op(codes))


def test_which_pools_the_kernel_takes() -> None:
    op = MaxPoolCodes(2, pool_options(kernel_size=3, stride=2, padding=1))

    def taken(*shape: int, last: bool = True) -> bool:
        codes = torch.zeros(shape, dtype=torch.uint8)
        form = torch.channels_last if last else torch.contiguous_format
        return op._suits_kernel(codes.contiguous(memory_format=form))

    assert taken(1, 64, 28, 28)
    assert taken(3, 40, 28, 28)
    assert not taken(1, 64, 28, 28, last=False)
    assert not taken(1, 64, 112, 112)
    assert not taken(1, 56, 64, 64)
    assert not taken(0, 64, 28, 28)
    op = MaxPoolCodes(2, pool_options(kernel_size=3, stride=2, ceil_mode=True))
    assert taken(1, 64, 112, 112)
    assert not taken(1, 16, 112, 112)


def test_max_pool_of_only_the_smallest_code() -> None:
    """Padding must not win over any code."""
    for dtype, lowest in ((torch.uint8, 0), (torch.int8, -128)):
        codes = torch.full((1, 1, 4, 4), lowest, dtype=dtype)
        op = MaxPoolCodes(2, pool_options(kernel_size=3, stride=1, padding=1))
        assert torch.equal(op(codes), codes)


def test_max_pool_layouts_and_empty() -> None:
    op = MaxPoolCodes(2, pool_options(kernel_size=3, stride=2, padding=1))
    codes = some_codes(3, 4, 9, 9)
    assert_layout_is_no_matter(op, codes)
    assert op(codes[:0]).shape == (0, 4, 5, 5)


OTHER_POOLS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("max_pool1d", pool_options(kernel_size=3, padding=1), (2, 5, 33)),
    ("max_pool3d", pool_options(kernel_size=2, dilation=2), (2, 3, 6, 7, 8)),
    ("max_pool3d", pool_options(kernel_size=3, stride=2, ceil_mode=True), (2, 3, 6, 7, 8)),
    ("adaptive_max_pool1d", {"output_size": 4}, (2, 5, 33)),
    ("adaptive_max_pool2d", {"output_size": (3, 2)}, (2, 5, 9, 11)),
    ("adaptive_max_pool3d", {"output_size": 2}, (2, 3, 5, 6, 7)),
    ("adaptive_max_pool1d", {"output_size": 4}, (2, 5, 32)),
    ("adaptive_max_pool2d", {"output_size": (3, None)}, (2, 5, 9, 11)),
    ("adaptive_max_pool2d", {"output_size": 1}, (5, 9, 11)),
    ("adaptive_max_pool3d", {"output_size": 2}, (2, 3, 4, 6, 8)),
)


@pytest.mark.parametrize(("name", "options", "shape"), OTHER_POOLS)
def test_pools_of_other_ranks_are_exact(
    name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    codes = some_codes(*shape)
    wanted = getattr(F, name)(codes.double(), **options)
    make = AdaptiveMaxPoolCodes if name.startswith("adaptive") else MaxPoolCodes
    op = make(int(name[-2]), options)
    assert torch.equal(op(codes).double(), wanted)
    assert op(codes).dtype == codes.dtype
    assert_layout_is_no_matter(op, codes)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.tuples(st.integers(1, 9), st.integers(1, 6)),
    st.booleans(),
)
def test_max_pool_of_codes_is_that_of_floats(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    size: tuple[int, int],
    last: bool,
) -> None:
    padding = min(padding, min(kernel) // 2)
    spans = [dilation * (k - 1) + 1 for k in kernel]
    assume(all(s + 2 * padding >= span for s, span in zip(size, spans, strict=True)))
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": False,
    }
    codes = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    if last:
        codes = codes.contiguous(memory_format=torch.channels_last)
    kept = codes.clone()
    # A window that sees padding alone gives minus infinity, and as a code the smallest.
    wanted = torch.nn.functional.max_pool2d(codes.float(), **options).clamp(min=0)
    assert torch.equal(MaxPoolCodes(2, options)(codes).float(), wanted)
    assert torch.equal(codes, kept)
