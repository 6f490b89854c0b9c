"""The conditions under which an exported graph is right, checked in every call.

``torch.export`` takes one side of each branch that asks for a shape, and notes what it relied on
as text: ``L['x'].size()[2] > 4``. That text is read as arithmetic, never run as code.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import GuardError, TraceError

Condition = Callable[[Mapping[str, Any]], Any]


def check_conditions(inputs: Mapping[str, Any], conditions: tuple[str, ...]) -> None:
    """Refuse a call for which the exported graph would be the wrong one.

    Args:
        inputs: argument of ``forward`` to its value.
        conditions: what the export relied on, such as ``L['x'].size()[2] > 4``.

    Raises:
        GuardError: one of them does not hold.

    Example:
        >>> import torch
        >>> check_conditions({"x": torch.ones(2, 8)}, ("L['x'].size()[1] > 4",))
    """
    values = tuple(inputs.values())
    if has_torch_function(values):  # traced anew, as unpickling does
        handle_torch_function(check_conditions, values, inputs, conditions)
        return
    for condition in conditions:
        if not read_condition(condition)(inputs):
            said = readable(condition)
            raise GuardError(
                f"these inputs do not fit the graph: it was exported for the case {said}. Export "
                "holds one case of every branch: quantize again with example_inputs like these"
            )


def check_value(holds: Any, message: str) -> None:
    """Refuse to go on where an assertion of the user's model fails.

    Args:
        holds: the condition, a number or a tensor of one element.
        message: what was asserted.

    Raises:
        GuardError: it does not hold.
    """
    if has_torch_function((holds,)):
        handle_torch_function(check_value, (holds,), holds, message)
        return
    if not bool(holds):
        raise GuardError(f"the model asserts what does not hold in this call: {message}")


def readable(condition: str) -> str:
    """``L['x'].size()[2] > 4`` as users write it: ``x.shape[2] > 4``."""
    tree = ast.parse(condition, mode="eval")
    return ast.unparse(_Readable().visit(tree))


class _Readable(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "L":
            return ast.Name(str(_constant(node.slice)))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "size" and not node.args:
            return ast.Attribute(node.func.value, "shape")
        return node


_BINARY: Final[dict[type[ast.AST], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: Final[dict[type[ast.AST], Callable[[Any], Any]]] = {
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "min": min,
    "max": max,
    "Min": min,
    "Max": max,
    "abs": abs,
    "int": int,
    "float": float,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
    "math.sqrt": math.sqrt,
    "torch.sym_min": min,
    "torch.sym_max": max,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_ite": lambda condition, yes, no: yes if condition else no,
    "torch._sym_sqrt": math.sqrt,
    "torch.sym_sqrt": math.sqrt,
}


@functools.lru_cache(maxsize=4096)
def read_condition(text: str) -> Condition:
    """A function that evaluates ``text`` for given inputs.

    Raises:
        TraceError: it holds something that is no arithmetic on sizes.
    """
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError) as error:
        raise TraceError(
            f"torch.export relied on a condition that cannot be checked at call time: {text}"
        ) from error


def _read(tree: ast.AST) -> Condition:
    """One node of the expression as a function of the inputs; an unknown node is a KeyError."""
    match tree:
        case ast.Constant(value=value):
            return lambda inputs: value
        case ast.Subscript(value=ast.Name(id="L"), slice=key):
            name = _constant(key)
            return lambda inputs: inputs[name]
        case ast.Subscript(value=base, slice=key):
            place, holder = _constant(key), _read(base)
            return lambda inputs: holder(inputs)[place]
        case ast.Call(func=ast.Attribute(value=base, attr="size"), args=[]):
            tensor = _read(base)
            return lambda inputs: tensor(inputs).shape
        case ast.Call(func=function, args=args):
            called, parts = _FUNCTIONS[ast.unparse(function)], [_read(arg) for arg in args]
            return lambda inputs: called(*(part(inputs) for part in parts))
        case ast.BinOp(left=left, op=op, right=right):
            return _pair(_BINARY[type(op)], _read(left), _read(right))
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_read(side) for side in (left, *others)]
            tests = [
                _pair(_BINARY[type(op)], a, b)
                for op, a, b in zip(ops, sides, sides[1:], strict=False)
            ]
            return lambda inputs: all(test(inputs) for test in tests)
        case ast.BoolOp(op=op, values=values):
            joined = all if isinstance(op, ast.And) else any
            members = [_read(value) for value in values]
            return lambda inputs: joined(member(inputs) for member in members)
        case ast.UnaryOp(op=op, operand=operand):
            change, inner = _UNARY[type(op)], _read(operand)
            return lambda inputs: change(inner(inputs))
    raise KeyError(type(tree).__name__)


def _pair(op: Callable[[Any, Any], Any], left: Condition, right: Condition) -> Condition:
    return lambda inputs: op(left(inputs), right(inputs))


def _constant(tree: ast.AST) -> Any:
    if isinstance(tree, ast.Constant):
        return tree.value
    raise KeyError("an index that is no constant")
