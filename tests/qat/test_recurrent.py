"""Recurrent layers and attention in training: what is deployed is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxquant
from fxquant.numerics.fake_weights import FakeQuantizeWeight
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from tests.qat.models import switch, trained
from tests.recurrent import PROJECTED

pytestmark = pytest.mark.filterwarnings(PROJECTED)

KINDS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, 8, 2, batch_first=True, dropout=0.1),
    "both ways": lambda: nn.LSTM(6, 8, bidirectional=True, proj_size=5, batch_first=True),
    "gru": lambda: nn.GRU(6, 8, batch_first=True, bias=False),
    "tanh": lambda: nn.RNN(6, 8, batch_first=True),
    "relu": lambda: nn.RNN(6, 8, nonlinearity="relu", batch_first=True),
}


class Reading(nn.Module):
    """A recurrent layer between two linears."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inside = nn.Linear(5, 6)
        self.layer = KINDS[kind]()
        width = 2 * 5 if kind == "both ways" else 8
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.layer(torch.relu(self.inside(x)))[0])
        return made


class Packed(nn.Module):
    """Sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([7, 4, 2]), batch_first=True)
        made: Tensor = self.out(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])
        return made


def data(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(seed))


def prepared(model: nn.Module, asked: bool = True, **options: Any) -> Any:
    layer = model.get_submodule("layer")
    overrides = {type(layer): options.pop("config", "dynamic")} if asked else None
    return fxquant.prepare(
        model.train(), mode="qat", example_inputs=(data(),), overrides=overrides, **options
    )


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Packed() if kind == "packed" else Reading(kind)


@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.parametrize("kind", [*KINDS, "packed"])
def test_what_is_deployed_is_what_was_trained(kind: str, backend: str) -> None:
    model = built(kind)
    made = prepared(model)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    trained(made, data, steps=3, rate=0.1)
    quantized = fxquant.convert(made, backend=backend)
    held: Any = quantized.get_submodule("layer")
    assert isinstance(held, IntegerRecurrent)
    with torch.no_grad():
        wanted, found = made.eval()(data(9)), quantized(data(9))
    # Sums in another order decide some ties: a code of a row, or of the last layer, more or less.
    limit = 0.02 * float(wanted.abs().max())
    assert float((wanted - found).abs().max()) <= limit
    if backend == "reference":
        assert float((wanted - found).abs().median()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_rounded_to_the_codes_that_are_deployed(kind: str) -> None:
    made = prepared(built(kind))
    trained(made, data, steps=2)
    fakes = {n: m for n, m in made.fake_quant.named_children() if "weight_" in n}
    held: Any = fxquant.convert(made, backend="reference").get_submodule("layer")
    for name in held.matrices():
        fake = fakes[f"layer_{name}"]
        assert isinstance(fake, FakeQuantizeWeight)
        codes, scale = held.stored(name)
        with torch.no_grad():
            rounded = fake(made.layer.get_parameter(name))
        torch.testing.assert_close(codes.float() * scale.view(-1, 1), rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_it_is_the_float_layer(kind: str) -> None:
    model = built(kind)
    made = prepared(model)
    switch(made, False)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(data()), model.eval()(data()), rtol=0, atol=1e-6)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model.eval()(data()).square().mean())


def test_rounded_training_follows_float_training() -> None:
    """Gradients pass the rounding: after some steps both losses are near each other."""
    model = built("lstm")
    made = prepared(model)
    losses = []
    for each in (model, made):
        before = loss(each)
        trained(each.train(), data, steps=10, rate=0.1)
        losses.append((before, loss(each)))
    (start, floats), (_, rounded) = losses
    assert rounded < 0.5 * start and abs(rounded - floats) < 0.1 * start


def test_few_bits_and_learned_scales_are_deployed_as_trained() -> None:
    weight = fxquant.QSpec(
        "int8", bits=4, symmetric=True, granularity="channel", observer="minmax", learned=True
    )
    rows = fxquant.QSpec(granularity="row", observer="runtime")
    made = prepared(built("gru"), config=fxquant.QConfig(rows, weight))
    trained(made, data, steps=3, rate=0.1)
    scales = [n for n, _ in made.named_parameters() if n.endswith("weight_ih_l0.scale")]
    assert scales == ["fake_quant.layer_weight_ih_l0.scale"]
    quantized = fxquant.convert(made, backend="reference")
    held: Any = quantized.get_submodule("layer")
    codes, scale = held.stored("weight_ih_l0")
    assert int(codes.abs().max()) <= 7
    assert torch.equal(scale, made.fake_quant.layer_weight_ih_l0.scale.detach())
    with torch.no_grad():
        # A row code next to a half may fall either way, and its step is passed on by the states.
        torch.testing.assert_close(quantized(data(9)), made.eval()(data(9)), rtol=0, atol=0.01)


def test_a_small_layer_that_nobody_asked_for_trains_in_float() -> None:
    made = prepared(built("lstm"), asked=False)
    assert type(made.layer) is nn.LSTM
    trained(made, data)
    quantized = fxquant.convert(made, backend="x86")
    assert type(quantized.get_submodule("layer")) is nn.LSTM
    op = next(op for op in fxquant.report(quantized).ops if op.path == "layer")
    assert not op.int8 and "faster" in op.why


def test_autocast_computes_rounded_layers_in_float32() -> None:
    made = prepared(built("lstm"))
    with torch.autocast("cpu", torch.bfloat16):
        made(data()).float().square().mean().backward()
    assert made.layer.weight_hh_l0.grad is not None
    assert bool(made.layer.weight_hh_l0.grad.isfinite().all())
