"""Recurrent layers become integer modules, where that is worth it or was asked for."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends.base import MEASURED, Cost, Costs
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.numerics.integer import pair_saturates
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.passes.annotate_recurrent import AnnotateRecurrent
from fxquant.passes.convert_recurrent import ConvertRecurrent
from fxquant.passes.observe import Observe
from fxquant.passes.read_ranges import ReadRanges
from fxquant.spec import PRESETS, QConfig
from tests.helpers import One, Overrides, annotated, names, node_of, run
from tests.recurrent import decibels

X = torch.randn(5, 2, 8)
CHEAP: Final = Costs(Cost(1, 0), Cost(1, 0), {"": Cost(0, 0)}, {"": Cost(1, 0)})
ASKED: Final = ((nn.LSTM, QConfig()),)


def converted(
    model: nn.Module, overrides: Overrides = (), costs: Costs = CHEAP, **more: Any
) -> GraphModule:
    module = run(annotated(model.eval(), X, overrides=overrides), AnnotateRecurrent(), Observe())
    module(X)
    return run(module, ReadRanges(), ConvertRecurrent(costs, **more))


def integer(module: GraphModule, path: str = "0") -> IntegerRecurrent:
    found = module.get_submodule(path)
    assert isinstance(found, IntegerRecurrent)
    return found


def test_it_fires_and_computes_nearly_the_same() -> None:
    model = nn.Sequential(nn.LSTM(8, 16, bidirectional=True))
    wanted = model(X)[0]
    module = converted(model)
    assert names(module) == ["IntegerRecurrent"]
    assert decibels(wanted, module(X)[0]) >= 30
    assert info(node_of(module, "IntegerRecurrent")).reads == (None,)
    assert "quantize-recurrent" in [edit.rule for edit in _log(model)]


def _log(model: nn.Module) -> list[Any]:
    module = run(annotated(model.eval(), X), AnnotateRecurrent(), Observe())
    module(X)
    run(module, ReadRanges())
    editor = Editor(module)
    ConvertRecurrent(CHEAP).run(editor)
    return editor.log


def test_it_is_idempotent() -> None:
    module = converted(nn.Sequential(nn.LSTM(8, 16)))
    editor = Editor(module)
    ConvertRecurrent(CHEAP).run(editor)
    assert editor.log == []


def test_small_ones_stay_float_with_the_figures_unless_asked_for() -> None:
    module = converted(nn.Sequential(nn.LSTM(8, 16)), costs=MEASURED)
    assert names(module) == ["LSTM"]
    decision = info(node_of(module, "LSTM")).decision
    assert decision is not None and not decision.int8
    assert "us a step at batch 1" in decision.why
    assert "overrides={nn.LSTM: 'dynamic'}" in decision.why
    assert names(converted(nn.Sequential(nn.LSTM(8, 16)), ASKED, MEASURED)) == ["IntegerRecurrent"]


def test_weights_that_could_saturate_pairs_use_seven_bits() -> None:
    for saturates in (False, True):
        made = integer(converted(nn.Sequential(nn.GRU(8, 16)), saturates_pairs=saturates))
        assert all(
            bool(pair_saturates(made.stored(n)[0]).any()) != saturates for n in made.matrices()
        )


def test_the_configuration_is_followed() -> None:
    made = integer(converted(nn.Sequential(nn.LSTM(8, 4)), ((nn.LSTM, PRESETS["qnnpack"]),)))
    assert made.stored("weight_ih_l0")[1].shape == (1,)
    made = integer(converted(nn.Sequential(nn.LSTM(8, 4)), (("0", PRESETS["dynamic-symmetric"]),)))
    assert made.reads.symmetric and made.reads.granularity == "row"


def test_a_layer_that_is_called_twice_stores_its_codes_once() -> None:
    def twice(m: Any, x: Tensor) -> Any:
        first, state = m.rnn(x)
        return m.rnn(x, state)[0] + first

    model = One(twice, rnn=nn.LSTM(8, 8))
    module = converted(model)
    found = [m for m in module.modules() if isinstance(m, IntegerRecurrent)]
    assert len({id(m.stored("weight_hh_l0")[0]) for m in found}) == 1
    assert decibels(model(X), module(X)) >= 30
