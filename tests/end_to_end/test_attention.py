"""Attention end to end: masks in no range, projections in int8, products where asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import QConfig
from fxquant.backends.x86_pairs import has_vnni
from fxquant.record import record_of
from tests.backends.lockstep import both

WIDTH, HEADS, LENGTH = 64, 4, 12


class Attention(nn.Module):
    """Self-attention as people write it.

    Args:
        style: how scores are masked: ``sdpa``, ``add`` (-inf), ``fill`` (-1e9) or ``where``.
    """

    mask: Tensor

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.style == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(WIDTH // HEADS)
        hidden = self.mask.bool()
        if self.style == "add":
            scores = scores + torch.zeros(LENGTH, LENGTH).masked_fill(hidden, -math.inf)
        elif self.style == "fill":
            scores = scores.masked_fill(hidden, -1e9)
        else:
            scores = torch.where(hidden, torch.tensor(-1e9), scores)
        return torch.matmul(torch.softmax(scores, -1), v)


STYLES = ("sdpa", "add", "fill", "where")


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """Signal to quantization noise, decibels."""
    return 10 * math.log10(float(wanted.square().mean() / (wanted - found).square().mean()))


def quantized(model: nn.Module, *shape: int, **options: Any) -> tuple[GraphModule, float]:
    """``model`` in int8 and how close it is to float on data it has not seen."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for _ in range(5)]
    made = fxquant.quantize(model, batches[:4], **options)
    with torch.no_grad():
        return made, sqnr(model(batches[4]), made(batches[4]))


@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.parametrize("style", STYLES)
def test_masks_are_in_no_range(style: str, backend: str) -> None:
    torch.manual_seed(0)
    made, quality = quantized(Attention(style).eval(), 2, LENGTH, WIDTH, backend=backend)
    # An int8 layer alone gives about 40 dB on normal data; -1e9 in a range would give 0.
    assert quality >= 30
    record = record_of(made)
    assert {op.path for op in record.ops if op.op == "linear" and op.int8} == {"qkv", "out"}
    assert all(max(-seen.low, seen.high) < 100 for seen in record.observers), record.observers


@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.parametrize("style", ["sdpa", "add"])
def test_products_are_int8_where_they_are_asked_for(style: str, backend: str) -> None:
    torch.manual_seed(0)
    asked: Any = F.scaled_dot_product_attention if style == "sdpa" else torch.matmul
    model = Attention(style).eval()
    made, quality = quantized(
        model, 2, LENGTH, WIDTH, backend=backend, overrides={asked: QConfig()}
    )
    assert quality >= 28  # two more quantized tensors than above
    record = record_of(made)
    assert [op.int8 for op in record.ops if op.op == "matmul"] == [True, True]
    assert sum(op.macs or 0 for op in record.ops if not op.int8) == 0


def test_attention_says_why_it_is_float() -> None:
    made, _ = quantized(Attention("sdpa").eval(), 2, LENGTH, WIDTH, backend="reference")
    why = next(op.why for op in record_of(made).ops if "attention" in op.op)
    assert "0.3 to 0.6 of the time" in why
    made, _ = quantized(Attention("add").eval(), 2, LENGTH, WIDTH, backend="x86")
    why = next(op.why for op in record_of(made).ops if op.op == "matmul")
    assert "us on codes" in why


class Products(nn.Module):
    """Two layers whose results are multiplied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.last = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.matmul(self.a(x), self.b(x).transpose(-2, -1)))


@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize("width", [16, 512])
def test_large_products_are_int8_by_themselves(width: int) -> None:
    """Where torch has a fast integer product, that is."""
    torch.manual_seed(0)
    int8 = width == 512 and has_vnni()
    model = Products(width).eval()
    made, quality = quantized(model, width, width, backend="x86")
    assert next(op for op in record_of(made).ops if op.op == "matmul").int8 is int8
    assert quality >= 28
    made, reference = both(model, torch.randn(width, width))
    x = torch.randn(width, width)
    # The kernels differ from the reference in float32 rounding, rarely by one code.
    assert sqnr(reference(x), made(x)) >= 45


class Selfish(nn.Module):
    """Attention of PyTorch's own class, whose weights are returned, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attn(x, x, x)
        return self.layer(y), weights


@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize(
    ("overrides", "floats"),
    [
        ({}, set()),
        ({"attn": None}, {"attn.in_proj", "attn.out_proj"}),
        ({nn.MultiheadAttention: None}, {"attn.in_proj", "attn.out_proj"}),
        ({"attn.out_proj": None}, {"attn.out_proj"}),
    ],
    ids=["default", "path", "class", "inside"],
)
def test_the_inside_of_an_attention_module_answers_to_its_names(
    overrides: Any, floats: set[str]
) -> None:
    torch.manual_seed(0)
    model = Selfish().eval()
    batches = [torch.randn(2, LENGTH, WIDTH) for _ in range(4)]
    made = fxquant.quantize(model, batches, backend="x86", overrides=overrides)
    linears = {op.path: op.int8 for op in record_of(made).ops if op.op == "linear"}
    assert {path for path, int8 in linears.items() if not int8} == floats
    assert set(linears) == {"attn.in_proj", "attn.out_proj", "layer"}
    with torch.no_grad():
        for found, wanted in zip(made(batches[0]), model(batches[0]), strict=True):
            assert found.shape == wanted.shape
            assert sqnr(wanted, found) >= 30
