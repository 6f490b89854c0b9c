"""Reads from a converted graph what became of every op."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch.fx import Graph, Node

from fxquant.graph.flow import wanted
from fxquant.graph.guards import is_plumbing
from fxquant.graph.held import held_tensor
from fxquant.graph.info import Decision, QType, info
from fxquant.graph.integer_modules import IntegerEmbedding, IntegerEmbeddingBag
from fxquant.graph.kernel_unit import KernelUnit
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_STORED,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    RUN_TIME,
    is_op,
    module_of,
    op_of,
)
from fxquant.graph.ops import Kind
from fxquant.graph.view import Unit, constant_values, flat_nodes, on_integers, units, what
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.numerics.stored_tables import StoredParts
from fxquant.record import OpRecord

HALVES: Final = ("bfloat16", "float16")
"""What ops that are not int8 compute in where it is not float32."""
_BOUNDARY = (QUANTIZE, DEQUANTIZE, DEQUANTIZE_WEIGHT, DEQUANTIZE_STORED, RUN_TIME)


def read_ops(graph: Graph) -> tuple[OpRecord, ...]:
    """One record per unit of a Q/DQ graph, in graph order; kernels are not known yet.

    What depends on parameters alone is no op of the user's data, and what computes masks,
    positions and indices is none to quantize; they have no record.

    Args:
        graph: the graph right after the convert pass.
    """
    constants = constant_values(graph)
    by_output = {
        unit.output: unit
        for unit in units(graph)
        if unit.output not in constants
        and not _is_cast(unit.output)
        and not is_op(unit.output, *_BOUNDARY)
    }
    found = []
    for node in graph.nodes:
        unit = by_output.get(node)
        if on_integers(node):
            continue
        if unit is not None and not _is_question(unit):
            found.append(_of_unit(unit))
        elif info(node).opaque and node.op.startswith("call_") and not is_plumbing(node):
            found.append(_of_opaque(node))
    return tuple(found)


def _is_cast(node: Node) -> bool:
    """Whether a pass of ours wrote this change of the float dtype."""
    return is_op(node, "cast") and info(node).rules[-1:] == ("cast-floats",)


def runs_in(op: OpRecord) -> str:
    """What an op computes in: ``int8``, ``bfloat16``, ``float16`` or ``float``.

    ``stored``: in float, with a weight of integers.
    """
    if op.int8:
        return "stored" if op.stored else "int8"
    return op.kernel if op.kernel in HALVES else "float"


def _is_question(unit: Unit) -> bool:
    op = op_of(unit.head)
    return op is not None and op.kind is Kind.SHAPE


def _of_unit(unit: Unit) -> OpRecord:
    record = info(unit.head)
    decision = record.decision
    reads = tuple(
        _codes(edge.source)
        for edge in unit.inputs
        if edge.source.op != "get_attr"
        and not is_op(edge.source, DEQUANTIZE_WEIGHT, DEQUANTIZE_STORED)
    )
    users = [user for output in reversed(unit.outputs) for user in output.users]
    writes = next((info(user).writes for user in users if is_op(user, QUANTIZE)), None)
    weight, elements = _weight(unit.head)
    int8 = decision is not None and decision.int8
    origins = dict.fromkeys(name for node in unit.nodes for name in info(node).origins)
    parts = "+".join(what(node) for node in unit.nodes)
    return OpRecord(
        path=record.path,
        op=parts if unit.custom is None else unit.custom.name,
        int8=int8,
        why=decision.why if decision is not None else "nothing decided",
        by=decision.by if decision is not None else "",
        kernel="reference" if int8 else _float_of(unit),
        reads=reads,
        weight=weight,
        writes=writes if int8 else None,
        source=record.source,
        origins=tuple(origins),
        weights=elements,
        macs=_macs(unit.nodes),
        parts=parts,
        stored=wanted(unit.head, "weight_only"),
    )


def _float_of(unit: Unit) -> str:
    """What a unit that is not int8 computes in."""
    decision = info(unit.head).decision
    half = decision is not None and decision.by == "cast-floats"
    config = info(unit.head).config
    return config.float_dtype if half and config is not None else "float"


def _of_opaque(node: Node) -> OpRecord:
    record = info(node)
    decision = record.decision or Decision(False, record.opaque, "the op table")
    weight, elements = _weight(node)
    return OpRecord(
        path=record.path,
        op=_name(node),
        int8=decision.int8,
        why=decision.why,
        by=decision.by,
        kernel="reference" if decision.int8 else "float",
        weight=weight if decision.int8 else "",
        reads=tuple(_codes(source) for source in flat_nodes(node.args)),
        source=record.source,
        origins=record.origins,
        weights=elements,
        macs=record.macs,
    )


def _name(node: Node) -> str:
    """A recurrent layer keeps the name of what it was."""
    module = module_of(node) if node.op == "call_module" else None
    if isinstance(module, IntegerRecurrent):
        return module.mode.partition("_")[0]
    return what(node)


def _macs(nodes: tuple[Node, ...]) -> int | None:
    counts = [info(node).macs for node in nodes]
    return None if None in counts else sum(count or 0 for count in counts)


def _codes(source: Node) -> QType | None:
    if is_op(source, DEQUANTIZE) and isinstance(source.args[0], Node):
        return info(source.args[0]).writes
    return None


def _weight(head: Node) -> tuple[str, int]:
    """How the weight of a unit is stored, and how many elements it has."""
    for source in flat_nodes(head.args):
        if is_op(source, DEQUANTIZE_STORED):
            return _stored(source)
        if not is_op(source, DEQUANTIZE_WEIGHT):
            continue
        codes, scale, axis = source.args
        if isinstance(codes, Node) and isinstance(scale, Node):
            tensor = held_tensor(codes)
            count = math.prod(tensor.shape) if tensor is not None else 0
            kind = "per tensor" if axis is None else f"per channel {axis}"
            return f"int8 {kind}", count
    if head.op == "call_module" and isinstance(
        module_of(head), IntegerEmbedding | IntegerEmbeddingBag
    ):
        table = module_of(head).get_buffer("weight")
        rows = module_of(head).get_buffer("weight_scale").numel() > 1
        return f"int8 per {'channel 0' if rows else 'tensor'}", table.numel()
    if head.op == "call_module" and isinstance(module_of(head), IntegerRecurrent):
        recurrent = module_of(head)
        count = sum(p.numel() for p in recurrent.buffers() if p.dtype is torch.int8)
        return "int8 per channel 0", count
    if head.op == "call_module" and isinstance(module_of(head), StoredParts):
        parts = module_of(head)
        return (parts.kind, parts.elements) if isinstance(parts, StoredParts) else ("", 0)
    if head.op == "call_module":
        kinds = dict.fromkeys(str(p.dtype)[6:] for p in module_of(head).parameters())
        return ", ".join(kinds), _parameters(head)
    return "", 0


def _stored(dequantized: Node) -> tuple[str, int]:
    codes, owner = dequantized.args[0], dequantized.graph.owning_module
    if owner is None or not isinstance(codes, Node):
        return "", 0
    parts = owner.get_submodule(str(codes.target).rpartition(".")[0])
    return (parts.kind, parts.elements) if isinstance(parts, StoredParts) else ("", 0)


def _parameters(node: Node) -> int:
    if node.op != "call_module":
        return 0
    return sum(p.numel() for p in module_of(node).parameters())


def coverage(ops: tuple[OpRecord, ...]) -> float:
    """The share of ops that run in int8, in 16 bits or with stored weights, 0 to 1."""
    return sum(runs_in(op) != "float" for op in ops) / len(ops) if ops else 0.0


def mac_coverage(ops: tuple[OpRecord, ...]) -> float:
    """The share of the known multiply-accumulates that int8 ops do, 0 to 1; 1 where none is."""
    total = sum(op.macs or 0 for op in ops)
    return sum(op.macs or 0 for op in ops if runs_in(op) == "int8") / total if total else 1.0


def weight_coverage(ops: tuple[OpRecord, ...]) -> float:
    """The share of weight elements that are integers, 0 to 1; 1 without weights."""
    total = sum(op.weights for op in ops)
    return sum(op.weights for op in ops if op.int8) / total if total else 1.0


def with_kernels(ops: tuple[OpRecord, ...], graph: Graph, backend: str) -> tuple[OpRecord, ...]:
    """The records with what finally runs each op.

    Args:
        ops: what :func:`read_ops` gave.
        graph: the lowered graph.
        backend: the backend it was lowered to; an op it has no kernel for computes in float.
    """
    kernels: dict[str, str] = {}
    for node in graph.nodes:
        record = info(node)
        if record.reads is None or record.value == "scalar":
            continue
        for origin in record.origins:
            kernels.setdefault(origin, _kernel(node))
    return tuple(_with_kernel(op, kernels, backend) if op.int8 else op for op in ops)


def _with_kernel(op: OpRecord, kernels: dict[str, str], backend: str) -> OpRecord:
    found = " + ".join(dict.fromkeys(kernels[name] for name in op.origins if name in kernels))
    if found or backend == "reference":
        in_float = [name for name in op.origins if name not in kernels] if found else []
        rest = f" + float {', '.join(in_float)}" if in_float else ""
        return dataclasses.replace(op, kernel=f"{found}{rest}" or "reference")
    why = f"{backend} has no kernel for it: codes are dequantized, computed on and quantized again"
    return dataclasses.replace(op, int8=False, why=why, by=f"backend {backend}", kernel="float")


def _kernel(node: Node) -> str:
    if node.op == "call_module" and isinstance(module_of(node), KernelUnit):
        return f"your {module_of(node).kernel_name}"
    if any(is_op(source, DEQUANTIZE_STORED) for source in node.all_input_nodes):
        return f"{what(node)} in float from a stored weight"
    return type(module_of(node)).__name__ if node.op == "call_module" else f"{what(node)} on codes"
