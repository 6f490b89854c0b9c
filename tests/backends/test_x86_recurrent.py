"""Recurrent layers on integer kernels: as the reference, and each sequence by itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from torch.nn.utils.rnn import pack_padded_sequence

from fxquant.backends import x86_row_sums
from fxquant.backends.x86_recurrent import X86Recurrent
from fxquant.backends.x86_row_sums import ByteSums, RowSums, has_fbgemm
from fxquant.spec import PRESETS, QSpec
from tests.recurrent import KINDS, decibels, flat, float_layer, integer_layer, layers

NEAR: Final = 45.0
"""Decibels: a sum of gates rounded otherwise may change a code of a state, whose step is 1/127 of
its row; kernels and reference differ by that and by float32 roundings alone, mostly over 120."""


@pytest.fixture(params=["fbgemm", "onednn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both integer kernels, whichever is chosen by itself."""
    if request.param == "fbgemm" and not has_fbgemm():
        pytest.skip("this torch has no FBGEMM kernel")
    monkeypatch.setattr(x86_row_sums, "has_fbgemm", lambda: request.param == "fbgemm")
    return str(request.param)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (3, 7, 5), (17, 514, 130)])
def test_sums_are_exact(kernel: str, rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-63, 64, (outputs, inputs), dtype=torch.int8, generator=generator)
    codes = torch.randint(-127, 128, (rows, inputs), generator=generator)
    sums = RowSums(weight)
    room = sums.room(rows)
    room[:, :inputs] = codes
    wanted = codes.double() @ weight.double().T
    assert torch.equal(sums(room).double(), wanted)
    assert sums(sums.room(0)).shape == (0, outputs)


@pytest.mark.parametrize("rows", [1, 7, 8, 40])
def test_few_rows_and_many_have_the_same_sums(kernel: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-63, 64, (130, 64), dtype=torch.int8, generator=generator)
    codes = torch.randint(0, 256, (rows, 72), dtype=torch.uint8, generator=generator)
    few = RowSums(weight)
    room = few.room(rows)
    room[:, :64] = codes[:, :64].float() - 128.0
    assert torch.equal(ByteSums(weight, 8)(codes), few(room))


def test_numbers_between_codes_are_rounded_half_to_even(kernel: str) -> None:
    sums = RowSums(torch.ones(1, 1, dtype=torch.int8))
    for value in (0.5, 1.5, -2.5, 126.5001, 127.00001, -127.00001):
        room = sums.room(1)
        room[:, 0] = value
        assert float(sums(room)) == round(value)


@settings(max_examples=40)
@given(case=layers())
def test_it_computes_what_the_reference_does(case: Any) -> None:
    layer, x, hx = case
    reference = integer_layer(layer)
    with torch.no_grad():
        pairs = zip(flat(reference(x, hx)), flat(X86Recurrent(reference)(x, hx)), strict=True)
    for one, other in pairs:
        assert other.shape == one.shape and other.dtype == one.dtype
        if one.numel():
            assert decibels(one, other) >= NEAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "reads",
    [
        *(PRESETS[name].activation for name in ("dynamic", "dynamic-symmetric")),
        QSpec("int8", granularity="row", observer="runtime"),
    ],
)
def test_both_kernels_and_every_kind_of_rows(kernel: str, kind: str, reads: QSpec) -> None:
    reference = integer_layer(float_layer(kind, 24, 33, num_layers=2), reads=reads)
    x = torch.randn(9, 4, 24)
    for one, other in zip(flat(reference(x)), flat(X86Recurrent(reference)(x)), strict=True):
        assert decibels(one, other) >= NEAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [12, 33, 64])
def test_a_sequence_does_not_depend_on_its_batch_mates(kind: str, hidden: int) -> None:
    made = X86Recurrent(integer_layer(float_layer(kind, 20, hidden, bidirectional=True)))
    x = torch.randn(5, 50, 20)
    whole = flat(made(x))
    for place in (0, 7, 49):
        alone = flat(made(x[:, place : place + 1]))
        for one, other in zip(alone, whole, strict=True):
            assert torch.equal(one, other[:, place : place + 1])
    order = torch.randperm(50)
    assert torch.equal(made(x[:, order])[0], whole[0][:, order])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_RELU"])
def test_packed_sequences(kind: str) -> None:
    reference = integer_layer(float_layer(kind, 8, 6, num_layers=2, bidirectional=True))
    made, x = X86Recurrent(reference), torch.randn(7, 4, 8)
    packed = pack_padded_sequence(x, torch.tensor([4, 1, 7, 4]), enforce_sorted=False)
    (out, ends), (wanted, wanted_ends) = made(packed), reference(packed)
    assert decibels(wanted.data, out.data) >= NEAR
    pairs = zip(wanted_ends, ends, strict=True) if kind == "LSTM" else [(wanted_ends, ends)]
    assert all(decibels(one, other) >= NEAR for one, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_bad_rows_stay_by_themselves(kind: str, bad: float) -> None:
    reference = integer_layer(float_layer(kind, 8, 6))
    made, x = X86Recurrent(reference), torch.randn(5, 3, 8)
    clean = made(x)[0]
    x[2, 1, 3] = bad
    out, wanted = made(x)[0], reference(x)[0]
    assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]]) and torch.equal(out[:2], clean[:2])
    assert torch.equal(out.isnan(), wanted.isnan())


def test_what_is_packed_is_made_anew_and_never_stored() -> None:
    reference = integer_layer(float_layer("LSTM", 8, 6))
    made, x = X86Recurrent(reference), torch.randn(3, 2, 8)
    assert set(made.state_dict()) == set(reference.state_dict())
    wanted = made(x)[0]
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.to("cpu")):
        assert torch.equal(twin(x)[0], wanted)
    other = integer_layer(float_layer("LSTM", 8, 6, seed=3))
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x)[0], X86Recurrent(other)(x)[0])
    assert not torch.equal(made(x)[0], wanted)


def test_inputs_and_states_are_left_as_they_are() -> None:
    made = X86Recurrent(integer_layer(float_layer("LSTM", 8, 6)))
    x, state = torch.randn(3, 2, 8), (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    kept = [part.clone() for part in (x, *state)]
    made(x, state)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *state), strict=True))
    x.requires_grad_()
    assert not made(x, state)[0].requires_grad
