"""Lowering of ops that compute in float between codes and codes.

quantize(layer_norm(dequantize(x)))          ->  StatisticsCodes(x)
quantize(mean(dequantize(x)))                ->  AverageCodes(x)
quantize(dequantize(x) * gamma)              ->  AffineCodes(x)
quantize(f(dequantize(x), y, ...))           ->  RealCodes(x, y, ...), whatever f is
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.rule_parts import (
    dequantized,
    is_constant,
    options_are_constant,
    options_of,
    put_op,
    quantized,
    writes_of,
)
from fxquant.backends.x86_layer_rules import codes_type, put
from fxquant.backends.x86_norms import BY_STATISTICS, StatisticsCodes
from fxquant.backends.x86_real import (
    AffineCodes,
    RealCodes,
    SlopeCodes,
    SoftmaxCodes,
)
from fxquant.backends.x86_reduce import AVERAGES, AverageCodes
from fxquant.graph.edit import Editor
from fxquant.graph.flow import moves_codes
from fxquant.graph.held import held_tensor
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, is_op, module_of, op_of
from fxquant.graph.view import flat_nodes, tensor_sources
from fxquant.patterns.boundary import DEQUANTIZE
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import affine_of
from fxquant.patterns.rule import Rule

PAIRS: Final = ("add", "sub", "mul", "div")
REAL: Final = (
    *PAIRS,
    *("maximum", "minimum", "addcmul", "addcdiv", "lerp"),
    *("normalize", "local_response_norm", "norm", "vector_norm", "glu"),
)
"""Ops that :class:`RealCodes` runs, whatever codes and floats they read."""


def _name(match: Match) -> str:
    found = op_of(match.node("op"))
    return found.name if found is not None else ""


def _statistics(match: Match, editor: Editor) -> None:
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    norm = module_of(match.node("op"))
    put_op(match, editor, StatisticsCodes(_name(match), norm, reads, writes), "dq")


def takes_its_own_statistics(match: Match) -> Reject | None:
    """An instance norm that tracks statistics is a map with fixed factors."""
    node = match.node("op")
    if getattr(module_of(node), "track_running_stats", False):
        return Reject("it uses the statistics of its training", node)
    return None


def _fixed_statistics(match: Match, editor: Editor) -> None:
    scale, shift = affine_of(module_of(match.node("op")))
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    relu = "relu" in match.bound
    put_op(match, editor, AffineCodes(scale, shift, reads, writes, relu=relu, channels=True), "dq")


def has_fixed_statistics(match: Match) -> Reject | None:
    """A norm with running statistics is an affine map, one for each channel."""
    node = match.node("op")
    if getattr(module_of(node), "running_mean", None) is None:
        return Reject("it tracks no running statistics", node)
    single = getattr(module_of(node), "_get_no_batch_dim", None)
    shape = info(match.node("dq")).shape
    if single is not None and (shape is None or len(shape) == single()):
        return Reject("its input has no batch", node)
    return None


def _average(match: Match, editor: Editor) -> None:
    node = match.node("op")
    options = options_of(node)
    computed = {name: value for name, value in options.items() if not is_constant(value)}
    fixed = {name: value for name, value in options.items() if name not in computed}
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    module = AverageCodes(_name(match), fixed, reads, writes, tuple(computed))
    if not computed:
        put_op(match, editor, module, "dq")
        return
    path = editor.add_module(info(node).path or match.root.name, module)
    inputs = (match.node("dq").args[0], *computed.values())
    made = editor.call_module(path, inputs, like=node, before=match.root)
    editor.annotate(
        made,
        writes=writes,
        reads=(reads,),
        value="tensor",
        decision=info(node).decision,
        shape=info(match.root).shape,
    )
    editor.replace(match.root, made, *match.nodes[1:])


def averages(match: Match) -> Reject | None:
    """Nearest neighbours move codes; the rest of the options may be computed, if by numbers."""
    node = match.node("op")
    if moves_codes(node):
        return Reject("it moves codes", node)
    rest = (node.args[1:], dict(node.kwargs))
    if any(info(n).value not in ("scalar", "sizes") for n in flat_nodes(rest)):
        return Reject("one of its options is a tensor", node)
    return None


def _softmax(match: Match, editor: Editor) -> None:
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    dim = argument(match.node("op"), "dim")
    put_op(match, editor, SoftmaxCodes(_name(match), dim, reads, writes), "dq")


def _slope(match: Match, editor: Editor) -> None:
    reads, writes = codes_type(match.node("dq")), writes_of(match)
    slope = module_of(match.node("op")).get_parameter("weight").detach().clone()
    put_op(match, editor, SlopeCodes(slope, reads, writes), "dq")


def _operands(node: Node) -> list[tuple[Node, QType | None]]:
    """What each tensor argument is read from: codes and their type, or a float tensor."""
    found: list[tuple[Node, QType | None]] = []
    for source in tensor_sources(node):
        codes = source.args[0] if is_op(source, DEQUANTIZE) else None
        if isinstance(codes, Node):
            found.append((codes, codes_type(source)))
        else:
            found.append((source, None))
    return found


def reads_codes(match: Match) -> Reject | None:
    """Something of what it reads must be codes, and all of it tensors."""
    node = match.node("op")
    count = len(op_of(node).tensors)  # type: ignore[union-attr]  # the pattern that matched has it
    operands = _operands(node)
    if len(operands) != count or any(info(n).value in ("scalar", "sizes") for n, _ in operands):
        return Reject("one of its operands is a number", node)
    if not any(qtype is not None for _, qtype in operands):
        return Reject("it reads no codes", node)
    return None


def _real(match: Match, editor: Editor) -> None:
    node = match.node("op")
    operands = _operands(node)
    reads = tuple(qtype for _, qtype in operands)
    relu = "relu" in match.bound
    module = RealCodes(_name(match), options_of(node), reads, writes_of(match), relu)
    inputs = tuple(source for source, _ in operands)
    put(match, editor, module, inputs, writes_of(match), path=info(node).path, like=node)


def _constant_of(match: Match) -> tuple[Tensor, QType, Node, bool] | None:
    """The constant operand of a pair, type and node of the codes, whether the codes come first."""
    node = match.node("op")
    operands = _operands(node)
    if len(operands) != 2:
        return None
    for place in (0, 1):
        (codes, qtype), (held, other) = operands[place], operands[1 - place]
        if qtype is None or other is not None or held.op != "get_attr":
            continue
        tensor = held_tensor(held)
        if tensor is not None and tensor.is_floating_point():
            return tensor.detach(), qtype, codes, place == 0
    return None


def takes_a_constant(match: Match) -> Reject | None:
    """A parameter or buffer, on the side where the result is affine in the codes."""
    found = _constant_of(match)
    if found is None:
        return Reject("no operand is a constant tensor", match.node("op"))
    if _name(match) == "div" and not found[3]:
        return Reject("it divides the constant", match.node("op"))
    return None


def _affine(match: Match, editor: Editor) -> None:
    found = _constant_of(match)
    if found is None:
        return
    constant, reads, codes, first = found
    node, name = match.node("op"), _name(match)
    factor, term = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    alpha = float(argument(node, "alpha")) if name in ("add", "sub") else 1.0
    sign = -1.0 if name == "sub" else 1.0
    if name in ("mul", "div"):
        factor = constant.double() if name == "mul" else 1.0 / constant.double()
    elif first:
        term = constant.double() * (alpha * sign)
    else:
        factor, term = factor * (alpha * sign), constant.double()
    relu = "relu" in match.bound
    module: nn.Module = AffineCodes(factor, term, reads, writes_of(match), relu=relu)
    put(match, editor, module, (codes,), writes_of(match), path=info(node).path, like=node)


def _rule(
    name: str,
    ops: str | tuple[str, ...],
    rewrite: Callable[[Match, Editor], None],
    *checks: Callable[[Match], Reject | None],
    **more: Any,
) -> Rule:
    """A rule for an op of one tensor of codes."""
    pattern = quantized(op(ops, dequantized("dq", "x"), name="op"))
    return Rule(name, pattern, rewrite, checks, **more)


def _of_anything(names: tuple[str, ...]) -> OpExpr:
    return quantized(op("relu", op(names, var("x"), name="op"), name="relu", optional=True))


REAL_RULES: Final = (
    _rule("x86-norm", BY_STATISTICS, _statistics, takes_its_own_statistics),
    Rule(
        "x86-affine-norm",
        quantized(
            op(
                "relu",
                op(("batch_norm", "instance_norm"), dequantized("dq", "x"), name="op"),
                name="relu",
                optional=True,
            )
        ),
        _fixed_statistics,
        (has_fixed_statistics,),
        priority=-5,
    ),
    _rule("x86-average", AVERAGES, _average, averages),
    _rule("x86-softmax", ("softmax", "log_softmax"), _softmax, options_are_constant),
    _rule("x86-prelu", "prelu", _slope),
    Rule(
        "x86-constant",
        _of_anything(PAIRS),
        _affine,
        (takes_a_constant, options_are_constant),
        priority=5,
    ),
    Rule("x86-real", _of_anything(REAL), _real, (reads_codes, options_are_constant), priority=-10),
)
