"""Writes into parts of a tensor: values afterwards are those of the model, rewritten or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.graph.functions import set_item
from fxquant.graph.info import info
from tests.helpers import One, canonical, names

Body = Callable[[Any, Tensor], Any]


def item(m: Any, y: Tensor) -> Any:
    y[:, 0] = 1.0
    return y


def masked(m: Any, y: Tensor) -> Any:
    y[y < 0] = 0.5
    return y * 2


def augmented(m: Any, y: Tensor) -> Any:
    y[:, 0] *= 3.0
    return y


def augmented_mask(m: Any, y: Tensor) -> Any:
    y[y < 0] *= 3.0
    return y


def method(m: Any, y: Tensor) -> Any:
    y[:, :2].mul_(3.0)
    return y


def kept_part(m: Any, y: Tensor) -> Any:
    part = y[:, :2]
    part += 1
    return y + part.mean()


def boxes(m: Any, y: Tensor) -> Any:
    y[..., 0:2] = y[..., 0:2].sigmoid() * 2 - 0.5
    y[:, 1:3] = y[:, 1:3] ** 2
    y[..., -1] += y[..., 0]
    return y


def inplace_functions(m: Any, y: Tensor) -> Any:
    F.relu(y[:, :3], inplace=True)
    y[:, 3:].sigmoid_()
    return y


def loop(m: Any, y: Tensor) -> Any:
    for place in range(4):
        y[:, place] *= place + 1
    return y


def same_name(m: Any, y: Tensor) -> Any:
    z = y
    y[:, 0] += 1
    return z * y.mean()


def neighbours(m: Any, y: Tensor) -> Any:
    y[:, :2] += y[:, 2:4]
    y[:, 2:4] -= y[:, :2]
    return y


def mixed(m: Any, y: Tensor) -> Any:
    y.relu_()
    y[:, 0].neg_()
    y.mul_(2)
    return y


def rows_and_columns(m: Any, y: Tensor) -> Any:
    y[:, :, 0] += 1
    y[..., 1] += 1
    total = y[:, :, 0].sum()
    y[:, :, 0] *= 0
    return y + total


def copy_before(m: Any, y: Tensor) -> Any:
    part = y[:, 1]
    more = part + 1
    part.mul_(0)
    return y + more.mean() + part.sum()


REWRITTEN: list[Body] = [
    item, masked, augmented, augmented_mask, method, kept_part, boxes, inplace_functions, loop,
    same_name, neighbours, mixed, rows_and_columns, copy_before,
]  # fmt: skip


def two_writes(m: Any, y: Tensor) -> Any:
    part = y[:, :2]
    part.mul_(2)
    part.add_(1)
    return y + y[:, 1].mean()


def chained(m: Any, y: Tensor) -> Any:
    y[:, :2].mul_(2).add_(1)
    return y


def whole_after_part(m: Any, y: Tensor) -> Any:
    part = y[:, :2]
    part.mul_(2)
    y.add_(1)
    return y + part.mean()


def item_after_part(m: Any, y: Tensor) -> Any:
    part = y[:, :2].mul_(2)
    y[:, 0] = 5.0
    return y + part.mean()


def part_of_part(m: Any, y: Tensor) -> Any:
    part = y[:, :2]
    part += 1
    inner = part[:, 0]
    inner *= 3
    return y + part.mean() + inner.mean()


def other_view(m: Any, y: Tensor) -> Any:
    view = y.view(y.shape[0], -1)
    y[:, 0] += 1
    return y + view.mean()


def other_part(m: Any, y: Tensor) -> Any:
    part = y[:, 1]
    y[:, :2].mul_(3.0)
    return y + part.mean()


def chunked(m: Any, y: Tensor) -> Any:
    first, _ = y.chunk(2, 1)
    first.mul_(2)
    return y


def list_index(m: Any, y: Tensor) -> Any:
    y[:, [0, 2]].mul_(3.0)
    return y


def set_later(m: Any, y: Tensor) -> Any:
    part = y[:, 0].mul_(2)
    y[:, 1] = y[:, 0] + 1
    y[:, 0] = part
    return y


def unknown_method(m: Any, y: Tensor) -> Any:
    y[:, 0].fill_(0.5)
    y[:, 1].copy_(y[:, 2])
    return y


LEFT: list[Body] = [
    two_writes, chained, whole_after_part, item_after_part, part_of_part, other_view, other_part,
    chunked, list_index, set_later, unknown_method,
]  # fmt: skip


def traced(body: Body) -> tuple[One, Any]:
    """The model with a sum in front, so that it writes into memory of its own; and its graph."""
    model = One(lambda m, x: body(m, x + 0.25))
    return model, canonical(model, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("body", [*REWRITTEN, *LEFT])
def test_values_are_those_of_the_model(body: Body) -> None:
    model, module = traced(body)
    for shape in ((2, 4, 5, 5), (1, 4, 3, 7), (5, 6, 2, 2)):
        x = torch.randn(shape)
        kept = x.clone()
        # A product written as a sum or the other way round may round differently, once.
        torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("body", REWRITTEN)
def test_what_can_be_rewritten_pins_no_memory(body: Body) -> None:
    _, module = traced(body)
    assert [node for node in module.graph.nodes if info(node).pinned] == []
    assert set_item.__name__ in names(module) and "setitem" not in names(module)


@pytest.mark.parametrize("body", LEFT)
def test_what_cannot_be_is_pinned(body: Body) -> None:
    _, module = traced(body)
    if body is not set_later:
        assert [node for node in module.graph.nodes if info(node).pinned] != []


def test_what_the_caller_gave_is_written_to() -> None:
    model = One(item)
    module = canonical(model, torch.randn(2, 4, 5, 5))
    x = torch.randn(2, 4, 5, 5)
    module(x)
    assert (x[:, 0] == 1.0).all()
