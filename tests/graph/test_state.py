"""GraphState: plain data that holds all of a graph but the values of its tensors."""

from __future__ import annotations

import copy
import operator
import pickle
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType
from fxquant.graph.state import Group, Known, Ref, graph_state
from fxquant.graph.text import shown
from fxquant.graph.view import render


class Every(nn.Module):
    """Every kind of node and of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.conv(x) * self.scale
        joined = torch.cat([y, y * 0.1 + 1e-30, y.flip(dims=(2,))], dim=1)
        part = joined[:, ::2, 1:-1]
        return {"sum": part.sum(), "cast": part.to(torch.float64), "big": part * float("inf")}


def test_text_is_the_canonical_text() -> None:
    module = capture(Every()).module
    editor = Editor(module)
    conv = next(node for node in module.graph.nodes if node.op == "call_module")
    with editor.rule("test"):
        editor.annotate(conv, unit="conv", writes=QType(0.1, 3, 0, 255, torch.uint8))
    assert graph_state(module.graph).text == render(module.graph)


def test_arguments_keep_edges_places_and_exact_constants() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call: dict[str, Any] = {"alpha": 0.1}
    node = graph.call_function(torch.add, (x, [x, (1, True, 1.0)]), call)
    graph.output(node)
    state = graph_state(graph).nodes[1]
    inner = Group("list", (Ref("x"), Group("tuple", ("1", "True", "1.0"))))
    assert state.args == (Ref("x"), inner)
    assert state.kwargs == (("alpha", "0.1"),)
    assert state.refs == ("x", "x")


def test_what_has_no_text_of_its_own_shows_no_address() -> None:
    graph = fx.Graph()
    given: tuple[Any, ...] = (object(), graph_state)
    graph.output(graph.call_function(torch.add, given))
    node = graph_state(graph).nodes[0]
    assert node.args == ("<object object>", "fxquant.graph.state.graph_state")


def test_targets_are_called_what_users_call_them() -> None:
    named = (torch.relu, nn.functional.linear, nn.functional.relu, operator.add, Tensor.relu)
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function in named:
        graph.call_function(function, (x,))
    assert [node.target for node in graph_state(graph).nodes[1:]] == [
        "torch.relu",
        "torch.nn.functional.linear",
        "torch.nn.functional.relu",
        "operator.add",
        "TensorBase.relu",
    ]


def test_setup_tells_modules_and_attributes_apart() -> None:
    nodes = {node.what: node for node in graph_state(capture(Every()).module.graph).nodes}
    assert nodes["conv2d"].setup.startswith("3, 4, kernel_size=(3, 3)")
    assert nodes["attribute"].setup == "float32[4, 1, 1]"


def test_state_is_picklable_and_shared_by_copies() -> None:
    state = graph_state(capture(Every()).module.graph)
    again = pickle.loads(pickle.dumps(state))
    assert again == state
    assert again.digest == state.digest
    assert copy.deepcopy({"history": [state]})["history"][0] is state


def test_state_outlives_changes_of_the_graph() -> None:
    module = capture(nn.Sequential(nn.ReLU())).module
    state = graph_state(module.graph)
    text = state.text
    next(node for node in module.graph.nodes if node.op == "call_module").name = "other"
    assert state.text == text


def test_digest_knows_structure_but_no_names() -> None:
    def state_of(first: str, second: str, scale: float) -> str:
        graph = fx.Graph()
        x = graph.create_node("placeholder", "x", name=first)
        y = graph.create_node("call_function", torch.mul, (x, scale), name=second)
        graph.output(y)
        return graph_state(graph).digest

    assert state_of("a", "b", 0.5) == state_of("b", "a", 0.5)
    assert state_of("a", "b", 0.5) != state_of("a", "b", 0.25)


def test_shown_text_is_one_harmless_line() -> None:
    hostile = "a\x1b[31m\n\r\t\x00\x9b\u202e\u200b\u2028\ud800\U000e0001é漢"
    safe = shown(hostile)
    expected = r"a\x1b[31m\n\r\t\x00\x9b\u202e\u200b\u2028\ud800\U000e0001é漢"
    assert safe == expected
    assert len(shown("ab" * 10_000_000, 50)) == 50
    assert shown("\n" * 100, 50).count("\n") == 0
    assert len(shown("\n" * 49, 50)) <= 50
    assert shown("x" * 50, 50) == "x" * 50


def test_what_is_known_keeps_no_module_alive() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    model.add_module("0", nn.Linear(2, 2))  # the tracer keeps the first one
    known: Known = {}
    before = graph_state(model.graph, known)
    assert graph_state(model.graph, known).nodes[1] is before.nodes[1]
    gone = weakref.ref(model.get_submodule("0"))
    setattr(model, "0", nn.Linear(2, 3))
    assert gone() is None
    # Another object, maybe where the first one was in memory: read anew.
    assert graph_state(model.graph, known).nodes[1].setup != before.nodes[1].setup
