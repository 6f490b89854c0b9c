"""Functionalize: in-place code gives eager's outputs exactly, whatever is read later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.graph.info import info
from tests.helpers import One, canonical, check_eager, fused, names, nodes


def relu_then_reads_its_input(m: Any, x: Any) -> Any:
    y = F.relu(x, inplace=True)
    return x + y


def relu_by_place(m: Any, x: Any) -> Any:
    y = F.relu(x, True)
    return x - y


def adds_with_an_older_alias(m: Any, x: Any) -> Any:
    z = x
    x += 1
    return z * x


def adds_with_an_older_view(m: Any, x: Any) -> Any:
    z = x.view(-1)
    x += 1
    return z


def adds_with_an_older_slice(m: Any, x: Any) -> Any:
    z = x[:, 1:]
    x *= 2
    return z + 1, x


def chained(m: Any, x: Any) -> Any:
    y = x.clone()
    y.add_(1).mul_(2).relu_()
    return y - x


def chained_on_what_it_reads(m: Any, x: Any) -> Any:
    x.mul_(2).sub_(1)
    x -= 0.5
    x /= 3
    return x.relu_() + x


def module_whose_input_is_read_later(m: Any, x: Any) -> Any:
    y = m.conv(x)
    z = m.act(y)
    return z + y


def zeroes_a_column(m: Any, x: Any) -> Any:
    y = x[:, 0]
    y.zero_()
    return x


def zeroes_a_column_of_a_result(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y[:, 0].zero_()
    return m.act(y)


def overwrites_a_view_with_an_op_of_the_table(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y[:, 0].mul_(2)
    return y


def overwrites_a_view_of_an_overwritten_value(m: Any, x: Any) -> Any:
    y = m.act(m.conv(x))
    part = y[:, 1:]
    part.mul_(-3)
    return y


def overwrites_a_view_of_a_view(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y.view(-1)[2:5].relu_()
    return y.flatten() + 1


def overwrites_a_chunk(m: Any, x: Any) -> Any:
    a, b = torch.chunk(x, 2, dim=1)[0], x.chunk(2, 1)[1]
    a.add_(b)
    return x


def sets_items(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y[:, 1:3] = 0.25
    y[:, 0] = y[:, 1] * 2
    return F.relu(y)


def adds_to_items(m: Any, x: Any) -> Any:
    x[:, 0] += 1
    return x * 2


def overwrites_through_dropout(m: Any, x: Any) -> Any:
    y = m.conv(x)
    z = m.drop(y)
    z.relu_()
    return y


def overwrites_in_a_residual(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y += x
    return m.act(y)


def fills(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y.clamp_(-0.1, 0.1)
    z = y.fill_(0.5) if m.training else y
    return z.add_(1)


def unknown_method_in_place(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y.cumsum_(1)
    return y + 1


def overwrites_twice_and_reads_between(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y.relu_()
    a = y + 1
    y.mul_(2)
    b = y + 1
    return a, b, y


BODIES = [
    relu_then_reads_its_input,
    relu_by_place,
    adds_with_an_older_alias,
    adds_with_an_older_view,
    adds_with_an_older_slice,
    chained,
    chained_on_what_it_reads,
    module_whose_input_is_read_later,
    zeroes_a_column,
    zeroes_a_column_of_a_result,
    overwrites_a_view_with_an_op_of_the_table,
    overwrites_a_view_of_an_overwritten_value,
    overwrites_a_view_of_a_view,
    overwrites_a_chunk,
    sets_items,
    adds_to_items,
    overwrites_through_dropout,
    overwrites_in_a_residual,
    fills,
    unknown_method_in_place,
    overwrites_twice_and_reads_between,
]


def model_of(body: Callable[..., Any]) -> nn.Module:
    parts = {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "act": nn.ReLU(inplace=True),
        "drop": nn.Dropout(),
    }
    return One(body, **parts).eval()


@pytest.mark.parametrize("body", BODIES)
def test_outputs_are_those_of_eager(body: Callable[..., Any]) -> None:
    model, x = model_of(body), torch.randn(2, 4, 5, 5)
    check_eager(model, canonical(model, x), x)
    check_eager(model, fused(model, x), x)
    check_eager(model, canonical(model, x), torch.randn(3, 4, 6, 7))


@pytest.mark.parametrize(
    "body", [b for b in BODIES if "conv" in b.__code__.co_names and b is not fills]
)
def test_int8_outputs_stay_near_those_of_eager(body: Callable[..., Any]) -> None:
    def with_a_layer_beside(m: Any, x: Any) -> Any:
        beside = m.beside(x)  # int8 whatever becomes of the body
        found = body(m, x)
        return (beside, *found) if isinstance(found, tuple) else (beside, found)

    model, x = model_of(with_a_layer_beside), torch.randn(4, 4, 5, 5)
    model.beside = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        wanted = model(x.clone())
    q = fxquant.quantize(model, [x.clone()], backend="reference")
    with torch.no_grad():
        found = q(x.clone())
    for a, b in zip(found, wanted, strict=True):
        # A handful of 8-bit roundings of values of this range; a lost write is off by its size.
        assert float((a - b).abs().max()) < 0.05 * float(b.abs().max())


def test_what_writes_through_a_view_is_pinned_and_says_so() -> None:
    model = model_of(zeroes_a_column_of_a_result)
    module = canonical(model, torch.randn(1, 4, 3, 3))
    conv = next(n for n in nodes(module) if n.op == "call_module")
    assert info(conv).pinned == "%zero_ writes into its memory in place"
    assert "zero_" in names(module)


def test_a_write_that_nobody_sees_leaves_no_trace() -> None:
    module = canonical(model_of(overwrites_in_a_residual), torch.randn(1, 4, 3, 3))
    assert names(module) == ["conv2d", "add", "relu"]
    assert not [n for n in module.graph.nodes if info(n).pinned]


def test_the_callers_tensor_is_not_overwritten() -> None:
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    canonical(model_of(chained_on_what_it_reads), x)(x)
    assert torch.equal(x, before)


def test_a_copy_of_what_is_written_into_later_stays_a_copy() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = x * 1.0
        z = y.clone()
        z[:, 0] = 0
        return y + z

    x = torch.randn(2, 3)
    model = One(body)
    check_eager(model, canonical(model, x), x)
