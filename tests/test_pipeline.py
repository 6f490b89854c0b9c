"""Pipelines: stages that fit, verification after every pass, snapshots; and random small graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import ConfigError, VerifyError
from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.verify import Stage
from fxquant.graph.view import render
from fxquant.passes.base import Pass
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.configure import Configure
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse import Fuse
from fxquant.passes.split_padding import SplitPadding
from fxquant.passes.unshare import Unshare
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.pipeline import Pipeline, first_snapshot
from fxquant.recipes import convert_recipe, prepare_recipe, resolve_backend
from fxquant.record import Record
from fxquant.spec import QConfig
from tests.helpers import FLOAT32, FLOAT64, canonical, close_share, names, ranks_of, trained

PREFIX: tuple[Pass, ...] = (
    Functionalize(),
    Unshare(),
    Canonicalize(),
    SplitPadding(),
    Configure(),
    Fuse(),
)
X = torch.randn(1, 4, 6, 6)


def model() -> nn.Module:
    return trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))


def ran(*passes: Pass) -> tuple[GraphModule, Record]:
    module, record = capture(model()).module, Record("static")
    record.snapshots.append(first_snapshot(module, 0.0))
    Pipeline(passes).run(module, record)
    return module, record


def test_every_pass_leaves_a_snapshot() -> None:
    _, record = ran(*PREFIX)
    assert [s.name for s in record.snapshots] == ["capture", *(p.name for p in PREFIX)]
    assert [s.stage for s in record.snapshots[1:]] == [p.gives for p in PREFIX]
    assert all(s.seconds >= 0 for s in record.snapshots)
    fuse = record.snapshots[-1]
    assert {edit.rule for edit in fuse.edits} == {"fold-conv-bn", "conv-act"}
    assert "relu" in fuse.state.text and "batch_norm" not in fuse.state.text


def test_a_pass_that_changes_nothing_shares_the_state() -> None:
    _, record = ran(*PREFIX)
    by_name = {s.name: s for s in record.snapshots}
    assert by_name["functionalize"].state is by_name["capture"].state
    assert by_name["fuse"].state is not by_name["capture"].state


def test_the_module_runs_afterwards() -> None:
    network = model()
    module = capture(network).module
    Pipeline(PREFIX).run(module, Record("static"))
    assert names(module) == ["conv2d", "relu"]
    assert close_share(module(X), network(X)) <= FLOAT32


def test_stages_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"'fuse' needs a graph at stage CANONICAL.*CAPTURED"):
        Pipeline((Unshare(), Fuse()))
    with pytest.raises(ConfigError, match=r"'canonicalize' needs .* CAPTURED, but 'fuse' .* FUSED"):
        Pipeline((Fuse(), Canonicalize()))


def test_recipes_fit() -> None:
    first = prepare_recipe(QConfig(), (), (), {})
    second = convert_recipe(resolve_backend("reference"))
    assert first.passes[-1].gives == second.passes[0].needs
    assert first.passes[0].needs == Stage.CAPTURED
    assert second.passes[-1].gives == Stage.LOWERED
    named = [p.name for p in (*first.passes, *second.passes)]
    assert len(set(named)) == len(named)


@dataclass(frozen=True)
class Spoils(Pass):
    """Writes another spelling."""

    name: ClassVar[str] = "spoils"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, editor: Editor) -> None:
        """Break the canonical form of the first call."""
        node = next(n for n in editor.graph.nodes if n.op == "call_module")
        with editor.rule("spoil"):
            editor.set_call(node, F.relu, node.args, {})


def test_a_pass_that_breaks_a_promise_is_named() -> None:
    with pytest.raises(VerifyError, match="after pass 'spoils'"):
        ran(*PREFIX[:3], Spoils())


def test_a_pass_without_a_run_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(Pass):
        name: ClassVar[str] = "empty"
        needs: ClassVar[Stage] = Stage.CAPTURED
        gives: ClassVar[Stage] = Stage.CAPTURED

    with pytest.raises(TypeError, match="Empty does not define run"):
        ran(Empty())


def test_watchers_see_every_pass_in_order() -> None:
    seen: list[str] = []
    module = capture(model()).module
    Pipeline(PREFIX).run(module, Record("static"), watch=lambda p, editor: seen.append(p.name))
    assert seen == [p.name for p in PREFIX]


class Random(nn.Module):
    """A small network put together from a list of numbers; keeps four channels throughout.

    Args:
        steps: for each step which op, and which earlier value is its second operand.
    """

    def __init__(self, steps: list[tuple[int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(self._layer(kind) for kind, _ in steps)

    @staticmethod
    def _layer(kind: int) -> nn.Module:
        if kind in (0, 1):
            return nn.Conv2d(4, 4, 3, padding=1, groups=1 + kind, bias=kind == 0)
        if kind == 2:
            return nn.BatchNorm2d(4)
        if kind == 3:
            return nn.ReLU(inplace=True)
        if kind == 4:
            return nn.Linear(6, 6)
        if kind == 5:
            return nn.ConvTranspose2d(4, 4, 3, padding=1)
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (kind, other), layer in zip(self.steps, self.layers, strict=True):
            values.append(self._step(kind, values[-1], values[other % len(values)], layer))
        return torch.cat([values[-1], values[0]], dim=1).flatten(1)

    @staticmethod
    def _step(kind: int, y: Tensor, other: Tensor, layer: nn.Module) -> Tensor:
        if kind <= 5:
            return layer(y.clone() if kind == 3 and y is other else y)
        calls: list[Any] = [
            lambda: y + other,
            lambda: torch.add(y, other, alpha=0.5),
            lambda: y.mul(other).tanh(),
            lambda: F.max_pool2d(y, 3, 1, 1),
            lambda: F.avg_pool2d(y, 3, stride=1, padding=1),
            lambda: torch.cat(y.chunk(2, 1)[::-1], 1),
            lambda: y.view(y.size(0), 2, 2, y.size(2), -1).transpose(1, 2).reshape(y.shape),
            lambda: F.hardtanh(y.sub(0.25), -0.5, 0.5, inplace=True),
            lambda: torch.sigmoid(y) * y,
            lambda: F.dropout(layer(y), training=False).permute(0, 1, 3, 2),
        ]
        return calls[kind - 6]()


GRAPHS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 7)), min_size=1, max_size=10)


def drawn(steps: list[tuple[int, int]]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(steps))
    return trained(Random(steps)).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)


@settings(max_examples=60)
@given(GRAPHS)
def test_canonicalizing_keeps_the_output_and_is_idempotent(steps: list[tuple[int, int]]) -> None:
    network, x = drawn(steps)
    module = canonical(network, x)
    with torch.no_grad():
        wanted = network(x.clone())
        assert torch.equal(module(x.clone()), wanted)
        other = torch.randn(3, 4, 6, 6, dtype=torch.float64)
        assert torch.equal(module(other.clone()), network(other.clone()))
    text = render(module.graph)
    again = Editor(module)
    Canonicalize().run(again)
    assert again.log == [] and render(module.graph) == text


@settings(max_examples=60)
@given(GRAPHS)
def test_fusing_keeps_the_output_and_the_text_repeats(steps: list[tuple[int, int]]) -> None:
    network, x = drawn(steps)
    texts = []
    for _ in range(2):
        module = capture(network, (x,), evaluate=True).module
        fuse = Fuse(FUSION_RULES, ranks_of(x, model=network))
        Pipeline((*PREFIX[:-1], fuse)).run(module, Record("static"))
        texts.append(render(module.graph))
        with torch.no_grad():
            assert close_share(module(x.clone()), network(x.clone())) <= FLOAT64
    assert texts[0] == texts[1]
