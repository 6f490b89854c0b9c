"""Which calls are calls of a recurrent layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.utils.parametrizations import weight_norm

from fxquant.graph.recurrent_layers import recurrent_layer, recurrent_matrices


class Own(nn.LSTM):
    """A subclass that computes something else."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


class Named(nn.GRU):
    """A subclass in name only."""


def found(layer: nn.Module) -> nn.RNNBase | None:
    module = symbolic_trace(nn.Sequential(layer))
    return recurrent_layer(next(n for n in module.graph.nodes if n.op == "call_module"))


@pytest.mark.parametrize("layer", [nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNN(2, 3)])
def test_torchs_own_are(layer: nn.Module) -> None:
    assert found(layer) is not None


def test_others_are_not() -> None:
    assert found(nn.Linear(2, 3)) is None
    hooked = nn.LSTM(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert found(hooked) is None


def test_subclasses_are_if_they_keep_forward() -> None:
    class Holder(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.RNNBase)

    for layer, is_one in ((Own(2, 3), False), (Named(2, 3), True)):
        holder = Holder(layer)
        module = torch.fx.GraphModule(holder, Leaves().trace(holder))
        node = next(n for n in module.graph.nodes if n.op == "call_module")
        assert (recurrent_layer(node) is not None) is is_one


def test_matrices_that_are_computed_are_none() -> None:
    layer = nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2)
    assert len(list(recurrent_matrices(layer))) == 2 * 2 * 3
    assert all(weight is not None for _, weight in recurrent_matrices(layer))
    normed = weight_norm(nn.GRU(4, 3), "weight_hh_l0")
    assert dict(recurrent_matrices(normed))["weight_hh_l0"] is None
