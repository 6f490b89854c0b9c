"""Pattern expressions: what can be written, and what is refused where it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fxquant.errors import PatternError
from fxquant.patterns.expr import OpExpr, Var, chain, op, var


def test_an_op_keeps_what_it_was_given() -> None:
    expr = op("add", var("x"), op("relu", var("y"), name="act"), name="sum", alpha=1)
    assert expr.ops == ("add",)
    assert expr.attributes == (("alpha", 1),)
    assert (expr.size, expr.roots) == (2, ("add",))
    assert isinstance(expr.args[0], Var)


def test_an_optional_outermost_op_may_be_missing() -> None:
    expr = op("relu", op(("conv2d", "linear"), var("x")), optional=True)
    assert expr.roots == ("relu", "conv2d", "linear")


def test_optional_ops_nest() -> None:
    inner = op("batch_norm", op("conv2d", var("x")), optional=True)
    assert op("relu", inner, optional=True).roots == ("relu", "batch_norm", "conv2d")
    assert op("relu", inner).roots == ("relu",)


def test_a_chain_is_written_forwards() -> None:
    expr = chain("conv2d", "batch_norm", ("relu", "relu6"), names=("conv",))
    assert expr == op(("relu", "relu6"), op("batch_norm", op("conv2d", var("x"), name="conv")))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: op("conv2", var("x")), "no op is called 'conv2': there are conv1d, "),
        (lambda: op(("relu", "rleu"), var("x")), "no op is called 'rleu'"),
        (lambda: op(()), "must name at least one op"),
        (lambda: op("relu", var("x"), var("y")), "relu takes 1 tensors, not 2"),
        (lambda: op("add", var("x"), beta=1), "add has no option 'beta'"),
        (lambda: op("relu", optional=True), "needs an argument to stand in its place"),
        (lambda: chain(), "a chain needs at least one op"),
        (lambda: chain("relu", "nothing"), "no op is called 'nothing'"),
    ],
)
def test_what_can_never_match_is_refused(make: Callable[[], OpExpr], text: str) -> None:
    with pytest.raises(PatternError, match=text):
        make()


def test_a_join_takes_any_number_of_tensors() -> None:
    assert op("cat", var("a"), var("b"), var("c")).size == 1
