"""Unshare: every call owns its module, and all copies train the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import is_op, module_of
from fxquant.passes.unshare import Unshare
from tests.helpers import (
    FLOAT32,
    One,
    Two,
    canonical,
    check_eager,
    close_share,
    fused,
    names,
    nodes,
    trained,
)


def test_folding_one_call_leaves_the_other() -> None:
    model = trained(
        Two(
            lambda m, x, y: m.bn(m.conv(x)) + m.conv(y),
            conv=nn.Conv2d(3, 4, 3),
            bn=nn.BatchNorm2d(4),
        )
    )
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    module = fused(model, x, y)
    assert names(module) == ["conv2d", "conv2d", "add"]
    assert close_share(module(x, y), model(x, y)) <= FLOAT32
    one, two = (module_of(n) for n in nodes(module)[:2])
    assert not torch.equal(one.get_parameter("weight"), two.get_parameter("weight"))


@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_convolution_with_two_batch_norms(first: int) -> None:
    def body(m: Any, x: Any) -> Any:
        norms = (m.one, m.two) if first == 0 else (m.two, m.one)
        return norms[0](m.conv(x)) * norms[1](m.conv(x))

    model = trained(
        One(body, conv=nn.Conv2d(3, 4, 1, bias=False), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4))
    )
    x = torch.randn(2, 3, 5, 5)
    module = fused(model, x)
    assert names(module) == ["conv2d", "conv2d", "mul"]
    assert close_share(module(x), model(x)) <= FLOAT32


def test_a_convolution_with_a_batch_norm_and_a_bare_reader_is_not_folded() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.bn(y) + y

    model = trained(One(body, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    module = fused(model, torch.randn(2, 3, 5, 5))
    assert names(module) == ["conv2d", "batch_norm", "add"]
    check_eager(model, module, torch.randn(2, 3, 5, 5))


def test_parameters_stay_the_same_objects_until_something_is_folded() -> None:
    model = One(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(3, 3, 3))
    module = canonical(model, torch.randn(1, 3, 8, 8))
    paths = [str(n.target) for n in nodes(module)]
    assert len(set(paths)) == 2
    a, b = (module.get_submodule(path) for path in paths)
    assert a is not b
    assert a.weight is b.weight and a.bias is b.bias
    module(torch.randn(1, 3, 8, 8)).sum().backward()
    assert a.weight.grad is b.weight.grad is not None
    assert len(list(module.parameters())) == 2


def test_modules_without_state_need_no_copies() -> None:
    def body(m: Any, x: Any) -> Any:
        for _ in range(5):
            x = m.act(m.conv(x))
        return x

    model = One(body, act=nn.ReLU(inplace=True), conv=nn.Conv2d(2, 2, 1)).eval()
    captured = capture(model).module
    editor = Editor(captured)
    Unshare().run(editor)
    assert {edit.rule for edit in editor.log} == {"unshare"}
    assert len(editor.log) == 4
    assert len({n.target for n in captured.graph.nodes if is_op(n, "conv2d")}) == 5
    check_eager(model, canonical(model, torch.randn(1, 2, 3, 3)), torch.randn(1, 2, 3, 3))


def test_one_module_at_two_places_is_one_module() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = trained(One(lambda m, x: m.bn(m.a(x)) + m.b(x), a=conv, b=conv, bn=nn.BatchNorm2d(3)))
    x = torch.randn(1, 3, 4, 4)
    module = fused(model, x)
    assert close_share(module(x), model(x)) <= FLOAT32


def test_weights_tied_between_modules_fold_apart() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    model = trained(One(lambda m, x: m.b(m.bn(m.a(x))), a=a, b=b, bn=nn.BatchNorm1d(4)))
    x = torch.randn(3, 4)
    before = a.weight.detach().clone()
    module = fused(model, x)
    assert names(module) == ["linear", "linear"]
    assert close_share(module(x), model(x)) <= FLOAT32
    assert torch.equal(a.weight, before)


def test_a_weight_used_as_a_function_argument_too() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight)

    model = trained(One(body, conv=nn.Conv2d(3, 4, 1, bias=False), bn=nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5)
    module = fused(model, x)
    assert close_share(module(x), model(x)) <= FLOAT32


def test_a_shared_batch_norm() -> None:
    model = trained(
        One(
            lambda m, x: m.bn(m.b(m.bn(m.a(x)))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 4, 1),
            bn=nn.BatchNorm2d(4),
        )
    )
    x = torch.randn(2, 3, 5, 5)
    module = fused(model, x)
    assert names(module) == ["conv2d", "conv2d"]
    assert close_share(module(x), model(x)) <= FLOAT32
