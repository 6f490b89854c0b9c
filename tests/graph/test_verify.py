"""The verifier: each promise of a graph, broken once, is an error that shows the place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import GraphModule, Node

from fxquant.backends.x86 import X86
from fxquant.errors import VerifyError
from fxquant.graph.info import QType, info, write_info
from fxquant.graph.op_table import is_op
from fxquant.graph.verify import Stage, boundary_type, verify
from fxquant.numerics.affine import dequantize, quantize
from fxquant.numerics.observers import make_observer
from fxquant.passes.convert import Convert
from fxquant.passes.lower import Lower
from fxquant.passes.place import Place
from fxquant.passes.share_scales import ShareScales
from fxquant.spec import QSpec
from tests.helpers import fused, measured, node_of, nodes, observed, qtype, run


class Residual(nn.Module):
    """Two convolutions and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return torch.relu(self.b(y) + y)


X = torch.randn(2, 4, 6, 6)


def qdq() -> GraphModule:
    return run(measured(Residual().eval(), X), ShareScales(), Place(), Convert())


def lowered() -> GraphModule:
    return run(qdq(), Lower(X86().rules))


def graph_of(build: Callable[[fx.Graph, Node], Any]) -> GraphModule:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return GraphModule(nn.Module(), graph)


def refused(module: GraphModule, stage: Stage, text: str, at: Node | None = None) -> str:
    with pytest.raises(VerifyError, match=text) as caught:
        verify(module, stage, "spoil")
    message = str(caught.value)
    assert "after pass 'spoil'" in message
    if at is not None:
        assert f"node %{at.name}" in message
        assert f"\n> %{at.name} = " in message or "\n> return" in message
    return message


def first(module: GraphModule, op: str) -> Node:
    return next(n for n in module.graph.nodes if is_op(n, op))


def test_good_graphs_pass() -> None:
    verify(qdq(), Stage.QDQ, "convert")
    verify(lowered(), Stage.LOWERED, "lower")
    verify(fused(Residual().eval(), X), Stage.FUSED, "fuse")


def test_an_ulp_of_a_scale() -> None:
    module = qdq()
    node = first(module, "dequantize")
    q, scale, zero_point = node.args
    node.args = (q, math.nextafter(float(scale), 1.0), zero_point)  # type: ignore[arg-type]
    message = refused(module, Stage.QDQ, "it reads scale .*; the codes are uint8", node)
    assert message.count("\n") >= 5, "the neighbours are shown"


def test_a_zero_point_off_by_one() -> None:
    module = qdq()
    node = first(module, "dequantize")
    q, scale, zero_point = node.args
    node.args = (q, scale, int(zero_point) + 1)  # type: ignore[arg-type]
    refused(module, Stage.QDQ, "it reads scale", node)


def test_a_quantize_that_is_not_what_its_record_says() -> None:
    module = qdq()
    node = first(module, "quantize")
    node.args = (node.args[0], 0.5, *node.args[2:])
    refused(module, Stage.QDQ, "its record says .* its arguments say", node)


@pytest.mark.parametrize(
    ("scale", "zero_point", "text"),
    [
        (0.0, 0, "is not a normal positive number"),
        (1e-42, 0, "is not a normal positive number"),
        (math.inf, 0, "is not a normal positive number"),
        (math.nan, 0, "is not a normal positive number"),
        (-1.0, 0, "is not a normal positive number"),
        (1.0, 256, "zero point 256 lies outside its codes"),
        (1.0, -1, "zero point -1 lies outside its codes"),
    ],
)
def test_types_that_are_none(scale: float, zero_point: int, text: str) -> None:
    module = qdq()
    node = first(module, "quantize")
    node.args = (node.args[0], scale, zero_point, *node.args[3:])
    write_info(node, writes=QType(scale, zero_point, 0, 255, torch.uint8))
    for user in list(node.users):
        user.args = (node, scale, zero_point)
    refused(module, Stage.QDQ, text, node)


def test_codes_read_as_numbers() -> None:
    module = qdq()
    codes = first(module, "quantize")
    real = next(iter(codes.users))
    reader = next(iter(real.users))
    reader.replace_input_with(real, codes)
    refused(module, Stage.QDQ, f"it reads the codes of %{codes.name} as numbers", reader)


def test_codes_returned() -> None:
    module = qdq()
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = (first(module, "quantize"),)
    refused(module, Stage.QDQ, "it returns codes of %", output)


def test_floats_read_as_codes() -> None:
    module = qdq()
    node = first(module, "dequantize")
    real = node.args[0].args[0]  # type: ignore[union-attr]
    node.args = (real, *node.args[1:])
    refused(module, Stage.QDQ, "it reads a value that holds no codes", node)


def test_a_lowered_op_that_reads_other_codes_than_it_was_made_for() -> None:
    module = lowered()
    node = next(n for n in nodes(module) if info(n).reads)
    wanted, *more = info(node).reads or ()
    assert wanted is not None
    changed = dataclasses.replace(wanted, scale=wanted.scale * 1.0000001)
    write_info(node, reads=(changed, *more))
    refused(module, Stage.LOWERED, "it reads %.* as uint8.*, which is uint8", node)


