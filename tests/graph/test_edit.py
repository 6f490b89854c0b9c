"""The editor: what it changes, what it logs, and that nothing changes a graph past it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.fx import GraphModule, Node

from fxquant.graph.edit import Editor, is_removable
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import op_named
from tests.helpers import canonical, names, node_of, nodes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module() -> GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sigmoid()).eval()
    return canonical(model, torch.randn(1, 3, 5, 5))


Change = Callable[[Editor, Node], object]
CHANGES: list[Change] = [
    lambda e, n: e.call(torch.relu, (n,), like=n, after=n),
    lambda e, n: e.call_module("0", (n,), like=n, before=n),
    lambda e, n: e.get_attr("0.weight", like=n, before=n),
    lambda e, n: e.erase(n),
    lambda e, n: e.reuse(n, n.all_input_nodes[0]),
    lambda e, n: e.replace(n, n.all_input_nodes[0]),
    lambda e, n: e.replace_use(next(iter(n.users)), n, n.all_input_nodes[0]),
    lambda e, n: e.set_call(n, torch.tanh, n.args, {}),
    lambda e, n: e.set_args(n, n.args),
    lambda e, n: e.annotate(n, unit="x"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_changes_outside_a_rule(module: GraphModule, change: Change) -> None:
    editor = Editor(module)
    with pytest.raises(RuntimeError, match=r"inside `with editor\.rule"):
        change(editor, node_of(module, "relu"))
    assert editor.log == []


def test_a_refused_change_leaves_the_graph(module: GraphModule) -> None:
    text = str(module.graph)
    for change in CHANGES:
        with pytest.raises(RuntimeError, match=r"inside `with editor\.rule"):
            change(Editor(module), node_of(module, "relu"))
    assert str(module.graph) == text


def test_a_replacement_is_logged_with_rule_nodes_provenance_and_line(module: GraphModule) -> None:
    relu, sigmoid = node_of(module, "relu"), node_of(module, "sigmoid")
    editor = Editor(module)
    with editor.rule("to-tanh", note="smoother"):
        new = editor.call(op_named("tanh"), relu.args, like=relu, before=relu, name="curve")
        editor.replace(sigmoid, new, relu)
    (edit,) = editor.log
    assert (edit.rule, edit.note) == ("to-tanh", "smoother")
    assert edit.removed == (sigmoid.name, relu.name)
    assert edit.added == ("curve",)
    assert set(edit.origins) == {"_1", "_2"}
    assert edit.path == "1"
    file, _, line = edit.line.partition(":")
    assert file == Path(__file__).name and int(line) > 0
    assert info(new).origins == ("_1", "_2")
    assert info(new).rules[-1] == "to-tanh"
    assert info(new).source == info(relu).source
    assert names(module) == ["conv2d", "tanh"]


def test_groups_nest_and_empty_groups_leave_no_trace(module: GraphModule) -> None:
    editor = Editor(module)
    relu = node_of(module, "relu")
    with editor.rule("outer"):
        with editor.rule("nothing"):
            pass
        with editor.rule("inner"):
            editor.annotate(relu, unit="a")
        editor.annotate(relu, unit="b")
    assert [(edit.rule, edit.changed) for edit in editor.log] == [
        ("inner", (relu.name,)),
        ("outer", (relu.name,)),
    ]


def test_a_failing_group_is_closed(module: GraphModule) -> None:
    editor = Editor(module)
    with pytest.raises(ZeroDivisionError), editor.rule("broken"):
        _ = 1 // 0
    with pytest.raises(RuntimeError, match=r"editor\.rule"):
        editor.erase(node_of(module, "relu"))


def test_annotating_what_is_there_already_is_no_edit(module: GraphModule) -> None:
    editor = Editor(module)
    relu = node_of(module, "relu")
    decision = Decision(True, "why", "by")
    with editor.rule("first"):
        editor.annotate(relu, decision=decision, unit="u")
    with editor.rule("second"):
        editor.annotate(relu, decision=Decision(True, "why", "by"), unit="u")
    assert [edit.rule for edit in editor.log] == ["first"]


def test_new_nodes_take_path_and_origin_but_no_types(module: GraphModule) -> None:
    editor = Editor(module)
    conv = node_of(module, "conv2d")
    with editor.rule("add"):
        editor.annotate(conv, unit="u")
        made = editor.call(torch.relu, (conv,), like=conv, after=conv)
    record = info(made)
    assert (record.path, record.origins) == ("0", ("_0",))
    assert (record.qtype, record.writes, record.reads) == (None, None, None)


def test_a_call_needs_one_place(module: GraphModule) -> None:
    editor = Editor(module)
    relu = node_of(module, "relu")
    with editor.rule("r"):
        with pytest.raises(ValueError, match="either before= or after="):
            editor.call(torch.relu, (relu,), like=relu)
        with pytest.raises(ValueError, match="either before= or after="):
            editor.call(torch.relu, (relu,), like=relu, before=relu, after=relu)
        with pytest.raises(ValueError, match="use call_module"):
            editor.call(op_named("conv2d"), (relu,), like=relu, before=relu)


def test_modules_and_tensors_never_overwrite_each_other(module: GraphModule) -> None:
    editor = Editor(module)
    assert editor.add_module("0", nn.ReLU()) == "0_1"
    assert editor.add_module("0", nn.ReLU()) == "0_2"
    assert editor.add_module("new", nn.ReLU()) == "new"
    # What every module has as an attribute is no name for one, in an owner yet to be made either.
    assert editor.add_module("to", nn.ReLU()) == "to_1"
    assert editor.add_module("later.to", nn.ReLU()) == "later.to_1"
    assert editor.add_module("later.forward", nn.ReLU()) == "later.forward_1"
    assert editor.add_buffer("0.weight", torch.ones(1)) == "0.weight_1"
    assert editor.add_buffer("deep.down.scale", torch.ones(2)) == "deep.down.scale"
    assert torch.equal(module.get_buffer("deep.down.scale"), torch.ones(2))
    editor.set_module("0", nn.Identity())
    assert isinstance(module.get_submodule("0"), nn.Identity)


def test_reuse_lets_users_read_another_value(module: GraphModule) -> None:
    editor = Editor(module)
    relu, sigmoid = node_of(module, "relu"), node_of(module, "sigmoid")
    with editor.rule("skip"):
        editor.reuse(relu, node_of(module, "conv2d"))
        editor.clean()
    assert editor.log[0].changed == (sigmoid.name,)
    assert editor.log[0].removed == (relu.name,)


def test_clean_keeps_what_has_an_effect() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("unused")
    graph.call_function(torch.relu, (x,))
    graph.call_function(print, (x,))
    graph.output(x)
    module = GraphModule({}, graph)
    editor = Editor(module)
    with editor.rule("clean"):
        editor.clean()
    assert [n.op for n in module.graph.nodes] == [
        "placeholder",
        "placeholder",
        "call_function",
        "output",
    ]
    assert not is_removable(nodes(module)[0])


def test_clean_takes_out_modules_nobody_calls(module: GraphModule) -> None:
    editor = Editor(module)
    editor.add_module("spare", nn.Linear(2, 2))
    with editor.rule("clean"):
        editor.clean()
    assert "spare" not in dict(module.named_modules())


def test_an_erased_twin_is_erased_once() -> None:
    """A pattern may meet one node on two of its branches."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.relu, (x,))
    add = graph.call_function(torch.add, (relu, relu))
    graph.output(add)
    editor = Editor(GraphModule({}, graph))
    with editor.rule("drop"):
        editor.replace(add, x, relu, relu)
    assert editor.log[0].removed == ("add", "relu")


_WRITES = ("replace_all_uses_with", "erase_node", "create_node", "replace_input_with")
_ALLOWED = (
    "fxquant/graph/edit.py",
    "fxquant/graph/answers.py",
    "fxquant/graph/tracer.py",
    "fxquant/graph/export_rebuild.py",
    "fxquant/graph/extract.py",  # writes a graph of its own
    "fxquant/graph/user_tree.py",  # moves modules to where the user had them, and calls with them
)


@pytest.mark.parametrize("path", sorted((ROOT / "fxquant").rglob("*.py")), ids=str)
def test_only_the_editor_writes_graphs(path: Path) -> None:
    if str(path.relative_to(ROOT)) in _ALLOWED:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not called & set(_WRITES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets: list[ast.expr] = (
                node.targets if isinstance(node, ast.Assign) else [node.target]
            )
            written = {t.attr for t in targets if isinstance(t, ast.Attribute)}
            assert not written & {"args", "kwargs", "target"} or not _is_node(targets)


def _is_node(targets: list[ast.expr]) -> bool:
    owners = [t.value for t in targets if isinstance(t, ast.Attribute)]
    return any(isinstance(o, ast.Name) and o.id in ("node", "user", "value") for o in owners)
