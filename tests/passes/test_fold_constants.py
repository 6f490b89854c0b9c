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
