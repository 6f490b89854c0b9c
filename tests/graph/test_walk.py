"""Walking a graph node by node gives what the graph gives, and forgets what nobody reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.capture import capture
from fxquant.graph.counterparts import counterparts, last_origins
from fxquant.graph.walk import Walk, bind_inputs
from tests.helpers import nodes


class Net(nn.Module):
    """Keywords, a default, a method, an attribute, and a value that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, *, gain: float = 2.0, **more: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        z = (y * gain).relu() + y + self.shift
        return {"z": z, "pair": (y, [z.sum()])}


def test_a_walk_is_the_forward() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    module = capture(Net(), (x,)).module
    seen: list[str] = []

    def note(node: Node, value: Any) -> Any:
        seen.append(node.name)
        return value

    with torch.no_grad():
        walk = Walk(module, bind_inputs(module, (x,), {}), note)
        made, wanted = walk.run(), module(x)
    assert torch.equal(made["z"], wanted["z"])
    assert torch.equal(made["pair"][1][0], wanted["pair"][1][0])
    assert seen == [node.name for node in module.graph.nodes]
    assert not walk.values


def test_values_go_after_their_last_reader() -> None:
    module = capture(nn.Sequential(*(nn.ReLU() for _ in range(9)))).module
    walk = Walk(module, bind_inputs(module, (torch.zeros(1),), {}))
    most = 0
    for node in module.graph.nodes:
        walk.step(node)
        most = max(most, len(walk.values))
    assert most == 1


def test_readers_get_what_the_caller_puts_in() -> None:
    module = capture(nn.Sequential(nn.ReLU(), nn.ReLU())).module
    first = nodes(module)[0]
    walk = Walk(
        module,
        bind_inputs(module, (torch.zeros(1),), {}),
        lambda node, value: value + 1 if node is first else value,
    )
    assert walk.run() == 1


def test_arguments_that_do_not_fit_are_refused() -> None:
    module = capture(nn.ReLU()).module
    with pytest.raises(TypeError):
        bind_inputs(module, (), {})


def test_every_value_is_its_own_counterpart() -> None:
    module = capture(Net()).module
    results = last_origins([(node.name,) for node in nodes(module)], module.graph)
    assert results == nodes(module)
    pairs = list(counterparts(module.graph, module.graph, nodes(module)))
    assert [(pair.real, pair.node) for pair in pairs] == [(n, n) for n in nodes(module)]


def test_a_result_belongs_to_the_last_op_that_has_it() -> None:
    module = capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).module
    first, last = nodes(module)
    groups = [(first.name, last.name), (last.name,), ("nothing",)]
    assert last_origins(groups, module.graph) == [None, last, None]
