"""Explain: why an op is int8 or float, who decided that, and what would change it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Final

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import ConfigError
from fxquant.graph.info import info
from fxquant.graph.op_table import class_op, function_spelling
from fxquant.graph.state import NodeState
from fxquant.graph.text import names_near, shown
from fxquant.passes.configure import Selector, predicate
from fxquant.record import OpRecord, Record
from fxquant.report.advice import advice
from fxquant.report.explained import Explanation, OpExplanation
from fxquant.report.ops import read_ops, runs_in

_NAME: Final = 80


class Explainer:
    """Finds ops of a model that fxquant made, and what is known of them.

    Args:
        model: what ``quantize``, ``prepare`` or ``convert`` returned.
        record: its memory.
    """

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._record = record
        places = {part.place: _prefix(part.path) for part in record.parts[1:] if part.place}
        self._graphs = {
            module: places.get(name, "")
            for name, module in model.named_modules()
            if isinstance(module, GraphModule)
        }
        self._ops = record.ops or tuple(op for g in self._graphs for op in read_ops(g.graph))
        states = [s.state for s in record.snapshots]
        self._captured = {node.name: node for node in states[0].nodes} if states else {}
        named = [s.state for s in record.snapshots if s.name == "configure"]
        self._canonical = list(named[0].nodes) if named else list(self._captured.values())

    def explain(self, selector: Selector) -> Explanation:
        """The ops that ``selector`` names.

        Raises:
            ConfigError: it names none.
        """
        if not isinstance(selector, str | type) and not callable(selector):
            raise ConfigError(
                f"explain() got {selector!r}: ask for a path, a glob, 're:...', a module class, or "
                "a function such as torch.add"
            )
        if isinstance(selector, str) and not selector:
            raise ConfigError("explain() got no name: report(model) lists all ops")
        wanted = self._origins(selector)
        ops = [op for op in self._ops if self._by_path(selector, op.path)]
        found = [op for op in self._ops if op in ops or wanted & self._names(op)]
        made = [self._of_op(op) for op in dict.fromkeys(found)]
        known = {name for op in self._ops for name in self._names(op)}
        rest = [n for n in self._captured if n in wanted and n not in known]
        if not made:
            made = [self._of_gone(self._captured[name]) for name in rest]
        if not made:
            raise ConfigError(self._nothing(selector))
        text = selector if isinstance(selector, str) else getattr(selector, "__name__", "")
        return Explanation(str(text), tuple(made), self._record.mode, self._record.backend)

    def _names(self, op: OpRecord) -> set[str]:
        """Names of the captured nodes that became ``op``; those of parts have a prefix."""
        prefixes = [
            _prefix(part.path)
            for part in self._record.parts[1:]
            if part.path and (op.path == part.path or op.path.startswith(f"{part.path}."))
        ]
        plain = set() if prefixes else set(op.origins)
        return plain | {prefix + name for prefix in prefixes for name in op.origins}

    def _origins(self, selector: Selector) -> set[str]:
        """Names of the captured nodes that a selector names."""
        found: set[str] = set()
        matches = predicate(selector)
        for node in self._captured.values():
            named = isinstance(selector, str) and selector.removeprefix("%") == node.name
            if named or self._by_path(selector, node.path):
                found.add(node.name)
        op = _op_name(selector)
        for node in self._canonical:
            if op and node.what == op:
                found.update(node.origins or (node.name,))
        for graph, prefix in self._graphs.items():
            for live in graph.graph.nodes:
                if live.op.startswith("call") and matches(live):
                    found.update(prefix + name for name in info(live).origins)
        return found

    @staticmethod
    def _by_path(selector: Selector, path: str) -> bool:
        if not isinstance(selector, str) or not path:
            return False
        around = [path]
        while "." in around[-1]:
            around.append(around[-1].rpartition(".")[0])
        if selector.startswith("re:"):
            return any(re.fullmatch(selector[3:], each) for each in around)
        if selector in around:
            return True
        return any(fnmatch.fnmatchcase(each, selector) for each in around)

    def _of_op(self, op: OpRecord) -> OpExplanation:
        names = self._names(op)
        members = [self._captured[name].path for name in names if name in self._captured]
        paths = dict.fromkeys((op.path, *sorted(members)))
        return OpExplanation(
            op.path,
            op.op,
            op.int8,
            op.why,
            op.by,
            advice(op, self._record.mode, tuple(filter(None, paths))),
            self._near(paths),
            self._edits(names),
            op.kernel if self._record.backend else "",
            op.source,
            tuple(path for path in paths if path),
            runs_in(op),
        )

    def _near(self, paths: dict[str, None]) -> tuple[tuple[str, str], ...]:
        """The nearest miss of each rule that found more than one op here, the nearest first."""
        best: dict[str, tuple[int, str]] = {}
        for snapshot in self._record.snapshots:
            for (rule, path, why), far in zip(snapshot.near, snapshot.fits, strict=False):
                if path in paths and far > best.get(rule, (1, ""))[0]:
                    best[rule] = (far, why)
        ranked = sorted(best.items(), key=lambda item: -item[1][0])
        return tuple((rule, why) for rule, (_, why) in ranked)

    def _edits(self, names: set[str]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for snapshot in self._record.snapshots:
            for edit in snapshot.edits:
                if edit.rule not in _PLAIN and names & set(edit.origins):
                    found[f"{snapshot.name}: {edit.rule} ({edit.line})"] = None
        return tuple(found)

    def _of_gone(self, node: NodeState) -> OpExplanation:
        """A captured node that is no op of the result: it was dropped, or never was one."""
        why, by = "it computes no tensor that could be quantized", "annotate"
        if node.op in ("placeholder", "output", "get_attr"):
            why, by = f"it is an {_KINDS[node.op]} of the model, and no op", "capture"
        for snapshot in self._record.snapshots:
            for edit in snapshot.edits:
                if node.name in edit.removed:
                    why = f"pass {snapshot.name!r} took it out (rule {edit.rule})"
                    by = snapshot.name
        near = self._near({node.path: None})
        change = "nothing: there is no op left to quantize"
        names = {node.name}
        return OpExplanation(
            node.path, node.what, None, why, by, change, near, self._edits(names), "", node.source
        )

    def _nothing(self, selector: Selector) -> str:
        paths = dict.fromkeys(op.path for op in self._ops if op.path)
        paths.update(dict.fromkeys(n.path for n in self._captured.values() if n.path))
        text = (
            repr(shown(selector, _NAME))
            if isinstance(selector, str)
            else str(getattr(selector, "__name__", selector))
        )
        return f"{text} names nothing in this model: {names_near(selector, paths)}"


def _prefix(path: str) -> str:
    """What stands before the names of nodes in a part, where all parts are shown as one graph."""
    return f"{path.replace('.', '_')}__" if path else ""


_PLAIN: Final = frozenset(
    {"configure", "annotate", "read-range", "insert-observer", "erase-observer", "inherit-scale"}
)
"""Edits that every op sees, and that say nothing about one."""
_KINDS: Final = {"placeholder": "input", "output": "output", "get_attr": "attribute"}


def _op_name(selector: Selector) -> str:
    """The canonical op that a class or a function stands for."""
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        found = class_op(selector)
        return found.name if found is not None else ""
    if isinstance(selector, str):
        return ""
    function: Callable[..., object] = selector
    spelled = function_spelling(function)
    return spelled[0].name if spelled is not None else ""
