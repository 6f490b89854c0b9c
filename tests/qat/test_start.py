"""Training that starts from a model which was calibrated in static mode."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.base import MEASURED, WITHOUT_VNNI, Cost
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import Observer
from tests.qat.models import CASES, built, pictures, sequences, trained


def calibrated(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """A network, and it prepared in static mode and calibrated."""
    model, data = built(name).eval(), CASES[name][1]
    made = fxquant.prepare(model, example_inputs=(data(),), **options)
    fxquant.calibrate(made, [data(n) for n in range(4)])
    return model, made


def activations(model: nn.Module) -> list[FakeQuantize]:
    return [m for m in model.modules() if isinstance(m, FakeQuantize)]


@pytest.mark.parametrize("name", CASES)
def test_every_fake_quant_has_the_range_that_was_found(name: str) -> None:
    model, static = calibrated(name)
    made = fxquant.prepare(static, mode="qat")
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    found = {
        (p.scale_value, p.zero_point_value)
        for p in (o.qparams() for o in static.modules() if isinstance(o, Observer))
    }
    fakes = activations(made)
    assert fakes and all(fake.seen for fake in fakes)
    for fake in fakes:
        assert (float(fake.scale), int(fake.zero_point)) in found, fake.path
    # The ranges belong to the same values: the model computes nearly what the float one does.
    x = CASES[name][1](7)
    with torch.no_grad():
        wanted, rounded = model(x), made(x)
    assert float((wanted - rounded).abs().max()) <= 0.1 * float(wanted.abs().max())


class Residue(nn.Module):
    """In evaluation the sum is part of the layer; in training something drops in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.drop, self.last = nn.Dropout(0.2), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        made: Tensor = self.last(torch.relu(x + self.drop(self.b(x))))
        return made


class Moved(nn.Module):
    """What is dropped and moved in training only is moved on codes in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.drop(self.norm(self.a(x)))[:, 1:].transpose(0, 1))
        return made


def test_ranges_are_found_through_moves_and_dropout() -> None:
    torch.manual_seed(0)
    static = fxquant.prepare(Moved().eval(), example_inputs=(sequences(),))
    fxquant.calibrate(static, [sequences(n) for n in range(4)])
    made = fxquant.prepare(static, mode="qat")
    fakes = activations(made)
    assert fakes and all(fake.seen for fake in fakes)


def test_what_static_mode_does_not_quantize_gets_its_range_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A sum by itself is faster in float where it is as small as this one.
    for costs in (MEASURED, WITHOUT_VNNI):
        monkeypatch.setitem(costs.in_float, "add", Cost(1e4, 0.0))
    torch.manual_seed(0)
    model = Residue().eval()
    static = fxquant.prepare(model, example_inputs=(pictures(),))
    fxquant.calibrate(static, [pictures(n) for n in range(4)])
    made = fxquant.prepare(static, mode="qat")
    assert [fake.path for fake in activations(made) if not fake.seen] == ["b"]
    with torch.no_grad():
        wanted, rounded = model(pictures(7)), made(pictures(7))
    assert float((wanted - rounded).abs().max()) <= 0.1 * float(wanted.abs().max())
    trained(made.train(), pictures)
    assert all(fake.seen for fake in activations(made))
    assert fxquant.verify(made, fxquant.convert(made, backend="reference"), [pictures(9)]).ok


def test_it_trains_converts_and_leaves_the_static_model() -> None:
    _, static = calibrated("residual")
    before = {key: value.clone() for key, value in static.state_dict().items()}
    made = fxquant.prepare(static, mode="qat")
    assert not made.training
    trained(made.train(), pictures)
    assert fxquant.verify(made, fxquant.convert(made, backend="reference"), [pictures(9)]).ok
    for key, value in static.state_dict().items():
        assert torch.equal(before[key], value), key
    assert fxquant.convert(static, backend="reference")(pictures()).isfinite().all()


def test_what_was_asked_for_is_kept_unless_it_is_given_anew() -> None:
    _, static = calibrated("residual", overrides={"head": None}, qconfig="qnnpack")
    kept: Any = fxquant.prepare(static, mode="qat")
    weights = [n for n, _ in kept.fake_quant.named_children() if n.endswith("_weight")]
    assert weights == ["conv1_weight", "conv2_weight"]
    assert kept.fake_quant.conv1_weight.axis is None
    four = fxquant.QConfig(fxquant.QSpec(bits=4))
    anew: Any = fxquant.prepare(static, mode="qat", overrides={}, qconfig=four)
    assert hasattr(anew.fake_quant, "head_weight")
    fake = activations(anew)[0]
    # The range is the same, its steps are those of four bits.
    assert fake.spec.bits == 4 and fake.seen
    low, high = kept.fake_quant.x.low, kept.fake_quant.x.high
    assert torch.equal(anew.fake_quant.x.low, low) and torch.equal(anew.fake_quant.x.high, high)
    torch.testing.assert_close(fake.scale, (high - low) / 15, rtol=0.1, atol=0)


def test_copies_remember_and_pickles_say_what_to_pass() -> None:
    _, static = calibrated("residual")
    twin = fxquant.prepare(copy.deepcopy(static), mode="qat")
    assert all(fake.seen for fake in activations(twin))
    file = io.BytesIO()
    torch.save(static, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(fxquant.errors.ConfigError, match="pass the float model"):
        fxquant.prepare(loaded, mode="qat")


def test_other_models_of_fxquant_are_refused() -> None:
    model = built("residual").eval()
    static = fxquant.prepare(model, example_inputs=(pictures(),))
    with pytest.raises(fxquant.errors.CalibrationError, match="training starts from its ranges"):
        fxquant.prepare(static, mode="qat")
    _, static = calibrated("residual")
    trainee = fxquant.prepare(static, mode="qat")
    refused: tuple[tuple[Any, Any], ...] = (
        (trainee, "qat"),
        (fxquant.convert(static, backend="reference"), "qat"),
        (static, "dynamic"),
    )
    for made, mode in refused:
        with pytest.raises(fxquant.errors.ConfigError, match="was made by fxquant"):
            fxquant.prepare(made, mode=mode)
