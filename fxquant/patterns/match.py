"""The one matcher, for fusion, lowering and user patterns.

It walks from the pattern's last op backwards. Commutative ops are tried in both orders. What does
not match is a :class:`Reject` with a sentence and the node; the nearest miss is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.fx import Node

from fxquant.graph.op_table import argument, op_of
from fxquant.graph.view import what
from fxquant.patterns.expr import Const, Expr, OpExpr, Var


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits.

    Args:
        root: the node that matched the outermost op.
        nodes: all matched op nodes, root first.
        bound: the values of named ops and variables.
    """

    root: Node
    nodes: tuple[Node, ...]
    bound: dict[str, Any]

    def node(self, name: str) -> Node:
        """The node called ``name`` in the pattern.

        Raises:
            KeyError: the pattern has no such name, or it stands for something not a node.
        """
        value = self.bound[name]
        if not isinstance(value, Node):
            raise KeyError(f"{name!r} is bound to {value!r}, which is not a node")
        return value

    def has(self, name: str) -> bool:
        """Whether an optional op called ``name`` was there."""
        return name in self.bound


@dataclass(frozen=True)
class Reject:
    """Why a pattern does not fit at a place.

    Args:
        reason: one sentence.
        node: the node that stands in the way.
        matched: how many ops had fitted before.
    """

    reason: str
    node: Node | None = None
    matched: int = 0


@dataclass
class Misses:
    """Keeps the nearest miss."""

    best: Reject | None = None

    def add(self, reject: Reject) -> None:
        """Remember ``reject`` if more had fitted than in any before."""
        if self.best is None or reject.matched > self.best.matched:
            self.best = reject


@dataclass(frozen=True)
class _State:
    nodes: tuple[Node, ...] = ()
    bound: dict[str, Any] = field(default_factory=dict)

    def with_node(self, node: Node, name: str | None) -> _State:
        bound = {**self.bound, name: node} if name else self.bound
        return _State((*self.nodes, node), bound)


def find(
    expr: OpExpr, root: Node, misses: Misses | None = None, *, after: Match | None = None
) -> Iterator[Match]:
    """Every way in which ``expr`` fits with its outermost op at ``root``.

    Args:
        expr: the pattern.
        root: the candidate for its last op.
        misses: keeps the nearest miss, if given.
        after: a match of another output of the same pattern, to which this one is joined.
    """
    notes = misses if misses is not None else Misses()
    start = _State() if after is None else _State(after.nodes, after.bound)
    for state in _expr(expr, root, start, notes, None):
        inside = dict.fromkeys(state.nodes)
        twice = [v for v in _variables(expr, state) if isinstance(v, Node) and v in inside]
        if twice:
            notes.add(
                Reject(
                    f"{what(twice[0])} %{twice[0].name} is both inside the pattern and its input",
                    twice[0],
                    len(state.nodes),
                )
            )
            continue
        yield Match(root if after is None else after.root, tuple(inside), state.bound)


def _variables(expr: Expr, state: _State) -> Iterator[Any]:
    if isinstance(expr, Var):
        yield state.bound.get(expr.name)
        return
    if isinstance(expr, Const):
        return
    for arg in expr.args:
        yield from _variables(arg, state)


def _expr(
    expr: Expr, value: Any, state: _State, misses: Misses, reader: Node | None
) -> Iterator[_State]:
    """Match ``value``, which ``reader`` reads; the outermost op has no reader."""
    if not isinstance(expr, OpExpr):
        bound = _leaf(expr, value, state, reader)
        if isinstance(bound, Reject):
            misses.add(bound)
        else:
            yield bound
        return
    if expr.name in state.bound:
        if state.bound[expr.name] is value:
            yield state
        else:
            misses.add(Reject(f"{expr.name!r} would be two ops", _node(value), len(state.nodes)))
        return
    why = _refuses(expr, value, reader)
    if why is None:
        found = _options(expr, value, state.with_node(value, expr.name))
        if isinstance(found, Reject):
            misses.add(found)
        else:
            yield from _arguments(expr, value, found, misses)
    elif expr.optional:
        yield from _expr(expr.args[0], value, state, misses, reader)
    else:
        # The right op with something in the way is nearer than another op.
        right = reader is not None and _name(value) in expr.ops
        misses.add(Reject(why, _node(value), len(state.nodes) + right))


