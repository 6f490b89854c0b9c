"""Observe: where observers stand, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.flow import sites
from fxquant.graph.view import render
from fxquant.passes.observe import Observe
from fxquant.spec import QConfig, QSpec
from tests.helpers import One, annotated, check_eager, fused, nodes, observers, run

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 4, 6, 6)
WATCHERS = ("observer_", "shape_")


def places(body: Body, **parts: Any) -> list[str]:
    module = annotated(One(body, **parts).eval(), X)
    return [node.name for node in sites(module.graph)]


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (lambda m, x: m.a(x), ["x"]),  # nobody reads the result as codes
        (lambda m, x: m.b(m.a(x)), ["x", "a"]),
        (lambda m, x: m.b(torch.relu(m.a(x))), ["x", "relu"]),  # nothing inside a unit
        (lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), ["x", "a"]),  # moves share what they move
        (lambda m, x: m.b(m.a(x).flip(1).contiguous()[:, :4]), ["x", "a"]),
        (lambda m, x: F.max_pool2d(m.a(x), 2), ["x"]),
        (lambda m, x: m.b(torch.cumsum(m.a(x), 1)), ["x", "cumsum"]),
        (lambda m, x: torch.cat([m.a(x), m.b(x)], 1).mean((2, 3)), ["x", "a", "b", "cat"]),
        (lambda m, x: m.b(m.a(x)) + m.a2(x), ["x", "a", "b"]),
        (lambda m, x: torch.var(x, 1), []),
    ],
)
def test_sites(body: Body, wanted: list[str]) -> None:
    assert places(body, a=conv(), b=conv(), a2=conv()) == wanted


def test_one_value_has_one_observer() -> None:
    model = One(lambda m, x: m.a(x) * m.b(x) + x, a=conv(), b=conv()).eval()
    module = run(annotated(model, X), Observe())
    watched = [str(n.args[0]) for n in nodes(module) if str(n.target).startswith("observer")]
    assert len(watched) == len(set(watched)) == len(observers(module))


def test_observers_change_no_output_and_can_be_taken_out() -> None:
    model = One(lambda m, x: m.b(torch.relu(m.a(x))) + x, a=conv(), b=conv()).eval()
    plain = annotated(model, X)
    text = render(plain.graph)
    module = run(annotated(model, X), Observe())
    check_eager(fused(model, X), module, X)
    editor = Editor(module)
    with editor.rule("out"):
        for node in [n for n in nodes(module) if str(n.target).startswith(WATCHERS)]:
            assert not node.users
            editor.erase(node)
    assert render(module.graph) == text


def test_shapes_are_recorded_where_work_is_done_and_no_observer_stands() -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.softmax(m.a(x), 1) @ m.a(x).flip(3)

    module = run(annotated(One(body, a=conv()).eval(), X), Observe())
    watched = [str(n.args[0]) for n in nodes(module) if str(n.target).startswith(WATCHERS)]
    assert len(watched) == len(set(watched))
    assert {"x", "a", "a_1", "softmax", "flip", "matmul"} == set(watched)


def test_placeholders_stay_together() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(y)

    module = run(annotated(Pair().eval(), X, X), Observe())
    kinds = [n.op for n in module.graph.nodes]
    assert kinds[:2] == ["placeholder", "placeholder"]
    assert "placeholder" not in kinds[2:]


def test_observers_carry_the_spec_and_the_users_path() -> None:
    eight, seven = QConfig(), QConfig(activation=QSpec(bits=7, observer="minmax"))
    model = nn.Sequential(conv(), conv(), conv()).eval()
    module = run(annotated(model, X, overrides=(("1", seven),)), Observe())
    found = {o.path: o.spec for o in observers(module)}
    assert list(found) == ["input", "0", "1"]
    assert found["input"] == eight.activation
    assert found["1"] == seven.activation


def test_an_output_spec_of_its_own() -> None:
    four = QConfig(output=QSpec(bits=4))
    module = run(
        annotated(nn.Sequential(conv(), conv()).eval(), X, overrides=(("0", four),)), Observe()
    )
    found = {o.path: o.spec.bits for o in observers(module)}
    assert found == {"input": 8, "0": 4}
