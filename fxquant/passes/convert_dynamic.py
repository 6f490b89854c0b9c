"""Convert dynamic ops: what they read is quantized in every call, row by row.

    linear(x, dequantize_weight(w_int8), bias)
        ->  linear(quantize_at_run_time(x), dequantize_weight(w_int8), bias)

The weights are integers already. Several ops that read one value in one way share its
quantization: the query, key and value layers of attention do. A row is what the op sums over: a
token for a linear, channels and pixels of one sample for a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import ROW_DIMS, wanted
from fxquant.graph.info import info
from fxquant.graph.op_table import RUN_TIME, is_op, op_named, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.spec import QSpec


@dataclass(frozen=True)
class ConvertDynamic(Pass):
    """Quantize at run time what dynamic ops with integer weights read."""

    name: ClassVar[str] = "convert-dynamic"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.QDQ

    def run(self, editor: Editor) -> None:
        """One quantization for each value and each way to quantize it."""
        made: dict[tuple[Node, QSpec, int], Node] = {}
        for node in list(editor.graph.nodes):
            op, config = op_of(node), info(node).config
            if op is None or config is None or config.activation is None:
                continue
            if op.kind is not Kind.CONTRACT or not wanted(node, "dynamic"):
                continue
            source = node.args[0]
            if node.op != "call_function" or not isinstance(source, Node):
                continue
            if is_op(source, RUN_TIME):
                continue  # it is done already
            key = (source, config.activation, ROW_DIMS[op.name])
            with editor.rule("quantize-at-run-time"):
                if key not in made:
                    made[key] = self._quantized(editor, node, *key)
                editor.set_call(node, node.target, (made[key], *node.args[1:]), dict(node.kwargs))

    @staticmethod
    def _quantized(editor: Editor, node: Node, source: Node, spec: QSpec, dims: int) -> Node:
        options = {
            "dims": dims,
            "dtype": spec.dtype,
            "bits": spec.bits,
            "symmetric": spec.symmetric,
            "per_row": spec.granularity == "row",
        }
        made = editor.call(op_named(RUN_TIME), (source,), options, like=source, before=node)
        shape = info(source).shape
        editor.note_values(made, unit=None, decision=None, value="tensor", shape=shape)
        return made
