"""Unshare: every call owns its module, so that folding at one call cannot change another.

The copies share their parameters with the original, so that training still trains one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class Unshare(Pass):
    """Give the second and later calls of a module copies that share its parameters."""

    name: ClassVar[str] = "unshare"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, editor: Editor) -> None:
        """Walk the calls in order; the first call of a module object keeps it."""
        seen: dict[int, str] = {}
        for node in editor.graph.nodes:
            if node.op != "call_module":
                continue
            path = str(node.target)
            module = editor.module.get_submodule(path)
            if id(module) not in seen:
                seen[id(module)] = path
                continue
            if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
                continue
            with editor.rule("unshare", note=f"{path} is called again"):
                free = editor.add_module(path, share_parameters(module))
                editor.set_call(node, free, node.args, dict(node.kwargs))
