"""Annotate: what may be int8, and the sentence for what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.info import info
from fxquant.passes.annotate import Annotate
from fxquant.spec import QConfig
from tests.helpers import One, annotated, decisions, fused, nodes, run

Body = Callable[[Any, Any], Any]
X = torch.rand(2, 4, 6, 6) + 0.1


def why(body: Body, overrides: Any = (), **parts: Any) -> dict[str, tuple[bool, str]]:
    return decisions(annotated(One(body, **parts).eval(), X, overrides=overrides))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.conv(x),
        lambda m, x: torch.relu(m.conv(x)),
        lambda m, x: x + m.conv(x),
        lambda m, x: torch.cat([x, x], 1),
        lambda m, x: F.max_pool2d(x, 2),
        lambda m, x: F.avg_pool2d(x, 2),
        lambda m, x: x.mean((2, 3)),
        lambda m, x: torch.tanh(x),
        lambda m, x: x[:, 1:].reshape(2, -1),
        lambda m, x: F.interpolate(x, scale_factor=2.0),
        lambda m, x: x / 3,
        lambda m, x: x.chunk(2, 1)[0],
    ],
)
def test_what_has_an_int8_form(body: Body) -> None:
    found = why(body, conv=nn.Conv2d(4, 4, 1))
    assert found and all(int8 for int8, _ in found.values())
    assert all("has an int8 form" in text for _, text in found.values())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: torch.var(x, 1), "var has no int8 form here"),
        (lambda m, x: torch.cumsum(x, 1), "the op table does not know cumsum"),
        (lambda m, x: F.dropout(x, 0.5), "it is active dropout"),
        (lambda m, x: x * x.size(0), "%size is a number computed in every call"),
        (lambda m, x: x.clamp(max=x.size(0)), "its options are computed in every call"),
        (lambda m, x: F.conv2d(x, x[:, :, :1, :1]), "computed by %getitem in every call"),
        (lambda m, x: m.lstm(x), "no int8 form of CrossMapLRN2d known"),
        (lambda m, x: x.size(0), "it answers a question about a shape"),
    ],
)
def test_what_has_none_and_why(body: Body, reason: str) -> None:
    found = why(body, lstm=nn.CrossMapLRN2d(3))
    texts = [text for int8, text in found.values() if not int8]
    if "question" in reason:
        assert found == {}
    else:
        assert any(reason in text for text in texts), texts


def test_overrides_are_named() -> None:
    module = annotated(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()).eval(), X, overrides=(("0", None),)
    )
    conv, tanh = nodes(module)
    decided = info(conv).decision
    assert decided is not None
    assert (decided.int8, decided.why, decided.by) == (
        *(False, "it was asked to stay float"),
        "override '0'",
    )
    assert decisions(module)[tanh.name][0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda conv: conv.weight.data.fill_(float("nan")), "its weight holds NaN or infinity"),
        (lambda conv: conv.weight.data[0].fill_(float("inf")), "its weight holds NaN or infinity"),
        (lambda conv: conv.half(), "its weight is torch.float16"),
        (lambda conv: conv.double(), "its weight is torch.float64"),
    ],
)
def test_weights_that_no_kernel_takes(spoil: Callable[[Any], Any], reason: str) -> None:
    conv = nn.Conv2d(4, 4, 1)
    spoil(conv)
    module = annotated(nn.Sequential(conv, nn.ReLU()).eval())
    assert all(not int8 and reason in text for int8, text in decisions(module).values())


def test_a_configuration_without_weight_leaves_the_layer_and_takes_the_rest() -> None:
    overrides = ((nn.Conv2d, QConfig(weight=None)),)
    found = why(lambda m, x: torch.tanh(m.conv(x).flip(2)), overrides, conv=nn.Conv2d(4, 4, 1))
    assert found["conv"] == (False, "its weight was asked to stay float")
    assert found["tanh"][0]


def test_a_unit_is_decided_as_one() -> None:
    module = annotated(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval(), X)
    conv, relu = nodes(module)
    assert info(conv).decision is info(relu).decision
    assert info(conv).unit == info(relu).unit


def test_reasons_of_a_backend_are_used() -> None:
    module = fused(nn.Sequential(nn.Tanh()).eval(), X)
    run(module, Annotate(frozenset(), {"tanh": "this machine has no tables"}))
    assert list(decisions(module).values()) == [(False, "this machine has no tables")]


def test_every_op_gets_a_decision() -> None:
    def body(m: Any, x: Any) -> Any:
        y = torch.cumsum(m.conv(x), 1)
        return torch.softmax(y + x, 1).view(x.size(0), -1)

    module = annotated(One(body, conv=nn.Conv2d(4, 4, 1)).eval(), X)
    undecided = [n.name for n in nodes(module) if info(n).decision is None]
    assert undecided == ["size"]


def test_a_sum_that_a_norm_reads_stays_float() -> None:
    parts = {"layer": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    body = lambda m, x: m.norm(x + m.layer(x))  # noqa: E731  # written as the other bodies are
    int8, text = why(body, **parts)["add"]
    assert not int8 and text.startswith("%norm divides each row of the sum by its size")
    int8, text = why(body, ((torch.add, QConfig()),), **parts)["add"]
    assert int8


def test_what_is_moved_into_such_a_sum_stays_float() -> None:
    parts = {"layer": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    found = why(lambda m, x: m.norm(x + m.layer(x).flip(1)), **parts)
    assert found["flip"] == (False, "all of it goes into %add, a sum that stays float")
    assert found["layer"][0]
