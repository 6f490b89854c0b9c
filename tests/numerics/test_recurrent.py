"""Recurrent layers in int8: against float64 arithmetic on codes, and against torch's own layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.numerics.recurrent import STATE, Weights, run_layer
from fxquant.spec import ROWS
from tests.recurrent import KINDS, PROJECTED, decibels, flat, float_layer, integer_layer, layers

SAME: Final = 45.0
"""Decibels: in float, the rounding of a sum may depend on the size of the batch, and may change a
code of a state, whose step is 1/127 of its row. (Integer kernels have no such sums.)"""


def qdq64(rows: Tensor, *, symmetric: bool) -> Tensor:
    """Rows quantized and made real again, in float64, from the definition."""
    made = []
    for row in rows.to(torch.float32):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        side = max(-low, high)
        span = side / 127 if symmetric else (high - low) / 255
        scale = float(torch.tensor(span, dtype=torch.float32)) or 1.0
        zero = 0 if symmetric else round(-low / scale)
        steps = torch.tensor([round(float(v) / scale) for v in row], dtype=torch.float64)
        least, most = (-127, 127) if symmetric else (-zero, 255 - zero)
        made.append(steps.clamp(least, most) * scale)
    return torch.stack(made)


def oracle(layer: nn.RNNBase, made: IntegerRecurrent, x: Tensor) -> Tensor:
    """Outputs of one layer in one direction, step by step in float64."""
    w = {name: p.double() for name, p in layer.named_parameters()}
    for name in made.matrices():
        codes, scale = made.matrix(name)
        w[name] = codes.double() * scale.double().unsqueeze(1)
    nothing = torch.zeros(1, dtype=torch.float64)
    h = torch.zeros(x.shape[1], made.width, dtype=torch.float64)
    c = torch.zeros(x.shape[1], layer.hidden_size, dtype=torch.float64)
    out = []
    for now in x:
        first = qdq64(now, symmetric=False) @ w["weight_ih_l0"].T + w.get("bias_ih_l0", nothing)
        then = qdq64(h, symmetric=True) @ w["weight_hh_l0"].T + w.get("bias_hh_l0", nothing)
        if layer.mode == "LSTM":
            i, f, g, o = (first + then).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if "weight_hr_l0" in w:
                h = qdq64(h, symmetric=True) @ w["weight_hr_l0"].T
        elif layer.mode == "GRU":
            (ri, zi, ni), (rh, zh, nh) = first.chunk(3, 1), then.chunk(3, 1)
            n, z = (ni + (ri + rh).sigmoid() * nh).tanh(), (zi + zh).sigmoid()
            h = (1 - z) * n + z * h
        else:
            h = (first + then).tanh() if layer.mode == "RNN_TANH" else (first + then).relu()
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_float64_arithmetic_on_codes(kind: str, bias: bool) -> None:
    layer = float_layer(kind, 9, 6, bias=bias)
    made = integer_layer(layer)
    x = torch.randn(5, 3, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = oracle(layer, made, x)
    # One step of a state that lies between two codes is the most that roundings may change.
    assert float((made(x)[0] - wanted).abs().max()) < 2e-3
    assert decibels(wanted, made(x)[0].double()) > 60


@pytest.mark.filterwarnings(PROJECTED)
@settings(max_examples=40)
@given(case=layers(least=16))
def test_it_is_near_the_float_layer(case: Any) -> None:
    layer, x, hx = case
    with torch.no_grad():
        wanted, found = layer(x, hx), integer_layer(layer)(x, hx)
    parts = list(zip(flat(wanted), flat(found), strict=True))
    assert all(b.shape == a.shape and b.dtype == a.dtype for a, b in parts)
    if x.numel():
        ones, others = (
            torch.cat([part.flatten() for part in side]) for side in zip(*parts, strict=True)
        )
        assert decibels(ones, others) >= 30


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_RELU"])
@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences(kind: str, sorted_already: bool) -> None:
    layer = float_layer(kind, 8, 6, num_layers=2, bidirectional=True)
    made = integer_layer(layer)
    x = torch.randn(7, 4, 8, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([7, 4, 4, 1] if sorted_already else [4, 1, 7, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sorted_already)
    out, ends = made(packed)
    assert isinstance(out, PackedSequence)
    wanted, wanted_ends = layer(packed)
    padded, found_lengths = pad_packed_sequence(out)
    assert torch.equal(found_lengths, lengths)
    assert decibels(pad_packed_sequence(wanted)[0], padded) >= 30
    pairs = zip(wanted_ends, ends, strict=True) if kind == "LSTM" else [(wanted_ends, ends)]
    assert all(decibels(one, other) >= 30 for one, other in pairs)
    # Each sequence is what it is alone.
    for place, length in enumerate(lengths.tolist()):
        alone, _ = made(x[:length, place : place + 1])
        assert decibels(alone, padded[:length, place : place + 1]) >= SAME


def test_states_go_on_where_they_ended() -> None:
    made = integer_layer(float_layer("LSTM", 8, 6, num_layers=2))
    x = torch.randn(6, 2, 8)
    whole, ends = made(x)
    first, state = made(x[:2])
    second, state = made(x[2:], state)
    assert torch.equal(torch.cat((first, second)), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, ends, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_is_nan_from_there_on_and_others_are_untouched(bad: float) -> None:
    made = integer_layer(float_layer("GRU", 8, 6))
    x = torch.randn(5, 3, 8)
    clean, _ = made(x)
    x[2, 1, 3] = bad
    out, _ = made(x)
    assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]]) and torch.equal(out[:2], clean[:2])
    assert bool(out[2:, 1].isnan().all())


def test_dropout_is_between_layers_and_in_training_only() -> None:
    layer = float_layer("LSTM", 8, 6, num_layers=2, dropout=0.5)
    made, x = integer_layer(layer), torch.randn(4, 2, 8)
    assert torch.equal(made(x)[0], made(x)[0])
    made.train()
    assert not torch.equal(made(x)[0], made(x)[0])


def test_what_torch_refuses_is_refused() -> None:
    made = integer_layer(float_layer("LSTM", 8, 6))
    good = torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match="2-D or 3-D"):
        made(torch.zeros(8))
    with pytest.raises(RuntimeError, match="7 features, and the layer takes 8"):
        made(torch.zeros(3, 2, 7))
    with pytest.raises(RuntimeError, match="larger than 0"):
        made(torch.zeros(0, 2, 8))
    with pytest.raises(RuntimeError, match=r"shape \(1, 3, 6\), got \(1, 2, 6\)"):
        made(torch.zeros(4, 3, 8), (good, good))


def test_it_is_stored_as_integers_and_copies() -> None:
    made = integer_layer(float_layer("LSTM", 8, 6, proj_size=3))
    state = made.state_dict()
    assert state["weight_hr_l0"].dtype is torch.int8
    assert state["weight_ih_l0_scale"].shape == (24,)
    x = torch.randn(3, 2, 8)
    wanted = made(x)[0]
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x)[0], wanted)
    other = integer_layer(float_layer("LSTM", 8, 6, proj_size=3, seed=5))
    assert not torch.equal(other(x)[0], wanted)
    other.load_state_dict(state)
    assert torch.equal(other(x)[0], wanted)
    made.flatten_parameters()
    assert "LSTM, 8, 6, layers=1, proj_size=3" in repr(made)


def test_training_passes_gradients_through_rows_of_its_own() -> None:
    w = Weights(torch.randn(8, 3, requires_grad=True), torch.randn(8, 2, requires_grad=True))
    start = (torch.zeros(2, 2), torch.zeros(2, 2))
    x = torch.randn(6, 3)
    out, _ = run_layer("LSTM", x, [2, 2, 2], start, w, ROWS, rows=lambda rows, spec: rows)
    out.sum().backward()
    assert w.from_input.grad is not None and w.from_state.grad is not None
    assert STATE.symmetric
