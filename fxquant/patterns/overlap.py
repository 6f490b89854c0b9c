"""Applying rules that compete for the same ops: the highest priority takes them, then the largest.

The other rules run node by node (:mod:`fxquant.patterns.rule`), which is faster and enough where
rules agree with each other; a user's patterns need not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.view import positions
from fxquant.patterns.match import Match, Misses, Reject
from fxquant.patterns.rule import Rule, RuleReport, RuleSet, run_rule

_ROUNDS = 20


@dataclass(frozen=True)
class Candidate:
    """A place where a rule fits.

    Args:
        rule: the rule.
        match: the place.
    """

    rule: Rule
    match: Match


def candidates(rules: RuleSet, nodes: Iterable[Node], report: RuleReport) -> list[Candidate]:
    """Every match of every rule, the one that goes first in front.

    Args:
        rules: the rules.
        nodes: the nodes of the graph, in order.
        report: keeps the near misses.
    """
    found: list[tuple[tuple[int, int, str, int], Candidate]] = []
    for place, node in enumerate(nodes):
        for rule in rules.at(node):
            match = rule.match(node, Misses())
            if isinstance(match, Reject):
                if match.matched > 0:
                    report.near[(rule.name, node.name)] = match
                continue
            order = (-rule.priority, -len(match.nodes), rule.name, place)
            found.append((order, Candidate(rule, match)))
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def chosen(found: list[Candidate], report: RuleReport) -> list[Candidate]:
    """The candidates that share no op with one that goes before them."""
    owner: dict[Node, Rule] = {}
    kept = []
    for candidate in found:
        rule, match = candidate.rule, candidate.match
        shared = next((node for node in match.nodes if node in owner), None)
        if shared is None:
            owner.update(dict.fromkeys(match.nodes, rule))
            kept.append(candidate)
        elif owner[shared] is not rule:
            why = f"`{shared.name}` belongs to pattern {owner[shared].name!r}, which goes first"
            report.near[(rule.name, match.root.name)] = Reject(why, shared, len(match.nodes))
    return kept


def apply_by_priority(rules: Iterable[Rule], editor: Editor) -> RuleReport:
    """Apply rules until none fits, those of higher priority first, then larger matches.

    Args:
        rules: the rules; names must differ.
        editor: the graph.

    Raises:
        PatternError: a rule makes what it matches, again and again; or a rewrite failed.
    """
    indexed, report = RuleSet(rules), RuleReport()
    for _ in range(_ROUNDS):
        report.near.clear()
        kept = chosen(candidates(indexed, editor.graph.nodes, report), report)
        edited = len(editor.log)
        places = positions(editor.graph)
        for candidate in sorted(kept, key=lambda each: places[each.match.root]):
            if any(node._erased for node in candidate.match.nodes):
                continue
            before = len(editor.log)
            run_rule(candidate.rule, candidate.match, editor)
            if len(editor.log) > before:
                name = candidate.rule.name
                report.hits[name] = report.hits.get(name, 0) + 1
        # Marks alone open no place for another match; new nodes may.
        if not any(edit.added or edit.removed for edit in editor.log[edited:]):
            return report
    raise PatternError(f"these patterns make what they match: {sorted(report.hits)}")
