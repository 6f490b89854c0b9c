"""Tables: every entry is what the reference graph computes, every look-up finds its entry."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import QParamError
from fxquant.numerics.affine import QParams, dequantize, quantize
from fxquant.numerics.lut import apply_table, make_table, pair_table

UINT8 = QParams.per_tensor(0.05, 117, 0, 255, torch.uint8)
INT8 = QParams.per_tensor(0.04, -9, -128, 127, torch.int8)
DTYPES = (torch.uint8, torch.int8)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "in place": torch.relu_,
    "hardswish": F.hardswish,
    "chain": lambda x: torch.tanh(x) * 2 - 1,
}


def qparams(dtype: torch.dtype) -> QParams:
    return UINT8 if dtype == torch.uint8 else INT8


def all_codes(dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.arange(info.min, info.max + 1).to(dtype)


def by_hand(q: Tensor, table: Tensor) -> Tensor:
    offset = 128 if q.dtype == torch.int8 else 0
    entries = table.tolist()
    flat = [entries[code + offset] for code in q.flatten().tolist()]
    return torch.tensor(flat, dtype=table.dtype).reshape(q.shape)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_entry_is_what_the_reference_computes(
    source: torch.dtype, target: torch.dtype, name: str
) -> None:
    in_q, out_q = qparams(source), qparams(target)
    table = make_table(FUNCTIONS[name], in_q, out_q)
    assert table.shape == (256,) and table.dtype == target
    codes = all_codes(source)
    real = FUNCTIONS[name](dequantize(codes, in_q.scale_value, in_q.zero_point_value))
    expected = quantize(
        real,
        out_q.scale_value,
        out_q.zero_point_value,
        out_q.quant_min,
        out_q.quant_max,
        target,
    )
    assert torch.equal(table, expected)
    assert torch.equal(apply_table(codes, table), expected)
    assert torch.equal(apply_table(codes, pair_table(table, source)), expected)


def tables(source: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor]:
    info = torch.iinfo(target)
    table = torch.randint(info.min, info.max + 1, (256,)).to(target)
    return table, pair_table(table, source)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_pair_of_codes_is_found(source: torch.dtype, target: torch.dtype) -> None:
    table, pairs = tables(source, target)
    assert pairs.shape == (65536, 2) and pairs.dtype == target
    codes = all_codes(source)
    every = torch.cartesian_prod(codes, codes)
    assert torch.equal(apply_table(every, pairs), by_hand(every, table))


@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
def test_any_shape_and_offset(shape: list[int], dtype: torch.dtype, offset: int) -> None:
    count = int(torch.Size(shape).numel())
    store = torch.randint(0, 256, (count + offset,), dtype=torch.uint8).view(dtype)
    q = store[offset:].view(shape)
    table, pairs = tables(dtype, torch.int8)
    kept = store.clone()
    for one in (table, pairs):
        assert torch.equal(apply_table(q, one), by_hand(q, table))
    assert torch.equal(store, kept)


def layouts(q: Tensor) -> dict[str, Tensor]:
    wide = torch.zeros(2, 3, 5, 14, dtype=q.dtype)
    wide[..., ::2] = q
    return {
        "channels last": q.to(memory_format=torch.channels_last),
        "transposed": q.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": wide[..., ::2],
        "expanded": q[:, :1].expand(-1, 4, -1, -1),
        "sliced": q[1:, 1:, 1:, 1:],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 3, 5, 7, dtype=torch.uint8)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(layout: str, dtype: torch.dtype) -> None:
    q = layouts(torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8).view(dtype))[layout]
    table, pairs = tables(dtype, torch.uint8)
    for one in (table, pairs):
        assert torch.equal(apply_table(q, one), by_hand(q, table))


def test_keeps_the_memory_format() -> None:
    q = torch.zeros(2, 3, 5, 7, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for one in tables(torch.uint8, torch.uint8):
        assert apply_table(q, one).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "fn", [lambda x: x.sum(), lambda x: x > 0, lambda x: x[:10], lambda x: x.view(2, 128)]
)
def test_what_is_not_elementwise_is_refused(fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(QParamError, match="elementwise"):
        make_table(fn, UINT8, UINT8)


def test_per_channel_qparams_are_refused() -> None:
    channels = QParams(torch.ones(2), torch.zeros(2).int(), 0, 255, torch.uint8, axis=1)
    with pytest.raises(QParamError, match="2 channels"):
        make_table(torch.relu, channels, UINT8)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(256).to(torch.uint8).flip(0), requires_grad=False)

    def forward(self, x):  # type: ignore[no-untyped-def]  # fx cannot pickle this file's annotations
        return apply_table(x, self.table)


def test_fx_records_one_node_and_pickling_keeps_it() -> None:
    traced = torch.fx.symbolic_trace(Looks())
    again = pickle.loads(pickle.dumps(traced))
    q = torch.arange(256).to(torch.uint8)
    for graph_module in (traced, again):
        assert [n.target for n in graph_module.graph.nodes if n.op == "call_function"] == [
            apply_table
        ]
        assert torch.equal(graph_module(q), q.flip(0))
