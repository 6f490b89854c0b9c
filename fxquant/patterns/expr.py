"""Pattern expressions: what a fusion, lowering or user pattern looks like, over canonical ops.

    bn_of_conv = op("batch_norm", op(CONVS, var("x"), name="conv"), name="bn")

An expression names ops, never spellings. Interior ops must have one user, unless ``shared``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxquant.errors import PatternError
from fxquant.graph.op_table import has_op, op_names
from fxquant.graph.op_table import op_named as find_op

NodeCheck = Callable[[Node], "str | None"]
"""Looks at one node; ``None`` if it will do, else the reason why not."""
ValueCheck = Callable[[Any], "str | None"]
"""Looks at one argument, a node or a constant; ``None`` if it will do, else why not."""


@dataclass(frozen=True)
class Var:
    """Matches any value; the same name must bind the same value everywhere.

    Args:
        name: how rules call the value.
        check: a further condition on the value.
    """

    name: str
    check: ValueCheck | None = None


@dataclass(frozen=True)
class Const:
    """Matches one constant, a number or an option such as ``(2, 3)``.

    Args:
        value: the constant.
    """

    value: Any

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is that constant; a list says the same as a tuple."""
        if isinstance(value, Node) or isinstance(value, bool) is not isinstance(self.value, bool):
            return False
        return bool(_plain(value) == _plain(self.value))


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class OpExpr:
    """Matches a call of one of several canonical ops.

    Args:
        ops: names of the ops.
        args: expressions of the leading tensor arguments; arguments beyond them match anything.
        name: how rules call the node; the same name must be the same node everywhere.
        attributes: option name and the value it must have, or a :class:`Var` that it binds.
        check: a further condition on the node.
        optional: whether it may be missing, its first argument standing in its place.
        shared: whether others than the pattern may read it too.
        ordered: whether operands must stand as written, even where the op commutes.
    """

    ops: tuple[str, ...]
    args: tuple[Expr, ...]
    name: str | None = None
    attributes: tuple[tuple[str, Any], ...] = ()
    check: NodeCheck | None = None
    optional: bool = False
    shared: bool = False
    ordered: bool = False

    @property
    def size(self) -> int:
        """How many ops it names."""
        return 1 + sum(arg.size for arg in self.args if isinstance(arg, OpExpr))

    @property
    def roots(self) -> tuple[str, ...]:
        """The ops its outermost node may be."""
        first = self.args[0] if self.args else None
        inner = first.roots if self.optional and isinstance(first, OpExpr) else ()
        return tuple(dict.fromkeys((*self.ops, *inner)))


Expr = Var | Const | OpExpr


def var(name: str) -> Var:
    """Any value."""
    return Var(name)


def op(
    names: str | tuple[str, ...],
    *args: Expr,
    name: str | None = None,
    check: NodeCheck | None = None,
    optional: bool = False,
    shared: bool = False,
    **attributes: Any,
) -> OpExpr:
    """A call of one of the named ops, such as ``op("add", var("x"), var("y"), alpha=1)``.

    Raises:
        PatternError: an op or an option that does not exist, or more arguments than it has.
    """
    ops = (names,) if isinstance(names, str) else tuple(names)
    if not ops:
        raise PatternError("a pattern must name at least one op")
    for each in ops:
        if not has_op(each):
            raise PatternError(f"no op is called {each!r}: there are {', '.join(op_names())}")
        record = find_op(each)
        if len(args) > len(record.tensors) and record.tensors != ("tensors",):
            raise PatternError(f"{each} takes {len(record.tensors)} tensors, not {len(args)}")
        for option in attributes:
            if option not in record.options:
                raise PatternError(f"{each} has no option {option!r}: it has {record.options}")
    if optional and not args:
        raise PatternError("an optional op needs an argument to stand in its place")
    return OpExpr(
        ops, tuple(args), name, tuple(attributes.items()), check, optional=optional, shared=shared
    )


def chain(*steps: str | tuple[str, ...], names: tuple[str | None, ...] = ()) -> OpExpr:
    """Ops in forward order, each reading the one before: ``chain("conv2d", "batch_norm")``.

    Args:
        steps: op names, or tuples of alternatives, first op first.
        names: how rules call the nodes, in the same order.

    Raises:
        PatternError: there is no step, or an op does not exist.
    """
    if not steps:
        raise PatternError("a chain needs at least one op")
    called = (*names, *([None] * (len(steps) - len(names))))
    expr: Expr = Var("x")
    for step, name in zip(steps, called, strict=True):
        expr = op(step, expr, name=name)
    if not isinstance(expr, OpExpr):
        raise PatternError("a chain needs at least one op")
    return expr
