"""What a pass is: a frozen dataclass with typed options that edits one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.verify import Stage


@dataclass(frozen=True)
class Pass:
    """One step of a pipeline; subclasses set the three class variables and define :meth:`run`.

    Whether it changed anything is read from the editor's log, not claimed.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    def run(self, editor: Editor) -> None:
        """Edit the graph.

        Args:
            editor: the only way to change it.
        """
        raise TypeError(f"{type(self).__name__} does not define run()")