def test_a_lowered_op_that_declares_too_few_inputs() -> None:
    module = lowered()
    node = next(n for n in nodes(module) if info(n).reads)
    write_info(node, reads=(*info(node).reads, None))  # type: ignore[misc]
    refused(module, Stage.LOWERED, "it declares . inputs and has", node)


def test_an_observer_that_was_left() -> None:
    module = observed(Residual().eval(), X)
    node = next(n for n in nodes(module) if str(n.target).startswith("observer"))
    refused(module, Stage.MEASURED, "an observer is left", node)
    verify(module, Stage.OBSERVED, "observe")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda g, x: g.call_function(F.relu, (x,)), "relu"),
        (lambda g, x: g.call_method("relu", (x,)), "relu"),
        (lambda g, x: g.call_method("add_", (x, 1)), "add"),
        (lambda g, x: g.call_function(torch.concat, ([x, x],)), "cat"),
    ],
)
def test_another_spelling(build: Callable[[fx.Graph, Node], Any], name: str) -> None:
    module = graph_of(build)
    refused(module, Stage.CANONICAL, f"spelling of {name}", nodes(module)[0])
    verify(module, Stage.CAPTURED, "capture")


def test_a_spelling_that_is_known_to_be_opaque_is_legal() -> None:
    module = graph_of(lambda g, x: g.call_method("add_", (x, 1)))
    write_info(nodes(module)[0], opaque="it writes in place")
    verify(module, Stage.CANONICAL, "canonicalize")


def test_a_unit_that_leaks() -> None:
    module = fused(Residual().eval(), X)
    conv, relu = node_of(module, "conv2d", 0), node_of(module, "relu", 0)
    add = node_of(module, "add")
    add.replace_input_with(relu, conv)
    refused(module, Stage.FUSED, f"unit a leaks to %{add.name}", conv)


@pytest.mark.parametrize("stage", [Stage.CANONICAL, Stage.FUSED, Stage.OBSERVED, Stage.MEASURED])
def test_quantize_too_early(stage: Stage) -> None:
    module = graph_of(lambda g, x: g.call_function(quantize, (x, 1.0, 0, 0, 255, torch.uint8)))
    refused(module, stage, "only appear once ranges are known", nodes(module)[0])


def tanh_of_relu(graph: fx.Graph, x: Node) -> Node:
    return graph.call_function(torch.tanh, (graph.call_function(torch.relu, (x,)),))


def test_two_nodes_of_one_name() -> None:
    module = graph_of(
        lambda g, x: g.call_function(torch.tanh, (g.call_function(torch.relu, (x,)),))
    )
    one, two = nodes(module)
    two.name = one.name
    with pytest.raises(VerifyError, match=r"after pass 'spoil'.*relu"):
        verify(module, Stage.CANONICAL, "spoil")


def test_a_value_read_before_it_is_made() -> None:
    module = graph_of(
        lambda g, x: g.call_function(torch.tanh, (g.call_function(torch.relu, (x,)),))
    )
    relu, tanh = nodes(module)
    tanh.append(relu)
    refused(module, Stage.CAPTURED, "the graph is malformed")


def test_a_call_of_a_module_that_is_not_there() -> None:
    module = fused(Residual().eval(), X)
    node_of(module, "conv2d").target = "gone"
    refused(module, Stage.CAPTURED, "the graph is malformed")


def overwriting(late: bool) -> GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    typed = qtype(0.5, 3)
    args = (typed.scale, typed.zero_point)
    codes = graph.call_function(quantize, (x, *args, 0, 255, torch.uint8))
    copy = graph.call_function(torch.clone, (codes,))
    taker = graph.call_function(torch.clone, (copy,))
    taker.meta["overwrites"] = 0
    real = graph.call_function(dequantize, (copy if late else taker, *args))
    graph.output(real)
    for node in (codes, copy, taker):
        write_info(node, writes=typed, reads=None if node is codes else (typed,))
    return GraphModule(nn.Module(), graph)


def test_an_op_that_overwrites_what_is_read_later() -> None:
    verify(overwriting(late=False), Stage.LOWERED, "lower")
    module = overwriting(late=True)
    refused(module, Stage.LOWERED, "it overwrites %clone.*, which %dequantize.* reads later")


def test_an_op_that_overwrites_the_models_input() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    taker = graph.call_function(torch.clone, (x,))
    taker.meta["overwrites"] = 0
    graph.output(taker)
    refused(GraphModule(nn.Module(), graph), Stage.LOWERED, "that is not the model's own", taker)


def test_boundary_type_reads_arguments() -> None:
    module = graph_of(lambda g, x: g.call_function(quantize, (x, 0.25, 7, 0, 127, torch.uint8)))
    assert boundary_type(nodes(module)[0]) == QType(0.25, 7, 0, 127, torch.uint8)


def test_observers_say_that_they_are() -> None:
    assert getattr(make_observer(QSpec(), "x"), "is_observer", False) is True


def test_stages_are_ordered() -> None:
    assert list(Stage) == sorted(Stage)
    assert [stage.name for stage in Stage] == [
        *("CAPTURED", "CANONICAL", "FUSED", "ANNOTATED"),
        *("OBSERVED", "MEASURED", "QDQ", "LOWERED"),
    ]
