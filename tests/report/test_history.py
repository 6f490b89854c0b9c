"""History and diffs as JSON and as Markdown: complete, and harmless whatever names hold."""

from __future__ import annotations

import html
import json
import re

import pytest
import torch
from torch import nn

from fxquant.api import quantize
from fxquant.graph.diff import GraphState, NodeState, diff_states
from fxquant.graph.text import shown, shown_in_markdown
from fxquant.report.api import diff, history
from fxquant.report.history import History
from fxquant.report.tables import markdown_table
from tests.report.test_tables import HOSTILE

MARKUP = (
    *HOSTILE,
    "a|b",
    "`code`",
    "[text](http://x.org)",
    "www.x.org",
    "<b>&amp;",
    "\\|",
    "~~x~~",
)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """A small model in int8."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    return quantize(net, [torch.randn(2, 3, 8, 8)], backend="reference")


def unmarked(text: str) -> str:
    """What a reader of Markdown sees of one inline text."""
    return html.unescape(re.sub(r"\\([^\w\s])", r"\1", text))


def test_every_pass_and_edit_is_in_the_dict(quantized: nn.Module) -> None:
    made = history(quantized)
    told = json.loads(json.dumps(made.to_dict(), allow_nan=False))["passes"]
    assert [step["name"] for step in told] == list(made.names)
    for step, snapshot in zip(told, made, strict=True):
        assert [edit["rule"] for edit in step["edits"]] == [edit.rule for edit in snapshot.edits]
        assert all(edit["line"] for edit in step["edits"])


def test_the_dict_holds_the_graph_after_every_pass(quantized: nn.Module) -> None:
    made = history(quantized)
    text = None
    for step, snapshot in zip(made.to_dict()["passes"], made, strict=True):
        text = text if step["graph"] is None else step["graph"]
        assert text == snapshot.state.text


def test_markdown_has_a_row_a_pass(quantized: nn.Module) -> None:
    made: History = history(quantized)
    lines = made.to_markdown().splitlines()
    assert len(lines) == len(made) + 2
    assert all(line.count("|") - line.count("\\|") == 7 for line in lines)


def test_markdown_of_a_diff_has_an_item_a_change(quantized: nn.Module) -> None:
    found = diff(quantized)
    lines = found.to_markdown().splitlines()
    assert sum(line.startswith("- **") for line in lines) == len(found.changes) > 0
    assert lines[-1] == found.summary


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_shows_any_text_and_nothing_else(text: str) -> None:
    marked = shown_in_markdown(text, 60)
    assert unmarked(marked) == shown(text, 60)
    assert marked.isprintable()
    assert "<" not in marked
    assert not re.search(r"(?<!\\)(\\\\)*[|`*\[]", marked)
    assert not re.search(r"(?<!\\)://", marked)
    assert "www." not in marked


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_tables_keep_their_columns(text: str) -> None:
    lines = markdown_table(("name", "n"), [(text, "1.10")], right=("n",)).split("\n")
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 3
    assert lines[2].endswith(" 1.10 |")


@pytest.mark.parametrize("name", MARKUP)
def test_hostile_names_in_a_diff_are_text(name: str) -> None:
    gone = NodeState("x", "placeholder", "input", name, (), path=name, kwargs=())
    lines = diff_states(GraphState((gone,)), GraphState(())).to_markdown().split("\n")
    assert len(lines) == 3
    assert lines[0].startswith("- **removed** ")
    assert lines[0].isprintable()
    assert "<" not in lines[0]
    assert len(lines[0]) < 1_500
