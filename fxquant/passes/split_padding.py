"""Split padding modes: ``Conv2d(padding_mode="reflect")`` is ``pad(mode="reflect")`` then a conv.

Integer kernels pad with zeros only; the pad itself moves codes and needs no arithmetic. The same
for ``padding="same"`` with unequal sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import Node

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import is_op, module_of, op_named
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass

CONVS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class SplitPadding(Pass):
    """Write a convolution's padding as zeros of its own, or as a ``pad`` in front of it."""

    name: ClassVar[str] = "split-padding"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, editor: Editor) -> None:
        """Look at every convolution."""
        for node in list(editor.graph.nodes):
            if is_op(node, *CONVS):
                self._split(editor, node)

    def _split(self, editor: Editor, node: Node) -> None:
        conv = module_of(node)
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return
        before, after = _sides(conv)
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            return
        twin: Any = share_parameters(conv)
        with editor.rule("split-padding", note=f"padding_mode={conv.padding_mode!r}"):
            if conv.padding_mode == "zeros" and before == after:
                twin.padding = before
            else:
                twin.padding = (0,) * len(before)
                twin.padding_mode = "zeros"
                self._insert(editor, node, conv.padding_mode, before, after)
            editor.set_module(str(node.target), twin)
            editor.set_call(node, node.target, node.args, {})
            editor.annotate(node, path=str(node.target))

    @staticmethod
    def _insert(
        editor: Editor, node: Node, mode: str, before: tuple[int, ...], after: tuple[int, ...]
    ) -> None:
        # F.pad lists the last dimension first.
        pad = [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]
        source = node.args[0]
        if not isinstance(source, Node):
            return
        zeros = mode == "zeros"
        options = {
            "pad": tuple(pad),
            "mode": "constant" if zeros else mode,
            "value": 0.0 if zeros else None,
        }
        padded = editor.call(op_named("pad"), (source,), options, like=node, before=node)
        editor.annotate(padded, unit=None, value="tensor")
        editor.replace_use(node, source, padded)


def _sides(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much is added before and after each dimension."""
    if conv.padding == "valid":
        zero = (0,) * len(conv.kernel_size)
        return zero, zero
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        before = tuple(t // 2 for t in total)
        return before, tuple(t - b for t, b in zip(total, before, strict=True))
    sides = tuple(int(p) for p in conv.padding)
    return sides, sides
