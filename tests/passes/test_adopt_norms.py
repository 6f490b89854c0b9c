"""Norms that are written out: which become a module, which do not, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.passes.adopt_norms import AdoptNorms
from tests.helpers import FLOAT32, One, canonical, close_share, names, node_of, run

Body = Callable[[Any, Any], Any]
EPS = 1e-3


def rsqrt(m: Any, x: Any) -> Any:
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def root(m: Any, x: Any) -> Any:
    return x / torch.sqrt((x * x).mean(dim=(-1,), keepdim=True) + EPS) * m.weight


def swapped(m: Any, x: Any) -> Any:
    return torch.rsqrt(EPS + torch.mean(torch.square(x), dim=-1, keepdim=True)) * x * m.weight


def model(body: Body) -> nn.Module:
    return One(body, weight=nn.Parameter(torch.randn(6)), first=nn.Linear(6, 6)).eval()


@pytest.mark.parametrize("body", (rsqrt, root, swapped))
def test_written_out_norms_become_modules(body: Body) -> None:
    whole, x = model(body), torch.randn(3, 4, 6)
    module = run(canonical(whole, x), AdoptNorms())
    assert names(module) == ["rms_norm"]
    norm = module_of(node_of(module, "rms_norm"))
    assert isinstance(norm, nn.RMSNorm) and norm.eps == EPS
    with torch.no_grad():
        assert close_share(module(x), whole(x)) <= FLOAT32
    again = Editor(module)
    AdoptNorms().run(again)
    assert again.log == []


NOT: dict[str, Body] = {
    "no weight": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "a cube": lambda m, x: m.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS)),
    "another dimension": lambda m, x: (
        m.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))
    ),
    "another tensor": lambda m, x: (
        m.weight * (m.first(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    ),
    "no number": lambda m, x: (
        m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs()))
    ),
}


@pytest.mark.parametrize("name", NOT)
def test_what_only_looks_like_one_stays(name: str) -> None:
    whole, x = model(NOT[name]), torch.rand(3, 4, 6) + 0.5
    module = run(canonical(whole, x), AdoptNorms())
    assert "rms_norm" not in names(module)
    with torch.no_grad():
        assert torch.equal(module(x), whole(x))


def test_the_mean_read_elsewhere_keeps_it_written_out() -> None:
    def body(m: Any, x: Any) -> Any:
        power = x.pow(2).mean(-1, keepdim=True)
        return m.weight * (x * torch.rsqrt(power + EPS)), power

    x = torch.randn(4, 6)
    module = run(canonical(model(body), x), AdoptNorms())
    assert "rms_norm" not in names(module)


def test_in_int8_between_layers() -> None:
    whole = model(lambda m, x: m.first(rsqrt(m, m.first(x))))
    q = fxquant.quantize(whole, [torch.randn(256, 6)])
    assert [op.op for op in fxquant.report(q).ops] == ["linear", "rms_norm", "linear"]
