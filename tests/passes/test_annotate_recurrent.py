"""Which recurrent layers may be int8, and why the others stay float."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.graph.edit import Editor
from fxquant.graph.info import Decision, info
from fxquant.passes.annotate_recurrent import AnnotateRecurrent
from fxquant.spec import PRESETS, ROWS, QConfig
from tests.helpers import Overrides, annotated, node_of, nodes, run

X = torch.randn(3, 2, 4)


def decided(layer: nn.Module, overrides: Overrides = ()) -> tuple[Decision, QConfig | None]:
    found = run(annotated(nn.Sequential(layer), X, overrides=overrides), AnnotateRecurrent())
    record = info(nodes(found)[0])
    assert record.decision is not None
    return record.decision, record.config


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.GRU(4, 3), nn.RNN(4, 3)])
def test_in_static_mode_they_are_quantized_at_run_time(layer: nn.Module) -> None:
    decision, config = decided(layer)
    assert decision.int8 and decision.by == "annotate-recurrent"
    assert "row by row at run time" in decision.why
    assert config is not None and config.scheme == "dynamic" and config.activation == ROWS


def test_what_was_asked_for_says_so() -> None:
    decision, _ = decided(nn.LSTM(4, 3), ((nn.LSTM, QConfig()),))
    assert decision.int8 and decision.by == "override LSTM"
    decision, config = decided(nn.LSTM(4, 3), (("0", PRESETS["dynamic-symmetric"]),))
    assert decision == Decision(True, "LSTM has a dynamic form", "override '0'")
    assert config is PRESETS["dynamic-symmetric"]


def _bad(name: str, value: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.LSTM(4, 3)
        with torch.no_grad():
            layer.get_parameter(name)[0, 0] = value
        return layer

    return make


@pytest.mark.parametrize(
    ("make", "config", "why"),
    [
        (lambda: nn.LSTM(4, 3), None, "it was asked to stay float"),
        (lambda: nn.LSTM(4, 3), PRESETS["weight-only-int8"], "no weight-only form"),
        (lambda: nn.LSTM(4, 3), QConfig(weight=None), "weight was asked to stay float"),
        (_bad("weight_hh_l0", float("nan")), QConfig(), "weight_hh_l0 holds NaN or infinity"),
    ],
)
def test_why_one_stays_float(make: Callable[[], nn.Module], config: QConfig, why: str) -> None:
    decision, _ = decided(make(), (("0", config),))
    assert not decision.int8 and why in decision.why


def test_layers_too_wide_for_int32_stay_float() -> None:
    wide = nn.RNN(70_000, 1)
    module = annotated(nn.Sequential(wide), torch.zeros(1, 1, 70_000))
    found = info(node_of(run(module, AnnotateRecurrent()), "RNN")).decision
    assert found is not None and "32 bits" in found.why


def test_it_is_idempotent_and_leaves_others_alone() -> None:
    module: GraphModule = annotated(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), X)
    before = info(node_of(module, "linear"))
    run(module, AnnotateRecurrent())
    assert info(node_of(module, "linear")) == before
    editor = Editor(module)
    AnnotateRecurrent().run(editor)
    assert editor.log == []
