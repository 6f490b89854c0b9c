"""Tensor methods as functions: the same answers, and graphs that survive a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph import tensor_methods
from fxquant.graph.op_table import OPS

CALLS: dict[Callable[..., Any], tuple[Any, ...]] = {
    tensor_methods.size: (),
    tensor_methods.dim: (),
    tensor_methods.expand: ((4, 2, 3),),
    tensor_methods.repeat: ((2, 1),),
}


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_is_the_method_and_survives_a_pickle(function: Callable[..., Any]) -> None:
    x, rest = torch.arange(6.0).view(2, 3), CALLS[function]
    wanted = getattr(x, function.__name__)(*rest)
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *rest)))
    module = pickle.loads(pickle.dumps(fx.GraphModule({}, graph)))
    assert any(node.target is function for node in module.graph.nodes)
    for found in (function(x, *rest), module(x)):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


def test_size_of_one_dimension() -> None:
    assert tensor_methods.size(torch.zeros(2, 3), -1) == 3


@pytest.mark.parametrize("op", [op for op in OPS if op.target is not None], ids=lambda op: op.name)
def test_generated_code_can_import_every_target(op: Any) -> None:
    """torch.fx writes targets into source text; one that is no importable name breaks pickles."""
    graph = fx.Graph()
    args = (graph.placeholder("x"),) * max(2, len(op.tensors))
    graph.output(graph.call_function(op.target, args))
    module = fx.GraphModule({}, graph)
    assert "TensorBase" not in str(module._graph.python_code("self").globals) or (
        # forwarded away wherever it stands
        op.name == "contiguous"
    )
