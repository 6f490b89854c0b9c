"""Lower: rewrite parts of the Q/DQ graph to a backend's own ops; the rest runs as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.patterns.rule import Rule, RuleSet


@dataclass(frozen=True)
class Lower(Pass):
    """Apply a backend's rules, results first: what a kernel can write, it writes itself.

    Args:
        rules: the backend's lowering rules.
    """

    name: ClassVar[str] = "lower"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.LOWERED
    rules: tuple[Rule, ...] = ()

    def run(self, editor: Editor) -> None:
        """Walk the graph backwards, then take out what nobody reads any more."""
        if self.rules:
            report = RuleSet(self.rules).apply(editor, backwards=True)
            for (rule, node), reject in report.near.items():
                # That a quantize is not some other op's quantize is no news.
                if reject.matched > 1:
                    editor.miss(rule, node, reject.reason)
        with editor.rule("drop-dead"):
            editor.clean()
