"""From the canonical graph of a pattern function to what the matcher looks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.custom.conditions import is_constant, is_number, is_one_of, is_tensor, joins
from fxquant.custom.parameters import Parameter
from fxquant.custom.trace import Stand
from fxquant.errors import PatternError
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, module_of, op_named, op_of
from fxquant.graph.ops import Kind, Op
from fxquant.graph.view import flat_nodes, what
from fxquant.patterns.custom_units import NOT_IN_A_UNIT, Names
from fxquant.patterns.expr import Const, Expr, OpExpr, Var
from fxquant.patterns.norm import CONVS, LINEAR, TRANSPOSED


@dataclass(frozen=True)
class Compiled:
    """What the matcher looks for.

    Args:
        root: the output that is looked for first.
        also: outputs that ``root`` does not lead to.
        names: how the pattern calls what it matches.
        inner: every op of the pattern with the ops that read it, for near misses.
    """

    root: OpExpr
    also: tuple[OpExpr, ...]
    names: Names
    inner: tuple[OpExpr, ...] = ()


@dataclass
class _Compiler:
    """Makes one expression of every node.

    Args:
        parameters: by name.
        line: where the pattern is written.
        ordered: whether operands must stand as written.
        whole: whether what it matches is replaced, and may hold ops that no unit can.
    """

    parameters: Mapping[str, Parameter]
    line: str
    ordered: bool
    whole: bool
    made: dict[Node, Expr] = field(default_factory=dict)

    def expr(self, value: Any) -> Expr:
        """What matches an argument."""
        if not isinstance(value, Node):
            if any(flat_nodes(value)):
                raise self.error("an argument that is computed inside a list or a slice")
            return Const(value)
        if value not in self.made:
            self.made[value] = self._node(value)
        return self.made[value]

    def error(self, what_is: str, node: Node | None = None) -> PatternError:
        """The error for something no pattern can look for."""
        where = info(node).source if node is not None else ""
        return PatternError(f"{where or self.line}: this pattern has {what_is}")

    def _node(self, node: Node) -> Expr:
        if node.op == "placeholder":
            return self._input(self.parameters[str(node.target)])
        if node.op == "get_attr":
            raise self.error(
                "a tensor of its own, which no model holds: take it as a parameter", node
            )
        if node.op == "call_module" and isinstance(module_of(node), Stand):
            return self._stand(node)
        found = op_of(node)
        if found is None:
            why = info(node).opaque or "the op table does not know it"
            if "its weight" in why:
                why += "; take the layer as a parameter, such as `layer: nn.Linear`, and call it"
            raise self.error(f"{what(node)}, which can never match: {why}", node)
        self._check(found, node)
        attributes = tuple((name, self._option(argument(node, name))) for name in found.options)
        expressions, check = self._tensors(found, node)
        return OpExpr(
            (found.name,), expressions, f"%{node.name}", attributes, check,
            shared=True, ordered=self.ordered,
        )  # fmt: skip

    def _check(self, found: Op, node: Node) -> None:
        if found.target is None:
            classes = " or ".join(f"nn.{cls.__name__}" for cls in found.modules[:1])
            raise self.error(
                f"{found.name} as a function; its weight belongs to a layer: take the layer as a "
                f"parameter, such as `layer: {classes}`, and call it",
                node,
            )
        why = NOT_IN_A_UNIT.get(found.kind)
        if why is not None and (not self.whole or found.kind is Kind.SHAPE):
            raise self.error(f"{found.name}, which cannot be inside a unit: {why}", node)

    def _tensors(self, found: Op, node: Node) -> tuple[tuple[Expr, ...], Any]:
        if found.tensors != ("tensors",):
            return tuple(self.expr(value) for value in node.args), None
        parts = node.args[0]
        if not isinstance(parts, tuple | list):
            raise self.error(f"{found.name} of something that is no list of tensors", node)
        return tuple(self.expr(part) for part in parts), joins(len(parts))

    def _option(self, value: Any) -> Any:
        if not isinstance(value, Node):
            if any(flat_nodes(value)):
                raise self.error("an option that is computed inside a list")
            return value
        if value.op == "placeholder":
            return self.expr(value)
        raise self.error("an option that is computed: only a parameter can stand for one", value)

    def _input(self, parameter: Parameter) -> Var:
        checks = {"number": is_number, "constant": is_constant}
        return Var(parameter.name, checks.get(parameter.kind, is_tensor))

    def _stand(self, node: Node) -> Expr:
        stand = module_of(node)
        assert isinstance(stand, Stand)
        parameter = stand.parameter
        if not node.args and not node.kwargs:
            raise self.error(f"{parameter.name}() without an input", node)
        if node.kwargs:
            raise self.error(f"{parameter.name} called with keywords: give them by place", node)
        given = tuple(self.expr(value) for value in node.args)
        gone = [cls for cls in parameter.classes if issubclass(cls, nn.Identity)]
        if gone and len(gone) == len(parameter.classes) and not parameter.functions:
            return given[0]  # models lose theirs too
        ops = parameter.ops
        for name in ops:
            self._check_stand(op_named(name), parameter, node)
        optional = parameter.optional or bool(gone) or ops == ("dropout",)
        made = OpExpr(
            ops, given, parameter.name, (), is_one_of(parameter.classes, parameter.functions),
            optional=optional, shared=True, ordered=self.ordered,
        )  # fmt: skip
        return made if self.whole else self._with_norm(made, node)

    def _with_norm(self, made: OpExpr, node: Node) -> OpExpr:
        """A layer with the batch norm that is folded into it: one layer, when it is quantized."""
        readers = [module_of(user) for user in node.users if user.op == "call_module"]
        says_so = any(isinstance(r, Stand) and "batch_norm" in r.parameter.ops for r in readers)
        if says_so or not set(made.ops) <= {*CONVS, *TRANSPOSED, *LINEAR}:
            return made
        name = f"%{made.name}_norm"
        return OpExpr(("batch_norm",), (made,), name, optional=True, shared=True)

    def _check_stand(self, found: Op, parameter: Parameter, node: Node) -> None:
        if found.tensors != ("tensors",) and len(node.args) > len(found.tensors):
            raise self.error(
                f"{parameter.name} called with {len(node.args)} inputs, and {found.name} takes "
                f"{len(found.tensors)}",
                node,
            )
        why = NOT_IN_A_UNIT.get(found.kind)
        if why is not None and (not self.whole or found.kind is Kind.SHAPE):
            raise self.error(f"{found.name}, which cannot be inside a unit: {why}", node)


def compile_graph(
    module: GraphModule, parameters: tuple[Parameter, ...], line: str, *, ordered: bool, whole: bool
) -> Compiled:
    """What the matcher looks for to find the graph of a pattern.

    Args:
        module: the canonical graph.
        parameters: of the pattern.
        line: where it is written, for messages.
        ordered: whether operands must stand as written.
        whole: whether what it matches is replaced rather than made a unit.

    Raises:
        PatternError: the pattern can never match.
    """
    compiler = _Compiler({p.name: p for p in parameters}, line, ordered, whole)
    result = next(node for node in module.graph.nodes if node.op == "output")
    outputs = _outputs(result.args[0], compiler)
    called: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module_of(node), Stand):
            if str(node.target) in called:
                raise compiler.error(
                    f"{node.target} called twice, and each call in a model has weights of its own: "
                    "use two parameters",
                    node,
                )
            called[str(node.target)] = node
    found = [compiler.expr(node) for node in outputs]
    exprs = [expr for expr in found if isinstance(expr, OpExpr)]
    if len(exprs) != len(found):
        raise compiler.error("an output that is one of its inputs: there is no op to look for")
    _check_used(compiler, parameters)
    last = max(range(len(outputs)), key=lambda place: outputs[place])
    root = exprs[last]
    seen = _cone(root)
    also = []
    for expr in exprs:
        if expr.name not in seen:
            also.append(expr)
            seen |= _cone(expr)
    kinds = {kind: tuple(p.name for p in parameters if p.kind == kind) for kind in _KINDS}
    names = Names(
        tuple(_last_names(expr) for expr in exprs),
        (*kinds["tensor"], *kinds["constant"]),
        kinds["number"],
        kinds["module"],
    )
    inner = tuple(dict.fromkeys(each for expr in exprs for each in _inside(expr)))
    return Compiled(root, tuple(also), names, inner)


_KINDS = ("tensor", "constant", "number", "module")


def _outputs(value: Any, compiler: _Compiler) -> list[Node]:
    given = list(value.values()) if isinstance(value, dict) else value
    found = list(given) if isinstance(given, tuple | list) else [given]
    if not found or not all(isinstance(node, Node) for node in found):
        raise compiler.error("an output that is no tensor: return what its ops compute")
    if len(dict.fromkeys(found)) != len(found):
        raise compiler.error("the same output twice")
    return found


def _last_names(expr: Expr) -> tuple[str, ...]:
    """Names of the ops that an output may end with."""
    if not isinstance(expr, OpExpr):
        return ()
    inner = _last_names(expr.args[0]) if expr.optional else ()
    return (str(expr.name), *inner)


def _inside(expr: Expr) -> Iterator[OpExpr]:
    if isinstance(expr, OpExpr):
        yield expr
        for arg in expr.args:
            yield from _inside(arg)


def _cone(expr: Expr) -> set[str | None]:
    if not isinstance(expr, OpExpr):
        return set()
    return {expr.name}.union(*(_cone(arg) for arg in expr.args))


def _check_used(compiler: _Compiler, parameters: tuple[Parameter, ...]) -> None:
    used: set[str] = set()
    made = compiler.made.values()
    for expr in (*made, *(each for e in made for each in _inside(e))):
        if isinstance(expr, Var):
            used.add(expr.name)
        elif isinstance(expr, OpExpr) and expr.name is not None:
            used.add(expr.name)
            used.update(v.name for _, v in expr.attributes if isinstance(v, Var))
    for parameter in parameters:
        only = [cls for cls in parameter.classes if issubclass(cls, nn.Identity)]
        if parameter.name not in used and not only:
            raise compiler.error(f"the parameter {parameter.name}, which leads to no output")
