"""Attention in bfloat16 on x86: two products, where the fused kernel would be slower."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends import x86_attention
from fxquant.backends.x86 import X86
from fxquant.backends.x86_attention import X86Attention
from fxquant.errors import SpeedWarning

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))


HALF = torch.bfloat16
Parts = tuple[Tensor, Tensor, Tensor]


def parts(*shape: int, keys: int | None = None, dtype: torch.dtype = HALF) -> Parts:
    generator = torch.Generator().manual_seed(0)
    other = (*shape[:-2], keys or shape[-2], shape[-1])
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in (shape, other, other))
    return q, k, v


def fused(given: Parts, scale: float | None = None) -> Tensor:
    q, k, v = given
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def decibels(exact: Tensor, found: Tensor) -> float:
    noise = (found.double() - exact).pow(2).mean()
    return float(10 * torch.log10(exact.pow(2).mean() / noise))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("keys", [None, 5])
@pytest.mark.parametrize("shape", [(3, 7, 8), (2, 4, 9, 16), (2, 3, 4, 6, 8)])
def test_it_is_attention(shape: tuple[int, ...], keys: int | None, scale: float | None) -> None:
    given = parts(*shape, keys=keys)
    found = X86Attention(scale)(*given)
    q, k, v = (each.double() for each in given)
    exact = fused((q, k, v), scale)
    assert found.dtype is torch.bfloat16
    assert found.shape == exact.shape
    # Scores of about 1, their softmax and the result are rounded to 8 bits: 2**-9 / sqrt(3) each.
    assert decibels(exact, found) > 44


def test_tensors_may_lie_anywhere() -> None:
    q, k, v = (each.transpose(1, 2) for each in parts(2, 9, 4, 16))
    plain = X86Attention(None)(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(X86Attention(None)(q, k, v), plain)


@pytest.mark.parametrize(
    "given",
    [
        parts(2, 4, 9, 16, dtype=torch.float32),
        parts(9, 16),
        (parts(2, 4, 9, 16)[0], *parts(1, 4, 9, 16)[1:]),
        parts(2, 4, 0, 16),
    ],
    ids=["float32", "no heads", "one batch of keys", "no tokens"],
)
def test_the_rest_is_torchs(given: Parts) -> None:
    assert torch.equal(X86Attention(None)(*given), fused(given))


def test_many_scores_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_attention, "_MOST", 100)
    given = parts(2, 4, 9, 16)
    assert torch.equal(X86Attention(None)(*given), fused(given))


class Net(nn.Module):
    """One attention of four heads."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = F.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]  # of one test each
        return self.out(made.transpose(1, 2).flatten(2))


def quantized(net: nn.Module, qconfig: str = "int8-bf16") -> nn.Module:
    data = [torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        return fxquant.quantize(net.eval(), data, qconfig=qconfig, backend="x86")


def count(net: nn.Module) -> int:
    return sum(isinstance(module, X86Attention) for module in net.modules())


def test_where_it_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_attention, "has_bfloat16", lambda: True)
    monkeypatch.setattr(x86_attention, "has_tiles", lambda: False)
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 6, 32)
    q = quantized(net)
    assert count(q) == 1
    assert decibels(net(x).detach().double(), q(x)) > 30
    rows = {row["op"]: row["runs"] for row in fxquant.report(q).to_dict()["ops"]}
    assert rows["scaled_dot_product_attention"] == "bfloat16"
    assert count(quantized(Net(), "default")) == 0
    assert count(quantized(Net(is_causal=True))) == 0
    assert count(quantized(Net(attn_mask=torch.zeros(6, 6)))) == 0
    monkeypatch.setattr(x86_attention, "has_tiles", lambda: True)
    assert count(quantized(Net())) == 0
    monkeypatch.setattr(x86_attention, "has_bfloat16", lambda: False)
    assert count(quantized(Net())) == 0
