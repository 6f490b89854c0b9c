"""Static linears that read the same codes and write floats are one product."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86_dynamic import X86DynamicLinear
from fxquant.backends.x86_layers import PostOp, X86Linear
from fxquant.backends.x86_stacked import X86StackedLinear
from fxquant.errors import SpeedWarning
from fxquant.graph.info import QType
from tests.recurrent import decibels


class Heads(nn.Module):
    """Queries, keys and values of one head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.q = nn.Linear(64, 64, bias=bias)
        self.k = nn.Linear(64, 64)
        self.v = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Mixed(Heads):
    """One of them goes on in int8, one is the user's to look at."""

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return torch.cumsum(self.first2(torch.relu(self.q(x))), -1), self.k(x)

    def __init__(self) -> None:
        super().__init__()
        self.first2 = nn.Linear(64, 64)


class Tied(Heads):
    """Queries and keys of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.k = self.q


def quantized(net: nn.Module, qconfig: str = "default") -> nn.Module:
    data = [torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        return fxquant.quantize(net.eval(), data, qconfig=qconfig, backend="x86")


def stacks(net: nn.Module) -> list[X86StackedLinear]:
    return [module for module in net.modules() if isinstance(module, X86StackedLinear)]


@pytest.mark.parametrize("qconfig", ["default", "int8-bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_product(qconfig: str, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = Heads(bias), torch.randn(5, 6, 32)
    q = quantized(copy.deepcopy(net), qconfig)
    (stack,) = stacks(q)
    assert stack.sizes == [64, 64, 96]
    assert decibels(net(x).detach().double(), q(x)) > 30
    assert torch.equal(q(x[:1]), q(x)[:1])
    assert q(x[:0]).shape == (0, 6, 96)


@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_point", [0, 77])
def test_parts_are_those_of_single_layers(real: torch.dtype, zero_point: int) -> None:
    torch.manual_seed(0)
    sizes, reads = [64, 32, 7], QType(0.05, zero_point, 0, 255, torch.uint8)
    weight = torch.randint(-127, 128, (sum(sizes), 48), dtype=torch.int8)
    scale, bias = torch.rand(sum(sizes)) * 0.01 + 0.001, torch.randn(sum(sizes))
    stack = X86StackedLinear(weight, scale, bias, reads, sizes)
    stack.write_real(real)
    codes = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8)
    parts = stack(codes)
    each = (t.split(sizes) for t in (weight, scale, bias))
    for part, w, s, b in zip(parts, *each, strict=True):
        single = X86Linear(w, s, b, reads, None, PostOp())
        single.write_real(real)
        # Sums are exact and scales the same; the kernel of another width may multiply and add
        # them in another order: a few of the 2**-24 of numbers up to 80, and a step of bfloat16.
        rtol, atol = (2**-8, 0.0) if real is torch.bfloat16 else (1e-6, 1e-5)
        torch.testing.assert_close(part, single(codes), rtol=rtol, atol=atol)


def test_report_names_each_layer() -> None:
    q = quantized(Heads())
    rows = {row["path"]: row["runs"] for row in fxquant.report(q).to_dict()["ops"]}
    assert {rows[name] for name in ("q", "k", "v")} == {"int8"}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_compare_tells_the_weight_of_each_layer(mode: Any) -> None:
    torch.manual_seed(0)
    net, data = Heads().eval(), [torch.randn(4, 6, 32)]
    given = data if mode == "static" else None
    q = fxquant.quantize(net, given, mode=mode, backend="x86", example_inputs=(data[0],))
    found = {row.path: row.weight_sqnr for row in fxquant.compare(net, q, data)}
    (stack,) = [
        m
        for m in q.modules()
        if isinstance(m, X86StackedLinear | X86DynamicLinear) and len(m.sizes) == 3
    ]
    stored = stack.weight.float() * stack.weight_scale[:, None]
    for name, held in zip(("q", "k", "v"), stored.split(stack.sizes), strict=True):
        weight = net.get_parameter(f"{name}.weight").detach()
        exact = 10 * torch.log10(weight.pow(2).sum() / (held - weight).pow(2).sum())
        # compare() fits a factor for each channel, which gains a little.
        assert found[name] == pytest.approx(float(exact), abs=0.1)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_others_are_stacked_where_one_stays_float(mode: Any) -> None:
    torch.manual_seed(0)
    net, x = Heads().eval(), torch.randn(4, 6, 32)
    given = [x] if mode == "static" else None
    q = fxquant.quantize(
        net, given, mode=mode, backend="x86", example_inputs=(x,), overrides={"k": None}
    )
    assert [m.sizes for m in q.modules() if len(getattr(m, "sizes", ())) > 1] == [[64, 96]]
    assert type(q.get_submodule("k")) is nn.Linear
    assert decibels(net(x).detach().double(), q(x).detach()) > 30


def test_what_is_not_stacked() -> None:
    assert not stacks(quantized(Mixed()))
    assert not stacks(quantized(Tied()))


def test_copies_pickles_and_state_dicts() -> None:
    q, x = quantized(Heads()), torch.randn(3, 6, 32)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for again in (copy.deepcopy(q), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), q(x))
    other = quantized(Heads())
    other.load_state_dict(q.state_dict())
    (stack,), (same,) = stacks(q), stacks(other)
    assert torch.equal(stack.weight, same.weight)
    assert stack.weight.shape == (224, 64)
