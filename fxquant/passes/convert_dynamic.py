"""Convert dynamic ops: what they read is quantized in every call, row by row.

    linear(x, dequantize_weight(w_int8), bias)
        ->  linear(quantize_at_run_time(x), dequantize_weight(w_int8), bias)
    matmul(a, b)
        ->  matmul(quantize_at_run_time(a), quantize_at_run_time(b, by_column=True))

The weights are integers already. Several ops that read one value in one way share its
quantization: the query, key and value layers of attention do. A row is what the op sums over: a
token for a linear, channels and pixels of one sample for a convolution. The right factor of a
product stands where a weight does: it is quantized as one, a scale for each of its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import Rows, rows_read
from fxquant.graph.info import info
from fxquant.graph.op_table import RUN_TIME, is_op, op_named
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass

_Made = dict[tuple[Node, Rows], Node]


@dataclass(frozen=True)
class ConvertDynamic(Pass):
    """Quantize at run time what dynamic ops with integer weights read."""

    name: ClassVar[str] = "convert-dynamic"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.QDQ

    def run(self, editor: Editor) -> None:
        """One quantization for each value and each way to quantize it."""
        made: _Made = {}
        for node in list(editor.graph.nodes):
            if node.op == "call_function" and rows_read(node):
                self._read_quantized(editor, node, rows_read(node), made)

    @staticmethod
    def _read_quantized(editor: Editor, node: Node, ways: tuple[Rows, ...], made: _Made) -> None:
        """Let ``node`` read its first arguments quantized, each in its way."""
        sources = node.args[: len(ways)]
        given = [source for source in sources if isinstance(source, Node)]
        if len(given) < len(ways) or any(is_op(source, RUN_TIME) for source in given):
            return  # it is done already
        with editor.rule("quantize-at-run-time"):
            for key in zip(given, ways, strict=True):
                if key not in made:
                    made[key] = ConvertDynamic._quantized(editor, node, *key)
            read = tuple(made[key] for key in zip(given, ways, strict=True))
            args = (*read, *node.args[len(ways) :])
            editor.set_call(node, node.target, args, dict(node.kwargs))

    @staticmethod
    def _quantized(editor: Editor, node: Node, source: Node, rows: Rows) -> Node:
        spec = rows.spec
        options = {
            "dims": rows.dims,
            "dtype": spec.dtype,
            "bits": spec.bits,
            "symmetric": spec.symmetric,
            "per_row": spec.granularity == "row",
        }
        if rows.by_column:
            options["by_column"] = True
        made = editor.call(op_named(RUN_TIME), (source,), options, like=source, before=node)
        shape = info(source).shape
        editor.note_values(made, unit=None, decision=None, value="tensor", shape=shape)
        return made
