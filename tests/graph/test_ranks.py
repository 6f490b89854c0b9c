"""Ranks: what is written must be true, in eager; what is not known is not written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.graph.info import info
from fxquant.graph.ranks import record_ranks
from tests.helpers import One, canonical, nodes

Body = Callable[[Any, Any], Any]

KNOWN: list[Body] = [
    lambda m, x: torch.relu(x),
    lambda m, x: m.conv(x),
    lambda m, x: m.pool(m.conv(x)).flatten(1),
    lambda m, x: m.lin(x),
    lambda m, x: x + 1,
    lambda m, x: x + x.mean(1, keepdim=True),
    lambda m, x: x.mean((2, 3)) * 2,
    lambda m, x: x.mean(),
    lambda m, x: x.mean(1),
    lambda m, x: x.flatten(),
    lambda m, x: x.flatten(1, 2),
    lambda m, x: x.flatten(-2),
    lambda m, x: x.flatten(-2, -1),
    lambda m, x: x.reshape(2, -1),
    lambda m, x: x.view(x.size(0), -1, 2),
    lambda m, x: x.permute(1, 0, 3, 2),
    lambda m, x: x.transpose(0, 1),
    lambda m, x: x.unsqueeze(0),
    lambda m, x: x.select(0, 1),
    lambda m, x: torch.cat([x, x], 1),
    lambda m, x: torch.matmul(x, x),
    lambda m, x: torch.softmax(x, 1),
    lambda m, x: x.unflatten(1, (2, 2)),
    lambda m, x: torch.matmul(x, m.matrices),
    lambda m, x: x + m.matrices,
    lambda m, x: nn.functional.pad(x, (1, 1)),
]

UNKNOWN: list[Body] = [
    lambda m, x: x[0],
    lambda m, x: x[None],
    lambda m, x: x.squeeze(),
    lambda m, x: x.expand(3, *[-1] * 4),
    lambda m, x: torch.stack([x, x]),
    lambda m, x: x.repeat(1, 1, 1, 1, 1),
    lambda m, x: torch.cumsum(x, 0),
    lambda m, x: x.reshape(m.matrices.shape),
]


def check(body: Body, *, known: bool) -> None:
    model = One(
        body,
        conv=nn.Conv2d(4, 4, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        lin=nn.Linear(4, 4),
        matrices=nn.Parameter(torch.ones(2, 2, 4, 4, 1)),
    ).eval()
    x = torch.ones(2, 4, 4, 4)
    module = canonical(model, x)
    record_ranks(module.graph, {"x": 4})
    found = info(nodes(module)[-1]).rank
    if known:
        assert found == model(x).dim()
    else:
        assert found is None
    record_ranks(module.graph, {})
    assert info(nodes(module)[-1]).rank in (None, found)


@pytest.mark.parametrize("body", KNOWN)
def test_known(body: Body) -> None:
    check(body, known=True)


@pytest.mark.parametrize("body", UNKNOWN)
def test_unknown(body: Body) -> None:
    check(body, known=False)


def test_what_needs_no_input_rank_is_known_without() -> None:
    module = canonical(One(lambda m, x: x.flatten(1)), torch.ones(2, 3))
    record_ranks(module.graph, {})
    assert info(nodes(module)[0]).rank == 2


def test_an_embedding_adds_a_dimension() -> None:
    module = canonical(nn.Sequential(nn.Embedding(3, 2)), torch.zeros(4, 5, dtype=torch.long))
    record_ranks(module.graph, {"input": 2})
    assert info(nodes(module)[0]).rank == 3
