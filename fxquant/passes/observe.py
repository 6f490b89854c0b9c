"""Observe: put an observer beside every value that int8 ops will read or write.

An observer is a side node: it reads the value and nobody reads it, so taking it out again leaves
the graph as it was. Values that only move codes share the observer of what they move. Where an op
multiplies and adds up, and no observer stands, the shape is recorded: reports count work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.flow import sites
from fxquant.graph.info import info
from fxquant.graph.macs import shapes_needed
from fxquant.graph.verify import Stage
from fxquant.numerics.observers import make_observer
from fxquant.numerics.shapes import ShapeRecorder
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class Observe(Pass):
    """Insert one observer per value."""

    name: ClassVar[str] = "observe"
    needs: ClassVar[Stage] = Stage.ANNOTATED
    gives: ClassVar[Stage] = Stage.OBSERVED

    def run(self, editor: Editor) -> None:
        """Inputs of every int8 op that computes, and its output if another one reads it."""
        observed = sites(editor.graph)
        for value, spec in observed.items():
            path = info(value).path or value.name
            self._watch(editor, value, f"observer_{value.name}", make_observer(spec, path))
        needed = dict.fromkeys(v for node in editor.graph.nodes for v in shapes_needed(node))
        for value in needed:
            if value not in observed:
                path = info(value).path or value.name
                self._watch(editor, value, f"shape_{value.name}", ShapeRecorder(path))

    @staticmethod
    def _watch(editor: Editor, value: Node, name: str, watcher: nn.Module) -> None:
        with editor.rule("insert-observer"):
            where = editor.add_module(name, watcher)
            editor.call_module(where, (value,), like=value, after=_last_input(value))


def _last_input(value: Node) -> Node:
    """Placeholders stay together at the top of the graph."""
    node = value
    while value.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
