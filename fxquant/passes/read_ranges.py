"""Read ranges: take scale and zero point from the observers, then take the observers out.

An op whose input calibration never reached, or which turned out not to be floating point, goes
back to float with that reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import Flow, rescaled_by, root_of, wanted_int8
from fxquant.graph.info import Decision, QType, info
from fxquant.graph.macs import count_macs
from fxquant.graph.op_table import module_of
from fxquant.graph.verify import Stage
from fxquant.graph.view import tensor_sources
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import Observer
from fxquant.numerics.qparams import QParams
from fxquant.numerics.shapes import ShapeRecorder
from fxquant.passes.base import Pass


def to_qtype(qparams: QParams) -> QType:
    """Per-tensor qparams as the type of an edge."""
    return QType(
        qparams.scale_value,
        qparams.zero_point_value,
        qparams.quant_min,
        qparams.quant_max,
        qparams.dtype,
    )


@dataclass(frozen=True)
class ReadRanges(Pass):
    """Move what the observers know into the records."""

    name: ClassVar[str] = "read-ranges"
    needs: ClassVar[Stage] = Stage.OBSERVED
    gives: ClassVar[Stage] = Stage.MEASURED

    def run(self, editor: Editor) -> None:
        """Read and erase every observer, then settle what was not seen."""
        missing: dict[Node, str] = {}
        for node in list(editor.graph.nodes):
            if node.op != "call_module":
                continue
            watcher = module_of(node)
            if not isinstance(watcher, Observer | ShapeRecorder | FakeQuantize):
                continue
            value = node.args[0]
            if isinstance(value, Node):
                self._read(editor, value, watcher, missing)
            with editor.rule("erase-observer"):
                if node.users and isinstance(value, Node):
                    editor.replace(node, value)
                else:
                    editor.erase(node)
        editor.drop_unused_modules()
        self._rescale(editor)
        for node in editor.graph.nodes:
            editor.note_values(node, macs=count_macs(node, lambda value: info(value).shape))
        self._settle(editor, missing)

    @staticmethod
    def _read(editor: Editor, value: Node, observer: nn.Module, missing: dict[Node, str]) -> None:
        if isinstance(observer, ShapeRecorder):
            editor.note_values(value, shape=observer.first_shape)
        elif not isinstance(observer, Observer | FakeQuantize):
            return
        elif not observer.floating:
            missing[value] = f"%{value.name} is not a floating-point tensor"
        elif not observer.seen:
            missing[value] = f"calibration never reached {observer.path}"
        else:
            with editor.rule("read-range"):
                qtype = to_qtype(observer.qparams())
                shape = getattr(observer, "first_shape", None) or info(value).shape
                editor.annotate(value, qtype=qtype, shape=shape)

    @staticmethod
    def _rescale(editor: Editor) -> None:
        """What was trained without a rounding of its own has the codes of what it scales."""
        for node in editor.graph.nodes:
            factor, own = rescaled_by(node), info(node).qtype
            if factor is None or own is not None or not wanted_int8(node):
                continue
            base = info(root_of(tensor_sources(node)[0])).qtype
            if base is not None:
                with editor.rule("read-range"):
                    scaled = dataclasses.replace(base, scale=base.scale * factor)
                    editor.annotate(node, qtype=scaled)

    @staticmethod
    def _settle(editor: Editor, missing: dict[Node, str]) -> None:
        """Units that lack a range on an input or a needed output go to float, until none does."""
        changed = True
        while changed:
            changed = False
            flow = Flow(editor.graph)
            for unit in flow.int8_units():
                why = _lacks(flow, unit.outputs, [edge.source for edge in unit.inputs], missing)
                if why is None:
                    continue
                changed = True
                with editor.rule("leave-float"):
                    for node in unit.nodes:
                        editor.annotate(node, decision=Decision(False, why, "calibration"))


def _lacks(
    flow: Flow, outputs: tuple[Node, ...], sources: list[Node], missing: dict[Node, str]
) -> str | None:
    for source in sources:
        root = root_of(source)
        if root in missing:
            return missing[root]
        if info(root).qtype is None and flow.read_as_codes(root):
            return f"no range is known for %{root.name}"
    return next((missing[output] for output in outputs if output in missing), None)
