"""The fuse pass: the user's rules beside the built-in ones, near misses, nothing left over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.passes.configure import Configure
from fxquant.passes.fuse import Fuse
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.patterns.expr import op, var
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import CHECKS, group
from tests.helpers import One, canonical, fused, names, nodes, reported, run, trained

X = torch.randn(1, 4, 6, 6)


def body(m: Any, x: Any) -> Any:
    y = m.conv(x)
    return y * torch.sigmoid(y)


def test_a_rule_of_the_users_own_makes_a_unit() -> None:
    head = op("conv2d", var("x"), name="head", shared=True)
    swish = Rule("conv-swish", op("mul", head, op("sigmoid", head)), group, CHECKS)
    model = One(body, conv=nn.Conv2d(4, 4, 1)).eval()
    assert reported(fused(model, X)) == [("conv2d", "conv"), ("silu", "conv")]
    module = fused(model, X, rules=(swish, *FUSION_RULES))
    assert reported(module) == [("conv2d", "conv"), ("sigmoid", "conv"), ("mul", "conv")]


def test_without_rules_nothing_changes() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    assert names(fused(model, X, rules=())) == ["conv2d", "batch_norm", "relu"]


def test_folded_norms_are_gone_from_the_module_too() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    module = fused(model, X)
    assert [type(m) for m in module.children()] == [nn.Conv2d]


def test_near_misses_carry_rule_node_and_reason() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.ReLU()).eval()
    module = run(canonical(model, X), Configure())
    editor = Editor(module)
    Fuse().run(editor)
    relu = nodes(module)[-1].name
    assert ("conv-act", relu, f"expected {_convs()}, found max_pool2d %_1") in editor.misses


def _convs() -> str:
    return "conv1d or conv2d or conv3d"


def test_a_node_knows_the_rules_that_made_it() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    (conv,) = nodes(fused(model, X))
    assert info(conv).rules == ("fold-conv2d-bn",)
    assert set(info(conv).origins) == {"_0", "_1"}


def test_a_long_chain_fuses_in_one_walk() -> None:
    layers: list[nn.Module] = []
    for _ in range(100):
        layers += [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    module = run(canonical(trained(nn.Sequential(*layers)), X), Configure())
    editor = Editor(module)
    Fuse().run(editor)
    assert names(module) == ["conv2d", "relu"] * 100
    assert len(editor.log) == 200
