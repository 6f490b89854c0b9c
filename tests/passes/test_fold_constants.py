"""Fold constants: weights computed from weights are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.export import export_graph
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.fold_constants import FoldConstants
from fxquant.passes.functionalize import Functionalize
from tests.helpers import One, check_eager, names, run

Body = Callable[..., Any]


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (lambda m, x: F.linear(x, m.w * m.mask), ["linear"]),
        (lambda m, x: F.linear(x, torch.cat([m.w, m.w]).narrow(0, 0, 4).relu()), ["linear"]),
        (lambda m, x: F.linear(x, m.w.chunk(2)[0]), ["linear"]),
        (lambda m, x: F.linear(x, m.w, m.w[:, 0].repeat(4)[:4] * m.w.shape[1]), ["linear"]),
        (lambda m, x: x + m.row.unsqueeze(0).expand(50, 3), ["unsqueeze", "expand", "add"]),
        (lambda m, x: F.linear(x, F.dropout(m.w, 0.5, True)), ["dropout", "linear"]),
        (lambda m, x: x * m.w[:1] + m.w[:1].sum(), ["mul", "add"]),
        # What is folded for one reader is read by another that is folded as well.
        (lambda m, x: x * m.w[0].exp() + (m.w[1] - m.w[0].exp()), ["mul", "add"]),
        (lambda m, x: (lambda s: x * s + (m.w[1] - m.row * s))(m.w[0].exp()), ["mul", "add"]),
    ],
)
def test_constants_are_computed_once(body: Body, ops: list[str]) -> None:
    parts: dict[str, Any] = {
        "w": nn.Parameter(torch.randn(4, 3)),
        "mask": nn.Parameter((torch.randn(4, 3) > 0).float()),
        "row": nn.Parameter(torch.randn(3)),
    }
    model, x = One(body, **parts), torch.randn(1, 3)
    module = run(capture(model, (x,)).module, Functionalize(), FoldConstants(), Canonicalize())
    assert names(module) == ops
    if "dropout" not in ops:
        check_eager(model, module, x)
    again = Editor(module)
    FoldConstants().run(again)
    assert again.log == []


def test_a_tensor_that_is_written_in_place_is_no_constant() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return x * m.count.sum()

    model = One(body, count=nn.Parameter(torch.zeros(2), requires_grad=False))
    module = run(capture(model).module, Functionalize(), FoldConstants(), Canonicalize())
    x = torch.ones(3)
    assert [float(module(x).sum()) for _ in range(2)] == [6.0, 12.0]


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias)


class NormedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        normed = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, normed.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize("make", [StandardisedConv, NormedConv])
def test_weights_standardised_in_forward(make: Callable[..., nn.Module]) -> None:
    model, x = make(3, 4, 3).eval(), torch.randn(2, 3, 6, 6)
    module = run(capture(model, (x,)).module, Functionalize(), FoldConstants(), Canonicalize())
    assert names(module) == ["conv2d"]
    assert len(list(module.parameters())) == 2, "the weight it is made from is still there"
    check_eager(model, module, x)


def test_what_is_made_of_nothing_is_made_once_if_it_is_small() -> None:
    x = torch.randn(2, 3)
    model = One(lambda m, x: x * torch.arange(3) + torch.zeros(10**9, dtype=torch.int8)[:3])
    graph = export_graph(model, (x,), {})
    module = run(graph, Functionalize(), FoldConstants(), Canonicalize())
    assert "arange.default" not in names(module)
    assert "zeros.default" in names(module), "a billion zeros must not be made ahead of time"


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.rand_like(m.row),
        lambda m, x: x + torch.bernoulli(m.row.sigmoid()),
        lambda m, x: x + torch.empty_like(m.row).fill_(1.0),
        lambda m, x: x + m.row.repeat(10_000_000).mean(),
    ],
)
def test_what_must_not_be_computed_ahead(body: Body) -> None:
    model, x = One(body, row=nn.Parameter(torch.randn(3))), torch.randn(2, 3)
    state = torch.get_rng_state()
    module = run(capture(model, (x,)).module, Functionalize(), FoldConstants())
    assert len(names(module)) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_reads_a_constant_is_folded_with_it() -> None:
    parts: dict[str, Any] = {"row": nn.Parameter(torch.randn(8, 3)), "part": nn.Linear(3, 4)}
    model, x = One(lambda m, x: x + m.part(m.row)[:1], **parts).eval(), torch.randn(2, 4)
    module = run(capture(model, (x,)).module, Functionalize(), FoldConstants(), Canonicalize())
    assert names(module) == ["add"]
    check_eager(model, module, x)
