"""Lower: rewrite parts of the Q/DQ graph to a backend's own ops; the rest runs as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.patterns.rule import Rule, RuleSet


@dataclass(frozen=True)
class Lower(Pass):
    """Apply a backend's rules, results first: what a kernel can write, it writes itself.

    Args:
        rules: the backend's lowering rules.
        modules: the backend's own form of whole modules, by their class; a module may be its own.
    """

    name: ClassVar[str] = "lower"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.LOWERED
    rules: tuple[Rule, ...] = ()
    modules: Mapping[type[nn.Module], Callable[..., nn.Module]] = field(default_factory=dict)

    def run(self, editor: Editor) -> None:
        """Walk the graph backwards, then take out what nobody reads any more."""
        if self.rules:
            report = RuleSet(self.rules).apply(editor, backwards=True)
            for (rule, node), reject in report.near.items():
                # That a quantize is not some other op's quantize is no news.
                if reject.matched > 1:
                    # The quantize around an op is ours: with that alone nothing of it fitted.
                    editor.miss(rule, node, reject.reason, reject.matched - 1)
        for node in [n for n in editor.graph.nodes if n.op == "call_module"]:
            module = module_of(node)
            make = self.modules.get(type(module))
            made = module if make is None else make(module)
            if made is not module:
                with editor.rule("lower-module"):
                    editor.set_module(str(node.target), made)
                    editor.annotate(node, rules=(*info(node).rules, "lower-module"))
        with editor.rule("drop-dead"):
            editor.clean()
