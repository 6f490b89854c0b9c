"""Rules that compete for the same ops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import op_named
from fxquant.patterns.expr import chain
from fxquant.patterns.match import Match
from fxquant.patterns.overlap import apply_by_priority
from fxquant.patterns.rule import Rewrite, Rule
from tests.helpers import canonical, names


def respell(to: str) -> Rewrite:
    def rewrite(match: Match, editor: Editor) -> None:
        source = match.nodes[-1].args[0]
        made = editor.call(op_named(to), (source,), {}, like=match.root, before=match.root)
        editor.note_values(made, value="tensor")
        editor.replace(match.root, made, *match.nodes[1:])

    return rewrite


def rule(name: str, *ops: str, to: str, priority: int = 0) -> Rule:
    return Rule(name, chain(*ops), respell(to), priority=priority, early=True)


def net() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Sigmoid()).eval()


@pytest.mark.parametrize("turned", [False, True])
def test_the_larger_match_goes_first_whatever_the_order(turned: bool) -> None:
    rules = [
        rule("small", "tanh", "relu", to="silu"),
        rule("large", "tanh", "relu", "sigmoid", to="mish"),
    ]
    module = canonical(net(), torch.randn(2, 3))
    report = apply_by_priority(rules[::-1] if turned else rules, Editor(module))
    assert names(module) == ["mish"] and report.hits == {"large": 1}


def test_priority_beats_size() -> None:
    rules = [
        rule("small", "tanh", "relu", to="silu", priority=1),
        rule("large", "tanh", "relu", "sigmoid", to="mish"),
    ]
    module = canonical(net(), torch.randn(2, 3))
    assert apply_by_priority(rules, Editor(module)).hits == {"small": 1}
    assert names(module) == ["silu", "sigmoid"]


def test_what_is_made_may_be_matched_in_the_next_round() -> None:
    rules = [rule("first", "tanh", to="silu"), rule("second", "silu", "relu", to="mish")]
    module = canonical(net(), torch.randn(2, 3))
    assert apply_by_priority(rules, Editor(module)).hits == {"first": 1, "second": 1}
    assert names(module) == ["mish", "sigmoid"]


def test_rules_that_make_what_they_match_end() -> None:
    rules = [rule("there", "tanh", to="silu"), rule("back", "silu", to="tanh")]
    with pytest.raises(PatternError, match="make what they match"):
        apply_by_priority(rules, Editor(canonical(net(), torch.randn(2, 3))))
