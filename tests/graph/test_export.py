"""Capture by torch.export: the same graph, names, answers and int8 result as symbolic tracing."""

from __future__ import annotations

import collections
import copy
import pickle
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import GuardError, TraceError
from fxquant.graph.export import export_graph
from fxquant.graph.export_conditions import check_conditions, check_value, read_condition, readable
from fxquant.graph.info import info
from fxquant.graph.view import what
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.unshare import Unshare
from fxquant.record import record_of
from tests import zoo
from tests.helpers import One, canonical, nodes, run, trained


def exported(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """``model`` exported; the model itself is left alone."""
    return export_graph(copy.deepcopy(model), args, kwargs)


def settled(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` canonicalized."""
    return run(module, Functionalize(), Unshare(), Canonicalize())


def tensor_ops(module: fx.GraphModule) -> Counter[str]:
    """How often each op on tensors is called; checks and arithmetic on sizes do not count."""
    return Counter(
        what(n)
        for n in nodes(module)
        if info(n).value not in ("scalar", "sizes") and not what(n).startswith("check_")
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("mlp", {}),
        ("resnet20", {"size": 32}),
        ("unet", {"size": 32}),
        ("mobilenet_v3_small", {"size": 64}),
        ("shufflenet_v2_x1_0", {"size": 64}),
    ],
)
def test_the_zoo_gives_the_same_ops_and_the_same_answers(name: str, given: dict[str, int]) -> None:
    size = given.get("size")
    model = zoo.build(name, seed=1, size=size)
    x = zoo.example(name, batch=1, size=size)
    found = settled(exported(model, x))
    traced = canonical(model, x)
    assert tensor_ops(found) == tensor_ops(traced)
    layers = [n.target for n in nodes(found) if n.op == "call_module"]
    assert layers == [n.target for n in nodes(traced) if n.op == "call_module"]
    batch = zoo.example(name, batch=3, size=size, seed=5)
    assert torch.equal(found(batch), traced(batch))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = trained(nn.BatchNorm2d(4))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, x: Tensor, factor: float = 2.0, *, mask: Tensor | None = None) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        y += 1
        with torch.no_grad():
            z = y.mean((2, 3))
        z = z * self.scale * factor
        if mask is not None:
            z = z * mask
        with torch.autocast("cpu", enabled=False):
            result: Tensor = self.head(z)
        return result


def test_nodes_know_their_place_and_line() -> None:
    model = Named().eval()
    found = exported(model, torch.randn(2, 3, 8, 8))
    conv = next(n for n in found.graph.nodes if n.name == "conv2d")
    assert info(conv).path == "conv"
    assert info(conv).owners == (("conv", nn.Conv2d),)
    assert info(conv).source.rpartition(":")[0] == __file__
    add = next(n for n in found.graph.nodes if n.name.startswith("add_"))
    assert info(add).path == "add"
    module = settled(found)
    assert [n.target for n in nodes(module) if n.op == "call_module"] == ["conv", "norm", "head"]
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(module(x), model(x))


def test_arguments_keep_their_names_and_defaults() -> None:
    model = Named().eval()
    x = torch.randn(2, 3, 8, 8)
    found = exported(model, x, mask=torch.ones(2, 4))
    assert [n.target for n in found.graph.find_nodes(op="placeholder")] == ["x", "factor", "mask"]
    mask = torch.rand(3, 4)
    y = torch.randn(3, 3, 6, 6)
    assert torch.equal(found(y, mask=mask), model(y, mask=mask))
    with pytest.raises(GuardError, match=r"'factor' is 3\.0"):
        found(y, 3.0, mask=mask)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_of_the_example_says_nothing(batch: int) -> None:
    def body(m: Any, x: Tensor) -> Any:
        return m.part(x).view(x.shape[0], -1) + x.new_zeros(x.shape[0], 1)

    model = One(body, part=nn.Linear(4, 4)).eval()
    found = exported(model, torch.randn(batch, 3, 4))
    for other in (1, 2, 7):
        x = torch.randn(other, 3, 4)
        assert torch.equal(found(x), model(x))


def test_a_branch_on_a_shape_is_kept_and_checked() -> None:
    found = exported(One(lambda m, x: x * 2 if x.shape[1] > 4 else x), torch.randn(2, 8))
    assert torch.equal(found(torch.ones(1, 5)), torch.full((1, 5), 2.0))
    with pytest.raises(GuardError, match=r"x\.shape\[1\] > 4"):
        found(torch.ones(1, 4))
    settled(found)
    with pytest.raises(GuardError, match=r"x\.shape\[1\] > 4"):
        found(torch.ones(1, 4))


def test_a_branch_on_values_is_refused_with_the_reason() -> None:
    model = One(lambda m, x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(TraceError, match=r"cannot be exported.*data-dependent"):
        exported(model, torch.randn(2, 8))


def test_an_assertion_of_the_model_stays() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        count = x[0, 0].int().item()
        torch._check(count > 3)
        return x * count

    found = settled(exported(One(body), torch.full((2, 2), 5.0)))
    assert torch.equal(found(torch.full((2, 2), 4.0)), torch.full((2, 2), 16.0))
    with pytest.raises(GuardError, match="asserts"):
        found(torch.full((2, 2), 2.0))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: {"a": x + 1, "b": [x, (x * 2, None, 3)]},
        lambda m, x: Pair(x + 1, x * 2),
        lambda m, x: collections.OrderedDict(a=x + 1, b=(x,)),
        lambda m, x: (x.shape[0], x + 1),
    ],
)
def test_results_have_the_users_structure(body: Any) -> None:
    model = One(body)
    x = torch.randn(3, 2)
    found, wanted = settled(exported(model, torch.randn(2, 2)))(x), model(x)
    assert type(found) is type(wanted)
    assert str(found) == str(wanted)


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], *more: Tensor) -> Tensor:
        left, right = batch["pair"]
        y: Tensor = left * right if batch["product"] else left + right
        return y + more[0]


def test_nested_arguments() -> None:
    x = torch.randn(2, 3)
    found = exported(Nested(), {"pair": (x, x + 1), "product": True}, x * 3)
    y = torch.randn(4, 3)
    given = ({"pair": (y, y - 1), "product": True}, y)
    assert torch.equal(found(*given), Nested()(*given))
    with pytest.raises(GuardError, match=r"batch\['product'\]"):
        found({"pair": (y, y - 1), "product": False}, y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(self.second(self.first(x)))
        return y


def test_tied_weights_and_second_calls() -> None:
    model = Tied().eval()
    found = settled(exported(model, torch.randn(2, 4)))
    calls = [found.get_submodule(str(n.target)) for n in nodes(found) if n.op == "call_module"]
    assert [str(n.target) for n in nodes(found) if n.op == "call_module"] == [
        "first",
        "second",
        "first_1",
    ]
    assert len({id(layer.weight) for layer in calls}) == 1
    x = torch.randn(3, 4)
    assert torch.equal(found(x), model(x))


def test_hooks_are_part_of_the_graph_and_run_once() -> None:
    part = nn.Linear(4, 4)
    part.register_forward_hook(lambda module, args, output: output + 1)
    model = One(lambda m, x: m.part(x), part=part).eval()
    x = torch.randn(2, 4)
    found = settled(exported(model, x))
    assert torch.equal(found(x), model(x))
    assert len(part._forward_hooks) == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_module_is_called_only_where_it_does_the_same(mode: Any) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    model = One(lambda m, x: m.part(x) + F.conv2d(x, m.part.weight, padding=1), part=conv).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(settled(exported(model, x))(x), model(x))


def test_constants_made_in_forward_stay_constant() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        running = torch.tensor([1.0, 2.0])
        running += x[0]
        return running

    found = settled(exported(One(body), torch.randn(2, 2)))
    x = torch.ones(2, 2)
    assert found(x).tolist() == found(x).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("L['x'].size()[0] > 1", True),
        ("L['x'].size()[1] % 2 == 0 and not L['x'].size()[0] == 3", True),
        ("2 <= L['x'].size()[0]*L['x'].size()[1] <= 7", False),
        ("max(L['x'].size()[0], 9) == 9", True),
        ("-L['x'].size()[0] == -2 or L['x'].size()[0] // 2 == 7", True),
    ],
)
def test_conditions_are_read_as_arithmetic(text: str, holds: bool) -> None:
    assert bool(read_condition(text)({"x": torch.ones(2, 4)})) is holds


@pytest.mark.parametrize("text", ["__import__('os')", "L['x'].sum()", "[1 for _ in L]", "x +"])
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(TraceError, match="cannot be checked"):
        read_condition(text)


def test_conditions_are_said_in_the_users_words() -> None:
    assert readable("L['x'].size()[2] > 4*L['mask'].size()[0]") == "x.shape[2] > 4 * mask.shape[0]"
    with pytest.raises(GuardError, match=r"x\.shape\[0\] == 3"):
        check_conditions({"x": torch.ones(2)}, ("L['x'].size()[0] == 3",))
    check_value(torch.tensor(True), "never said")


def test_without_an_example_nothing_can_be_exported() -> None:
    with pytest.raises(TraceError, match="needs example inputs"):
        export_graph(nn.Linear(2, 2), (), {})


@pytest.mark.parametrize("backend", ["x86", "reference"])
@pytest.mark.parametrize("name", ["resnet20", "mlp"])
def test_the_int8_result_is_the_same(name: str, backend: str) -> None:
    model = zoo.build(name, seed=1)
    x = zoo.example(name, batch=2)
    wanted = fxquant.quantize(model, [x], backend=backend)
    found = fxquant.quantize(exported(model, x).eval(), [x], backend=backend)
    batch = zoo.example(name, batch=3, seed=7)
    assert torch.equal(found(batch), wanted(batch))
    assert [op.int8 for op in record_of(found).ops] == [op.int8 for op in record_of(wanted).ops]


def test_an_exported_graph_survives_a_copy_and_a_pickle() -> None:
    def body(m: Any, x: Tensor, flag: bool = True) -> Tensor:
        y: Tensor = m.part(x) * x.shape[0] if x.shape[1] > 3 else x
        return y

    part = nn.Linear(4, 4)
    found = settled(exported(One(body, part=part), torch.randn(2, 4)))
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(twin(x), part(x) * 3)
        with pytest.raises(GuardError, match=r"x\.shape\[1\] "):
            twin(torch.randn(3, 2))
