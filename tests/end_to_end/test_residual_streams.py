"""Residual streams of transformers: what they lose, and how that is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.spec import Mode


class Stream(nn.Module):
    """A transformer whose class token is small beside the others, as that of a fresh ViT."""

    size: Tensor

    def __init__(self, depth: int = 8, dim: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(depth)
        )
        self.last = nn.LayerNorm(dim)
        self.register_buffer("size", torch.ones(9, 1).index_fill_(0, torch.tensor(0), 0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.size
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.last(x)[:, 0]


def decibels(wanted: Tensor, found: Tensor) -> float:
    noise = float((found - wanted).square().sum())
    return 10 * math.log10(float(wanted.square().sum()) / noise)


@pytest.mark.parametrize("mode", ["static", "qat"])
def test_small_tokens_keep_their_digits(mode: Mode) -> None:
    torch.manual_seed(0)
    model = Stream().eval()
    data, x = [4 * torch.randn(16, 9, 32) for _ in range(4)], 4 * torch.randn(64, 9, 32)
    asked = {torch.add: "default"}

    def made(**more: Any) -> nn.Module:
        prepared = fxquant.prepare(model, mode=mode, example_inputs=(x[:1],), **more)
        fxquant.calibrate(prepared, data)
        return fxquant.convert(prepared.eval())

    with torch.no_grad():
        wanted = model(x)
        kept, rounded = (decibels(wanted, made(**more)(x)) for more in ({}, {"overrides": asked}))
    # By default 35 dB; with the sums rounded to 8 bits 7.
    assert kept > 32 and kept > rounded + 20


def test_the_report_says_why_they_are_float() -> None:
    torch.manual_seed(0)
    quantized = fxquant.quantize(Stream(depth=2).eval(), [torch.randn(4, 9, 32)])
    adds = [op for op in fxquant.report(quantized).ops if op.op == "add"]
    assert len(adds) == 2 and not any(op.int8 for op in adds)
    assert all("divides each row of the sum by its size" in op.why for op in adds)


class PostNorm(nn.Module):
    """Blocks whose stream is normed after each sum, as BERT's."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x))
        return x


@pytest.mark.parametrize("backend", ["reference", "x86"])
def test_what_is_read_in_float_and_as_codes_is_compared_in_float(backend: str) -> None:
    """The rounding on the way to a linear is the linear's, not that of the norm or of the sum."""
    if backend not in [each.name for each in fxquant.backends() if each.available]:
        pytest.skip("this machine has no such backend")
    torch.manual_seed(0)
    model, x = PostNorm().eval(), torch.randn(8, 9, 32)
    quantized = fxquant.quantize(model, [x], backend=backend)
    comparison = fxquant.compare(model, quantized, [x])
    own = {op.path: op.own.sqnr for op in comparison.rows if op.own is not None}
    # Float ops on the very values that they read: what is left is the rounding of float32.
    assert all(own[name] > 100 for name in ("norms.0", "norms.1"))
    if backend == "reference":
        assert all(own[name] > 100 for name in ("add", "add_1"))
    else:
        # A linear adds up the float sum, too: both are measured as one op, which is the linear.
        inner = {op.path: op.why for op in comparison.rows if op.own is None}
        assert all("compared as a whole" in inner[name] for name in ("add", "add_1"))
    assert all(own[f"layers.{place}"] < 50 for place in range(3))
    assert sum(op.share for op in comparison.rows if op.share) == pytest.approx(1, abs=0.1)
