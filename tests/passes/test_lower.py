"""Lower: a backend's rules from the results backwards; what no rule takes stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.backends.x86 import X86
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.view import render
from fxquant.passes.convert import Convert
from fxquant.passes.lower import Lower
from fxquant.passes.place import Place
from fxquant.passes.share_scales import ShareScales
from fxquant.patterns.boundary import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match
from fxquant.patterns.rule import Rule
from tests.helpers import One, measured, names, nodes, run

X = torch.randn(2, 4, 6, 6)


def qdq(model: nn.Module) -> GraphModule:
    return run(measured(model.eval(), X), ShareScales(), Place(), Convert())


def body(m: Any, x: Any) -> Any:
    return m.b(torch.relu(m.a(x)))


def pair() -> nn.Module:
    return One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


def test_without_rules_the_graph_stays() -> None:
    module = qdq(pair())
    text = render(module.graph)
    run(module, Lower())
    assert render(module.graph) == text


def test_rules_see_results_first() -> None:
    seen: list[str] = []

    def note(match: Match, editor: Editor) -> None:
        seen.append(match.root.name)

    module = qdq(pair())
    Lower((Rule("note", op(QUANTIZE, var("x")), note),)).run(Editor(module))
    made = [n.name for n in nodes(module) if n.name in seen]
    assert seen == made[::-1]


def test_what_is_lowered_takes_its_readers_along() -> None:
    layer = op(
        "conv2d",
        op(DEQUANTIZE, var("x"), shared=True),
        op(DEQUANTIZE_WEIGHT, var("w"), var("s"), shared=True),
        var("bias"),
    )
    fits = Rule("conv", op(QUANTIZE, op("relu", layer)), lambda match, editor: None)
    module = qdq(pair())
    editor = Editor(module)
    Lower((fits,)).run(editor)
    assert editor.log == []


def test_misses_are_kept_only_where_much_fitted() -> None:
    deep = op(QUANTIZE, op("relu", op("linear", var("x"))))
    rule = Rule("never", deep, lambda match, editor: None)
    editor = Editor(qdq(pair()))
    Lower((rule,)).run(editor)
    assert [(name, why) for name, _, why in editor.misses] == [
        ("never", "expected linear, found conv2d %a")
    ]


def test_x86_leaves_no_float_between_two_layers() -> None:
    module = run(qdq(pair()), Lower(X86().rules))
    assert names(module) == ["quantize", "X86Pointwise", "X86Pointwise"]
    first, second = nodes(module)[1:]
    assert info(first).writes == info(second).reads[0]  # type: ignore[index]
    assert info(second).writes is None


def test_an_op_no_rule_takes_stays_in_the_graph() -> None:
    model = One(lambda m, x: torch.cumsum(m.a(x), 1), a=nn.Conv2d(4, 4, 1))
    module = run(qdq(model), Lower(X86().rules))
    assert names(module)[-1] == "cumsum"
    assert module(X).shape == X.shape
