"""Units of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.graph.info import info
from fxquant.patterns.units import ACTIVATIONS
from tests.helpers import One, check_rule, fused, names, nodes, trained
from tests.patterns.test_conv import SHIFTED, activation, after, before


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_after_a_linear(name: str) -> None:
    act = activation(name)
    model = One(lambda m, x: act(m.lin(x)), lin=nn.Linear(6, 5)).eval()
    alone = name in SHIFTED or bool(before(name))
    check_rule(model, torch.randn(4, 6), ops=after("linear", name), unit=not alone)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.GELU()).eval()
    module = check_rule(model, torch.randn(shape), ops=["linear", "gelu"])
    assert {info(n).unit for n in nodes(module)} == {"_0"}


def test_a_batch_norm_between() -> None:
    model = trained(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()))
    check_rule(model, torch.randn(4, 6), ops=["linear", "relu"])


def test_a_functional_linear_is_a_unit_too() -> None:
    model = One(
        lambda m, x: torch.relu(nn.functional.linear(x, m.weight)),
        weight=nn.Parameter(torch.randn(5, 6)),
    )
    check_rule(model.eval(), torch.randn(4, 6), ops=["linear", "relu"])


def test_the_input_must_be_a_linear() -> None:
    module = fused(One(lambda m, x: torch.relu(x.flatten(1))).eval(), torch.randn(4, 6))
    assert names(module) == ["flatten", "relu"]
    assert {info(n).unit for n in nodes(module)} == {None}
