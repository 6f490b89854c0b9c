"""Adopt norms: what models write out as a mean of squares and a root is an ``nn.RMSNorm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.patterns.rule import RuleSet
from fxquant.patterns.written_norms import WRITTEN_NORMS


@dataclass(frozen=True)
class AdoptNorms(Pass):
    """Put the standard module in the place of a norm that is written out."""

    name: ClassVar[str] = "adopt-norms"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, editor: Editor) -> None:
        """Run the rules to their fixpoint; near misses go to the editor's log of misses."""
        report = RuleSet(WRITTEN_NORMS).apply(editor)
        for (rule, node), reject in report.near.items():
            if reject.matched > 2:  # any product begins like one of these
                editor.miss(rule, node, reject.reason, reject.matched)
        with editor.rule("drop-dead"):
            editor.clean()
