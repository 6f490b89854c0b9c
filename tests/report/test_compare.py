"""compare: figures that can be checked by hand, shares that add up, every mode and backend."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError
from fxquant.report.compare import Comparison
from tests.helpers import trained
from tests.report.test_report_api import Small

Mode = Literal["static", "dynamic", "weight_only", "bfloat16"]


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(Small())


@pytest.fixture(scope="module")
def comparison(model: nn.Module) -> Comparison:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    return fxquant.compare(model, quantized, batches())


def test_the_output_is_what_running_both_models_gives(model: nn.Module) -> None:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    made = fxquant.compare(model, quantized, iter(batches()))
    with torch.no_grad():
        real = torch.cat([model(x) for x in batches()]).double()
        codes = torch.cat([quantized(x) for x in batches()]).double()
    error = codes - real
    sqnr = 10 * math.log10(float(real.square().sum() / error.square().sum()))
    assert made.batches == 3
    # The very same tensors; only the order of the sums differs.
    assert made.output.sqnr == pytest.approx(sqnr, abs=1e-6)
    assert made.output.max_error == float(error.abs().max())


def test_every_op_has_a_row_and_figures(model: nn.Module, comparison: Comparison) -> None:
    assert {row.path for row in comparison} == {"first", "second", "mean", "head"}
    for row in comparison:
        assert row.accumulated is not None and row.own is not None and not row.why
        assert 30 < row.own.sqnr  # 8 bits of a few sigma: 40 dB and more
        assert row.own.cosine > 0.999
    weights = {row.path: row.weight_sqnr for row in comparison}
    assert weights.pop("mean") is None
    # 8 bits, a range of about three standard deviations: 6.02 * 8 + 4.77 - 20 log10(3) = 43 dB.
    assert all(sqnr is not None and 38 < sqnr < 55 for sqnr in weights.values())


def test_the_first_op_has_no_error_but_its_own(comparison: Comparison) -> None:
    first = next(row for row in comparison if row.path == "first")
    assert first.own == first.accumulated


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "x86"])
def test_shares_add_up_to_the_error_of_the_output(
    model: nn.Module, mode: Mode, backend: str
) -> None:
    if backend not in [each.name for each in fxquant.backends() if each.available]:
        pytest.skip("this machine has no such backend")
    data = batches() if mode == "static" else None
    quantized = fxquant.quantize(model, data, mode=mode, backend=backend)
    made = fxquant.compare(model, quantized, batches())
    assert made.explained is not None
    # First order: an error of 1 % of the values may shift the sum by a few per cent of itself.
    assert made.explained == pytest.approx(1.0, abs=0.05)
    assert 30 < made.output.sqnr < 80


def test_an_op_that_is_made_worse_is_ranked_first(model: nn.Module) -> None:
    coarse = fxquant.QConfig(weight=fxquant.QSpec("int8", bits=3, symmetric=True))
    for path in ("first", "second", "head"):
        quantized = fxquant.quantize(
            model, batches(), backend="reference", overrides={path: coarse}
        )
        worst = fxquant.compare(model, quantized, batches()).worst(1)[0]
        assert worst.path == path
        assert worst.share is not None and worst.share > 0.5  # at 3 bits first order is rough
        assert worst.weight_sqnr is not None and worst.weight_sqnr < 20


def test_a_model_left_in_float_is_exact_there(model: nn.Module) -> None:
    quantized = fxquant.quantize(
        model, batches(), backend="reference", overrides={"*": None, "head": fxquant.QConfig()}
    )
    rows = {row.path: row for row in fxquant.compare(model, quantized, batches())}
    own = rows["first"].own
    # Folding the batch norm leaves the rounding of float32.
    assert own is not None and own.sqnr > 100
    # What the head reads is rounded to codes, which counts to what makes it.
    shares = {path: row.share or 0.0 for path, row in rows.items()}
    assert shares["head"] + shares["mean"] == pytest.approx(1.0, abs=0.01)
    assert max(abs(shares["first"]), abs(shares["second"])) < 1e-4


class InPlace(nn.Module):
    """Writes over what it has read, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += 1
        F.relu(y, inplace=True)
        return self.last(y).sigmoid_().mul_(2)


class Branches(nn.Module):
    """Stays the user's own code around its children."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        if y.abs().max() < 1e6:
            y = self.body(y)
        return y, self.head(y).argmax(1)


class Indices(nn.Module):
    """Begins with integers, ends with several tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        states, (h, _) = self.rnn(self.table(tokens))
        return {"scores": self.head(states), "last": [h, h.shape[0]]}


