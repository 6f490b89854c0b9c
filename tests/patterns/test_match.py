"""The matcher, on small graphs made of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.op_table import argument
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Misses, find
from tests.helpers import One, Two, canonical, node_of, nodes

X, Y = torch.randn(2, 3), torch.randn(2, 3)


def graph(body: Callable[..., Any], **parts: Any) -> GraphModule:
    return canonical(Two(body, **parts).eval(), X, Y)


def at_end(module: GraphModule, expr: OpExpr) -> list[Match]:
    return list(find(expr, nodes(module)[-1]))


def miss(module: GraphModule, expr: OpExpr, root: Node | None = None) -> str:
    misses = Misses()
    assert list(find(expr, root or nodes(module)[-1], misses)) == []
    assert misses.best is not None
    return misses.best.reason


def test_a_chain_binds_its_nodes_root_first() -> None:
    module = graph(lambda m, x, y: torch.tanh(torch.relu(x)))
    expr = op("tanh", op("relu", var("x"), name="act"), name="out")
    (match,) = at_end(module, expr)
    relu, tanh = nodes(module)
    assert match.root is tanh
    assert match.nodes == (tanh, relu)
    assert match.node("act") is relu and match.node("x").name == "x"
    assert match.has("out") and not match.has("other")
    with pytest.raises(KeyError):
        match.node("other")


def test_commutative_ops_match_in_both_orders() -> None:
    expr = op("add", op("relu", var("x")), var("y"))
    for body in (lambda m, x, y: torch.relu(x) + y, lambda m, x, y: y + torch.relu(x)):
        (match,) = at_end(graph(body), expr)
        assert (match.node("x").name, match.node("y").name) == ("x", "y")


def test_both_orders_are_offered_where_both_fit() -> None:
    module = graph(lambda m, x, y: torch.relu(x) * torch.relu(y))
    expr = op("mul", op("relu", var("a"), name="act"), var("b"))
    assert [m.node("a").name for m in at_end(module, expr)] == ["x", "y"]


def test_ops_that_do_not_commute_match_in_one_order() -> None:
    expr = op("sub", op("relu", var("x")), var("y"))
    assert at_end(graph(lambda m, x, y: torch.relu(x) - y), expr)
    assert not at_end(graph(lambda m, x, y: y - torch.relu(x)), expr)


def test_a_variable_stands_for_one_value() -> None:
    expr = op("mul", var("x"), op("sigmoid", var("x")))
    (match,) = at_end(graph(lambda m, x, y: x * torch.sigmoid(x)), expr)
    assert match.node("x").name == "x"
    assert at_end(graph(lambda m, x, y: torch.sigmoid(x) * x), expr)
    assert "would stand for two values" in miss(graph(lambda m, x, y: y * torch.sigmoid(x)), expr)


def test_the_same_number_twice() -> None:
    expr = op("add", op("mul", var("x"), var("k")), var("k"))
    assert at_end(graph(lambda m, x, y: x * 2 + 2), expr)
    assert not at_end(graph(lambda m, x, y: x * 2 + 3), expr)


def test_a_plus_a() -> None:
    module = graph(lambda m, x, y: _twice(x))
    assert len(at_end(module, op("add", var("a"), var("a")))) == 1
    assert len(at_end(module, op("add", var("a"), var("b")))) == 1
    # One user, read twice: inside the pattern on one side and its input on the other.
    expr = op("add", op("relu", var("x")), var("b"))
    assert "both inside the pattern and its input" in miss(module, expr)
    both = op("add", op("relu", var("x")), op("relu", var("x")))
    assert at_end(module, both)


def _twice(x: Any) -> Any:
    y = torch.relu(x)
    return y + y


def test_an_optional_op_may_be_missing() -> None:
    expr = op("tanh", op("relu", var("x"), name="act", optional=True))
    (with_it,) = at_end(graph(lambda m, x, y: torch.tanh(torch.relu(x))), expr)
    (without,) = at_end(graph(lambda m, x, y: torch.tanh(x)), expr)
    assert with_it.has("act") and not without.has("act")
    assert without.node("x").name == "x"


def test_an_optional_outermost_op() -> None:
    expr = op("relu", op("tanh", var("x"), name="inner"), name="act", optional=True)
    (with_it,) = at_end(graph(lambda m, x, y: torch.relu(torch.tanh(x))), expr)
    (without,) = at_end(graph(lambda m, x, y: torch.tanh(x)), expr)
    assert with_it.has("act") and not without.has("act")


def test_alternatives() -> None:
    expr = op(("relu", "tanh"), var("x"), name="act")
    for body in (lambda m, x, y: torch.relu(x), lambda m, x, y: torch.tanh(x)):
        assert at_end(graph(body), expr)
    assert miss(graph(lambda m, x, y: torch.sigmoid(x)), expr) == (
        "expected relu or tanh, found sigmoid %sigmoid"
    )


def test_an_interior_op_must_have_one_user() -> None:
    def body(m: Any, x: Any, y: Any) -> Any:
        a = torch.relu(x)
        return a + y, torch.tanh(a)

    expr = op("tanh", op("relu", var("x")))
    assert miss(graph(body), expr) == "relu %relu has more than one user: %add"
    assert at_end(graph(body), op("tanh", op("relu", var("x"), shared=True)))


def test_the_outermost_op_may_have_many_users() -> None:
    module = graph(lambda m, x, y: _fan(torch.relu(x)))
    assert list(find(op("relu", var("x")), node_of(module, "relu")))


def _fan(x: Any) -> Any:
    return x + 1, x + 2


def test_attributes_guard() -> None:
    expr = op("add", var("x"), var("y"), alpha=1)
    assert at_end(graph(lambda m, x, y: x + y), expr)
    assert miss(graph(lambda m, x, y: torch.add(x, y, alpha=2)), expr) == (
        "add %add has alpha=2, not 1"
    )


def test_attributes_of_modules_guard() -> None:
    def model(stride: int) -> GraphModule:
        conv = nn.Conv2d(3, 4, 3, stride=stride)
        return canonical(One(lambda m, x: m.conv(x), conv=conv).eval(), torch.randn(1, 3, 5, 5))

    expr = op("conv2d", var("x"), stride=(2, 2), groups=1)
    assert at_end(model(2), expr)
    assert "stride=(1, 1), not (2, 2)" in miss(model(1), expr)


@pytest.mark.parametrize("name", [None, "sum"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_checks_run_on_every_kind_of_node(name: str | None, optional: bool, inner: bool) -> None:
    seen: list[Node] = []

    def refuse(node: Node) -> str | None:
        seen.append(node)
        return f"alpha is {argument(node, 'alpha')}" if argument(node, "alpha") != 1 else None

    expr = op("add", var("x"), var("y"), name=name, check=refuse, optional=optional)
    expr = op("relu", expr) if inner else expr
    act = torch.relu if inner else (lambda x: x)
    assert at_end(graph(lambda m, x, y: act(x + y)), expr)
    module = graph(lambda m, x, y: act(torch.add(x, y, alpha=2)))
    found = at_end(module, expr)
    # An optional op that fails its check counts as missing: its argument is matched instead.
    assert (found != []) is optional
    assert not any(m.has("sum") for m in found)
    assert node_of(module, "add") in seen


def test_an_interior_node_that_is_also_an_input() -> None:
    def body(m: Any, x: Any, y: Any) -> Any:
        a = torch.relu(x)
        return torch.tanh(a) + a

    expr = op("add", op("tanh", op("relu", var("x"), shared=True)), var("b"))
    assert miss(graph(body), expr) == "relu %relu is both inside the pattern and its input"


def test_a_constant_is_no_op() -> None:
    expr = op("add", var("x"), op("relu", var("y")))
    assert miss(graph(lambda m, x, y: x + 2), expr) == "expected relu, found the constant 2"


def test_joins_match_their_list() -> None:
    expr = op("cat", op("relu", var("a")), var("b"), dim=1)
    (match,) = at_end(graph(lambda m, x, y: torch.cat([torch.relu(x), y], 1)), expr)
    assert (match.node("a").name, match.node("b").name) == ("x", "y")
    short = op("cat", var("a"), var("b"), var("c"))
    assert miss(graph(lambda m, x, y: torch.cat([x, y], 1)), short) == "%cat has 2 tensors"


def test_the_nearest_miss_is_kept() -> None:
    deep = op("tanh", op("relu", op("sigmoid", var("x"))))
    module = graph(lambda m, x, y: torch.tanh(torch.relu(torch.exp(x))))
    misses = Misses()
    assert list(find(deep, nodes(module)[-1], misses)) == []
    assert misses.best is not None
    assert misses.best.reason == "expected sigmoid, found exp %exp"
    assert misses.best.matched == 2
    assert misses.best.node is node_of(module, "exp")
    # A later, earlier-failing try does not displace it.
    assert list(find(deep, node_of(module, "relu"), misses)) == []
    assert misses.best.matched == 2


def test_a_diamond_matches_once() -> None:
    def body(m: Any, x: Any, y: Any) -> Any:
        a = torch.relu(x)
        return torch.tanh(a) * torch.sigmoid(a)

    shared = op("relu", var("x"), shared=True)
    expr = op("mul", op("tanh", shared), op("sigmoid", shared))
    (match,) = at_end(graph(body), expr)
    assert match.node("x").name == "x"
    assert [n.name for n in match.nodes] == ["mul", "tanh", "relu", "sigmoid"]


def test_search_of_a_deep_sum_stays_small() -> None:
    """Both orders of each of twenty sums: a million ways, of which one is looked for first."""

    def body(m: Any, x: Any, y: Any) -> Any:
        for _ in range(20):
            x = x + y
        return x

    expr: OpExpr = op("add", var("x"), var("y0"))
    for _ in range(19):
        expr = op("add", expr, var("y"))
    module = graph(body)
    assert next(find(expr, nodes(module)[-1])).node("y").name == "y"
