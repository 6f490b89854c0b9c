"""The flow of codes: what they come from and who reads them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.flow import Flow, is_join, moves_codes, root_of, wanted_int8
from fxquant.graph.info import Decision
from tests.helpers import One, annotated, node_of, nodes

X = torch.randn(1, 4, 6, 6)


def body(m: Any, x: Any) -> Any:
    y = F.max_pool2d(torch.relu(m.a(x)), 2)
    z = y.flip(1)[:, :2]
    return m.b(torch.cat([z, z], 1)), torch.cumsum(y, 1)


def graph() -> Any:
    return annotated(One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)).eval(), X)


def test_roots_lie_behind_moves() -> None:
    module = graph()
    relu = node_of(module, "relu")
    for op in ("max_pool2d", "flip", "getitem"):
        assert root_of(node_of(module, op)) is relu
    for op in ("relu", "cat", "conv2d"):
        assert root_of(node_of(module, op)) is node_of(module, op)


def test_a_move_in_float_is_its_own_root() -> None:
    module = graph()
    flip = node_of(module, "flip")
    editor = Editor(module)
    with editor.rule("float"):
        editor.annotate(flip, decision=Decision(False, "so", "test"))
    assert root_of(node_of(module, "getitem")) is flip
    assert not wanted_int8(flip)


def test_what_moves_codes() -> None:
    module = graph()
    moved = [n for n in nodes(module) if moves_codes(n)]
    assert moved == [node_of(module, op) for op in ("max_pool2d", "flip", "getitem")]
    for mode, moves in (("nearest", True), ("bilinear", False)):
        model = One(lambda m, x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode))
        assert moves_codes(nodes(annotated(model, X))[0]) is moves
    assert [n for n in nodes(module) if is_join(n)] == [node_of(module, "cat")]


def test_readers_are_found_through_moves() -> None:
    module = graph()
    flow = Flow(module.graph)
    assert flow.read_as_codes(node_of(module, "relu"))
    assert flow.read_as_codes(node_of(module, "cat"))
    last = node_of(module, "conv2d", 1)
    assert not flow.read_as_codes(last)


def test_units_of_nodes() -> None:
    module = graph()
    flow = Flow(module.graph)
    unit = flow.unit_of(node_of(module, "relu"))
    assert unit is not None and unit.head is node_of(module, "conv2d")
    assert flow.unit_of(next(iter(module.graph.nodes))) is None
    computing = [u.output.name for u in flow.arithmetic_units()]
    assert computing == ["relu", "cat", "b"]
    assert len(list(flow.int8_units())) == 6
