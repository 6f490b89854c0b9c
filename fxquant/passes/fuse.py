"""Fuse: apply fusion rules until nothing changes, a user's patterns before all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph.edit import Editor
from fxquant.graph.ranks import record_ranks
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.patterns.overlap import apply_by_priority
from fxquant.patterns.rule import Rule, RuleReport, RuleSet
from fxquant.patterns.unary import WRITTEN_OUT


@dataclass(frozen=True)
class Fuse(Pass):
    """Fold batch norms and mark units.

    Args:
        rules: the rules to apply, the user's among them.
        ranks: name and number of dimensions of the inputs that are known.
    """

    name: ClassVar[str] = "fuse"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.FUSED
    rules: tuple[Rule, ...] = FUSION_RULES
    ranks: tuple[tuple[str, int], ...] = ()

    def run(self, editor: Editor) -> None:
        """Run the rule set to its fixpoint; near misses go to the editor's log of misses."""
        record_ranks(editor.graph, dict(self.ranks))
        RuleSet(self.rules)  # no two rules of one name, whenever they run
        early = [rule for rule in self.rules if rule.early]
        reports: list[tuple[RuleReport, int]] = []
        if early:
            RuleSet(WRITTEN_OUT).apply(editor)
            # Whoever writes a pattern wants to know where as much as its last op was found.
            reports.append((apply_by_priority(early, editor), 1))
        reports.append((RuleSet(rule for rule in self.rules if not rule.early).apply(editor), 0))
        for report, more in reports:
            for (rule, node), reject in report.near.items():
                editor.miss(rule, node, reject.reason, reject.matched + more)
        with editor.rule("drop-dead"):
            editor.clean()
