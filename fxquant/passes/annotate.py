"""Annotate: decide which units may run in int8, and say why the others stay in float.

Liberal on purpose: what is merely possible here is weighed against its cost once calibration has
seen the sizes (:mod:`fxquant.passes.place`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.fills import bad_fill
from fxquant.graph.flow import asked_as_product, gives_indices
from fxquant.graph.info import CustomUnit, Decision, info
from fxquant.graph.masks import masks_scores, reads_masked
from fxquant.graph.normed_sums import norm_that_reads, sum_that_takes
from fxquant.graph.op_table import argument, module_of, op_of
from fxquant.graph.ops import Kind, Op
from fxquant.graph.verify import Stage
from fxquant.graph.view import (
    Unit,
    constant_values,
    flat_nodes,
    on_integers,
    tensor_sources,
    units,
)
from fxquant.numerics.finite import all_finite
from fxquant.passes.base import Pass
from fxquant.spec import Scheme

_FIXED: Final = Decision(False, "it is computed from parameters alone", "annotate")
_SCHEMES: Final[dict[Scheme, str]] = {"dynamic": "dynamic", "weight_only": "weight-only"}
_BY_CHOICE: Final = {
    "matmul": (
        "a product of two computed tensors is quantized at run time where it is asked for: "
        "overrides={torch.matmul: 'dynamic'}; that took 1.9 times as long as float for 12 products "
        "of 128 x 64 x 128, and 0.45 times as long for 1024 x 1024 x 1024 (one thread)"
    ),
    "scaled_dot_product_attention": (
        "its products are quantized at run time where they are asked for: "
        "overrides={F.scaled_dot_product_attention: 'dynamic'}; products of its sizes took 1.9 "
        "times as long as in float (12 of 128 x 64 x 128, one thread)"
    ),
}
"""What stays float in a dynamic model unless an override names it."""
_NEED_TENSORS: Final = (Kind.MOVE, Kind.SPLIT, Kind.PICK, Kind.INDEX, Kind.UNARY)


@dataclass(frozen=True)
class Annotate(Pass):
    """Write a decision into the record of every op.

    Args:
        int8_ops: names of the ops that have an int8 form with ranges known beforehand.
        reasons: for ops without one, why not.
        other_ops: names of the ops that have one by another scheme, such as ``dynamic``.
        trained: whether the graph is to be trained first: then norms are in training mode and
            dropout is active, and in the int8 model neither is.
    """

    name: ClassVar[str] = "annotate"
    needs: ClassVar[Stage] = Stage.FUSED
    gives: ClassVar[Stage] = Stage.ANNOTATED
    int8_ops: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    other_ops: Mapping[Scheme, frozenset[str]] = field(default_factory=dict)
    trained: bool = False

    def run(self, editor: Editor) -> None:
        """Decide unit by unit; calls the op table cannot read are decided one by one."""
        with editor.rule("annotate"):
            constants = constant_values(editor.graph)
            for unit in units(editor.graph):
                fixed = all(node in constants for node in unit.nodes)
                decision = _FIXED if fixed else self.decide(unit)
                for node in unit.nodes:
                    editor.annotate(node, decision=decision)
            for node in editor.graph.nodes:
                if info(node).opaque:
                    why = Decision(False, info(node).opaque, "the op table")
                    editor.annotate(node, decision=why)

    def decide(self, unit: Unit) -> Decision:
        """Whether ``unit`` may run in int8."""
        head = unit.head
        op = op_of(head)
        if op is None:
            return Decision(False, "the op table does not know it", "the op table")
        if all(on_integers(node) for node in unit.nodes):
            return Decision(False, "it computes on integers", "annotate")
        record = info(head)
        config = record.config
        if unit.custom is not None and config is not None and config.scheme == "static":
            return self._decide_custom(unit, unit.custom)
        if config is None or config.scheme == "float":
            return Decision(False, "it was asked to stay float", record.configured_by)
        if config.scheme != "static":
            return self._decide_other(op, unit, config.scheme)
        why = (
            self._no_form(op, head)
            or _bad_weight(op, head, config.weight is None)
            or _bad_values(unit)
            or _masked(unit)
            or _is_normed(unit)
        )
        if why is not None:
            return Decision(False, why, "annotate")
        return Decision(True, f"{op.name} has an int8 form", record.configured_by)

    def _decide_custom(self, unit: Unit, custom: CustomUnit) -> Decision:
        """A unit of a user's pattern computes in float between codes: only its edges matter."""
        for node in unit.nodes:
            op, config = op_of(node), info(node).config
            if op is None:
                continue
            weight_is_float = config is None or config.weight is None
            why = _bad_weight(op, node, weight_is_float)
            if gives_indices(node):
                why = "it takes indices, which are no codes"
            if why is not None:
                return Decision(False, f"{why} (%{node.name})", "annotate")
        bad = _bad_values(unit) or _masked(unit)
        if bad is not None:
            return Decision(False, bad, "annotate")
        return Decision(True, f"pattern {custom.name!r} ({custom.line})", f"pattern {custom.name}")

    def _decide_other(self, op: Op, unit: Unit, scheme: Scheme) -> Decision:
        """A scheme under which ops read and write float: only those with weights gain by it."""
        head = unit.head
        why = f"{op.name} has no {_SCHEMES[scheme]} form"
        if scheme == "dynamic" and op.name in _BY_CHOICE and not asked_as_product(head):
            why = _BY_CHOICE[op.name]
        elif op.name in self.other_ops.get(scheme, frozenset()):
            why = ""
        if why:
            return Decision(False, why, "annotate")
        config = info(head).config
        bad = _bad_weight(op, head, config is None or config.weight is None) or _bad_values(unit)
        if bad is not None:
            return Decision(False, bad, "annotate")
        why = f"{op.name} has a {_SCHEMES[scheme]} form"
        if unit.custom is not None and unit.custom.kernel is not None:
            why += (
                f"; the kernel of pattern {unit.custom.name!r} reads codes, which mode='static' has"
            )
        return Decision(True, why, info(head).configured_by)

    def _no_form(self, op: Op, node: Node) -> str | None:
        if op.kind is Kind.SHAPE:
            return "it answers a question about a shape"
        if self.trained and op.name == "dropout":
            return None
        if op.name not in self.int8_ops:
            return self.reasons.get(op.name, f"{op.name} has no int8 form here")
        return _changes(op, node, self.trained)


