"""Elementwise ops of one tensor become one op: when, when not, and with what result."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.graph.chain import UnaryChain
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.passes.fuse import Fuse
from tests.helpers import (
    FLOAT32,
    FLOAT64,
    One,
    Two,
    close_share,
    fused,
    misses,
    names,
    node_of,
    options,
)

Body = Callable[[Any, Any], Any]


def new_gelu(m: Any, x: Any) -> Any:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def through(m: Any, x: Any) -> Any:
    y = x + 1
    return torch.tanh(y) * y - y.abs() / 3


WRITTEN_OUT: dict[str, tuple[Body, str, dict[str, Any]]] = {
    "silu": (lambda m, x: x * torch.sigmoid(x), "silu", {}),
    "silu reversed": (lambda m, x: x.sigmoid().mul(x), "silu", {}),
    "silu by hand": (lambda m, x: x / (1 + torch.exp(-x)), "unary", {}),
    "mish": (lambda m, x: x * torch.tanh(F.softplus(x)), "mish", {}),
    "gelu": (
        lambda m, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu",
        {"approximate": "none"},
    ),
    "NewGELU": (new_gelu, "gelu", {"approximate": "tanh"}),
    "hardswish": (lambda m, x: x * F.relu6(x + 3) / 6, "hardswish", {}),
    "hardsigmoid": (lambda m, x: F.relu6(x + 3) / 6, "hardsigmoid", {}),
}

CHAINS: dict[str, Body] = {
    "gelu, rounded": lambda m, x: 0.5 * x * (1 + torch.erf(x / 1.414)),
    "QuickGELU": lambda m, x: x * torch.sigmoid(1.702 * x),
    "a learned factor": lambda m, x: x * torch.sigmoid(m.beta * x),
    "a learned dividend": lambda m, x: m.beta / (x.abs() + 1) - m.beta,
    "over an inner value": through,
    "relu of a sum": lambda m, x: torch.relu(x + 3) * 2,
    "numbers in front": lambda m, x: 2 - 3 / (1 + 2**x),
    "products of the same": lambda m, x: x * x * x - torch.maximum(x, x.square()),
    "a long one": lambda m, x: ((((x + 1) * 2).tanh() - 0.5).abs() + 0.1).log().exp().sqrt(),
}


def model(body: Body) -> nn.Module:
    parts = {"beta": nn.Parameter(torch.tensor(1.3)), "lin": nn.Linear(6, 6)}
    return One(body, **parts, last=nn.Linear(6, 6)).eval()


def check_outputs(body: Body, x: Tensor) -> None:
    """The same outputs in float32 and in float64, and nothing more to do in a second run."""
    whole = model(body)
    module = fused(whole, x)
    with torch.no_grad():
        assert close_share(module(x), whole(x)) <= FLOAT32
        double = fused(whole.double(), x.double())
        assert close_share(double(x.double()), whole(x.double())) <= FLOAT64
    again = Editor(module)
    Fuse().run(again)
    assert again.log == []


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_ops_written_out_are_recognised(name: str) -> None:
    body, op, given = WRITTEN_OUT[name]
    x = 4 * torch.randn(64, 6)
    module = fused(model(body), x)
    assert names(module) == [op] or (op == "unary" and names(module) == ["silu"])
    if op != "unary":
        assert options(node_of(module, op)) == given
    check_outputs(body, x)


@pytest.mark.parametrize("name", CHAINS)
def test_other_chains_become_one_op(name: str) -> None:
    x = 3 * torch.randn(64, 6)
    module = fused(model(CHAINS[name]), x)
    assert names(module) == ["unary"]
    chain = module_of(node_of(module, "unary"))
    assert isinstance(chain, UnaryChain)
    assert torch.equal(pickle.loads(pickle.dumps(chain))(x), chain(x))
    assert "x" in repr(chain)
    check_outputs(CHAINS[name], x)


def test_a_recognised_op_joins_its_layer() -> None:
    module = fused(model(lambda m, x: m.last(new_gelu(m, m.lin(x)))), torch.randn(4, 6))
    assert names(module) == ["linear", "gelu", "linear"]
    assert node_of(module, "gelu").meta["fxquant"].unit == node_of(module, "linear").name


NOT: dict[str, tuple[Body, list[str], str]] = {
    "an inner value is read elsewhere": (
        lambda m, x: (y := torch.sigmoid(x), y * 2 + y.mean())[1],
        ["sigmoid", "mul", "mean", "add"],
        "is also read by",
    ),
    "an inner value is returned": (
        lambda m, x: (y := torch.sigmoid(x), (x * y, y))[1],
        ["sigmoid", "mul"],
        "is also read by",
    ),
    "two tensors are mixed": (
        lambda m, x: torch.sigmoid(m.lin(x)) * x.tanh(),
        ["linear", "sigmoid", "tanh", "mul"],
        "it mixes",
    ),
    "a tensor of constants": (
        lambda m, x: torch.sigmoid(x) * m.lin.bias,
        ["sigmoid", "mul"],
        "",
    ),
    "a size": (lambda m, x: torch.sigmoid(x) * x.size(0), ["sigmoid", "size", "mul"], ""),
    "one op": (lambda m, x: torch.sigmoid(x), ["sigmoid"], ""),
    "a reduction between": (lambda m, x: x.exp() / x.exp().sum(1, keepdim=True),
        ["exp", "exp", "sum", "div"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT)
def test_what_stays_apart(name: str) -> None:
    body, wanted, reason = NOT[name]
    x = torch.randn(4, 6)
    assert names(fused(model(body), x)) == wanted
    told = [why for rule, _, why in misses(model(body), x) if rule == "fuse-unary"]
    assert not reason or any(reason in why for why in told), told


def test_two_inputs_are_never_one_chain() -> None:
    module = fused(Two(lambda m, x, y: x * torch.sigmoid(y)).eval(), torch.ones(3), torch.ones(3))
    assert names(module) == ["sigmoid", "mul"]


def test_an_override_inside_keeps_the_ops_apart() -> None:
    x = torch.randn(4, 6)
    module = fused(model(CHAINS["QuickGELU"]), x, overrides=((torch.sigmoid, None),))
    assert "sigmoid" in names(module)


@pytest.mark.parametrize("name", ("QuickGELU", "a learned factor", "over an inner value"))
def test_a_chain_between_layers_is_one_table(name: str) -> None:
    whole = model(lambda m, x: m.last(CHAINS[name](m, m.lin(x))))
    q = fxquant.quantize(whole, [torch.randn(512, 6) for _ in range(3)])
    ops = fxquant.report(q).ops
    assert [op.op for op in ops] == ["linear", "unary", "linear"]
    kernels = [op.kernel for op in ops]
    assert kernels in (
        ["X86Linear", "TableCodes", "X86Linear"],
        ["X86Linear", "float", "X86Linear"],
    )
