"""A dry run: where a pattern fits in a model, and where it nearly does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.arguments import check_model, ranks, split_example
from fxquant.custom.bound import described
from fxquant.custom.compile import Compiled
from fxquant.custom.parameters import Parameter
from fxquant.custom.trace import canonicalize
from fxquant.errors import TraceError
from fxquant.graph.capture import capture
from fxquant.graph.info import info
from fxquant.graph.op_table import op_of
from fxquant.graph.pieces import is_layer, parts_of, users_path
from fxquant.graph.ranks import record_ranks
from fxquant.graph.settle import unwrapped
from fxquant.graph.text import shown
from fxquant.graph.view import what
from fxquant.patterns.expr import OpExpr
from fxquant.patterns.match import Match, Misses, find
from fxquant.patterns.overlap import candidates, chosen
from fxquant.patterns.rule import Rule, RuleReport, RuleSet

_NAME = 80


@dataclass(frozen=True)
class Hit:
    """A place where a pattern fits.

    Args:
        path: path of its first op in the user's model.
        ops: the canonical ops, in graph order.
        nodes: names of the matched nodes, in graph order.
        bound: names of the pattern, each with the path or number that it stands for.
        source: the user's line of its last op.
    """

    path: str
    ops: tuple[str, ...]
    nodes: tuple[str, ...]
    bound: dict[str, str]
    source: str

    def __str__(self) -> str:
        names = ", ".join(f"{k}={shown(v, _NAME)}" for k, v in self.bound.items())
        return f"{shown(self.path, _NAME)}: {' + '.join(self.ops)} ({names})"


@dataclass(frozen=True)
class NearMiss:
    """A place where a part of a pattern fits.

    Args:
        path: path of the place in the user's model.
        reason: what is missing or too much.
        matched: how many ops did fit.
        node: name of the node.
        source: the user's line.
    """

    path: str
    reason: str
    matched: int
    node: str
    source: str

    def __str__(self) -> str:
        return f"{shown(self.path, _NAME)}: {shown(self.reason, 4 * _NAME)}"


@dataclass(frozen=True)
class Matches:
    """What a dry run of a pattern found.

    Args:
        pattern: the pattern's name.
        hits: where it fits, in graph order.
        near: where it nearly does, the nearest first.
        unseen: parts of the model that could not be looked into, with the reason.
    """

    pattern: str
    hits: tuple[Hit, ...]
    near: tuple[NearMiss, ...] = ()
    unseen: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        def some(count: int, noun: str, nouns: str) -> str:
            return f"{count or 'no'} {noun if count == 1 else nouns}"

        lines = [
            f"pattern {shown(self.pattern, _NAME)}: {some(len(self.hits), 'hit', 'hits')}, "
            f"{some(len(self.near), 'near miss', 'near misses')}"
        ]
        lines += [f"  hit  {hit}" for hit in self.hits]
        lines += [f"  near {miss}" for miss in self.near]
        lines += [f"  not looked into: {shown(p, _NAME)} ({shown(w)})" for p, w in self.unseen]
        return "\n".join(lines)


def look_for(
    rule: Rule,
    compiled: Compiled,
    parameters: tuple[Parameter, ...],
    model: nn.Module,
    example_inputs: Any,
) -> Matches:
    """Look for a pattern in a model, without changing it.

    Raises:
        ConfigError: ``model`` is no float model.
        TraceError: it cannot be captured.
    """
    model = unwrapped(model)
    check_model(model)
    args, kwargs = split_example(example_inputs)
    captured = capture(model, args, kwargs, evaluate=True)
    known = ranks(model, args, kwargs)
    search = _Search(rule, compiled, parameters)
    search.look(captured.module, "", known)
    for leaf, why in captured.leaves:
        for place, child in parts_of(captured.module, leaf):
            search.part(users_path(place), child, why)
    near = sorted(search.near, key=lambda miss: -miss.matched)
    return Matches(rule.name, tuple(search.hits), tuple(near), tuple(search.unseen))


class _Search:
    """Hits and misses of one pattern in the graphs of one model."""

    def __init__(self, rule: Rule, compiled: Compiled, parameters: tuple[Parameter, ...]) -> None:
        self._rule, self._compiled, self._parameters = rule, compiled, parameters
        self.hits: list[Hit] = []
        self.near: list[NearMiss] = []
        self.unseen: list[tuple[str, str]] = []

    def part(self, path: str, child: nn.Module, why: str) -> None:
        """Look into a part of a module that stays the user's own code."""
        if is_layer(child):
            child = nn.Sequential(child)
        try:
            module = capture(child, evaluate=True).module
        except TraceError:
            self.unseen.append((path, why))
            return
        self.look(module, path, {})

    def look(self, module: GraphModule, prefix: str, known: dict[str, int]) -> None:
        """Look into one graph."""
        canonicalize(module, known=True)
        record_ranks(module.graph, known)
        report = RuleReport()
        found = chosen(candidates(RuleSet((self._rule,)), module.graph.nodes, report), report)
        order = {node: place for place, node in enumerate(module.graph.nodes)}
        taken: dict[Node, None] = {}
        for candidate in sorted(found, key=lambda each: order[each.match.root]):
            taken.update(dict.fromkeys(candidate.match.nodes))
            self.hits.append(self._hit(candidate.match, prefix))
        named = {node.name: node for node in module.graph.nodes}
        for (_, name), reject in report.near.items():
            at = reject.node if reject.node is not None else named[name]
            self._miss(prefix, at, reject.reason, reject.matched)
            if reject.matched > 1:
                taken[named[name]] = None
        self._unfinished(module.graph.nodes, taken, prefix)

    def _hit(self, match: Match, prefix: str) -> Hit:
        nodes = sorted(match.nodes)
        path = _join(prefix, info(nodes[0]).path or nodes[0].name)
        bound = described(match, self._parameters)
        return Hit(
            path,
            tuple(what(node) for node in nodes),
            tuple(node.name for node in nodes),
            {name: _join(prefix, value) for name, value in bound.items()},
            info(match.root).source,
        )

    def _miss(self, prefix: str, node: Node, reason: str, matched: int) -> None:
        path = _join(prefix, info(node).path or node.name)
        self.near.append(NearMiss(path, reason, matched, node.name, info(node).source))

    def _unfinished(self, nodes: Iterable[Node], taken: dict[Node, None], prefix: str) -> None:
        """Places where the pattern begins and then goes on otherwise."""
        parents = _parents(self._compiled)
        for node in nodes:
            found = op_of(node)
            if found is None or node in taken:
                continue
            for inner, outer in parents:
                if found.name not in inner.roots:
                    continue
                match = next(iter(find(inner, node, Misses())), None)
                if match is None or any(member in taken for member in match.nodes):
                    continue
                users = [u for u in node.users if _may_be(u, outer)]
                if not users:
                    after = ", ".join(f"{what(u)} %{u.name}" for u in list(node.users)[:3])
                    wanted = " or ".join(outer.ops)
                    why = f"expected {wanted} after `{info(node).path or node.name}`, found {after}"
                    self._miss(prefix, node, why, len(match.nodes))
                    break


def _may_be(node: Node, expr: OpExpr) -> bool:
    found = op_of(node)
    return found is not None and found.name in expr.ops


def _parents(compiled: Compiled) -> list[tuple[OpExpr, OpExpr]]:
    """Every op of a pattern with one that reads it, the largest first."""
    pairs = [
        (arg, outer) for outer in compiled.inner for arg in outer.args if isinstance(arg, OpExpr)
    ]
    return sorted(pairs, key=lambda pair: -pair[0].size)


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path
