"""Graph diffs: nothing missed, nothing invented, the same read from both sides."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from random import Random

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxquant.graph.capture import capture
from fxquant.graph.diff import GraphDiff, GraphState, NodeState, diff_states, graph_state
from fxquant.graph.info import QType
from fxquant.graph.state import Argument, Ref

SCALE = 0.1
TYPE = QType(SCALE, 3, 0, 255, torch.uint8)
OPS = ("relu", "add", "mul", "conv2d")


def node(name: str, what: str, *args: Argument, **fields: object) -> NodeState:
    """A node of a graph made by hand."""
    op = {"input": "placeholder", "output": "output", "conv2d": "call_module"}.get(what)
    made = NodeState(name, op or "call_function", what, what, args, ())
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type] # fields by their names


@st.composite
def states(draw: st.DrawFn) -> GraphState:
    """A small graph; its provenance may be right, missing, or nonsense."""
    kind = draw(st.sampled_from(["captured", "paths", "bare", "nonsense"]))
    nodes = [node("x", "input"), node("y", "input", target="y")]
    for index in range(draw(st.integers(1, 6))):
        what = draw(st.sampled_from(OPS))
        known = st.sampled_from([Ref(made.name) for made in nodes])
        args = [draw(known) for _ in range(2 if what in ("add", "mul") else 1)]
        nodes.append(node(f"n{index}", what, *args, "0.5" if what == "mul" else "1"))
    nodes.append(node("output", "output", Ref(nodes[-1].name)))
    few = st.sampled_from(["a", "b", "c"])
    for index, made in enumerate(nodes):
        if kind == "captured":
            new = dataclasses.replace(made, origins=(made.name,), path=f"m.{made.name}")
        elif kind == "paths":
            new = dataclasses.replace(made, path=draw(few))
        elif kind == "nonsense":
            origins = tuple(draw(st.lists(few, unique=True, max_size=3)))
            unit = draw(st.none() | few)
            new = dataclasses.replace(made, origins=origins, path=draw(few), unit=unit)
        else:
            new = made
        nodes[index] = new
    return GraphState(tuple(nodes))


def mutate(draw: st.DrawFn, state: GraphState) -> GraphState:
    """One change of one node."""
    nodes = list(state.nodes)
    place = draw(st.integers(2, len(nodes) - 1))
    old = nodes[place]
    earlier = [Ref(made.name) for made in nodes[:place]]
    what = draw(st.sampled_from(["edge", "swap", "constant", "type", "op", "setup", "add", "drop"]))
    if what == "edge":
        nodes[place] = dataclasses.replace(
            old, args=(draw(st.sampled_from(earlier)), *old.args[1:])
        )
    elif what == "swap":
        nodes[place] = dataclasses.replace(old, args=old.args[::-1])
    elif what == "constant":
        nodes[place] = dataclasses.replace(old, args=(*old.args, repr(math.nextafter(0.5, 1))))
    elif what == "type":
        nodes[place] = dataclasses.replace(old, writes=TYPE)
    elif what == "op":
        nodes[place] = dataclasses.replace(old, what="gelu", target="gelu")
    elif what == "setup":
        nodes[place] = dataclasses.replace(old, setup="stride=2")
    elif what == "add":
        nodes[place] = dataclasses.replace(old, args=(Ref("new"), *old.args[1:]))
        nodes.insert(place, node("new", "relu", draw(st.sampled_from(earlier)), "1"))
    elif place < len(nodes) - 1:  # the output stays
        source = next(value for value in old.args if isinstance(value, Ref))
        del nodes[place]
        nodes = [_rename(made, {old.name: source.name}) for made in nodes]
    return GraphState(tuple(nodes))


def _rename(made: NodeState, names: dict[str, str]) -> NodeState:
    args = tuple(
        Ref(names.get(value.name, value.name)) if isinstance(value, Ref) else value
        for value in made.args
    )
    return dataclasses.replace(made, name=names.get(made.name, made.name), args=args)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[GraphState, GraphState]:
    """A graph, and the same after one to three changes."""
    before = draw(states())
    after = before
    for _ in range(draw(st.integers(1, 3))):
        if len(after.nodes) > 3 and "new" not in {made.name for made in after.nodes}:
            after = mutate(draw, after)
    return before, after


def same_graph(a: GraphState, b: GraphState) -> bool:
    """Whether two graphs are one but for names and order: by exhaustive search."""
    return nx.is_isomorphic(
        _labelled(a),
        _labelled(b),
        node_match=lambda p, q: p["label"] == q["label"],
        edge_match=lambda p, q: (
            Counter(e["place"] for e in p.values()) == Counter(e["place"] for e in q.values())
        ),
    )


def _labelled(state: GraphState) -> nx.MultiDiGraph[str]:
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for made in state.nodes:
        constants = tuple(
            (place, value) for place, value in enumerate(made.args) if isinstance(value, str)
        )
        label = (made.op, made.what, made.target, made.setup, made.writes, constants)
        graph.add_node(made.name, label=label)
    for made in state.nodes:
        for place, value in enumerate(made.args):
            if isinstance(value, Ref):
                graph.add_edge(value.name, made.name, place=place)
    return graph


@given(states())
def test_a_graph_does_not_differ_from_itself(state: GraphState) -> None:
    diff = diff_states(state, state)
    assert not diff
    assert diff.unchanged == len(state.nodes)


@given(states(), st.randoms(use_true_random=False))
def test_names_play_no_part(state: GraphState, random: Random) -> None:
    names = [made.name for made in state.nodes]
    shuffled = random.sample(names, len(names))
    assert not diff_states(state, _renamed(state, dict(zip(names, shuffled, strict=True))))
    fresh = {name: f"other_{index}" for index, name in enumerate(names)}
    assert not diff_states(state, _renamed(state, fresh))


def _renamed(state: GraphState, names: dict[str, str]) -> GraphState:
    return GraphState(tuple(_rename(made, names) for made in state.nodes))


@given(mutated())
def test_every_mutation_is_reported(pair: tuple[GraphState, GraphState]) -> None:
    before, after = pair
    if not diff_states(before, after):
        assert same_graph(before, after)


@given(mutated())
def test_mirrored(pair: tuple[GraphState, GraphState]) -> None:
    before, after = pair
    swap = {"added": "removed", "removed": "added"}
    there = Counter((c.kind, c.before, c.after) for c in diff_states(before, after).changes)
    back = Counter(
        (swap.get(c.kind, c.kind), c.after, c.before) for c in diff_states(after, before).changes
    )
    assert there == back


@given(mutated())
def test_every_node_is_told_once(pair: tuple[GraphState, GraphState]) -> None:
    before, after = pair
    diff = diff_states(before, after)
    told = [made for change in diff.changes for made in change.after]
    assert Counter((*told, *diff.same)) == Counter(after.nodes)
    gone = Counter(made for change in diff.changes for made in change.before)
    assert gone <= Counter(before.nodes)
    assert sum(gone.values()) + diff.unchanged == len(before.nodes)


CHAIN = GraphState(
    (
        node("x", "input", path="x", origins=("x",)),
        node("conv", "conv2d", Ref("x"), path="m.conv", origins=("conv",)),
        node("bn", "batch_norm", Ref("conv"), path="m.bn", origins=("bn",)),
        node("relu", "relu", Ref("bn"), path="m.relu", origins=("relu",)),
        node("mul", "mul", Ref("relu"), Ref("relu"), path="mul", origins=("mul",)),
        node("output", "output", Ref("mul"), origins=("output",)),
    )
)


def changed(name: str, **fields: object) -> GraphState:
    """CHAIN with one node changed."""
    return GraphState(
        tuple(
            dataclasses.replace(made, **fields) if made.name == name else made  # type: ignore[arg-type] # fields by their names
            for made in CHAIN.nodes
        )
    )


@pytest.mark.parametrize(
    ("name", "fields", "kind", "detail"),
    [
        ("mul", {"args": (Ref("relu"), Ref("bn"))}, "changed", "argument 1: %relu -> %bn"),
        ("mul", {"args": (Ref("relu"), "2")}, "changed", "argument 1: %relu -> 2"),
        ("mul", {"kwargs": (("out", Ref("x")),)}, "changed", "out: none -> %x"),
        ("conv", {"setup": "stride=2"}, "changed", "setup none -> stride=2"),
        ("conv", {"target": "m.other"}, "changed", "target conv2d -> m.other"),
        ("relu", {"what": "gelu", "target": "gelu"}, "replaced", ""),
        ("relu", {"writes": TYPE}, "requantized", f"type float -> {TYPE}"),
        ("relu", {"int8": True}, "requantized", "undecided -> int8"),
        ("relu", {"reads": (TYPE,)}, "requantized", f"input 0: type float -> {TYPE}"),
    ],
)
def test_one_change_gives_one_entry(
    name: str, fields: dict[str, object], kind: str, detail: str
) -> None:
    (change,) = diff_states(CHAIN, changed(name, **fields)).changes
    assert (change.kind, change.after[0].name) == (kind, name)
    assert detail in change.detail


def test_a_scale_one_step_away_is_told_with_both_numbers() -> None:
    scale = math.nextafter(SCALE, 1.0)
    before = changed("relu", writes=TYPE, qtype=TYPE)
    other = dataclasses.replace(TYPE, scale=scale)
    (change,) = diff_states(before, changed("relu", writes=other, qtype=other)).changes
    assert change.kind == "requantized"
    assert change.detail == f"scale {SCALE!r} -> {scale!r}"


def test_a_new_scale_of_a_conversion_is_a_requantization() -> None:
    def graph(scale: str) -> GraphState:
        q = NodeState("q", "call_function", "quantize", "f.quantize", (Ref("x"),), ())
        return GraphState((node("x", "input"), dataclasses.replace(q, kwargs=(("scale", scale),))))

    (change,) = diff_states(graph("0.1"), graph("0.2")).changes
    assert (change.kind, change.detail) == ("requantized", "scale: 0.1 -> 0.2")


def test_nodes_that_became_one_are_fused() -> None:
    nodes = list(CHAIN.nodes)
    nodes[1] = dataclasses.replace(nodes[1], origins=("conv", "bn", "relu"), setup="bias")
    nodes[4] = _rename(nodes[4], {"relu": "conv"})
    after = GraphState((nodes[0], nodes[1], *nodes[4:]))
    (change,) = diff_states(CHAIN, after).changes
    assert change.kind == "fused"
    assert [made.what for made in change.before] == ["conv2d", "batch_norm", "relu"]
    assert [made.what for made in change.after] == ["conv2d"]
    assert change.path == "m.conv"
    assert "> fused m.conv: conv2d + batch_norm + relu -> conv2d" in str(diff_states(CHAIN, after))


def test_nodes_marked_as_one_unit_are_fused() -> None:
    nodes = [
        dataclasses.replace(made, unit="conv") if made.what in ("conv2d", "batch_norm") else made
        for made in CHAIN.nodes
    ]
    (change,) = diff_states(CHAIN, GraphState(tuple(nodes))).changes
    assert change.kind == "fused"
    assert [made.name for made in change.after] == ["conv", "bn"]


def test_an_op_that_several_ops_replace() -> None:
    parts = [
        node("q", "quantize", Ref("relu"), "0.1", origins=("mul",)),
        node("im", "int_mul", Ref("q"), Ref("q"), origins=("mul",)),
        node("dq", "dequantize", Ref("im"), "0.1", origins=("mul",)),
        node("output", "output", Ref("dq"), origins=("output",)),
    ]
    (change,) = diff_states(CHAIN, GraphState((*CHAIN.nodes[:4], *parts))).changes
    assert change.kind == "replaced"
    assert [made.name for made in change.before] == ["mul"]
    assert [made.name for made in change.after] == ["q", "im", "dq"]


def test_new_constants_belong_to_the_change_of_their_reader() -> None:
    nodes = list(CHAIN.nodes)
    codes = NodeState("codes", "get_attr", "attribute", "m.codes", (), ())
    weight = node("weight", "dequantize_weight", Ref("codes"), "0.1")
    nodes[1:2] = [codes, weight, dataclasses.replace(nodes[1], args=(Ref("x"), Ref("weight")))]
    (change,) = diff_states(CHAIN, GraphState(tuple(nodes))).changes
    assert change.kind == "changed"
    assert [made.name for made in change.after] == ["codes", "weight", "conv"]
    assert "%conv argument 1: none -> %weight" in change.detail
    (back,) = diff_states(GraphState(tuple(nodes)), CHAIN).changes
    assert (back.kind, back.before, back.after) == ("changed", change.after, change.before)


def test_a_result_is_the_same_before_and_after_its_conversion() -> None:
    """A unit gives codes to int8 readers and a float to others: neither reader changed."""
    nodes = [
        CHAIN.nodes[0],
        node("unit", "lowered", Ref("x"), origins=("conv", "bn", "relu"), path="m.conv"),
        node("dq", "dequantize", Ref("unit"), origins=("conv", "bn", "relu"), path="m.conv"),
        node("mul", "mul", Ref("unit"), Ref("dq"), path="mul", origins=("mul",)),
        CHAIN.nodes[5],
    ]
    (change,) = diff_states(CHAIN, GraphState(tuple(nodes))).changes
    assert change.kind == "fused"
    assert [made.name for made in change.after] == ["unit", "dq"]


def test_a_node_put_in_between_is_the_only_change() -> None:
    nodes = list(CHAIN.nodes)
    nodes[4] = _rename(nodes[4], {"relu": "q"})
    nodes.insert(4, node("q", "quantize", Ref("relu"), "0.1", origins=("relu",), path="m.relu"))
    (change,) = diff_states(CHAIN, GraphState(tuple(nodes))).changes
    assert (change.kind, change.detail) == ("added", "read by %mul")


def test_origins_taken_over_from_an_input_do_not_merge_neighbours() -> None:
    """A lowered op takes in the conversion of its input, with the provenance of that input."""
    a = node("a", "lowered", Ref("x"), origins=("x", "conv", "bn"), path="m.conv")
    b = node("b", "lowered_relu", Ref("a"), origins=("bn", "relu"), path="m.relu")
    nodes = (CHAIN.nodes[0], a, b, _rename(CHAIN.nodes[4], {"relu": "b"}), CHAIN.nodes[5])
    changes = diff_states(CHAIN, GraphState(nodes)).changes
    pairs = [([n.name for n in c.before], [n.name for n in c.after]) for c in changes]
    assert pairs == [(["conv", "bn"], ["a"]), (["relu"], ["b"])]
    assert [c.kind for c in changes] == ["fused", "replaced"]


SINGLE: dict[str, object] = {
    "op": "call_method",
    "what": "gelu",
    "target": "other.relu",
    "setup": "inplace=True",
    "reads": (TYPE,),
    "writes": TYPE,
    "qtype": TYPE,
    "int8": False,
    "kwargs": (("inplace", "True"),),
}


@given(states(), st.sampled_from(sorted(SINGLE)), st.randoms(use_true_random=False))
def test_every_single_attribute_of_every_node_is_reported(
    state: GraphState, field: str, random: Random
) -> None:
    place = random.randrange(2, len(state.nodes) - 1)
    other = dataclasses.replace(state.nodes[place], **{field: SINGLE[field]})  # type: ignore[arg-type] # fields by their names
    after = GraphState((*state.nodes[:place], other, *state.nodes[place + 1 :]))
    diff = diff_states(state, after)
    assert diff
    assert diff_states(after, state)
    assert any(other in change.after for change in diff.changes)


@given(states(), st.randoms(use_true_random=False))
def test_one_more_edge_beside_another_is_reported(state: GraphState, random: Random) -> None:
    """The second of two uses of the same value, by the same node."""
    place = random.randrange(2, len(state.nodes) - 1)
    old = state.nodes[place]
    again = next(value for value in old.args if isinstance(value, Ref))
    after = GraphState(
        (
            *state.nodes[:place],
            dataclasses.replace(old, args=(*old.args, again)),
            *state.nodes[place + 1 :],
        )
    )
    for diff in (diff_states(state, after), diff_states(after, state)):
        (change,) = diff.changes
        assert change.kind == "changed"
        assert again.name in change.detail


def edges_in(view: nx.MultiDiGraph[str], side: str, gone: str) -> Counter[tuple[str, str, str]]:
    """The edges of one of the two graphs, by names, read back from the merged one."""
    return Counter(
        (view.nodes[u][side].name, view.nodes[v][side].name, data["place"])
        for u, v, data in view.edges(data=True)
        if data["status"] != gone
    )


def edges_of(state: GraphState) -> Counter[tuple[str, str, str]]:
    return Counter(
        (value.name, made.name, place)
        for made in state.nodes
        for place, value in made.places
        if isinstance(value, Ref)
    )


@given(mutated())
def test_networkx_holds_both_graphs_whole(pair: tuple[GraphState, GraphState]) -> None:
    before, after = pair
    diff = diff_states(before, after)
    view = diff.to_networkx()
    for side, state, gone in (("before", before, "added"), ("after", after, "removed")):
        kept = Counter(d[side] for _, d in view.nodes(data=True) if d[side] is not None)
        assert kept == Counter(state.nodes)
        assert edges_in(view, side, gone) == edges_of(state)
    for _, data in view.nodes(data=True):
        change = None if data["change"] is None else diff.changes[data["change"]]
        assert data["status"] == ("same" if change is None else change.kind)


def test_networkx_of_a_part_is_a_part() -> None:
    diff = diff_states(captured(Net(4)), captured(Net(4, nn.GELU)))
    view = diff.only("blocks.1").to_networkx()
    assert {data["path"] for _, data in view.nodes(data=True)} == {"blocks.1.0", "blocks.1.1"}
    assert view.number_of_edges() == 1


def test_colours_are_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    diff = diff_states(CHAIN, changed("relu", what="gelu"))
    assert diff.to_text() == diff.to_text(color=False) == str(diff)
    assert "\x1b" not in str(diff)
    painted = diff.to_text(color=True)
    assert painted.startswith("\x1b[33m~ replaced\x1b[0m m.relu")
    assert re.sub(r"\x1b\[\d*m", "", painted) == str(diff)


def test_noise_is_shown_where_it_was_measured() -> None:
    plain = diff_states(CHAIN, changed("relu", writes=TYPE))
    diff = plain.with_noise({"relu": 41.25, "conv": math.inf})
    assert diff.sqnr(diff.changes[0]) == 41.25
    assert "SQNR 41.2 dB" in str(diff)
    assert "SQNR 41.2 dB" in diff.to_markdown()
    assert diff.to_dict()["changes"][0]["sqnr"] == 41.25
    exact = plain.with_noise({"relu": math.inf})
    assert "; exact" in str(exact)
    json.dumps(exact.to_dict(), allow_nan=False)


class Net(nn.Module):
    """A chain of blocks with functional calls."""

    def __init__(self, blocks: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 1), act()) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.add(block(x), x)
        return x


def captured(model: nn.Module) -> GraphState:
    return graph_state(capture(model).module.graph)


def test_models_of_different_captures_align_by_path() -> None:
    diff = diff_states(captured(Net(4)), captured(Net(5)))
    # The output reads the new block: no single node was put in between.
    assert [c.kind for c in diff.changes] == ["added", "added", "added", "changed"]
    assert [c.after[0].what for c in diff.changes] == ["conv2d", "ReLU", "add", "output"]
    diff = diff_states(captured(Net(4)), captured(Net(4, nn.GELU)))
    assert [c.kind for c in diff.changes] == ["replaced"] * 4
    assert [c.path for c in diff.changes] == [f"blocks.{index}.1" for index in range(4)]


def test_models_align_by_structure_when_all_paths_moved() -> None:
    diff = diff_states(captured(nn.Sequential(Net(3))), captured(Net(3)))
    assert [change.kind for change in diff.changes] == ["changed"] * 7
    assert diff.changes[0].detail == "target input -> x"
    assert all(change.detail.startswith("target 0.blocks.") for change in diff.changes[1:])


def test_only_keeps_one_module() -> None:
    diff = diff_states(captured(Net(11)), captured(Net(11, nn.GELU)))
    part = diff.only("blocks.1")
    assert [change.path for change in part.changes] == ["blocks.1.1"]
    assert part.unchanged == 1
    assert diff.only("") == diff
    assert not diff.only("nowhere")


def test_text_and_dict_are_stable_and_harmless() -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b[2J\n\u202e" + "n" * 10_000
    diff = diff_states(CHAIN, changed("relu", path=hostile, setup=hostile))
    text = str(diff)
    assert text == str(diff_states(CHAIN, changed("relu", path=hostile, setup=hostile)))
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines())) < 1000
    assert text.splitlines()[-1] == "1 changed; 5 nodes unchanged"
    stored = json.loads(json.dumps(diff.to_dict()))
    assert stored["unchanged"] == 5
    assert stored["changes"][0]["kind"] == "changed"


def test_a_large_graph_with_many_changes() -> None:
    """Every third op of 3,000 differs, with no provenance at all: a quadratic search would show."""

    def chain(every: int) -> GraphState:
        nodes = [node("n0", "input")]
        for index in range(1, 3000):
            what = "gelu" if index % every == 0 else "relu"
            nodes.append(node(f"n{index}", what, Ref(f"n{index - 1}")))
        return GraphState((*nodes, node("output", "output", Ref("n2999"))))

    diff = diff_states(chain(10**6), chain(3))
    assert isinstance(diff, GraphDiff)
    assert [change.kind for change in diff.changes] == ["replaced"] * 999


def test_neighbours_that_could_be_either_wait_for_more_evidence() -> None:
    """Two like readers of one value: what reads them in turn says which is which."""

    def graph(first: str, second: str, *numbers: str) -> GraphState:
        return GraphState(
            (
                node("x", "input"),
                node("p", "relu", Ref("x"), numbers[0]),
                node("q", "relu", Ref("x"), numbers[1]),
                node("s", first, Ref("p")),
                node("t", second, Ref("q")),
                node("output", "output", Ref("s"), Ref("t")),
            )
        )

    diff = diff_states(graph("exp", "log", "1", "2"), graph("sin", "cos", "3", "4"))
    told = {(c.kind, c.before[0].name, c.after[0].name) for c in diff.changes}
    assert told == {
        ("changed", "p", "p"),
        ("changed", "q", "q"),
        ("replaced", "s", "s"),
        ("replaced", "t", "t"),
    }
