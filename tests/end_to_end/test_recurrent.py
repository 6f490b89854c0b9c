"""Models with recurrent layers, through the public calls."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxquant
from fxquant.errors import SpeedWarning
from tests.recurrent import decibels

pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
BACKENDS = ("x86", "reference")
STEPS = torch.randn(12, 3, 32, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """A linear, a recurrent layer whose state may be passed on, a linear."""

    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(32, 32), layer, nn.Linear(width, 5)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        self.rnn.flatten_parameters()
        out, state = self.rnn(self.first(x), state)
        return self.last(out), state


def tagger(kind: str = "LSTM", **options: Any) -> Tagger:
    torch.manual_seed(0)
    cls = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[kind]
    width = 24 * (2 if options.get("bidirectional") else 1)
    return Tagger(cls(32, 24, **options), width).eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_model_is_int8_from_end_to_end(backend: str, kind: str) -> None:
    model = tagger(kind, num_layers=2, bidirectional=True)
    asked = {type(model.rnn): "dynamic"}
    q = fxquant.quantize(model, [STEPS], overrides=asked, backend=backend)
    report = fxquant.report(q)
    row = next(row for row in report.rows if row["op"] == kind)
    assert row["runs"] == "int8" and row["weight"] == "int8 per channel 0" and row["macs"]
    assert report.mac_coverage == 1.0
    for batch in (1, 3, 7):
        x = torch.randn(5, batch, 32)
        assert decibels(model(x)[0], q(x)[0]) >= 25
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(STEPS)[0], q(STEPS)[0])


def test_large_layers_are_int8_by_default_and_none_leaves_them_float() -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.LSTM(512, 768)).eval()
    x = torch.randn(2, 1, 512)
    row = fxquant.report(fxquant.quantize(large, [x])).rows[0]
    assert row["runs"] == "int8" and row["macs"] == 2 * 4 * 768 * (512 + 768)
    model = tagger()
    q = fxquant.quantize(model, [STEPS], overrides={nn.LSTM: None})
    assert type(q.rnn) is nn.LSTM
    row = next(row for row in fxquant.report(q).rows if row["op"] == "LSTM")
    assert (row["runs"], row["why"], row["by"]) == (
        *("float", "it was asked to stay float", "override LSTM"),
    )


def test_small_layers_stay_float_and_the_report_says_why() -> None:
    q = fxquant.quantize(tagger(), [STEPS])
    row = next(row for row in fxquant.report(q).rows if row["op"] == "LSTM")
    assert row["runs"] == "float" and "faster" in row["why"] and row["by"] == "convert-recurrent"


@pytest.mark.filterwarnings("default::fxquant.errors.SpeedWarning")
def test_whoever_asks_for_a_slow_one_is_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)).eval()
    with pytest.warns(SpeedWarning, match=r"slower than the float one.*\(X86Recurrent\)"):
        fxquant.quantize(model, [torch.randn(64, 2, 8)], overrides={nn.LSTM: "dynamic"})


# Kernels of static linears round floats in another order for another number of rows (with AMX), and
# what lies next to half a step may then get another code in the recurrent layer that reads them.
# One step of 255 in one number of the 24 of a row: 20 * log10(255) + 10 * log10(24) = 62 dB, less
# what it does to the steps after it.
NEAR: Final = 55.0


def test_state_is_carried_from_call_to_call() -> None:
    model = tagger()
    q = fxquant.quantize(
        model,
        lambda m: m(STEPS, (torch.zeros(1, 3, 24), torch.zeros(1, 3, 24))),
        example_inputs=(STEPS, (torch.zeros(1, 3, 24), torch.zeros(1, 3, 24))),
        overrides={nn.LSTM: "dynamic"},
    )
    whole, ends = q(STEPS, (torch.zeros(1, 3, 24), torch.zeros(1, 3, 24)))
    state: Any = (torch.zeros(1, 3, 24), torch.zeros(1, 3, 24))
    made = []
    for step in STEPS.split(1):
        out, state = q(step, state)
        made.append(out)
    assert decibels(whole, torch.cat(made)) > NEAR
    assert all(decibels(b, a) > NEAR for a, b in zip(state, ends, strict=True))


def test_steps_one_by_one_are_the_sequence_to_the_last_bit() -> None:
    q: Any = fxquant.quantize(tagger(), mode="dynamic", example_inputs=(STEPS,))
    state: Any = (torch.zeros(1, 3, 24), torch.zeros(1, 3, 24))
    whole, ends = q.rnn(STEPS, state)
    made = []
    for step in STEPS.split(1):
        out, state = q.rnn(step, state)
        made.append(out)
    assert torch.equal(torch.cat(made), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, ends, strict=True))


class Packs(nn.Module):
    """Sequences of their own lengths, packed; a branch on values keeps it the user's own code."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = branches
        self.first, self.last = nn.Linear(32, 32), nn.Linear(24, 5)
        self.rnn = nn.GRU(32, 24, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        x = self.first(x)
        if self.branches and x.sum() > 1e9:
            x = x / 2
        start = torch.zeros(1, x.shape[0], self.rnn.hidden_size)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed, start)
        return self.last(pad_packed_sequence(out, batch_first=True)[0])


