"""Canonicalize: spellings chosen by hand, arguments, shape arithmetic, and what stays opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import GuardError
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, module_of
from fxquant.graph.view import render
from fxquant.passes.canonicalize import Canonicalize
from tests.helpers import One, Two, canonical, check_eager, names, node_of, nodes, options

Body = Callable[..., Any]
_cat: Callable[..., Any] = torch.cat
"""Takes ``axis=`` as well, which torch's own stubs do not know."""


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.relu(x),
        lambda m, x: F.relu(input=x),
        lambda m, x: F.relu(x, True),
        lambda m, x: F.relu(x, inplace=True),
        lambda m, x: F.relu_(x),
        lambda m, x: torch.relu(x),
        lambda m, x: torch.relu_(x),
        lambda m, x: x.relu(),
        lambda m, x: x.relu_(),
        lambda m, x: m.act(x),
        lambda m, x: m.act(input=x),
        lambda m, x: nn.functional.relu(F.dropout(x, 0.5, m.training)),
    ],
)
def test_relu_has_one_spelling(body: Body) -> None:
    x = torch.randn(2, 3)
    model = One(body, act=nn.ReLU(inplace=True)).eval()
    module = canonical(model, x)
    assert [(n.target, n.args, n.kwargs) for n in nodes(module)] == [
        (torch.relu, (nodes(module)[0].all_input_nodes[0],), {})
    ]
    check_eager(model, module, x)


def _iadd(x: Any, y: Any) -> Any:
    x += y
    return x


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        (lambda m, x, y: x + y, 1),
        (lambda m, x, y: torch.add(x, y), 1),
        (lambda m, x, y: torch.add(input=x, other=y), 1),
        (lambda m, x, y: torch.add(x, y, alpha=1), 1),
        (lambda m, x, y: x.add(y), 1),
        (lambda m, x, y: x.add_(y), 1),
        (lambda m, x, y: x.__add__(y), 1),
        (lambda m, x, y: _iadd(x, y), 1),
        (lambda m, x, y: torch.add(x, y, alpha=2), 2),
        (lambda m, x, y: x.add(y, alpha=-0.5), -0.5),
        (lambda m, x, y: x.add_(y, alpha=3), 3),
    ],
)
def test_add_has_one_spelling_and_keeps_alpha(body: Body, alpha: float) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    module = canonical(Two(body), x, y)
    add = node_of(module, "add")
    assert names(module) == ["add"]
    assert [n.name for n in add.args] == ["x", "y"]  # type: ignore[union-attr]
    assert options(add) == {"alpha": alpha}
    check_eager(Two(body), module, x, y)


def test_a_tensor_comes_first_where_order_does_not_matter() -> None:
    for body, op in ((lambda m, x: 2 + x, "add"), (lambda m, x: 2 * x, "mul")):
        module = canonical(One(body), torch.randn(3))
        call = node_of(module, op)
        assert (str(call.args[0]), call.args[1]) == ("x", 2)
        check_eager(One(body), module, torch.randn(3))


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (lambda m, x: 2 - x, ["rsub"]),
        (lambda m, x: 2**x, ["power_of"]),
        (lambda m, x: torch.pow(0.5, x), ["power_of"]),
        (lambda m, x: 1 / x, ["reciprocal"]),
        (lambda m, x: 2 / x, ["reciprocal", "mul"]),
        (lambda m, x: torch.rsub(x, 3, alpha=2), ["rsub"]),
        (lambda m, x: torch.rsub(x, x.abs(), alpha=2), ["abs", "sub"]),
    ],
)
def test_a_constant_that_stands_first_has_an_op_of_its_own(body: Body, ops: list[str]) -> None:
    x = torch.rand(3) + 0.1
    module = canonical(One(body), x)
    assert names(module) == ops
    check_eager(One(body), module, x)


