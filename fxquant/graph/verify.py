"""The verifier that runs after every pass: lint, what the stage allows, typed edges.

Typed edges: a value that holds codes says so in its record (``writes``); a reader of codes says
which codes it expects (``reads``, or the arguments of its ``dequantize``); the two must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerifyError
from fxquant.graph.info import NodeInfo, QType, info
from fxquant.graph.lint import malformed
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
    argument,
    function_spelling,
    method_spelling,
    module_of,
    op_of,
)
from fxquant.graph.ops import Op
from fxquant.graph.view import around, flat_nodes, is_given, labelled


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


_Check = Callable[[Node, NodeInfo, Op | None], str | None]
"""Looks at a node, its record, and the op that it calls as a function; says what is wrong."""


def verify(module: GraphModule, stage: Stage, by: str) -> None:
    """Check that a graph keeps the promises of its stage.

    Args:
        module: the graph module.
        stage: the stage it claims to be in.
        by: the pass that left it so, for the message.

    Raises:
        VerifyError: a promise is broken; the message shows the graph around the culprit.
    """
    wrong = malformed(module)
    if wrong is not None:
        raise VerifyError(f"after pass {by!r} the graph is malformed: {wrong}")
    checks: list[_Check] = []
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
        # Asked once for all checks. What calls of modules mean takes longer, and none asks.
        record, op = info(node), op_of(node) if node.op == "call_function" else None
        for check in checks:
            why = check(node, record, op)
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


def _not_canonical(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    """One spelling per op: whatever the table can read must be in canonical form."""
    if record.opaque or record.value in ("scalar", "sizes"):
        return None
    if node.op == "call_method" and method_spelling(str(node.target)) is not None:
        return f".{node.target}() is a spelling of {method_spelling(str(node.target))[0].name}"  # type: ignore[index]  # asked for in the condition
    if op is None and node.op == "call_function":
        found = function_spelling(node.target)
        if found is not None:
            return f"it is another spelling of {found[0].name}"
    return None


def _is_observer(node: Node) -> bool:
    return node.op == "call_module" and getattr(module_of(node), "is_observer", False) is True


def _still_observed(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    del record, op
    if _is_observer(node):
        return "an observer is left after calibration was read"
    return None


def _too_early(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    del node, record
    if op is not None and op.name in (QUANTIZE, DEQUANTIZE, DEQUANTIZE_WEIGHT, RUN_TIME):
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


def _wrong_edge(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    if op is not None and op.name in (DEQUANTIZE, DEQUANTIZE_WEIGHT):
        return None
    if record.reads is None or node.op == "output":
        coded = [n for n in node.all_input_nodes if info(n).writes is not None]
        if coded and node.op == "output":
            return f"it returns codes of %{coded[0].name}"
        return f"it reads the codes of %{coded[0].name} as numbers" if coded else None
    sources = flat_nodes((node.args, tuple(node.kwargs.values())))
    wanted = [source for source in sources if info(source).value not in ("scalar", "sizes")]
    if len(wanted) != len(record.reads):
        return f"it declares {len(record.reads)} inputs and has {len(wanted)}"
    for source, expected in zip(wanted, record.reads, strict=True):
        found = info(source).writes
        if found != expected:
            return f"it reads %{source.name} as {expected or 'float'}, which is {found or 'float'}"
    return None


def _wrong_boundary(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    written = record.writes
    if op is not None and op.name == QUANTIZE:
        made = boundary_type(node)
        if written != made:
            return f"its record says {written}, its arguments say {made}"
        return _bad_qtype(made)
    if op is not None and op.name == DEQUANTIZE:
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


def _wrong_overwrite(node: Node, record: NodeInfo, op: Op | None) -> str | None:
    """An op that overwrites an input must be the last to read it."""
    del record, op
    place = node.meta.get("overwrites")
    if place is None:
        return None
    source = node.args[place]
    if not isinstance(source, Node) or source.op in ("placeholder", "get_attr"):
        return "it overwrites something that is not the model's own"
    late = [user for user in source.users if user > node]
    return f"it overwrites %{source.name}, which %{late[0].name} reads later" if late else None


def _check_units(module: GraphModule, stage: Stage, by: str) -> None:
    # Read by their labels: what else is known of units plays no part, and takes longer to find.
    for nodes in labelled(module.graph).values():
        inside = dict.fromkeys(nodes)
        for node in nodes[:-1]:
            if is_given(node):
                continue
            # What only watches during calibration is gone before the unit becomes one op.
            outside = [u for u in node.users if u not in inside and not _is_observer(u)]
            if outside:
                raise VerifyError(
                    _message(node, stage, by, f"unit {info(node).unit} leaks to %{outside[0].name}")
                )