def _name(value: Any) -> str:
    op = op_of(value) if isinstance(value, Node) else None
    return op.name if op is not None else ""


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None


def _leaf(expr: Var | Const, value: Any, state: _State, reader: Node | None) -> _State | Reject:
    """Bind a variable, or compare a constant."""
    if isinstance(expr, Const):
        if expr.fits(value):
            return state
        found = f"%{value.name}" if isinstance(value, Node) else repr(value)
        return Reject(f"expected {expr.value!r}, found {found}", reader, len(state.nodes))
    if expr.name in state.bound:
        before = state.bound[expr.name]
        # Constants have no identity: 0.5 here and 0.5 there are one value.
        if before is value or (not isinstance(before, Node) and Const(before).fits(value)):
            return state
        return Reject(f"{expr.name!r} would stand for two values", None, len(state.nodes))
    why = expr.check(value) if expr.check is not None else None
    if why is not None:
        return Reject(f"{expr.name!r} {why}", _node(value) or reader, len(state.nodes))
    return _State(state.nodes, {**state.bound, expr.name: value})


def _options(expr: OpExpr, node: Node, state: _State) -> _State | Reject:
    """Bind the options that variables stand for."""
    for option, wanted in expr.attributes:
        if isinstance(wanted, Var):
            found = _leaf(wanted, argument(node, option), state, node)
            if isinstance(found, Reject):
                return found
            state = found
    return state


def _refuses(expr: OpExpr, value: Any, reader: Node | None) -> str | None:
    """Why a value is not the op that ``expr`` asks for."""
    if not isinstance(value, Node):
        return f"expected {' or '.join(expr.ops)}, found the constant {value!r}"
    op = op_of(value)
    if op is None or op.name not in expr.ops:
        return f"expected {' or '.join(expr.ops)}, found {what(value)} %{value.name}"
    if reader is not None and not expr.shared and len(value.users) > 1:
        others = ", ".join(f"%{u.name}" for u in islice(value.users, 4) if u is not reader)
        return f"{op.name} %{value.name} has more than one user: {others}"
    for option, wanted in expr.attributes:
        if isinstance(wanted, Var):
            continue
        found = argument(value, option)
        if found != wanted and not Const(wanted).fits(found):
            return f"{op.name} %{value.name} has {option}={found!r}, not {wanted!r}"
    return expr.check(value) if expr.check is not None else None


def _arguments(expr: OpExpr, node: Node, state: _State, misses: Misses) -> Iterator[_State]:
    op = op_of(node)
    given = list(node.args[: len(expr.args)])
    if op is not None and op.tensors == ("tensors",) and node.args:
        first = node.args[0]
        given = list(first) if isinstance(first, tuple | list) else [first]
    if len(given) < len(expr.args):
        misses.add(Reject(f"%{node.name} has {len(given)} tensors", node, len(state.nodes)))
        return
    orders = [given]
    commutes = op is not None and op.commutes and not expr.ordered
    if commutes and len(given) == 2 and given[0] is not given[1]:
        orders.append(given[::-1])
    for order in orders:
        yield from _in_order(expr.args, order, state, misses, node)


def _in_order(
    exprs: tuple[Expr, ...], values: list[Any], state: _State, misses: Misses, reader: Node
) -> Iterator[_State]:
    if not exprs:
        yield state
        return
    for after in _expr(exprs[0], values[0], state, misses, reader):
        yield from _in_order(exprs[1:], values[1:], after, misses, reader)