def test_a_constant_that_must_stand_first_stays_as_written() -> None:
    x = torch.rand(3) + 0.1
    body: Body = lambda m, x: torch.add(2, x, alpha=3)  # noqa: E731
    module = canonical(One(body), x)
    assert "constant" in info(nodes(module)[0]).opaque
    check_eager(One(body), module, x)


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated:UserWarning")
def test_the_deprecated_add_with_the_factor_in_the_middle_is_not_misread() -> None:
    module = canonical(Two(lambda m, x, y: torch.add(x, 2, y)), torch.ones(2), torch.ones(2))
    assert "do not fit" in info(nodes(module)[0]).opaque


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda m, x: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda m, x: F.max_pool2d(x, (2, 2), stride=[2, 2]), "max_pool2d"),
        (lambda m, x: torch.max_pool2d(x, 2, 2), "max_pool2d"),
        (lambda m, x: m.max(x), "max_pool2d"),
        (lambda m, x: m.max22(x), "max_pool2d"),
        (lambda m, x: F.avg_pool2d(x, 2), "avg_pool2d"),
        (lambda m, x: m.avg(x), "avg_pool2d"),
        (lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)), "adaptive_avg_pool2d"),
        (lambda m, x: m.adaptive(x), "adaptive_avg_pool2d"),
    ],
)
def test_pools_say_equal_sides_and_the_default_stride_in_one_way(body: Body, op: str) -> None:
    parts = {
        "max": nn.MaxPool2d(2),
        "max22": nn.MaxPool2d((2, 2)),
        "avg": nn.AvgPool2d((2, 2)),
        "adaptive": nn.AdaptiveAvgPool2d(1),
    }
    x = torch.randn(1, 2, 6, 6)
    module = canonical(One(body, **parts), x)
    found = options(node_of(module, op))
    if op == "adaptive_avg_pool2d":
        assert found == {"output_size": 1}
    else:
        assert (found["kernel_size"], found["stride"], found["padding"]) == (2, 2, 0)
    check_eager(One(body, **parts), module, x)


def test_unequal_sides_of_a_pool_stay() -> None:
    model = One(lambda m, x: F.avg_pool2d(x, (2, 3), padding=(1, 0)))
    module = canonical(model, torch.randn(1, 1, 6, 6))
    found = options(node_of(module, "avg_pool2d"))
    assert (found["kernel_size"], found["stride"], found["padding"]) == ((2, 3), (2, 3), (1, 0))
    check_eager(model, module, torch.randn(1, 1, 6, 6))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.view(x.size(0), -1),
        lambda m, x: x.view(x.shape[0], -1),
        lambda m, x: x.view((x.size(0), -1)),
        lambda m, x: x.view([x.size()[0], -1]),
        lambda m, x: x.reshape(x.size(dim=0), -1),
        lambda m, x: torch.reshape(x, (x.size(0), -1)),
        lambda m, x: x.reshape(shape=(x.size(0), -1)),
        lambda m, x: torch.flatten(x, 1),
        lambda m, x: x.flatten(start_dim=1),
        lambda m, x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
        lambda m, x: x.view(x.size(0), x.shape[1:].numel()),
        lambda m, x: x.permute(0, 1, 2, 3).reshape(x.size(0), x.numel() // x.size(0)),
    ],
)
def test_the_batch_and_the_sides_stay_free(body: Body) -> None:
    model = One(body)
    module = canonical(model, torch.randn(2, 3, 4, 5))
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (7, 2, 6, 3)):
        check_eager(model, module, torch.randn(shape))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x, y: x.reshape(y.shape),
        lambda m, x, y: x.view(y.size()),
        lambda m, x, y: torch.reshape(x, y.shape),
        lambda m, x, y: x.reshape(torch.Size((6, 2))),
        lambda m, x, y: x[:, None, :1].expand(y.shape[0] // 2, 3, -1),
        lambda m, x, y: x[..., : y.size(1)],
        lambda m, x, y: F.interpolate(x[None], size=y.size(0)),
        lambda m, x, y: x.narrow(1, 0, y.dim()).repeat(y.ndim, 1),
    ],
)
def test_shapes_of_other_tensors(body: Body) -> None:
    x, y = torch.randn(3, 4), torch.randn(6, 2)
    module = canonical(Two(body), x, y)
    assert not [info(n).opaque for n in nodes(module) if info(n).opaque]
    check_eager(Two(body), module, x, y)