class Sorted(nn.Module):
    """Sequences that come in the order of their lengths: packed, they need no indices."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(32, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        packed = pack_padded_sequence(x, torch.tensor([12, 5, 1]), batch_first=True)
        return self.last(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_that_come_sorted(backend: str) -> None:
    model, x = Sorted().eval(), STEPS.transpose(0, 1).contiguous()
    q = fxquant.quantize(model, mode="dynamic", example_inputs=(x,), backend=backend)
    assert {op.op for op in fxquant.report(q).ops if op.int8} == {"LSTM", "linear"}
    assert decibels(model(x), q(x)) >= 30


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("asked", [{nn.GRU: "dynamic"}, {}])
def test_packed_sequences_in_graphs_and_in_pieces(branches: bool, asked: dict[Any, str]) -> None:
    model = Packs(branches).eval()
    x, lengths = STEPS.transpose(0, 1).contiguous(), torch.tensor([5, 12, 1])
    q = fxquant.quantize(model, [(x, lengths)], overrides=asked)
    row = next(row for row in fxquant.report(q).rows if row["op"] == "GRU")
    assert row["path"] == "rnn" and (row["runs"] == "int8") is bool(asked)
    assert decibels(model(x, lengths), q(x, lengths)) >= 25
    assert torch.equal(copy.deepcopy(q)(x, lengths), q(x, lengths))
    # Alone or in a batch: other lengths, another order.
    alone = q(x[1:2], lengths[1:2])
    assert decibels(q(x, lengths)[1], alone[0]) > NEAR


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_may_be_the_whole_model(backend: str) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(32, 24, num_layers=2).eval()
    q = fxquant.quantize(layer, [STEPS], overrides={nn.LSTM: "dynamic"}, backend=backend)
    (out, (h, c)), (wanted, (wanted_h, wanted_c)) = q(STEPS), layer(STEPS)
    assert all(decibels(a, b) >= 30 for a, b in ((wanted, out), (wanted_h, h), (wanted_c, c)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("preset", ["dynamic", "dynamic-symmetric"])
def test_dynamic_mode_needs_no_data_and_takes_layers_of_any_size(kind: str, preset: str) -> None:
    model = tagger(kind)
    q = fxquant.quantize(model, mode="dynamic", qconfig=preset, example_inputs=(STEPS,))
    row = next(row for row in fxquant.report(q).rows if row["op"] == kind)
    assert row["runs"] == "int8" and row["macs"]
    whole = q(STEPS)[0]
    assert decibels(model(STEPS)[0], whole) >= 30
    assert torch.equal(q(STEPS[:, 1:2])[0], whole[:, 1:2])
