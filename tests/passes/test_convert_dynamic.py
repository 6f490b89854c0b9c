"""Dynamic ops read what is quantized at run time; nothing else does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import RUN_TIME, argument, is_op
from fxquant.passes.convert_dynamic import ConvertDynamic


class Net(nn.Module):
    """Two linears on one value, one on another, one left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.a(x) + self.b(x)))


def quantized(**overrides: fxquant.QConfig | None) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return fxquant.quantize(
        Net().eval(), mode="dynamic", overrides={"d": None, **overrides}, backend="reference"
    )


def test_one_quantization_for_each_value() -> None:
    graph = quantized().graph
    made = [node for node in graph.nodes if is_op(node, RUN_TIME)]
    assert [len(node.users) for node in made] == [2, 1]
    assert all(is_op(user, "linear") for node in made for user in node.users)
    assert argument(made[0], "dims") == 1 and argument(made[0], "per_row") is True


def test_ways_to_quantize_are_kept_apart() -> None:
    other = fxquant.QConfig(activation=fxquant.QSpec("int8", symmetric=True, observer="runtime"))
    graph = quantized(b=other).graph
    made = [node for node in graph.nodes if is_op(node, RUN_TIME)]
    assert [len(node.users) for node in made] == [1, 1, 1]
    assert sorted(argument(node, "per_row") for node in made) == [False, True, True]


def test_it_is_idempotent() -> None:
    module = quantized()
    editor = Editor(module)
    ConvertDynamic().run(editor)
    assert editor.log == []


def test_static_graphs_are_left_alone() -> None:
    torch.manual_seed(0)
    module = fxquant.quantize(Net().eval(), [torch.randn(4, 8)], backend="reference")
    assert not any(is_op(node, RUN_TIME) for node in module.graph.nodes)
