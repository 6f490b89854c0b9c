"""Dynamic ops read what is quantized at run time; nothing else does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import RUN_TIME, argument, is_op
from fxquant.passes.convert_dynamic import ConvertDynamic
from fxquant.spec import ROWS


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


class Products(nn.Module):
    """A product, one of a value with itself, and one that nobody asks for."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x @ y, y.mT) + x.matmul(x)


def test_factors_of_products_are_quantized_by_row_and_by_column() -> None:
    module = fxquant.quantize(
        Products().eval(), mode="dynamic", overrides={torch.matmul: "dynamic"}, backend="reference"
    )
    made = [node for node in module.graph.nodes if is_op(node, RUN_TIME)]
    products = [node for node in module.graph.nodes if is_op(node, "matmul")]
    assert len(products) == 3
    for node in products:
        left, right = node.args
        assert argument(left, "by_column") is False and argument(left, "dtype") == "uint8"
        assert argument(right, "by_column") is True and argument(right, "symmetric") is True
        assert argument(right, "dtype") == "int8"
    # x by row is shared; y by column and the transposed y by column are two values.
    assert len(made) == 5
    editor = Editor(module)
    ConvertDynamic().run(editor)
    assert editor.log == []


def test_right_factors_are_quantized_as_weights_are() -> None:
    weight = fxquant.QSpec("int8", bits=6, symmetric=True)
    asked = fxquant.QConfig(activation=ROWS, weight=weight)
    module = fxquant.quantize(
        Products().eval(), mode="dynamic", overrides={torch.bmm: asked}, backend="reference"
    )
    right = next(node.args[1] for node in module.graph.nodes if is_op(node, "matmul"))
    assert argument(right, "bits") == 6 and argument(right, "per_row") is False


def test_products_stay_float_unless_they_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y @ y.mT

    for overrides in ({}, {"*": "dynamic"}):
        module = fxquant.quantize(Net().eval(), mode="dynamic", overrides=overrides)
        op = next(op for op in fxquant.report(module).to_dict()["ops"] if op["op"] == "matmul")
        assert op["runs"] == "float" and "overrides={torch.matmul: 'dynamic'}" in op["why"]
