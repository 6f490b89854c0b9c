"""Reading graphs: units, canonical text, neighbours, the networkx view."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.view import (
    around,
    flat_nodes,
    positions,
    render,
    render_node,
    single_user,
    tensor_sources,
    to_networkx,
    units,
    what,
)
from tests.helpers import One, Two, canonical, fused, node_of, nodes, qtype

X = torch.randn(1, 4, 6, 6)


def residual(m: Any, x: Any) -> Any:
    return torch.relu(m.b(torch.relu(m.a(x))) + x)


def net() -> nn.Module:
    return One(residual, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()


def test_units_and_what_enters_them() -> None:
    found = units(fused(net(), X).graph)
    assert [[what(n) for n in unit.nodes] for unit in found] == [
        ["conv2d", "relu"],
        ["conv2d", "add", "relu"],
    ]
    first, second = found
    assert [(e.user.name, e.source.name) for e in first.inputs] == [("a", "x")]
    assert [(what(e.user), e.source.name) for e in second.inputs] == [
        ("conv2d", first.output.name),
        ("add", "x"),
    ]
    assert second.head.name == "b" and what(second.output) == "relu"


def test_numbers_are_no_units() -> None:
    module = canonical(One(lambda m, x: x.view(x.size(0) * 2, -1)), X)
    assert [what(unit.head) for unit in units(module.graph)] == ["reshape"]


def test_canonical_text() -> None:
    def body(m: Any, x: Any, y: Any) -> Any:
        return torch.cat([m.a(x) * 0.1, y[:, 1:]], 1)

    module = canonical(Two(body, a=nn.Conv2d(4, 4, 1)), X, X)
    assert render(module.graph).splitlines() == [
        "%x = input(x)",
        "%y = input(y)",
        "%a = conv2d[a](%x)",
        "%mul = mul(%a, 0.1)",
        "%getitem = getitem(%y, (None:None:None, 1:None:None))",
        "%cat = cat([%mul, %getitem], dim=1)",
        "return %cat",
    ]


def test_text_shows_units_and_types() -> None:
    module = fused(net(), X)
    editor = Editor(module)
    with editor.rule("type"):
        editor.annotate(node_of(module, "add"), writes=qtype(0.5, 3))
    text = render_node(node_of(module, "add"))
    assert text.endswith("# unit b  # -> uint8(scale=0.5, zero_point=3)")


def test_neighbours_show_the_node_in_the_middle() -> None:
    module = fused(net(), X)
    text = around(node_of(module, "add"), lines=2).splitlines()
    assert [line[0] for line in text] == [" ", " ", ">", " ", " "]
    assert text[2].startswith("> %add = add(")
    assert around(next(iter(module.graph.nodes)), lines=1).splitlines()[0] == "> %x = input(x)"


def test_flat_nodes_look_everywhere() -> None:
    graph = canonical(Two(lambda m, x, y: x + y), X, X).graph
    x, y = [n for n in graph.nodes if n.op == "placeholder"]
    found = list(flat_nodes((x, [y, {"k": x}], slice(None, y, x), 3, "s")))
    assert found == [x, y, x, y, x]


def test_sources_and_users() -> None:
    module = canonical(One(lambda m, x: torch.relu(x) + torch.relu(x).flip(0)), X)
    add = node_of(module, "add")
    assert [what(n) for n in tensor_sources(add)] == ["relu", "flip"]
    assert single_user(node_of(module, "flip")) is add
    x = next(iter(module.graph.nodes))
    assert single_user(x) is None
    assert tensor_sources(x) == ()
    places = positions(module.graph)
    assert places[x] == 0 and places[add] == max(places[n] for n in nodes(module))


def test_networkx_counts_every_use() -> None:
    module = canonical(One(lambda m, x: x * x), X)
    view = to_networkx(module.graph)
    assert isinstance(view, nx.MultiDiGraph)
    assert view.number_of_edges("x", "mul") == 2
    assert view.nodes["mul"]["op"] == "mul"
    assert list(nx.topological_sort(view)) == ["x", "mul", "output"]
