"""Unshare: every call owns its module, so that folding at one call cannot change another.

The copies share their parameters with the original, so that training still trains one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.sharing import unshare
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
        unshare(editor)
