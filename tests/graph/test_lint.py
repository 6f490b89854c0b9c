"""Malformed graphs are those that torch's own lint refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from fxquant.graph.lint import malformed


class Net(nn.Module):
    """A nested layer, a parameter, a method and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x).abs() + self.shift)


def made() -> GraphModule:
    return fx.symbolic_trace(Net())


def first(module: GraphModule, op: str) -> Node:
    return next(node for node in module.graph.nodes if node.op == op)


def rename(module: GraphModule) -> None:
    first(module, "call_method").name = first(module, "call_module").name


def too_late(module: GraphModule) -> None:
    first(module, "call_function").append(first(module, "call_method"))


def elsewhere(module: GraphModule) -> None:
    first(module, "call_method").args = (first(made(), "placeholder"),)


def retarget(op: str, target: Any) -> Callable[[GraphModule], None]:
    def spoil(module: GraphModule) -> None:
        first(module, op).target = target

    return spoil


def take_out(path: str) -> Callable[[GraphModule], None]:
    def spoil(module: GraphModule) -> None:
        owner = module.get_submodule(path.rpartition(".")[0])
        delattr(owner, path.rpartition(".")[2])

    return spoil


MUTATIONS = {
    "two of one name": rename,
    "read before it is made": too_late,
    "read from another graph": elsewhere,
    "no function": retarget("call_function", "tanh"),
    "no name": retarget("call_method", torch.abs),
    "no such module": retarget("call_module", "body.7"),
    "no such parent": retarget("call_module", "tail.0"),
    "a parameter called": retarget("call_module", "shift"),
    "no such attribute": retarget("get_attr", "body.0.scale"),
    "module gone": take_out("body.0"),
    "parameter gone": take_out("shift"),
}


def test_good_graphs_are_well_formed() -> None:
    module = made()
    module.graph.lint()
    assert malformed(module) is None


@pytest.mark.parametrize("spoil", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_what_torch_refuses(spoil: Callable[[GraphModule], None]) -> None:
    module = made()
    spoil(module)
    with pytest.raises((RuntimeError, ValueError)):
        module.graph.lint()
    assert malformed(module) is not None


@pytest.mark.parametrize(
    "spoil",
    [retarget("get_attr", "body.0.weight"), retarget("get_attr", "body"), take_out("body.0.bias")],
    ids=["a tensor of a layer", "a whole module", "a tensor nobody reads"],
)
def test_what_torch_takes(spoil: Callable[[GraphModule], None]) -> None:
    module = made()
    spoil(module)
    module.graph.lint()
    assert malformed(module) is None


def test_the_place_is_named() -> None:
    module = made()
    too_late(module)
    assert malformed(module) == "%add reads %abs_1, which is not made before it"
