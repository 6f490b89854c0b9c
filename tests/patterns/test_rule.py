"""Rules and sets of rules: order, endings, errors, records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fxquant.errors import PatternError, VerifyError
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import op_named
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rewrite, Rule, RuleSet
from tests.helpers import One, canonical, names, node_of

X = torch.randn(2, 3)


def model(*calls: str) -> GraphModule:
    def body(m: Any, x: Any) -> Any:
        for call in calls:
            x = getattr(torch, call)(x)
        return x

    return canonical(One(body), X)


def becomes(name: str) -> Rewrite:
    def rewrite(match: Match, editor: Editor) -> None:
        args = (match.bound["x"],)
        new = editor.call(op_named(name), args, like=match.root, before=match.root)
        editor.replace(match.root, new, *match.nodes[1:])

    return rewrite


def rule(name: str, pattern: OpExpr, result: str, **more: Any) -> Rule:
    return Rule(name, pattern, becomes(result), **more)


def test_a_rule_fires_until_nothing_is_left() -> None:
    module = model("relu", "tanh", "relu")
    report = RuleSet([rule("r", op("relu", var("x")), "sigmoid")]).apply(Editor(module))
    assert names(module) == ["sigmoid", "tanh", "sigmoid"]
    assert report.hits == {"r": 2}


def test_new_nodes_are_visited_too() -> None:
    module = model("relu")
    rules = [
        rule("a", op("relu", var("x")), "tanh"),
        rule("b", op("tanh", var("x")), "sigmoid"),
    ]
    for order in (rules, rules[::-1]):
        module = model("relu", "relu")
        RuleSet(order).apply(Editor(module))
        assert names(module) == ["sigmoid", "sigmoid"]


def test_the_larger_pattern_is_tried_first() -> None:
    small = rule("a-small", op("tanh", var("x")), "exp")
    large = rule("z-large", op("tanh", op("relu", var("x"))), "sigmoid")
    for order in ([small, large], [large, small]):
        module = model("relu", "tanh")
        RuleSet(order).apply(Editor(module))
        assert names(module) == ["sigmoid"]


def test_priority_goes_before_size() -> None:
    small = rule("small", op("tanh", var("x")), "exp", priority=1)
    large = rule("large", op("tanh", op("relu", var("x"))), "sigmoid")
    module = model("relu", "tanh")
    RuleSet([large, small]).apply(Editor(module))
    assert names(module) == ["relu", "exp"]


def test_equal_rules_are_tried_by_name() -> None:
    rules = [rule("b", op("tanh", var("x")), "exp"), rule("a", op("tanh", var("x")), "sin")]
    for order in (rules, rules[::-1]):
        module = model("tanh")
        RuleSet(order).apply(Editor(module))
        assert names(module) == ["sin"]


def test_rules_that_undo_each_other_are_an_error() -> None:
    back_and_forth = [
        rule("there", op("relu", var("x")), "tanh"),
        rule("back", op("tanh", var("x")), "relu"),
    ]
    with pytest.raises(PatternError, match=r"never settle: \['back', 'there'\]"):
        RuleSet(back_and_forth).apply(Editor(model("relu")))


def test_a_rule_that_grows_the_graph_without_end_is_an_error() -> None:
    def grow(match: Match, editor: Editor) -> None:
        new = editor.call(op_named("relu"), (match.root,), like=match.root, after=match.root)
        editor.reuse(match.root, new)
        editor.set_args(new, (match.root,))

    with pytest.raises(PatternError, match="never settle"):
        RuleSet([Rule("grow", op("relu", var("x")), grow)]).apply(Editor(model("relu")))


def test_a_rewrite_that_changes_nothing_ends_the_visit() -> None:
    idle = Rule("idle", op("relu", var("x")), lambda match, editor: None, priority=1)
    lesser = rule("lesser", op("relu", var("x")), "tanh")
    module = model("relu")
    report = RuleSet([idle, lesser]).apply(Editor(module))
    assert names(module) == ["relu"] and report.hits == {}


def test_two_rules_of_one_name_are_refused_with_both_lines() -> None:
    one, two = rule("same", op("relu", var("x")), "tanh"), rule("same", op("exp", var("x")), "tanh")
    with pytest.raises(PatternError, match=rf"called 'same' \({one.line}, {two.line}"):
        RuleSet([one, two])


def test_a_rule_knows_where_it_is_written() -> None:
    made = Rule("here", op("relu", var("x")), becomes("tanh"))
    assert made.line.startswith(Path(__file__).name + ":")
    editor = Editor(model("relu"))
    RuleSet([made]).apply(editor)
    assert [(edit.rule, edit.line) for edit in editor.log] == [("here", made.line)]


def test_a_failing_rewrite_names_rule_and_node() -> None:
    def broken(match: Match, editor: Editor) -> None:
        raise IndexError("off by one")

    failing = Rule("breaks", op("tanh", var("x")), broken)
    with pytest.raises(PatternError, match="off by one") as caught:
        RuleSet([failing]).apply(Editor(model("relu", "tanh")))
    text = str(caught.value)
    assert f"rule 'breaks' ({failing.line}) failed at tanh: IndexError" in text
    assert "> %tanh = tanh(%relu)" in text
    assert isinstance(caught.value.__cause__, IndexError)


def test_errors_of_the_package_pass_through() -> None:
    def refuses(match: Match, editor: Editor) -> None:
        raise VerifyError("as it is")

    with pytest.raises(VerifyError, match=r"^as it is$"):
        RuleSet([Rule("r", op("relu", var("x")), refuses)]).apply(Editor(model("relu")))


def test_checks_refuse_with_a_reason_and_the_next_rule_is_tried() -> None:
    def never(match: Match) -> Reject | None:
        return Reject("not today")

    first = rule("first", op("tanh", op("relu", var("x"))), "exp", checks=(never,))
    second = rule("second", op("tanh", var("x")), "sin")
    module = model("relu", "tanh")
    report = RuleSet([first, second]).apply(Editor(module))
    assert names(module) == ["relu", "sin"]
    assert report.near[("first", "tanh")].reason == "not today"


def test_every_way_to_match_is_checked() -> None:
    def reads_the_input(match: Match) -> Reject | None:
        return None if match.node("b").name == "y" else Reject("the other way round")

    pattern = op("mul", op("relu", var("a")), op("relu", var("b")))
    found = Rule("r", pattern, becomes("tanh"), (reads_the_input,))

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(y) * torch.relu(x)

    module = canonical(Product(), X, X)
    match = found.match(node_of(module, "mul"))
    assert isinstance(match, Match) and match.node("b").name == "y"


def test_near_misses_need_one_op_in_place() -> None:
    pair = rule("pair", op("tanh", op("relu", var("x"))), "exp")
    report = RuleSet([pair]).apply(Editor(model("sigmoid", "tanh")))
    assert report.near[("pair", "tanh")].reason == "expected relu, found sigmoid %sigmoid"
    assert RuleSet([pair]).apply(Editor(model("sigmoid"))).near == {}


def test_the_nearest_miss_of_all_visits_is_kept() -> None:
    """Once another rule has rewritten what nearly fitted, the next visit finds less."""

    def never(match: Match) -> Reject | None:
        return Reject("not today")

    wide = rule("wide", op("tanh", op("relu", var("x"))), "exp", checks=(never,))
    inner = rule("inner", op("relu", var("x")), "sin")
    module = model("relu", "tanh")
    report = RuleSet([wide, inner]).apply(Editor(module), backwards=True)
    assert names(module) == ["sin", "tanh"]
    assert report.near[("wide", "tanh")].reason == "not today"


def test_a_rule_that_fires_after_all_missed_nothing() -> None:
    late = rule("late", op("tanh", op("sin", var("x"))), "exp")
    inner = rule("inner", op("relu", var("x")), "sin")
    module = model("relu", "tanh")
    report = RuleSet([late, inner]).apply(Editor(module), backwards=True)
    assert names(module) == ["exp"]
    assert ("late", "tanh") not in report.near


def test_the_set_matches_without_changing() -> None:
    rules = RuleSet([rule("pair", op("tanh", op("relu", var("x"))), "exp")])
    module = model("relu", "tanh")
    found = rules.match(node_of(module, "tanh"))
    assert found is not None and found[0].name == "pair"
    assert rules.match(node_of(module, "relu")) is None
    assert names(module) == ["relu", "tanh"]


def test_provenance_of_all_matched_nodes_is_kept() -> None:
    module = model("relu", "tanh")
    RuleSet([rule("pair", op("tanh", op("relu", var("x"))), "exp")]).apply(Editor(module))
    assert set(info(node_of(module, "exp")).origins) == {"relu", "tanh"}


FILES = (
    "flattened.py",
    "norm.py",
    "scale_shift.py",
    "conv.py",
    "linear.py",
    "residual.py",
    "unary.py",
)


def test_built_in_rules_have_names_of_their_own_and_lines() -> None:
    assert len({r.name for r in FUSION_RULES}) == len(FUSION_RULES)
    for built_in in FUSION_RULES:
        assert built_in.line.split(":")[0] in FILES
        assert built_in.name == built_in.name.lower() and " " not in built_in.name
