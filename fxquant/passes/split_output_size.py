"""Split output sizes: ``up(x, output_size=skip.size())`` is a transposed conv, then a slice.

Output padding only adds rows at the end, so the layer makes as many as it can and the slice takes
those that were asked for: the layer has one form for every size.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import Node

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class SplitOutputSize(Pass):
    """Write the ``output_size`` of a transposed convolution's call as a slice of its result."""

    name: ClassVar[str] = "split-output-size"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, editor: Editor) -> None:
        """Look at every call of a transposed convolution."""
        for node in list(editor.graph.nodes):
            if node.op == "call_module":
                layer = module_of(node)
                size = _asked(node)
                if isinstance(layer, nn.modules.conv._ConvTransposeNd) and size is not None:
                    self._split(editor, node, layer, size)

    @staticmethod
    def _split(editor: Editor, node: Node, layer: Any, size: Any) -> None:
        source = node.args[0] if node.args else node.kwargs["input"]
        users = list(node.users)
        twin: Any = share_parameters(layer)
        twin.output_padding = tuple(stride - 1 for stride in layer.stride)
        with editor.rule("split-output-size"):
            sides = _sides(editor, node, size, len(layer.stride))
            editor.set_module(str(node.target), twin)
            editor.set_call(node, node.target, (source,), {})
            window = (..., *(slice(None, side) for side in sides))
            cut = editor.call(operator.getitem, (node, window), like=node, after=node)
            for user in users:
                editor.replace_use(user, node, cut)


def _asked(node: Node) -> Any:
    """What a call gives as ``output_size``, or ``None``."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")


def _sides(editor: Editor, node: Node, size: Any, rank: int) -> list[Any]:
    """The spatial sides of ``size``, which may lead with batch and channels."""
    if isinstance(size, tuple | list):
        return list(size[-rank:])
    return [
        editor.call(operator.getitem, (size, place), like=node, before=node)
        for place in range(-rank, 0)
    ]