@pytest.mark.parametrize("net", [InPlace, Branches])
def test_models_that_are_hard_to_follow(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net().eval()
    state = copy.deepcopy(model.state_dict())
    quantized = fxquant.quantize(model, batches(), backend="reference")
    made = fxquant.compare(model, quantized, batches())
    assert made.output.sqnr > 25
    if net is InPlace:
        assert made.explained == pytest.approx(1.0, abs=0.05)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_indices_and_tuples() -> None:
    torch.manual_seed(0)
    model = Indices().eval()
    data = [{"tokens": torch.randint(50, (4, 6))} for _ in range(2)]
    quantized = fxquant.quantize(model, data, backend="reference")
    made = fxquant.compare(model, quantized, data)
    assert made.output.sqnr > 30
    assert made.explained == pytest.approx(1.0, abs=0.05)


def test_text_dict_and_markdown(comparison: Comparison) -> None:
    text = str(comparison)
    assert text.splitlines()[0].split()[:3] == ["path", "op", "runs"]
    assert "output: " in text and "3 batches" in text
    told = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [op["path"] for op in told["ops"]] == [row.path for row in comparison]
    assert told["output"]["sqnr"] == comparison.output.sqnr
    lines = comparison.to_markdown().splitlines()
    assert all(line.startswith("|") for line in lines[: len(comparison) + 2])
    assert comparison.worst(2) == comparison.rows[:2]


def test_nothing_is_left_changed(model: nn.Module) -> None:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    before = [copy.deepcopy(m.state_dict()) for m in (model, quantized)]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.inference_mode():
        fxquant.compare(model, quantized, batches(1))
    assert torch.equal(state, torch.get_rng_state())
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    for was, now in zip(before, (model, quantized), strict=True):
        assert all(torch.equal(value, now.state_dict()[name]) for name, value in was.items())


def test_copies_and_loaded_models_are_compared_alike(model: nn.Module) -> None:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    wanted = fxquant.compare(model, quantized, batches())
    assert fxquant.compare(model, copy.deepcopy(quantized), batches()) == wanted
    assert fxquant.compare(model, pickle.loads(pickle.dumps(quantized)), batches()) == wanted
    spoiled = copy.deepcopy(quantized)
    for node in spoiled.graph.nodes:  # as after a tracer that knows nothing of records
        node.meta.clear()
    assert fxquant.compare(model, copy.deepcopy(spoiled), batches()) == wanted
    spoiled.graph.call_function(torch.relu, (next(iter(spoiled.graph.nodes)),))
    with pytest.raises(ConfigError, match="was changed after it was converted"):
        fxquant.compare(model, spoiled, batches())


class Counter(nn.Module):
    """Counts its calls, and computes with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_state_is_the_same_in_every_walk_and_is_put_back() -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    quantized = fxquant.quantize(model, batches(), backend="reference")
    before = [each.state_dict()["calls"].clone() for each in (model, quantized)]
    made = fxquant.compare(model, quantized, batches())
    assert made.output.sqnr > 30
    assert all(row.own is None or row.own.sqnr > 30 for row in made)
    after = [each.state_dict()["calls"] for each in (model, quantized)]
    assert all(map(torch.equal, before, after))


def test_what_cannot_be_compared_is_refused(model: nn.Module) -> None:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    with pytest.raises(ConfigError, match="was not made from this Sequential"):
        fxquant.compare(nn.Sequential(nn.Conv2d(3, 8, 3)), quantized, batches())
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        fxquant.compare(quantized, model, batches())
    with pytest.raises(ConfigError, match="not converted yet"):
        fxquant.compare(model, fxquant.prepare(model), batches())
    with pytest.raises(ConfigError, match="got a str as the float model"):
        fxquant.compare("model", quantized, batches())  # type: ignore[arg-type] # the error's point
    with pytest.raises(ConfigError, match="not a function"):
        fxquant.compare(model, quantized, lambda m: m(batches()[0]))
    with pytest.raises(CalibrationError, match="0 batches"):
        fxquant.compare(model, quantized, [])
    with pytest.raises(CalibrationError, match=r"failed on batch 1, float32\[2, 5, 8, 8\]"):
        fxquant.compare(model, quantized, [batches()[0], torch.zeros(2, 5, 8, 8)])
    with pytest.raises(CalibrationError, match="batch 0"):
        fxquant.compare(model, quantized, [(batches()[0], torch.zeros(8))])


def test_max_batches_and_transform(model: nn.Module) -> None:
    quantized = fxquant.quantize(model, batches(), backend="reference")
    labelled = ((x, torch.zeros(8)) for x in batches())
    made = fxquant.compare(model, quantized, labelled, transform=lambda b: b[0], max_batches=2)
    assert made.batches == 2
    assert next(labelled)  # the third was not drawn


def test_a_model_in_training_is_compared_as_it_rounds() -> None:
    torch.manual_seed(0)
    model = trained(Small()).train()
    prepared = fxquant.prepare(model, mode="qat", example_inputs=batches()[0]).train()
    prepared(batches()[0])  # ranges
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    made = fxquant.compare(model, prepared, batches())
    assert made.note == "" and 25 < made.output.sqnr < 60
    assert made.explained == pytest.approx(1.0, abs=0.05)
    assert all(row.own is not None and row.weight_sqnr is None for row in made)
    # It is left as it was: in training, with the statistics and ranges that it had.
    assert prepared.training
    after = prepared.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_training_is_no_rounding_and_the_summary_says_so() -> None:
    torch.manual_seed(0)
    model = trained(Small())
    prepared = fxquant.prepare(model, mode="qat", example_inputs=batches()[0]).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    converted = fxquant.convert(prepared, backend="reference")
    told = fxquant.compare(model, prepared, batches())
    assert "load_state_dict(prepared.state_dict(), strict=False)" in str(told)
    real = copy.deepcopy(model)
    real.load_state_dict(prepared.state_dict(), strict=False)
    fair = fxquant.compare(real, prepared, batches())
    assert fair.note == "" and fair.output.sqnr > told.output.sqnr
    # What was trained is what is deployed.
    assert fxquant.compare(real, converted, batches()).output.sqnr == pytest.approx(
        fair.output.sqnr, abs=0.5
    )


def test_a_model_that_computes_in_float_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="not converted yet"):
        fxquant.compare(model, fxquant.prepare(model), batches())
    prepared = fxquant.prepare(model, mode="qat", example_inputs=batches()[0])
    fxquant.schedule.set_fake_quant(prepared, False)
    with pytest.raises(ConfigError, match="computes in float"):
        fxquant.compare(model, prepared, batches())
