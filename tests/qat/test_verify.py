"""verify: every op of a converted model computes what was trained, and a change is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.report.verified import OpVerified, Verification
from fxquant.spec import QConfig, QSpec
from tests.qat.models import CASES, built, pictures, switch, trained

BACKENDS = ("reference", "x86")
WEIGHT = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")
CONFIGS = {
    "default": QConfig(),
    "4-bit": QConfig(weight=QSpec("int8", 4, True, "channel", "minmax")),
    "per tensor": QConfig(weight=QSpec("int8", 8, True, "tensor", "minmax")),
    "learned": QConfig(
        activation=QSpec(learned=True),
        weight=QSpec("int8", 4, True, "channel", "minmax", learned=True),
    ),
    "learned per tensor": QConfig(
        activation=QSpec(learned=True, symmetric=True),
        weight=QSpec("int8", 4, True, "tensor", "minmax", learned=True),
    ),
}


def pair(name: str, backend: str = "reference", config: QConfig | None = None) -> tuple[Any, Any]:
    """A trained model and what was made of it."""
    model, data = built(name), CASES[name][1]
    prepared = fxquant.prepare(model, mode="qat", example_inputs=(data(),), qconfig=config)
    trained(prepared, data)
    return prepared, fxquant.convert(prepared, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_int8_op_is_within_one_code(name: str, backend: str) -> None:
    if backend not in [each.name for each in fxquant.backends() if each.available]:
        pytest.skip("this machine has no such backend")
    prepared, converted = pair(name, backend)
    made = fxquant.verify(prepared, converted, [CASES[name][1](50 + n) for n in range(3)])
    assert made.ok, str(made)
    assert made.batches == 3 and not any(row.why for row in made)
    ops = [(op.path, op.op) for op in fxquant.report(converted).ops if op.int8]
    rows = [(row.path, row.op) for row in made if row.op != "quantize"]
    assert sorted(rows) == sorted(ops)
    # Where a kernel sums integers exactly and training summed in float, ties may differ.
    assert all(row.equal is None or row.equal >= 0.999 for row in made)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["residual", "upward", "dense", "twice"])
def test_weights_of_every_kind_are_those_that_were_trained(name: str, config: str) -> None:
    prepared, converted = pair(name, config=CONFIGS[config])
    made = fxquant.verify(prepared, converted, [CASES[name][1](50)])
    assert made.ok, str(made)


def test_a_changed_code_is_found_where_it_is_and_nowhere_else() -> None:
    prepared, converted = pair("residual")
    with torch.no_grad():
        converted.conv1.weight.add_(9)
    made = fxquant.verify(prepared, converted, [pictures(50)])
    assert not made.ok and made.worst > 1
    assert [row.path for row in made.failures] == ["conv1"]
    assert "1 op differs" in made.summary


def test_a_changed_float_result_is_found() -> None:
    prepared, converted = pair("residual")
    with torch.no_grad():
        converted.head.bias.add_(0.01)
    made = fxquant.verify(prepared, converted, [pictures(50)])
    assert [row.path for row in made.failures] == ["head"]


def test_training_on_after_conversion_is_found() -> None:
    prepared, converted = pair("residual")
    trained(prepared, pictures, rate=0.1)
    assert not fxquant.verify(prepared, converted, [pictures(50)]).ok


def test_both_models_are_left_as_they_were() -> None:
    prepared, converted = pair("residual")
    prepared.eval()(pictures(1))  # scales of weights follow the last step of the optimizer
    prepared.train()
    prepared.bn1.eval()
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    fxquant.verify(prepared, converted, [pictures(50)])
    assert prepared.training and not prepared.bn1.training and prepared.bn2.training
    assert all(torch.equal(prepared.state_dict()[key], value) for key, value in before.items())


def test_it_reads_data_as_calibrate_does_and_unwraps_models() -> None:
    prepared, converted = pair("residual")
    compiled: Any = torch.compile(prepared, backend="eager")
    pairs = [(pictures(n), n) for n in range(4)]
    made = fxquant.verify(
        compiled,
        converted,
        iter(pairs),
        transform=lambda batch: batch[0],
        max_batches=2,
    )
    assert made.ok and made.batches == 2


def test_as_a_table_as_json_and_as_markdown() -> None:
    made = fxquant.verify(*pair("residual"), [pictures(50)])
    text = str(made)
    assert all(word in text for word in ("conv2d+add+relu", "worst", "at most 0 codes", "1 batch"))
    plain = json.loads(json.dumps(made.to_dict()))
    assert plain["ok"] and plain["worst"] == 0 and len(plain["ops"]) == len(made)
    assert plain["ops"][0]["op"] == "quantize"
    assert made.to_markdown().startswith("| path")


def test_what_counts_as_agreement() -> None:
    def one(**values: Any) -> Verification:
        return Verification((OpVerified("a", "linear", "reference", **values),), 1)

    assert one(worst=1, equal=0.5).ok and not one(worst=2, equal=0.99).ok
    assert one(float_error=1e-4).ok and not one(float_error=2e-4).ok
    assert one(why="nothing came by").ok
    assert one(float_error=float("inf")).to_dict()["ops"][0]["float_error"] is None


def test_models_that_do_not_belong_together_are_refused() -> None:
    prepared, converted = pair("residual")
    other, _ = pair("dense")
    static = fxquant.prepare(built("residual").eval(), example_inputs=(pictures(),))
    data = [pictures()]
    with pytest.raises(ConfigError, match="graphs differ"):
        fxquant.verify(other, converted, data)
    with pytest.raises(ConfigError, match="mode='qat'"):
        fxquant.verify(static, converted, data)
    with pytest.raises(ConfigError, match="not converted"):
        fxquant.verify(prepared, prepared, data)
    with pytest.raises(ConfigError, match="fxquant"):
        fxquant.verify(nn.Linear(2, 2), converted, data)
    with pytest.raises(ConfigError, match="str"):
        fxquant.verify(prepared, "converted", data)  # type: ignore[arg-type]


def test_bad_data_and_fake_quant_that_is_off_are_refused() -> None:
    prepared, converted = pair("residual")
    with pytest.raises(CalibrationError):
        fxquant.verify(prepared, converted, [])
    with pytest.raises(ConfigError, match="not a function"):
        fxquant.verify(prepared, converted, lambda model: model(pictures()))
    switch(prepared, False)
    with pytest.raises(ConfigError, match="fake-quant is off at"):
        fxquant.verify(prepared, converted, [pictures()])


class ScaledNorm(nn.Module):
    """A norm, which is computed in float, is scaled by a number after something was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.last = nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.drop(self.norm(x)) * 0.25)
        return made


def test_a_number_that_scales_a_float_result_is_rounded_once_in_training_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    prepared = fxquant.prepare(ScaledNorm(), mode="qat", example_inputs=(x,))
    for _ in range(3):
        prepared.train()(x)
    assert len([m for m in prepared.modules() if isinstance(m, FakeQuantize)]) == 1
    found = fxquant.verify(prepared, fxquant.convert(prepared), [x])
    assert found.ok, str(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_that_is_split_off_a_convolution_makes_no_result(backend: str) -> None:
    """Both are of one captured op: the result of that is the convolution's."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    model, data = nn.Sequential(layer, nn.ReLU()), torch.randn(2, 3, 8, 8)
    prepared = fxquant.prepare(model, mode="qat", example_inputs=(data,))
    trained(prepared, lambda *_: data)
    made = fxquant.verify(prepared, fxquant.convert(prepared, backend=backend), [data])
    assert made.ok and not any(row.why for row in made)
    found = [(row.op, row.values) for row in made]
    assert found == [("quantize", data.numel()), ("conv2d+relu", 2 * 8 * 8 * 8)]
