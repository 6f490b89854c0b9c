"""Multiply-accumulates, against torch's own counter of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from fxquant.graph.info import info
from fxquant.numerics.shapes import ShapeRecorder
from tests.helpers import One, measured, node_of

IMAGE = torch.randn(2, 4, 6, 6)
ROWS = torch.randn(2, 5, 8)


def counted(model: nn.Module, x: Any) -> int:
    """Multiply-accumulates as torch counts them: two operations each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def found(model: nn.Module, x: Any) -> list[int | None]:
    """What the records say, for every op that multiplies; nothing is read but its shapes."""
    module = measured(model.eval(), x)
    macs = [info(n).macs for n in module.graph.nodes if n.op.startswith("call")]
    return [count for count in macs if count != 0]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), IMAGE),
        (nn.Conv2d(4, 8, (3, 1), padding=(2, 0), dilation=2, groups=2), IMAGE),
        (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 5, 3)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 7)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1, groups=4), IMAGE),
        (nn.ConvTranspose3d(2, 3, 2, stride=2), torch.randn(1, 2, 4, 5, 3)),
        (nn.Linear(8, 3), ROWS),
    ],
)
def test_layers(layer: nn.Module, x: torch.Tensor) -> None:
    assert found(nn.Sequential(layer), x) == [counted(layer, x)]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x @ x.transpose(1, 2),
        lambda m, x: x @ m.w,  # a parameter on one side
        lambda m, x: torch.matmul(x.unsqueeze(1), m.w.expand(2, 3, 8, 4)),  # broadcast batches
        lambda m, x: torch.bmm(x, x.mT),
        lambda m, x: torch.baddbmm(x.sum(1, keepdim=True), x, m.w.expand(2, 8, 4).repeat(1, 1, 2)),
        lambda m, x: torch.addmm(m.w[0], x[0], m.w),
        lambda m, x: torch.einsum("bij,jk->bik", x, m.w),
        lambda m, x: torch.einsum("bij, ...ij -> b...", x, x),
        lambda m, x: torch.einsum("bij,jk,bil->bkl", x, m.w, x),
        lambda m, x: torch.tensordot(x, m.w, dims=([2], [0])),
        lambda m, x: torch.inner(x, m.w.t()),
        lambda m, x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3, :4]),
        lambda m, x: F.linear(x, (m.w * 2).t()),  # a weight computed in forward
        lambda m, x: F.conv1d(x, weight=m.k * m.k, padding=1),
    ],
)
def test_functions(body: Callable[[Any, Any], Any]) -> None:
    # A layer first: without anything in int8 there is nothing to measure.
    model = One(
        lambda m, x: body(m, m.first(x)),
        first=nn.Linear(8, 8),
        w=nn.Parameter(torch.randn(8, 4)),
        k=nn.Parameter(torch.randn(3, 5, 3)),
    )
    assert sum(count or 0 for count in found(model, ROWS)) == counted(model, ROWS)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("layer", "matrices"),
    [
        (nn.LSTM(8, 6, batch_first=True), 4 * 6 * (8 + 6)),
        (nn.GRU(8, 6, num_layers=2), 3 * 6 * (8 + 6) + 3 * 6 * (6 + 6)),
        (nn.RNN(8, 6, bidirectional=True, batch_first=True), 2 * 6 * (8 + 6)),
        (nn.LSTM(8, 6, proj_size=3), 4 * 6 * (8 + 3) + 6 * 3),
    ],
)
def test_recurrent_layers(layer: nn.Module, matrices: int) -> None:
    model = One(lambda m, x: m.rnn(m.lin(x))[0], lin=nn.Linear(8, 8), rnn=layer)
    assert found(model, ROWS) == [10 * 8 * 8, 10 * matrices]


def test_a_recorder_takes_the_first_tensor_that_holds_something() -> None:
    recorder = ShapeRecorder("here")
    for value in (None, torch.empty(0, 8), ROWS, torch.zeros(3, 3)):
        assert recorder(value) is value
    assert recorder.first_shape == (2, 5, 8)
    packed = ShapeRecorder("there")
    packed(pack_padded_sequence(ROWS, torch.tensor([5, 3]), batch_first=True))
    assert packed.first_shape == (8, 8)


def test_what_does_not_multiply_counts_nothing() -> None:
    model = One(lambda m, x: torch.cumsum(torch.softmax(x + x, 1), 1) * 2, lin=nn.Linear(8, 8))
    assert found(model, ROWS) == []


def test_an_unknown_module_with_weights_is_not_guessed_at() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w.sum()

    strange = Strange()
    strange.__class__.__module__ = "torch.nn.strange"  # traced as a leaf, as torch's own are
    module = measured(nn.Sequential(nn.Linear(8, 8), strange).eval(), ROWS)
    assert info(node_of(module, "Strange")).macs is None
