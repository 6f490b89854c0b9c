"""Share scales: tensors that are put side by side get one scale, where their ranges agree.

Union-find over the values. A group's range is the union of its members' ranges; a member joins
only if its own range is at least half of that, since a coarser scale would cost it more than one
bit. A branch that does not fit keeps its own scale and is requantized at the join.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.fills import outside
from fxquant.graph.flow import Flow, is_join, moves_codes, rescaled_by, root_of, wanted_int8
from fxquant.graph.info import Decision, QType, info
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes, tensor_sources
from fxquant.numerics.qparams import choose_qparams
from fxquant.passes.base import Pass
from fxquant.spec import QSpec

_TINY: Final = torch.finfo(torch.float32).tiny
_AGREE: Final = 2.0
"""How many times wider than its own a member's range may become."""


@dataclass
class _Groups:
    """Union-find with the range of each group."""

    parent: dict[Node, Node]
    span: dict[Node, tuple[float, float]]
    narrowest: dict[Node, float]

    def find(self, node: Node) -> Node:
        """The representative of the group of ``node``."""
        path = []
        while self.parent[node] is not node:
            path.append(node)
            node = self.parent[node]
        for step in path:
            self.parent[step] = node
        return node

    def add(self, node: Node, qtype: QType) -> None:
        """A group of its own for ``node``."""
        self.parent.setdefault(node, node)
        self.span.setdefault(node, (qtype.low, qtype.high))
        self.narrowest.setdefault(node, qtype.high - qtype.low)

    def unite(self, a: Node, b: Node) -> bool:
        """Merge two groups if every member can bear the union's range; says whether it did."""
        a, b = self.find(a), self.find(b)
        if a is b:
            return True
        low = min(self.span[a][0], self.span[b][0])
        high = max(self.span[a][1], self.span[b][1])
        narrowest = min(self.narrowest[a], self.narrowest[b])
        if high - low > _AGREE * narrowest:
            return False
        self.parent[b] = a
        self.span[a] = (low, high)
        self.narrowest[a] = narrowest
        return True


@dataclass(frozen=True)
class ShareScales(Pass):
    """Give the inputs and the output of every join one scale where ranges agree within 2x.

    Args:
        joins: whether to do so; scales that a model was trained with stay as they are.
    """

    name: ClassVar[str] = "share-scales"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.MEASURED
    joins: bool = True

    def run(self, editor: Editor) -> None:
        """Build the groups join by join, in graph order, then write their scales."""
        self._refuse_fills(editor)
        groups = _Groups({}, {}, {})
        for unit in Flow(editor.graph).int8_units():
            node = unit.output
            own = info(node).qtype
            if not self.joins or not is_join(node) or own is None:
                continue
            groups.add(node, own)
            for source in tensor_sources(node):
                root = root_of(source)
                qtype = info(root).qtype
                if qtype is not None and _same_codes(qtype, own):
                    groups.add(root, qtype)
                    groups.unite(node, root)
        sizes = Counter(groups.find(node) for node in groups.parent)
        uneven = {groups.find(node) for node in groups.parent if not _is_even(info(node).qtype)}
        shared = {node for node in groups.parent if sizes[groups.find(node)] > 1}
        for node in groups.parent:
            head = groups.find(node)
            if node in shared:
                self._write(editor, node, groups.span[head], even=head not in uneven)
        self._inherit(editor, shared)

    @staticmethod
    def _refuse_fills(editor: Editor) -> None:
        """A constant without a code of its own sends the move that puts it in back to float."""
        for node in editor.graph.nodes:
            alone = info(node).custom is None  # inside a unit of a user's no constant is a code
            qtype = info(root_of(node)).qtype if alone and wanted_int8(node) else None
            why = outside(node, qtype) if qtype is not None else None
            if why is not None:
                with editor.rule("leave-float"):
                    editor.annotate(node, decision=Decision(False, why, "share-scales"))

    @staticmethod
    def _write(editor: Editor, node: Node, span: tuple[float, float], *, even: bool) -> None:
        old = info(node).qtype
        if old is None:
            return
        with editor.rule("share-scale"):
            editor.annotate(node, qtype=_centred(*span, old) if even else _spanning(*span, old))

    @staticmethod
    def _inherit(editor: Editor, shared: set[Node]) -> None:
        """Values that only moved codes have the type of what was moved; scaled ones, its codes."""
        with editor.rule("inherit-scale"):
            for node in editor.graph.nodes:
                if wanted_int8(node) and moves_codes(node):
                    qtype = info(root_of(node)).qtype
                    editor.annotate(node, qtype=qtype, shape=info(node).shape or _moved(node))
                elif wanted_int8(node) and node not in shared:
                    editor.annotate(node, qtype=_rescaled(node))


def _rescaled(node: Node) -> QType | None:
    """``x * 0.5`` has the codes of ``x``, at half the scale."""
    own, factor = info(node).qtype, rescaled_by(node)
    sources = tensor_sources(node)
    base = info(root_of(sources[0])).qtype if sources else None
    if own is None or factor is None or base is None or not _same_codes(own, base):
        return own
    scale = base.scale * factor
    return dataclasses.replace(base, scale=scale) if _TINY <= scale < math.inf else own


def _moved(node: Node) -> tuple[int, ...] | None:
    """The shape a move gives, found on a tensor without memory; ``None`` if calls compute it."""
    source = node.args[0] if node.args else None
    shape = info(source).shape if isinstance(source, Node) else None
    rest = (node.args[1:], tuple(node.kwargs.values()))
    if shape is None or not callable(node.target) or any(flat_nodes(rest)):
        return None
    moved = node.target(torch.empty(shape, device="meta"), *node.args[1:], **node.kwargs)
    return tuple(moved.shape) if isinstance(moved, torch.Tensor) else None


def _same_codes(a: QType, b: QType) -> bool:
    return (a.dtype, a.quant_min, a.quant_max) == (b.dtype, b.quant_min, b.quant_max)


def _middle(qtype: QType) -> int:
    return 0 if qtype.dtype == torch.int8 else (qtype.quant_max + 1) // 2


def _is_even(qtype: QType | None) -> bool:
    """Whether the zero point stands in the middle: symmetric codes, and they stay so."""
    return qtype is not None and qtype.zero_point == _middle(qtype)


def _centred(low: float, high: float, like: QType) -> QType:
    """The type with the codes and the zero point of ``like`` that spans ``[low, high]``."""
    middle = _middle(like)
    scale = max(-low / (middle - like.quant_min), high / (like.quant_max - middle))
    return dataclasses.replace(like, scale=float(torch.tensor(scale)))


def _spanning(low: float, high: float, like: QType) -> QType:
    """The type with the codes of ``like`` that spans ``[low, high]``."""
    signed = like.dtype == torch.int8
    bits = (like.quant_max + 1).bit_length() - (0 if signed else 1)
    spec = QSpec("int8" if signed else "uint8", bits=bits)
    span = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    qparams = choose_qparams(*span, spec)
    return dataclasses.replace(like, scale=qparams.scale_value, zero_point=qparams.zero_point_value)
