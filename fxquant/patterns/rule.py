"""Rules: a pattern, conditions, and what to do; and sets of rules, run until nothing changes."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from fxquant.errors import FxQuantError, PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import op_of
from fxquant.graph.view import around
from fxquant.patterns.expr import OpExpr
from fxquant.patterns.match import Match, Misses, Reject, find

Check = Callable[[Match], "Reject | None"]
Rewrite = Callable[[Match, Editor], None]


def _definition_line() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    # A dataclass's generated __init__ has no file of its own; the caller stands above it.
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


@dataclass(frozen=True)
class Rule:
    """One named rewrite.

    Args:
        name: kebab-case, as printed in histories.
        pattern: where it applies.
        rewrite: does it, through the editor.
        checks: further conditions on a match; each returns ``None`` or a :class:`Reject`.
        priority: rules of higher priority are tried first; then larger patterns.
        line: where the rule is written.
        also: further outputs of the pattern, which ``pattern`` does not lead to.
        early: whether it goes before all rules that are not, over the whole graph: users' patterns
            see ops as the model has them, and compete by priority and size.
    """

    name: str
    pattern: OpExpr
    rewrite: Rewrite
    checks: tuple[Check, ...] = ()
    priority: int = 0
    line: str = field(default_factory=_definition_line)
    also: tuple[OpExpr, ...] = ()
    early: bool = False

    def match(self, node: Node, misses: Misses | None = None) -> Match | Reject:
        """The first match at ``node`` that passes the checks, or the nearest miss."""
        notes = misses if misses is not None else Misses()
        for match in self._found(node, notes):
            refusal = self._refusal(match)
            if refusal is None:
                return match
            notes.add(
                Reject(refusal.reason, refusal.node or node, len(match.nodes) + refusal.matched)
            )
        return notes.best or Reject("nothing to match", node)

    def _found(self, node: Node, notes: Misses) -> Iterator[Match]:
        found = find(self.pattern, node, notes)
        for other in self.also:
            found = _joined(found, other, notes)
        return found

    def _refusal(self, match: Match) -> Reject | None:
        for check in self.checks:
            refusal = check(match)
            if refusal is not None:
                return refusal
        return None


def _joined(found: Iterator[Match], other: OpExpr, notes: Misses) -> Iterator[Match]:
    """Each match together with another output, looked for among the readers of what it bound."""
    for match in found:
        inside = dict.fromkeys(match.nodes)
        for node in _downstream(match, other.size):
            op = op_of(node)
            if node not in inside and op is not None and op.name in other.roots:
                yield from find(other, node, notes, after=match)


def _downstream(match: Match, depth: int) -> list[Node]:
    """What reads the bound values within ``depth`` ops, in graph order."""
    reached = dict.fromkeys([v for v in match.bound.values() if isinstance(v, Node)])
    layer = list(reached)
    for _ in range(depth):
        layer = [user for node in layer for user in node.users if user not in reached]
        reached.update(dict.fromkeys(layer))
    return sorted(reached)


@dataclass
class RuleReport:
    """What a run of rules did.

    Args:
        hits: how often each rule fired.
        near: the nearest miss of each rule that had at least one op in place, by node name.
    """

    hits: dict[str, int] = field(default_factory=dict)
    near: dict[tuple[str, str], Reject] = field(default_factory=dict)


class RuleSet:
    """Rules that are applied together until none of them fires.

    Args:
        rules: the rules; names must differ.

    Raises:
        PatternError: two rules have one name.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        names: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.name in names:
                raise PatternError(
                    f"two rules are called {rule.name!r} ({names[rule.name].line}, {rule.line})"
                )
            names[rule.name] = rule
        self._by_root = self._index()

    def _index(self) -> Mapping[str, tuple[Rule, ...]]:
        # Order is a total one (priority, size, name): the same set gives the same result.
        ordered = sorted(self.rules, key=lambda r: (-r.priority, -r.pattern.size, r.name))
        by_root: dict[str, list[Rule]] = {}
        for rule in ordered:
            for root in rule.pattern.roots:
                by_root.setdefault(root, []).append(rule)
        return {root: tuple(rules) for root, rules in by_root.items()}

    def match(self, node: Node) -> tuple[Rule, Match] | None:
        """The first rule that fits at ``node``."""
        for rule in self.at(node):
            found = rule.match(node)
            if isinstance(found, Match):
                return rule, found
        return None

    def at(self, node: Node) -> tuple[Rule, ...]:
        """The rules whose outermost op ``node`` may be, in the order in which they are tried."""
        op = op_of(node)
        return self._by_root.get(op.name, ()) if op is not None else ()

    def apply(self, editor: Editor, *, backwards: bool = False) -> RuleReport:
        """Rewrite ``editor``'s graph until no rule fires.

        Args:
            editor: the graph.
            backwards: visit the nodes in reverse order first.

        Raises:
            PatternError: the rules undo each other and would never end, or a rewrite failed.
        """
        report = RuleReport()
        todo = deque(reversed(editor.graph.nodes) if backwards else editor.graph.nodes)
        waiting = dict.fromkeys(todo)
        limit = 50 * len(todo) + 1000
        while todo:
            node = todo.popleft()
            waiting.pop(node, None)
            if node._erased:
                continue
            for again in self._visit(node, editor, report):
                if again not in waiting and not again._erased:
                    waiting[again] = None
                    todo.append(again)
            limit -= 1
            if limit < 0:
                raise PatternError(f"these rules never settle: {sorted(report.hits)}")
        return report

    def _visit(self, node: Node, editor: Editor, report: RuleReport) -> list[Node]:
        for rule in self.at(node):
            found = rule.match(node)
            if isinstance(found, Reject):
                before = report.near.get((rule.name, node.name))
                # Later visits may find less: what nearly fitted has been rewritten by others.
                if found.matched > 0 and (before is None or found.matched >= before.matched):
                    report.near[(rule.name, node.name)] = found
                continue
            edited = len(editor.log)
            users = [user for inner in found.nodes for user in inner.users]
            run_rule(rule, found, editor)
            if len(editor.log) == edited:
                # It fits and is done already; a lesser rule must not undo it.
                return []
            report.hits[rule.name] = report.hits.get(rule.name, 0) + 1
            report.near.pop((rule.name, node.name), None)
            added = {name for edit in editor.log[edited:] for name in edit.added}
            fresh = [u for u in users if not u._erased]
            reach = [n for u in fresh for n in u.all_input_nodes if n.name in added]
            return [*([node] if not node._erased else []), *reach, *fresh]
        return []


def run_rule(rule: Rule, match: Match, editor: Editor) -> None:
    """Rewrite one match, as one edit of the editor's log.

    Raises:
        PatternError: the rewrite failed.
    """
    try:
        with editor.rule(rule.name, line=rule.line):
            rule.rewrite(match, editor)
    except FxQuantError:
        raise
    # A rewrite may be the user's own code and fail in any way; say which one and where.
    except Exception as error:
        record = info(match.root)
        raise PatternError(
            f"rule {rule.name!r} ({rule.line}) failed at {record.path or match.root.name}: "
            f"{type(error).__name__}: {error}\n{around(match.root)}"
        ) from error
