"""Read ranges: observers out, types in; what was not seen goes to float with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.info import info
from fxquant.graph.view import render
from fxquant.numerics.qparams import QParams
from fxquant.passes.observe import Observe
from fxquant.passes.read_ranges import ReadRanges, to_qtype
from fxquant.spec import QConfig, QSpec
from tests.helpers import (
    One,
    annotated,
    decisions,
    measured,
    node_of,
    nodes,
    observed,
    observers,
    run,
)

X = torch.randn(2, 4, 6, 6)


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


def test_types_are_those_the_observers_chose() -> None:
    module = observed(nn.Sequential(conv(), conv()).eval(), X, X * 2)
    wanted = [to_qtype(o.qparams()) for o in observers(module)]
    run(module, ReadRanges())
    found = [info(n).qtype for n in module.graph.nodes if info(n).qtype is not None]
    assert found == wanted
    assert observers(module) == []
    assert info(next(iter(module.graph.nodes))).shape == (2, 4, 6, 6)


def test_minmax_covers_what_it_saw() -> None:
    config = QConfig(activation=QSpec(observer="minmax"))
    module = measured(nn.Sequential(conv()).eval(), X, X * 3, overrides=(("*", config),))
    found = info(next(iter(module.graph.nodes))).qtype
    assert found is not None
    # Half a step at either end: the zero point is an integer.
    assert found.low <= float(X.min()) * 3 + found.scale / 2
    assert found.high >= float(X.max()) * 3 - found.scale / 2
    assert (found.quant_min, found.quant_max, found.dtype) == (0, 255, torch.uint8)


def test_to_qtype_keeps_everything() -> None:
    found = to_qtype(QParams.per_tensor(0.25, 3, 0, 127, torch.uint8))
    assert (found.scale, found.zero_point, found.quant_min, found.quant_max) == (0.25, 3, 0, 127)


class Gate(nn.Module):
    """A leaf that hands on its input only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.a(x))))


def test_a_site_never_reached_stays_float_with_the_reason() -> None:
    module = run(annotated(Gate().eval(), X), Observe())
    silent = next(o for o in observers(module) if o.path == "relu")
    silent.forward = lambda x: x  # type: ignore[method-assign]
    module(X)
    run(module, ReadRanges())
    found = decisions(module)
    assert found["b"] == (False, "calibration never reached relu")
    assert found["a"] == (False, "calibration never reached relu")
    assert found["c"][0], "its input was seen"
    assert observers(module) == []


def test_nothing_seen_leaves_everything_float() -> None:
    module = run(annotated(Gate().eval(), X), Observe(), ReadRanges())
    assert {int8 for int8, _ in decisions(module).values()} == {False}


def test_integer_tensors_are_no_candidates() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.lin(m.emb(x)) + 1

    model = One(body, emb=nn.Embedding(5, 4), lin=nn.Linear(4, 4)).eval()
    module = measured(model, torch.randint(0, 5, (3, 2)))
    assert info(next(iter(module.graph.nodes))).qtype is None
    assert not decisions(module)["emb"][0]
    assert decisions(module)["lin"][0]


def test_arithmetic_on_integers_goes_back_to_float() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.emb(x + 1)

    model, x = One(body, emb=nn.Embedding(9, 4)).eval(), torch.randint(0, 5, (3, 2))
    assert decisions(measured(model, x))["add"] == (False, "it computes on integers")
    # Without an example only calibration can tell.
    prepared = fxquant.prepare(nn.Sequential(model, nn.Linear(4, 4)).eval())
    fxquant.calibrate(prepared, [x])
    rows = fxquant.report(fxquant.convert(prepared)).to_dict()["ops"]
    assert [row["why"] for row in rows if row["op"] == "add"] == [
        "%input_1 is not a floating-point tensor"
    ]


def test_reading_leaves_the_graph_as_before_observing() -> None:
    model = Gate().eval()
    assert render(measured(model, X).graph) == render(annotated(model, X).graph)


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_tensors_get_a_valid_type_that_holds_them(value: float) -> None:
    module = measured(nn.Sequential(conv()).eval(), torch.full((1, 4, 2, 2), value))
    found = info(next(iter(module.graph.nodes))).qtype
    assert found is not None and found.scale > 0
    code = round(value / found.scale) + found.zero_point
    assert found.quant_min <= code <= found.quant_max
    assert (code - found.zero_point) * found.scale == pytest.approx(value, rel=1e-6)


def test_the_edge_after_a_unit_is_typed_at_its_end() -> None:
    module = measured(Gate().eval(), X)
    assert info(node_of(module, "relu")).qtype is not None
    assert info(nodes(module)[0]).qtype is None
