"""The verifier that runs after every pass: lint, what the stage allows, typed edges.

Typed edges: a value that holds codes says so in its record (``writes``); a reader of codes says
which codes it expects (``reads``, or the arguments of its ``dequantize``); the two must be equal.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerifyError
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
    argument,
    function_spelling,
    is_op,
    method_spelling,
    module_of,
    op_of,
)
from fxquant.graph.view import around, flat_nodes, is_given, units


class Stage(IntEnum):
    """How far a graph has come; each stage keeps the promises of those before it."""

    CAPTURED = 0
    CANONICAL = 1
    FUSED = 2
    ANNOTATED = 3
    OBSERVED = 4
    MEASURED = 5
    QDQ = 6
    LOWERED = 7


def verify(module: GraphModule, stage: Stage, by: str) -> None:
    """Check that a graph keeps the promises of its stage.

    Args:
        module: the graph module.
        stage: the stage it claims to be in.
        by: the pass that left it so, for the message.

    Raises:
        VerifyError: a promise is broken; the message shows the graph around the culprit.
    """
    try:
        module.graph.lint()
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise VerifyError(f"after pass {by!r} the graph is malformed: {error}") from error
    _check_names(module, by)
    checks = []
    if stage >= Stage.CANONICAL:
        checks.append(_not_canonical)
    if stage >= Stage.MEASURED:
        checks.append(_still_observed)
    if stage < Stage.QDQ:
        checks.append(_too_early)
    else:
        checks += [_wrong_edge, _wrong_boundary]
    if stage >= Stage.LOWERED:
        checks.append(_wrong_overwrite)
    for node in module.graph.nodes:
        for check in checks:
            why = check(node)
            if why is not None:
                raise VerifyError(_message(node, stage, by, why))
    if Stage.FUSED <= stage < Stage.QDQ:
        _check_units(module, stage, by)


def _message(node: Node, stage: Stage, by: str, why: str) -> str:
    record = info(node)
    place = f" ({record.path}, {record.source})" if record.path else ""
    return (
        f"after pass {by!r} (stage {stage.name}) node %{node.name}{place} is not legal: {why}\n"
        f"{around(node)}"
    )


def _check_names(module: GraphModule, by: str) -> None:
    seen: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.name in seen:
            raise VerifyError(f"after pass {by!r} two nodes are called %{node.name}")
        seen[node.name] = node


def _not_canonical(node: Node) -> str | None:
    """One spelling per op: whatever the table can read must be in canonical form."""
    record = info(node)
    if record.opaque or record.value in ("scalar", "sizes"):
        return None
    if node.op == "call_method" and method_spelling(str(node.target)) is not None:
        return f".{node.target}() is a spelling of {method_spelling(str(node.target))[0].name}"  # type: ignore[index]  # asked for in the condition
    if node.op == "call_function" and op_of(node) is None:
        found = function_spelling(node.target)
        if found is not None:
            return f"it is another spelling of {found[0].name}"
    return None


def _is_observer(node: Node) -> bool:
    return node.op == "call_module" and getattr(module_of(node), "is_observer", False) is True


def _still_observed(node: Node) -> str | None:
    if _is_observer(node):
        return "an observer is left after calibration was read"
    return None


def _too_early(node: Node) -> str | None:
    if node.op == "call_function" and is_op(
        node, QUANTIZE, DEQUANTIZE, DEQUANTIZE_WEIGHT, RUN_TIME
    ):
        return "quantize and dequantize may only appear once ranges are known"
    return None


def boundary_type(node: Node) -> QType:
    """The type of the codes that a ``quantize`` node makes."""
    return QType(
        float(argument(node, "scale")),
        int(argument(node, "zero_point")),
        int(argument(node, "quant_min")),
        int(argument(node, "quant_max")),
        argument(node, "dtype"),
    )


def _wrong_edge(node: Node) -> str | None:
    record = info(node)
    if node.op == "output":
        coded = [n for n in flat_nodes(node.args) if info(n).writes is not None]
        return f"it returns codes of %{coded[0].name}" if coded else None
    if node.op == "call_function" and is_op(node, DEQUANTIZE, DEQUANTIZE_WEIGHT):
        return None
    sources = list(flat_nodes((node.args, tuple(node.kwargs.values()))))
    if record.reads is None:
        coded = [n for n in sources if info(n).writes is not None]
        return f"it reads the codes of %{coded[0].name} as numbers" if coded else None
    wanted = [source for source in sources if info(source).value not in ("scalar", "sizes")]
    if len(wanted) != len(record.reads):
        return f"it declares {len(record.reads)} inputs and has {len(wanted)}"
    for source, expected in zip(wanted, record.reads, strict=True):
        found = info(source).writes
        if found != expected:
            return f"it reads %{source.name} as {expected or 'float'}, which is {found or 'float'}"
    return None


def _wrong_boundary(node: Node) -> str | None:
    written = info(node).writes
    if node.op != "call_function":  # most are calls of modules, and reading those takes longer
        return _bad_qtype(written) if written is not None else None
    if is_op(node, QUANTIZE):
        made = boundary_type(node)
        if info(node).writes != made:
            return f"its record says {info(node).writes}, its arguments say {made}"
        return _bad_qtype(made)
    if is_op(node, DEQUANTIZE):
        source = node.args[0]
        found = info(source).writes if isinstance(source, Node) else None
        if found is None:
            return "it reads a value that holds no codes"
        scale, zero_point = argument(node, "scale"), argument(node, "zero_point")
        if (found.scale, found.zero_point) != (scale, zero_point):
            return f"it reads scale {scale}, zero point {zero_point}; the codes are {found}"
    return _bad_qtype(written) if written is not None else None


_NORMAL = torch.finfo(torch.float32).tiny


def _bad_qtype(qtype: QType) -> str | None:
    if not _NORMAL <= qtype.scale < float("inf"):
        return f"its scale {qtype.scale} is not a normal positive number"
    if not qtype.quant_min <= qtype.zero_point <= qtype.quant_max:
        return f"its zero point {qtype.zero_point} lies outside its codes"
    return None


def _wrong_overwrite(node: Node) -> str | None:
    """An op that overwrites an input must be the last to read it."""
    place = node.meta.get("overwrites")
    if place is None:
        return None
    source = node.args[place]
    if not isinstance(source, Node) or source.op in ("placeholder", "get_attr"):
        return "it overwrites something that is not the model's own"
    late = [user for user in source.users if user > node]
    return f"it overwrites %{source.name}, which %{late[0].name} reads later" if late else None


def _check_units(module: GraphModule, stage: Stage, by: str) -> None:
    for unit in units(module.graph):
        inside = dict.fromkeys(unit.nodes)
        for node in unit.nodes[:-1]:
            if is_given(node):
                continue
            # What only watches during calibration is gone before the unit becomes one op.
            outside = [u for u in node.users if u not in inside and not _is_observer(u)]
            if outside:
                raise VerifyError(
                    _message(node, stage, by, f"unit {info(node).unit} leaks to %{outside[0].name}")
                )
