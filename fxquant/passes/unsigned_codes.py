"""Unsigned codes: int8 activations are stored as uint8, 128 higher, where kernels read uint8.

    (q - z) * scale   ==   ((q + 128) - (z + 128)) * scale

No number changes. Symmetric int8 leaves out -128 so that its range is even; the kernels saturate
at the ends of the type, so here that code is in use: what lies below the range is clipped one step
later. Codes that a user's own kernel reads or writes keep the type that was asked for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Graph, Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import Flow, root_of
from fxquant.graph.info import QType, info
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass

_SHIFT: Final = 128
_EVEN: Final = -127
"""The least code of symmetric int8."""


@dataclass(frozen=True)
class UnsignedCodes(Pass):
    """Give int8 activations uint8 types of the same numbers.

    Args:
        reads_unsigned: whether the backend's kernels read uint8; nothing is done for others.
    """

    name: ClassVar[str] = "unsigned-codes"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.MEASURED
    reads_unsigned: bool = False

    def run(self, editor: Editor) -> None:
        """Value by value; what moves codes has its type from what it moves, later."""
        if not self.reads_unsigned:
            return
        signed = {
            node: qtype
            for node in editor.graph.nodes
            if (qtype := info(node).qtype) is not None and qtype.dtype is torch.int8
        }
        kept = _at_kernels(editor.graph) if signed else set()
        for node, qtype in signed.items():
            if node not in kept:
                with editor.rule("store-unsigned"):
                    editor.annotate(node, qtype=unsigned(qtype))


def unsigned(qtype: QType) -> QType:
    """The uint8 type of the same numbers as an int8 type.

    Example:
        >>> str(unsigned(QType(0.5, 0, -127, 127, torch.int8)))
        'uint8(scale=0.5, zero_point=128)'
    """
    least = -_SHIFT if qtype.quant_min == _EVEN else qtype.quant_min
    return dataclasses.replace(
        qtype,
        zero_point=qtype.zero_point + _SHIFT,
        quant_min=least + _SHIFT,
        quant_max=qtype.quant_max + _SHIFT,
        dtype=torch.uint8,
    )


def _at_kernels(graph: Graph) -> set[Node]:
    """The values that kernels of the user's read or write."""
    found: set[Node] = set()
    for unit in Flow(graph).int8_units():
        if unit.custom is not None and unit.custom.kernel is not None:
            found.update(root_of(edge.source) for edge in unit.inputs)
            found.update(unit.outputs)
    return found
