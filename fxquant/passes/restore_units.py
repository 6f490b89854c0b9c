"""Restore units: after training, what a user's module was trained for stands there again.

unit(x)   ->   silu(conv(x, weight=fq(w)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.graph.trained_units import TrainedUnit
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class RestoreUnits(Pass):
    """Put back what users' modules were trained in the place of."""

    name: ClassVar[str] = "restore-units"
    needs: ClassVar[Stage] = Stage.OBSERVED
    gives: ClassVar[Stage] = Stage.OBSERVED

    def run(self, editor: Editor) -> None:
        """Unit by unit."""
        for node in list(editor.graph.nodes):
            module = module_of(node) if node.op == "call_module" else None
            if isinstance(module, TrainedUnit):
                module.put_back(editor, node)
