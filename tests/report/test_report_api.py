"""report, history and diff on models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.api import prepare, quantize
from fxquant.errors import ConfigError, TraceError
from fxquant.graph.diff import GraphDiff
from fxquant.report.api import compare, diff, history, report


class Small(nn.Module):
    """Two convolutions, one with batch norm, one residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> fx.GraphModule:
    generator = torch.Generator().manual_seed(0)
    return quantize(model, [torch.randn(4, 3, 8, 8, generator=generator)], backend="reference")


def test_report_of_a_quantized_model(model: nn.Module, quantized: fx.GraphModule) -> None:
    made = report(quantized)
    assert [row["path"] for row in made.rows] == ["first", "second", "mean", "head"]
    assert [row["op"] for row in made.rows][:2] == ["conv2d+relu", "conv2d+add+relu"]
    assert made.rows[1]["weight_elements"] == 8 * 8 * 9
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert made.to_dict()["bytes_before"] == size


def test_history_of_a_prepared_and_of_a_quantized_model(
    model: nn.Module, quantized: fx.GraphModule
) -> None:
    passes = history(quantized).names
    before = history(prepare(model)).names
    assert passes[: len(before)] == before
    assert before[0] == "capture"
    assert {"fuse", "observe"} <= set(before)
    assert "convert" in passes


def test_diff_of_one_model_spans_its_history(quantized: fx.GraphModule) -> None:
    found = diff(quantized)
    fused = [change for change in found.changes if change.kind == "fused"]
    assert {"first", "second"} <= {change.path for change in fused}
    parts = next(change for change in fused if change.path == "second")
    assert {"batch_norm", "add", "relu"} <= {node.what for node in parts.before}


def test_diff_with_the_float_model_is_the_same(model: nn.Module, quantized: fx.GraphModule) -> None:
    one, other = diff(quantized), diff(model, quantized)
    assert {c.path for c in one.changes} == {c.path for c in other.changes}
    assert one.summary == other.summary


def test_a_model_does_not_differ_from_its_copy(model: nn.Module, quantized: fx.GraphModule) -> None:
    assert not diff(model, copy.deepcopy(model))
    assert not diff(quantized, copy.deepcopy(quantized))
    assert not diff(fx.symbolic_trace(model), fx.symbolic_trace(model))
    assert not diff(history(quantized)[-1], quantized)


def test_diff_takes_snapshots_and_states(quantized: fx.GraphModule) -> None:
    passes = history(quantized)
    by_snapshot = diff(passes[0], passes["fuse"])
    assert isinstance(by_snapshot, GraphDiff)
    assert by_snapshot == diff(passes[0].state, passes["fuse"].state)
    assert by_snapshot


def test_diff_captures_in_eval_mode_and_leaves_the_model_alone(model: nn.Module) -> None:
    training = copy.deepcopy(model).train()
    assert not diff(training, model)
    assert training.training


@pytest.mark.parametrize("call", [report, history, diff])
def test_models_of_others_are_refused(call: Callable[[Any], Any], model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        call(model)
    with pytest.raises(ConfigError, match=r"got a str: pass the model that quantize\(\)"):
        call("model")


def test_what_cannot_be_compared_is_refused(model: nn.Module, quantized: fx.GraphModule) -> None:
    with pytest.raises(ConfigError, match="cannot compare b, a int"):
        diff(model, 3)  # type: ignore[arg-type] # what the error is about
    with pytest.raises(ConfigError, match="got one Snapshot: pass two"):
        diff(history(quantized)[0])


def test_a_diff_with_data_tells_the_noise(model: nn.Module, quantized: fx.GraphModule) -> None:
    batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    found = diff(model, quantized, data=batches)
    assert found.changes == diff(quantized).changes
    compared = {row.path: row.accumulated for row in compare(model, quantized, batches)}
    head = next(c for c in found.changes if c.path == "head")
    assert compared["head"] is not None
    assert found.sqnr(head) == compared["head"].sqnr
    with pytest.raises(ConfigError, match="runs two models"):
        diff(quantized, data=batches)
    with pytest.raises(ConfigError, match="pass data="):
        diff(model, quantized, max_batches=1)
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        diff(quantized, model, data=batches)


class Branching(nn.Module):
    """Stays its own code, as it branches on values; its layers are parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        made: torch.Tensor = self.b(y) if y.sum() > 0 else self.b(-y)
        return made


class InPieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), Branching(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.last(torch.relu(self.block(self.first(x))))
        return made


def test_diffs_of_models_in_pieces_reach_into_the_parts() -> None:
    torch.manual_seed(0)
    model, x = InPieces().eval(), torch.randn(8, 8)
    one = quantize(model, [x], backend="reference")
    other = quantize(model, [x], backend="reference", overrides={"block.a": None})
    assert not diff(one, copy.deepcopy(one))
    found = diff(one, other)
    assert found and {change.path for change in found.changes if change.path} == {"block.a"}
    assert [c.kind for c in diff(model, one, data=[x]).changes] == [
        c.kind for c in diff(one).changes
    ]


def test_a_model_that_needs_an_example_is_compared_with_one() -> None:
    torch.manual_seed(0)
    model, x = InPieces().eval(), torch.randn(8, 8)
    made = quantize(model, [x], backend="reference")
    with pytest.raises(TraceError, match="pass example_inputs"):
        diff(model, made)
    for example in (x, (x,), {"x": x}):
        found = diff(model, made, example_inputs=example)
        assert "first" in {change.path for change in found.changes}
        assert not any(change.path.startswith("block.") for change in found.changes)
