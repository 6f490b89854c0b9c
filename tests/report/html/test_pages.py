"""The pages, read without a browser: complete, consistent, harmless whatever names hold."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import fx, nn

import fxquant
from fxquant.graph.diff import GraphState
from fxquant.graph.state import Ref
from fxquant.report.diff import ModelDiff, diff_models
from fxquant.report.html.diff_page import WIDE
from fxquant.report.html.layout import SHORTEST_RUN, lay_out
from tests.graph.test_diff import CHAIN, changed, mutated, node
from tests.report.html.pages import Page, check_is_harmless
from tests.report.test_history import MARKUP
from tests.report.test_report_api import Small

HOSTILE = (
    *MARKUP,
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "\u202eright to left\u2066",
    "\x1b[31mred\x00\x07",
    "]]>--><!--",
    "\ud800 lone",
    "n" * 10_000,
)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, fx.GraphModule, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Small().eval()
    batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    return model, fxquant.quantize(model, batches, backend="reference"), batches


Models = tuple[nn.Module, fx.GraphModule, list[torch.Tensor]]


def hostile_diff(name: str) -> ModelDiff:
    """A diff with a name in every place that users choose."""
    before = tuple(
        dataclasses.replace(made, path=name, target=name, setup=name, source=name, rules=(name,))
        for made in CHAIN.nodes
    )
    after = tuple(dataclasses.replace(n, what=name) if n.name == "relu" else n for n in before)
    return diff_models(GraphState(before), GraphState(after))


def test_every_block_is_drawn_and_told(models: Models) -> None:
    model, quantized, batches = models
    diff = fxquant.diff(model, quantized, data=batches)
    read = check_is_harmless(diff.to_html(title="Small"))
    layout = lay_out(diff)
    drawn = {int(a["data-i"]): a for a in read.having("g", "data-i")}
    assert set(drawn) == set(range(len(layout.blocks)))
    told = {a["id"] for a in read.having("section", "id")}
    assert told == {f"d{index}" for index in drawn}
    shown = Counter(a.get("data-c", "same") for a in drawn.values())
    assert shown == Counter(
        "same" if each.block.change is None else each.block.change.kind for each in layout.blocks
    )
    nodes = [n for each in layout.blocks for n in each.block.after]
    assert Counter(nodes) == Counter(diff.after.nodes)
    assert "Small" in read.texts
    assert any(re.fullmatch(r"\d+\.\d dB", text) for text in read.texts)


def test_blocks_do_not_overlap_and_edges_go_down(models: Models) -> None:
    model, quantized, _ = models
    read = Page(fxquant.diff(model, quantized).to_html())
    places = [
        (*map(int, re.findall(r"\d+", a["transform"])), int(a["data-h"]))
        for a in read.having("g", "transform")
        if " off" not in a["class"]
    ]
    for i, (x, y, h) in enumerate(places):
        for other_x, other_y, other_h in places[:i]:
            apart = abs(x - other_x) >= WIDE
            assert apart or y + h < other_y or other_y + other_h < y


@given(mutated())
def test_layouts_hold_every_node_once_and_respect_the_order(
    pair: tuple[GraphState, GraphState],
) -> None:
    diff = diff_models(*pair)
    layout = lay_out(diff)
    nodes = Counter(n for each in layout.blocks for n in each.block.after)
    assert nodes == Counter(diff.after.nodes)
    gone = Counter(n for each in layout.blocks for n in each.block.before)
    assert gone == Counter(diff.before.nodes)
    places = Counter((each.layer, each.column) for each in layout.blocks)
    assert max(places.values()) == 1
    for link in layout.links:
        source, target = layout.blocks[link.source], layout.blocks[link.target]
        if link.source < link.target:
            assert source.layer < target.layer
        assert (link.lane >= 0) == (target.layer != source.layer + 1)
    assert len(layout.links) == len({(link.source, link.target) for link in layout.links})
    check_is_harmless(diff.to_html())


def long_chain(count: int, odd: int) -> GraphState:
    nodes = [node("n0", "input")]
    for index in range(1, count):
        what = "gelu" if index == odd else "relu"
        nodes.append(node(f"n{index}", what, Ref(f"n{index - 1}")))
    return GraphState((*nodes, node("output", "output", Ref(f"n{count - 1}"))))


def test_unchanged_runs_are_folded_and_a_chain_is_one_column() -> None:
    diff = diff_models(long_chain(40, 0), long_chain(40, 20))
    layout = lay_out(diff)
    assert layout.columns == 1 and layout.lanes == 0
    assert [len(run) for run in layout.runs] == [19, 19]
    read = check_is_harmless(diff.to_html())
    assert sum(" off" in a["class"] for a in read.having("g", "data-i")) == 38
    assert sum("19 unchanged" in text for text in read.texts) == 2
    short = lay_out(diff_models(long_chain(10, 0), long_chain(10, SHORTEST_RUN)))
    assert [len(run) for run in short.runs] == [9 - SHORTEST_RUN]


def test_no_differences_make_a_page_too() -> None:
    read = check_is_harmless(diff_models(CHAIN, CHAIN).to_html())
    assert any("no differences" in text for text in read.texts)
    check_is_harmless(diff_models(GraphState(()), GraphState(())).to_html())


def test_long_edges_have_lanes_and_parallel_edges_are_one() -> None:
    diff = diff_models(CHAIN, changed("mul", args=(Ref("relu"), Ref("x"))))
    layout = lay_out(diff)
    assert layout.lanes == 1
    (link,) = [each for each in layout.links if each.lane >= 0]
    assert (link.status, link.count) == ("added", 1)
    once = next(each for each in layout.links if each.status == "changed")
    assert once.count == 1  # it was read twice


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    diff = hostile_diff(name)
    page = diff.to_html(title=name)
    assert len(page) < 60_000
    check_is_harmless(page)
    for part in (diff._repr_html_(), diff.to_markdown(), diff.to_text(color=False)):
        assert all(c.isprintable() or c == "\n" for c in part)
    read = Page(diff._repr_html_())
    assert set(read.tags) <= {*["div", "table", "thead", "tbody", "tr", "th", "td", "pre"]}
    diff.to_networkx()
    json.dumps(diff.to_dict())


def test_the_report_page_has_a_row_an_op_and_a_figure_an_observer(models: Models) -> None:
    model, quantized, batches = models
    report = fxquant.report(quantized)
    plain = check_is_harmless(report.to_html())
    assert len(plain.having("tr", "data-q")) == len(report.ops)
    assert plain.tags["figure"] == len(report._record.observers) > 0
    comparison = fxquant.compare(model, quantized, batches)
    both = check_is_harmless(report.to_html(comparison=comparison))
    assert len(both.having("tr", "data-q")) == len(report.ops) + len(comparison)
    check_is_harmless(fxquant.report(fxquant.prepare(model)).to_html())


def test_hostile_names_in_a_report_are_text(models: Models) -> None:
    _, quantized, _ = models
    report = fxquant.report(quantized)
    record = report._record
    for name in HOSTILE:
        ops = tuple(dataclasses.replace(op, path=name, op=name, why=name) for op in record.ops)
        seen = tuple(dataclasses.replace(each, path=name) for each in record.observers)
        spoiled = type(report)(dataclasses.replace(record, ops=ops, observers=seen, rung=name))
        check_is_harmless(spoiled.to_html(title=name))
        assert set(Page(spoiled._repr_html_()).tags) <= {
            *["div", "table", "thead", "tbody", "tr", "th", "td", "pre"]
        }


def test_notebooks_show_tables(models: Models) -> None:
    model, quantized, batches = models
    shown = {
        "report": (fxquant.report(quantized), 4),
        "history": (fxquant.history(quantized), len(fxquant.history(quantized))),
        "diff": (fxquant.diff(quantized), len(fxquant.diff(quantized).changes)),
        "compare": (fxquant.compare(model, quantized, batches), 4),
    }
    for made, count in shown.values():
        read = Page(made._repr_html_())  # type: ignore[attr-defined] # of four classes
        assert read.tags["tr"] == count + 1
        assert not {"script", "style"} & set(read.tags)


def test_long_tables_are_cut_in_notebooks() -> None:
    diff = diff_models(GraphState(()), long_chain(300, 0))
    read = Page(diff._repr_html_())
    assert read.tags["tr"] == 201
    assert any("rows more" in text for text in read.texts)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    diff = diff_models(CHAIN, changed("relu", what="gelu"))
    file = tmp_path / "diff.html"
    assert diff.to_html(file) == file.read_text(encoding="utf-8") == diff.to_html()
    assert [each.name for each in tmp_path.iterdir()] == ["diff.html"]
    with pytest.raises(OSError, match="nowhere"):
        diff.to_html(tmp_path / "nowhere" / "diff.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        diff.to_html(tmp_path / "folder")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["diff.html", "folder"]


def test_a_large_diff_stays_small() -> None:
    diff = diff_models(long_chain(5000, 1), long_chain(5000, 2500))
    page = diff.to_html()
    assert len(page.encode()) < 5_000_000
    assert page.count("data-i=") == 5001
