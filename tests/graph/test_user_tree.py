"""The tree of the user's modules, under their names and in their order, in a graph module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.both_modes import capture_both
from fxquant.graph.edit import Editor
from fxquant.graph.trained_layers import is_trained_layer, take_given_weights
from fxquant.graph.user_class import with_user_class
from fxquant.graph.user_tree import TrainableModule, adopt_tree

HOME = "home"


class Net(nn.Module):
    """Called in another order than it is declared; one module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.bag = nn.ModuleDict({"norm": nn.BatchNorm1d(4)})
        self.first = nn.Linear(3, 4)
        self.unused = nn.Linear(1, 1)
        self.shift = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.bag["norm"](self.first(x)) + self.shift)
        return made


def adopted(model: nn.Module, added: bool = True) -> TrainableModule:
    captured = capture_both(model, (torch.randn(5, 3),), {}).captured
    module, root = captured.module, captured.root
    assert root is not None
    editor = Editor(module)
    if added:
        node = next(n for n in module.graph.nodes if n.op == "call_module" and n.target == "first")
        with editor.rule("test"):
            place = editor.add_module(f"{HOME}.extra", nn.Tanh())
            last = editor.call_module(place, (node,), like=node, after=node)
            editor.reuse(node, last)
            editor.set_args(last, (node,))
            place = editor.add_module("made", nn.Sigmoid())  # as passes do that open things up
            other = editor.call_module(place, (last,), like=node, after=last)
            editor.reuse(last, other)
            editor.set_args(other, (last,))
    made = with_user_class(module, model, TrainableModule)
    assert isinstance(made, TrainableModule)
    adopt_tree(made, root, model, HOME)
    return made


def test_names_and_order_are_the_users_and_what_is_new_stands_apart() -> None:
    model = Net()
    made = adopted(model)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(made.state_dict()) == list(model.state_dict())
    assert [n for n, _ in made.named_children()] == [*(n for n, _ in model.named_children()), HOME]
    home: Any = made.get_submodule(HOME)
    assert [type(m) for m in home.children()] == [nn.Tanh, nn.Sigmoid]
    assert "seen" in dict(made.named_buffers()) and "seen" not in made.state_dict()
    assert made(torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_as_found(training: bool) -> None:
    model = Net().train(training)
    model.bag["norm"].train(not training)
    made = adopted(model)
    assert made.training is training and made.get_submodule(HOME).training is training
    assert made.get_submodule("bag.norm").training is not training


def test_classes_are_the_users_but_for_layers_that_take_weights() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    made = adopted_of(model)
    assert type(made.get_submodule("0")) is nn.TransformerEncoderLayer
    assert type(made.get_submodule("0.self_attn")) is nn.MultiheadAttention
    layer = made.get_submodule("0.linear1")
    assert take_given_weights(layer) and is_trained_layer(layer) and isinstance(layer, nn.Linear)
    assert not take_given_weights(nn.BatchNorm1d(3))


def adopted_of(model: nn.Module) -> TrainableModule:
    captured = capture_both(model, (torch.randn(1, 3, 4),), {}).captured
    assert captured.root is not None
    made = with_user_class(captured.module, model, TrainableModule)
    assert isinstance(made, TrainableModule)
    adopt_tree(made, captured.root, model, HOME)
    return made


def test_a_copy_has_modules_of_its_own() -> None:
    made = adopted(Net())
    twin = copy.deepcopy(made)
    assert list(twin.state_dict()) == list(made.state_dict())
    theirs = {id(m) for m in made.modules()}
    assert not any(id(m) in theirs for m in twin.modules())
    x = torch.randn(5, 3)
    assert torch.equal(made.eval()(x), twin.eval()(x))


def test_frozen_modules_stay_so_until_they_are_let_go() -> None:
    made = adopted(Net())
    norm = made.get_submodule("bag.norm")
    made.freeze(["bag.norm"])
    assert made.training
    made.eval().train()
    assert [m.training for m in (made, norm)] == [True, False]
    made.freeze(["bag.norm"], False)
    assert norm.training
    made.freeze(["first"], False)  # was never frozen: left as it is
    assert made.get_submodule("first").training


def test_the_users_model_is_left_as_it_was() -> None:
    model = Net()
    before = [(n, type(m), m.training) for n, m in model.named_modules()]
    adopted(model)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == before