def _changes(op: Op, node: Node, trained: bool) -> str | None:
    """Why a call cannot read or write codes although its op can."""
    if op.name == "batch_norm" and module_of(node).training and not trained:
        return "a batch norm in training mode changes with every batch"
    if op.name == "batch_norm" and getattr(module_of(node), "running_mean", None) is None:
        return "a batch norm without running statistics mixes the pictures of a batch"
    if gives_indices(node) and op.kind is not Kind.INDEX:
        return "it takes indices, which are no codes"
    if bad_fill(node) is not None:
        return bad_fill(node)
    if op.name == "dropout":
        return "it is active dropout"
    if op.name == "rrelu" and argument(node, "training"):
        return "its slopes are drawn anew in every call"
    tracks = op.name == "instance_norm" and bool(
        getattr(module_of(node), "track_running_stats", False)
    )
    if tracks and module_of(node).training:
        return "an instance norm that tracks statistics changes them when training"
    if op.kind is Kind.UNARY and any(flat_nodes(node.args[1:])) + any(flat_nodes(node.kwargs)):
        return "its options are computed in every call"
    return None


def _bad_weight(op: Op, node: Node, weight_is_float: bool) -> str | None:
    if op.kind is not Kind.CONTRACT:
        return None
    if weight_is_float:
        return "its weight was asked to stay float"
    if node.op != "call_module":
        return "its weight is computed in every call"
    weight = module_of(node).get_parameter("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet: run the model once before quantizing"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}, and int8 kernels are made from float32"
    if not all_finite(weight):
        return "its weight holds NaN or infinity"
    return None


def _masked(unit: Unit) -> str | None:
    if any(masks_scores(node) or reads_masked(node) for node in unit.nodes):
        return "it works on scores with a mask, which reaches to minus infinity"
    return None


def _is_normed(unit: Unit) -> str | None:
    norm, total = norm_that_reads(unit.head), sum_that_takes(unit.head)
    if total is not None:
        return f"all of it goes into %{total.name}, a sum that stays float"
    if norm is None:
        return None
    return f"%{norm.name} divides each row of the sum by its size, and small rows need their digits"


def _bad_values(unit: Unit) -> str | None:
    for node in unit.nodes:
        if info(node).pinned:
            return info(node).pinned
        for source in tensor_sources(node):
            if info(source).pinned:
                return info(source).pinned
            if info(source).value in ("scalar", "sizes"):
                return f"%{source.name} is a number computed in every call"
    head = unit.head
    op = op_of(head)
    if op is not None and op.kind in _NEED_TENSORS:
        kind = info(tensor_sources(head)[0]).value if tensor_sources(head) else "unknown"
        if kind == "unknown":
            return "it is not known whether its input is a tensor"
    return None