@pytest.mark.parametrize(
    ("body", "op", "name", "value"),
    [
        (lambda m, x: _cat([x, x], axis=1), "cat", "dim", 1),
        (lambda m, x: torch.softmax(x, dim=-1), "softmax", "dim", -1),
        (lambda m, x: x.mean(axis=1, keepdims=True), "mean", "keepdim", True),
        (lambda m, x: torch.mean(x, (1, 2)), "mean", "dim", (1, 2)),
        (lambda m, x: x.mean(), "mean", "dim", None),
        (lambda m, x: x.squeeze(), "squeeze", "dim", None),
        (lambda m, x: torch.squeeze(x), "squeeze", "dim", None),
        (lambda m, x: x.swapaxes(axis0=0, axis1=1), "transpose", "dim1", 1),
        (lambda m, x: x.permute(dims=(2, 0, 1)), "permute", "dims", (2, 0, 1)),
        (lambda m, x: x.flip(dims=[1]), "flip", "dims", (1,)),
        (lambda m, x: x.flip(1), "flip", "dims", (1,)),
        (lambda m, x: x.roll(1), "roll", "dims", None),
        (lambda m, x: x.clamp(max=0.5), "clamp", "min", None),
        (lambda m, x: x.clamp_min(0.5), "clamp", "min", 0.5),
        (lambda m, x: x**2, "pow", "exponent", 2),
        (lambda m, x: -x, "neg", "", None),
        (lambda m, x: abs(x), "abs", "", None),
    ],
)
def test_arguments_by_hand(body: Body, op: str, name: str, value: Any) -> None:
    x = torch.randn(2, 1, 3)
    module = canonical(One(body), x)
    assert names(module) == [op]
    if name:
        assert options(node_of(module, op))[name] == value
    check_eager(One(body), module, x)


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (lambda m, x: torch.chunk(x, 2, dim=1)[1], ["chunk", "getitem"]),
        (lambda m, x: x.split(2, 1)[0], ["split", "getitem"]),
        (lambda m, x: torch.split(x, [1, 3], dim=1)[1], ["split", "getitem"]),
        (lambda m, x: torch.split(tensor=x, split_size_or_sections=2)[0], ["split", "getitem"]),
        (lambda m, x: x.unbind(1)[2], ["unbind", "getitem"]),
        (lambda m, x: x[:, 1:3], ["getitem"]),
        (lambda m, x: x.select(1, 0), ["select"]),
    ],
)
def test_splits_and_selections(body: Body, ops: list[str]) -> None:
    x = torch.randn(2, 4, 3)
    module = canonical(One(body), x)
    assert names(module) == ops
    assert [info(n).value for n in nodes(module)][-1] == "tensor"
    check_eager(One(body), module, x)


def test_identities_go() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.identity(m.drop(x)).contiguous(memory_format=torch.channels_last)
        return F.dropout(y, p=0.3, training=m.training).clone()

    model = One(body, identity=nn.Identity(), drop=nn.Dropout2d()).eval()
    x = torch.randn(1, 2, 3, 3)
    module = canonical(model, x)
    assert names(module) == []
    assert not [m for m in module.modules() if isinstance(m, nn.Identity | nn.Dropout2d)]
    check_eager(model, module, x)


def test_dropout_that_stays_on_in_eval_is_kept() -> None:
    module = canonical(One(lambda m, x: F.dropout(x, 0.5)), torch.ones(100))
    assert names(module) == ["dropout"]
    assert bool((module(torch.ones(100)) == 0).any())


