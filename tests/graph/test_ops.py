"""Reading calls through the op table: binding, renaming, what is unreadable and why."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph.info import write_info
from fxquant.graph.op_table import (
    OPS,
    argument,
    class_op,
    function_spelling,
    has_op,
    is_op,
    method_spelling,
    module_of,
    module_op,
    op_named,
    op_names,
    op_of,
)
from fxquant.graph.ops import Call, Kind, Unreadable, bind, module_arguments
from tests.helpers import canonical, nodes


def read(function: Any, *args: Any, **kwargs: Any) -> Call | Unreadable:
    found = method_spelling(function) if isinstance(function, str) else function_spelling(function)
    assert found is not None
    return bind(*found, args, kwargs)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (lambda: read(torch.add, 1, 2), {"input": 1, "other": 2, "alpha": 1}),
        (lambda: read("add_", 1, other=2, alpha=3), {"input": 1, "other": 2, "alpha": 3}),
        (lambda: read("view", 0, 2, 3), {"input": 0, "shape": (2, 3)}),
        (lambda: read("view", 0, (2, 3)), {"input": 0, "shape": (2, 3)}),
        (lambda: read("view", 0, [2, 3]), {"input": 0, "shape": (2, 3)}),
        (lambda: read("view", 0, torch.Size((2, 3))), {"input": 0, "shape": (2, 3)}),
        (lambda: read("view", 0, size=(2, 3)), {"input": 0, "shape": (2, 3)}),
        (lambda: read("view", 0, -1), {"input": 0, "shape": (-1,)}),
        (lambda: read(torch.cat, [1], axis=2), {"tensors": [1], "dim": 2}),
        (lambda: read("mean", 0, 1, keepdims=True), {"input": 0, "dim": 1, "keepdim": True}),
        (lambda: read("clamp_min", 0, 1.0), {"input": 0, "min": 1.0, "max": None}),
        (lambda: read(F.relu, 0, inplace=False), {"input": 0}),
        (lambda: read("softmax", 0, dim=1, dtype=None), {"input": 0, "dim": 1}),
    ],
)
def test_bind(call: Any, arguments: dict[str, Any]) -> None:
    found = call()
    assert isinstance(found, Call)
    assert found.arguments == arguments
    assert list(found.arguments) == list(found.op.signature.parameters)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: read(torch.relu), "its arguments do not fit relu"),
        (lambda: read(torch.add, 1, 2, 3), "do not fit add"),
        (lambda: read("mean", 0, dtype=torch.float64), "mean has no canonical form with dtype="),
        (lambda: read(F.max_pool2d, 0, 2, return_indices=True), "no call of max_pool2d"),
        (lambda: read("div", 1, 2, rounding_mode="floor"), "rounding_mode='floor'"),
        (lambda: read("relu", 0, unheard_of=1), "do not fit relu"),
    ],
)
def test_bind_says_why_it_cannot(call: Any, reason: str) -> None:
    found = call()
    assert isinstance(found, Unreadable)
    assert reason in found.reason


def test_in_place_spellings_are_marked() -> None:
    for function, args in (("relu_", (0,)), (operator.iadd, (0, 1)), (torch.exp_, (0,))):
        found = read(function, *args)
        assert isinstance(found, Call) and found.inplace
    switched = read(F.relu, 0, True)
    assert isinstance(switched, Call) and switched.inplace
    plain = read(F.relu, 0)
    assert isinstance(plain, Call) and not plain.inplace


def test_module_arguments_are_read_from_the_module() -> None:
    op = op_named("max_pool2d")
    found = module_arguments(op, nn.MaxPool2d((2, 2)), ("x",))
    assert found["input"] == "x"
    assert (found["kernel_size"], found["stride"], found["padding"]) == (2, 2, 0)


def test_the_table_is_consistent() -> None:
    assert len(op_names()) == len(set(op_names()))
    for op in OPS:
        assert set(op.tensors) <= set(op.signature.parameters)
        made_by_a_rule = op.name == "unary"
        only_modules = bool(op.modules) and not op.functions
        assert (op.target is None) == (
            op.kind is Kind.CONTRACT or op.build is not None or made_by_a_rule or only_modules
        )
        if op.commutes:
            assert len(op.tensors) >= 2
        assert repr(op) == f"Op({op.name})"


def test_names_that_are_not_there() -> None:
    assert has_op("conv2d") and not has_op("conv4d")
    with pytest.raises(KeyError):
        op_named("conv4d")
    assert function_spelling(print) is None
    assert function_spelling([]) is None, "not even hashable"
    assert method_spelling("nothing") is None
    assert class_op(nn.LSTM) is None


def test_a_subclass_that_changes_forward_is_another_op() -> None:
    class Same(nn.ReLU):
        pass

    class Other(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    assert module_op(Same()) is op_named("relu")
    assert module_op(Other()) is None


def test_reading_nodes() -> None:
    module = canonical(nn.Sequential(nn.Conv2d(2, 3, 1, stride=2), nn.Hardtanh(-2, 2)).eval())
    conv, act = nodes(module)
    assert is_op(conv, "conv2d", "linear") and not is_op(conv, "linear") and not is_op(3, "add")
    assert argument(conv, "stride") == (2, 2)
    assert argument(act, "max_val") == 2
    assert argument(act, "input") is conv
    with pytest.raises(TypeError, match="calls no module"):
        module_of(act)
    write_info(act, opaque="for a reason")
    assert op_of(act) is None
    with pytest.raises(KeyError, match="no argument 'max_val'"):
        argument(act, "max_val")


def test_a_graph_without_an_owner_has_no_modules() -> None:
    graph = fx.Graph()
    call = graph.call_module("a", (graph.placeholder("x"),))
    with pytest.raises(TypeError, match="calls no module of a GraphModule"):
        module_of(call)
