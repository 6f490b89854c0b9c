"""Train units and restore units: a user's module in the place of a unit, and the unit again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.custom.pattern import Pattern
from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.graph.trained_units import CalledOp, TrainedUnit
from fxquant.graph.view import render
from fxquant.passes.restore_units import RestoreUnits
from fxquant.passes.train_units import TrainUnits
from fxquant.spec import QConfig, QSpec
from tests.helpers import One, names, nodes, run
from tests.passes.trainees import inserted, watched

X = torch.randn(2, 4, 6, 6)
PER_TENSOR = QConfig(weight=QSpec("int8", symmetric=True, observer="minmax"))


class Own(nn.Module):
    """What is trained in the place of a unit."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, act

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.act(self.bn(self.conv(x)))
        return made


def block(x: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Hardtanh) -> Any:
    return act(bn(conv(x)))


def net() -> One:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(4, 4, 3), "bn": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 4, 1)}
    act = nn.Hardtanh(-0.5, 0.7)
    return One(lambda m, x: m.b(m.act(m.bn(m.a(x)))), **parts, act=act).train()


def graph(qat: Any = Own, **options: Any) -> GraphModule:
    pattern = Pattern(block, qat=qat)
    return watched(inserted(net(), X, rules=(pattern.rule,), **options), X)


@pytest.mark.parametrize("config", [QConfig(), PER_TENSOR], ids=["channel", "tensor"])
def test_the_users_module_stands_for_the_unit_and_computes_the_same(config: QConfig) -> None:
    module = graph(config=config).eval()
    before = module(X)
    run(module, TrainUnits())
    assert names(module).count("TrainedUnit") == 1 and "batch_norm" not in names(module)
    assert torch.equal(module(X), before)
    unit = next(m for m in module.modules() if isinstance(m, TrainedUnit))
    assert isinstance(unit.module, Own) and isinstance(unit.module.act, CalledOp)
    assert unit.module.act.options == {"min_val": -0.5, "max_val": 0.7}


@pytest.mark.parametrize("config", [QConfig(), PER_TENSOR], ids=["channel", "tensor"])
def test_what_was_there_comes_back(config: QConfig) -> None:
    module = graph(config=config).eval()
    text, before = names(module), module(X)
    run(module, TrainUnits(), RestoreUnits())
    assert names(module) == text and torch.equal(module(X), before)
    for node in nodes(module):
        assert node.op != "call_module" or isinstance(module_of(node), nn.Module)


def test_both_are_idempotent_and_leave_what_is_not_theirs() -> None:
    module = run(graph(), TrainUnits())
    for step in (TrainUnits(), RestoreUnits(), RestoreUnits()):
        text = render(module.graph)
        editor = Editor(module)
        step.run(editor)
        assert (editor.log == []) is (render(module.graph) == text)
    assert editor.log == []
    plain = inserted(net(), X, rules=(Pattern(block).rule,))
    editor = Editor(plain)
    TrainUnits().run(editor)
    assert editor.log == []


def test_a_unit_that_stays_float_is_left() -> None:
    module = graph(overrides=(("*", None),))
    editor = Editor(module)
    TrainUnits().run(editor)
    assert editor.log == []


def test_what_cannot_be_made_is_an_error_with_the_line() -> None:
    with pytest.raises(PatternError, match=r"test_train_units\.py:\d+: qat= of .* returned a str"):
        run(graph(lambda **parts: "no"), TrainUnits())