class Functional(nn.Module):
    """Layers written as functions of the module's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, stride=2, padding="valid")
        y = F.batch_norm(y, self.mean, self.variance, training=self.training)  # type: ignore[arg-type]
        return F.linear(y.mean((2, 3)), self.head)


def test_functional_layers_become_modules_that_own_the_users_parameters() -> None:
    model, x = Functional().eval(), torch.randn(2, 3, 9, 9)
    module = canonical(model, x)
    assert names(module) == ["conv2d", "batch_norm", "mean", "linear"]
    kinds = [type(module_of(node_of(module, op))) for op in ("conv2d", "linear")]
    assert kinds == [nn.Conv2d, nn.Linear]
    assert module_of(node_of(module, "conv2d")).get_parameter("weight").requires_grad
    check_eager(model, module, x)
    check_eager(model, module, torch.randn(5, 3, 11, 7))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: F.conv2d(x, x[:, :2]), "its weight is computed by %getitem in every call"),
        (lambda m, x: F.batch_norm(x, None, None, training=True), "training=True"),
        (lambda m, x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode='floor'"),
        (lambda m, x: torch.cumsum(x, 1), "the op table does not know cumsum"),
        (lambda m, x: m.custom(x), "no int8 form of CrossMapLRN2d known"),
        (lambda m, x: m.hooked(x), "forward hooks"),
        (lambda m, x: F.softmax(x), "softmax"),
        (lambda m, x: m.softmax(x), "without dim"),
        (lambda m, x: x.view(torch.int32), "other bits"),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
def test_what_has_no_canonical_form_keeps_its_spelling_and_says_why(body: Body, why: str) -> None:
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    model = One(body, hooked=hooked, indices=nn.MaxPool2d(2, return_indices=True))
    model.custom = nn.CrossMapLRN2d(3)
    model.softmax = nn.Softmax()
    x = torch.randn(2, 2, 4, 4)
    module = canonical(model, x)
    assert any(why in info(node).opaque for node in nodes(module)), [
        info(node).opaque for node in nodes(module)
    ]
    check_eager(model, module, x)


def test_a_subclass_that_keeps_forward_is_the_op_and_one_that_does_not_is_not() -> None:
    class Named(nn.Conv2d):
        """Adds nothing."""

    class Scaled(nn.Conv2d):
        """Standardizes its weight, as some networks do."""

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight * 2, bias)

    Named.__module__ = Scaled.__module__ = "torch.nn.mine"  # leaves, as torch's own are
    x = torch.randn(1, 2, 5, 5)
    for cls, known in ((Named, True), (Scaled, False)):
        model = One(lambda m, x: m.conv(x), conv=cls(2, 3, 3)).eval()
        module = canonical(model, x)
        assert (names(module) == ["conv2d"]) is known
        check_eager(model, module, x)


def test_canonicalize_is_idempotent() -> None:
    model = One(
        lambda m, x: F.relu(m.conv(x)).add(2).view(x.size(0), -1).mean(dim=1) + x.shape[0],
        conv=nn.Conv2d(3, 4, 3),
    )
    module = canonical(model, torch.randn(1, 3, 6, 6))
    text = render(module.graph)
    editor = Editor(module)
    Canonicalize().run(editor)
    assert editor.log == []
    assert render(module.graph) == text


def test_unused_calls_without_effect_go_and_those_with_effect_stay() -> None:
    def body(m: Any, x: Any) -> Any:
        torch.relu(x)
        x.size(0)
        torch._assert(x.dim() == 2, "two dimensions")
        return x + 1

    module = canonical(One(body), torch.randn(2, 3))
    assert names(module) == ["check_input", "add"]
    with pytest.raises(GuardError, match="dimensions of 'x': 2 when the model was captured"):
        module(torch.randn(3))


def test_lone_numbers_are_not_tensors() -> None:
    module = canonical(One(lambda m, x: x * (x.size(0) + 1)), torch.randn(2, 3))
    kinds = {n.name: info(n).value for n in nodes(module)}
    assert kinds == {"size": "scalar", "add": "scalar", "mul": "tensor"}
    assert argument(node_of(module, "mul"), "other").name == "add"


def test_running_twice_gives_the_same_text() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = One(lambda m, x: torch.cat(m.conv(x).chunk(2, 1), 1).relu_(), conv=nn.Conv2d(3, 4, 3))
    assert render(canonical(model, x).graph) == render(canonical(model, x).graph)


class Optional(nn.Module):
    """What is given stands behind what is not, so that both need a default in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)

    def forward(
        self, mask: Tensor | None = None, ids: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        assert ids is not None
        hidden = self.linear(self.table(ids)) * scale
        return hidden if mask is None else hidden * mask


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_an_input_after_one_that_is_left_out_is_a_tensor(mode: Any) -> None:
    ids = torch.randint(0, 9, (2, 5))
    model, given = Optional().eval(), {"ids": ids}
    prepared = fxquant.prepare(model, mode=mode, example_inputs=given)
    kinds = {str(n.target): info(n).value for n in prepared.graph.find_nodes(op="placeholder")}
    assert kinds == {"mask": "scalar", "ids": "tensor", "scale": "scalar"}
    data = [given] * 2 if mode == "static" else None
    made = fxquant.quantize(model, data, mode=mode, example_inputs=given)
    real = model(ids=ids)
    # 26 dB: 8 bits lose less, and a lookup of codes instead of numbers leaves none.
    assert (made(ids=ids) - real).norm() < 0.05 * real.norm()
