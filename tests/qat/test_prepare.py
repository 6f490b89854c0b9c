"""Prepared for training: names, modes, statistics, and what is deployed in the end."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
import fxquant.schedule
from fxquant.errors import CalibrationError
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.numerics.fake_weights import FakeQuantizeWeight
from tests.qat.models import CASES, Dense, Residual, built, pictures, rows, switch, tokens, trained

BATCH_NORMED = ("residual", "upward", "dense", "twice")


def prepared(name: str) -> tuple[nn.Module, Any]:
    """A network in training mode, and it prepared."""
    model = built(name)
    return model, fxquant.prepare(model, mode="qat", example_inputs=(CASES[name][1](),))


@pytest.mark.parametrize("name", CASES)
def test_parameters_keep_names_and_order_and_are_apart_from_what_is_added(name: str) -> None:
    model, made = prepared(name)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    added = [key for key in made.state_dict() if key not in model.state_dict()]
    assert added and all(key.startswith("fake_quant.") for key in added)
    loaded = made.load_state_dict(model.state_dict(), strict=False)
    assert loaded.missing_keys == added and not loaded.unexpected_keys


@pytest.mark.parametrize("name", CASES)
def test_with_fake_quant_off_it_is_the_float_model(name: str) -> None:
    model, made = prepared(name)
    switch(made, False)
    x = CASES[name][1]()
    with torch.no_grad():
        # The attention is computed by another kernel than that of the fused float layer.
        torch.testing.assert_close(made.eval()(x), model.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BATCH_NORMED)
def test_ten_steps_with_fake_quant_off_leave_the_statistics_of_float_training(name: str) -> None:
    model, made = prepared(name)
    switch(made, False)
    for each in (model, made):
        trained(each, CASES[name][1], steps=10)
    buffers = dict(made.named_buffers())
    for key, value in model.named_buffers():
        torch.testing.assert_close(buffers[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.parametrize("name", CASES)
def test_the_int8_model_is_the_fake_quantized_one(name: str, backend: str) -> None:
    _, made = prepared(name)
    trained(made, CASES[name][1])
    quantized = fxquant.convert(made, backend=backend)
    assert made.training  # conversion changes nothing
    x = CASES[name][1](50)
    with torch.no_grad():
        wanted, found = made.eval()(x), quantized(x)
    # A few float32 roundings of sums; where one decides a tie, a code or two of the last layers.
    limit = 0.02 * float(wanted.abs().max())
    assert float((wanted - found).abs().max()) <= limit
    assert float((wanted - found).abs().median()) <= 1e-5
    layers = [op for op in fxquant.report(quantized).ops if op.macs and op.weights]
    assert len(layers) >= 2 and all(op.int8 for op in layers)


def test_a_product_with_a_number_is_deployed_on_the_codes_of_what_it_scales() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.b(F.relu(self.a(x)) * 0.3)
            return made

    made: Any = fxquant.prepare(Halved(), mode="qat", example_inputs=(pictures(),))
    assert [n for n, _ in made.fake_quant.named_children() if n == "mul"] == []
    trained(made, pictures)
    for backend in ("reference", "x86"):
        quantized = fxquant.convert(made, backend=backend)
        assert fxquant.verify(made, quantized, [pictures(50)]).ok


def test_modules_stay_modules_and_modes_are_as_found() -> None:
    model = built("dense")
    model.get_submodule("bn").eval()
    made: Any = fxquant.prepare(model, mode="qat", example_inputs=(rows(),))
    assert made.training and not made.bn.training
    assert (type(made.bn), type(made.drop), made.drop.p) == (nn.BatchNorm1d, nn.Dropout, 0.25)
    assert isinstance(made.first, nn.Linear)
    made = fxquant.prepare(model.eval(), mode="qat", example_inputs=(rows(),))
    assert not made.training and not made.drop.training
    made.train()
    assert made.drop.training and made.bn.training


def test_dropout_of_both_spellings_follows_the_mode() -> None:
    _, made = prepared("dense")
    x = rows()
    switch(made, False)
    with torch.no_grad():
        assert not torch.equal(made.train()(x), made(x))
        assert torch.equal(made.eval()(x), made(x))


def test_eps_and_momentum_are_those_of_the_model() -> None:
    _, made = prepared("residual")
    assert (made.bn1.eps, made.bn1.momentum) == (1e-3, 0.2)


def test_training_resumes_from_a_state_dict() -> None:
    model, one = prepared("residual")
    trained(one, pictures, steps=2)
    state = copy.deepcopy(one.state_dict())
    two = fxquant.prepare(model, mode="qat", example_inputs=(pictures(),))
    two.load_state_dict(state)
    for each in (one, two):
        trained(each, pictures, steps=2)
    for key, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], value), key


def test_a_copy_is_the_same_model_and_trains_on_its_own() -> None:
    _, made = prepared("residual")
    twin = copy.deepcopy(made)
    assert list(twin.state_dict()) == list(made.state_dict())
    before = {key: value.clone() for key, value in made.state_dict().items()}
    trained(twin, pictures)
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())


def test_a_pickle_is_the_same_model_and_trains_on() -> None:
    _, made = prepared("residual")
    trained(made, pictures)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    twin: Any = torch.load(file, weights_only=False)
    fxquant.Schedule(twin)
    assert list(twin.state_dict()) == list(made.state_dict())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in made.named_parameters()]
    for each in (made, twin):
        trained(each, pictures)
    for key, value in made.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    converted = fxquant.convert(twin, backend="reference")
    assert fxquant.verify(twin, converted, [pictures(50)]).ok


def test_frozen_layers_stay_as_they_are() -> None:
    model = built("residual")
    model.get_submodule("conv1").requires_grad_(False)
    made = fxquant.prepare(model, mode="qat", example_inputs=(pictures(),))
    trained(made, pictures)
    own, theirs = dict(made.named_parameters()), dict(model.named_parameters())
    assert torch.equal(own["conv1.weight"], theirs["conv1.weight"])
    assert not torch.equal(own["conv2.weight"], theirs["conv2.weight"])


def test_before_any_training_values_have_no_range_and_pass() -> None:
    model, made = prepared("residual")
    for fake in made.modules():
        if isinstance(fake, FakeQuantizeWeight):
            fake.switch(quantizing=False)
    with torch.no_grad():
        wanted = model.eval()(pictures())
        torch.testing.assert_close(made.eval()(pictures()), wanted, rtol=0, atol=1e-6)


def test_evaluation_changes_no_range() -> None:
    _, made = prepared("residual")
    trained(made, pictures)
    made.eval()
    with torch.no_grad():
        made(pictures(1))
        before = {key: value.clone() for key, value in made.state_dict().items()}
        made(100.0 * pictures(2))
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    _, made = prepared("residual")
    with torch.autocast("cpu", dtype):
        loss = made(pictures()).float().square().mean()
    loss.backward()
    assert made.conv1.weight.grad is not None
    fakes = [m for m in made.modules() if isinstance(m, FakeQuantizer)]
    assert all(fake.scale.dtype == torch.float32 for fake in fakes)
    assert fxquant.convert(made, backend="reference")(pictures()).isfinite().all()


def test_the_user_model_is_never_changed() -> None:
    model = built("dense")
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    made = fxquant.prepare(model, mode="qat", example_inputs=(rows(),))
    trained(made, rows)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == [type(m) for m in Dense().modules()]


def test_quantize_trains_with_the_function_it_is_given() -> None:
    model = built("residual").eval()
    quantized = fxquant.quantize(
        model, mode="qat", example_inputs=(pictures(),), train=lambda m: trained(m, pictures)
    )
    assert fxquant.report(quantized).coverage == 1.0


def test_calibration_gives_the_ranges_to_start_from() -> None:
    model = built("residual")
    made = fxquant.prepare(model, mode="qat", example_inputs=(pictures(),))
    fxquant.calibrate(made, [pictures(n) for n in range(4)])
    assert made.training
    fakes = [m for m in made.modules() if isinstance(m, FakeQuantize)]
    assert all(fake.seen and fake.quantizing for fake in fakes)
    assert fxquant.convert(made, backend="reference")(pictures()).isfinite().all()


class Branching(nn.Module):
    """Computes a loss in training mode, as some detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x.sum() if self.training else F.relu(x)


def test_a_branch_on_training_is_refused_with_its_place() -> None:
    with pytest.raises(fxquant.errors.TraceError, match=r"test_prepare.py:\d+.*self.training"):
        fxquant.prepare(Branching(), mode="qat", example_inputs=(pictures(),))


def test_a_parametrized_weight_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)))
    with pytest.raises(fxquant.errors.TraceError, match="remove_parametrizations"):
        fxquant.prepare(model, mode="qat", example_inputs=(rows(),))


def test_converting_an_untrained_model_is_refused() -> None:
    _, made = prepared("residual")
    with pytest.raises(fxquant.errors.CalibrationError, match="train the prepared model"):
        fxquant.convert(made)
    made.eval()(pictures())  # evaluation observes nothing
    with pytest.raises(fxquant.errors.CalibrationError, match="train the prepared model"):
        fxquant.convert(made)


def test_a_model_that_diverged_is_refused_by_name() -> None:
    _, made = prepared("residual")
    trained(made, pictures, steps=1)
    with torch.no_grad():
        made.conv2.weight[0, 0] = float("nan")
    with pytest.raises(fxquant.errors.CalibrationError, match=r"conv2\.weight holds NaN"):
        fxquant.convert(made)


def test_batches_that_are_not_finite_leave_the_ranges() -> None:
    _, made = prepared("residual")
    trained(made, pictures, steps=2)
    before = made.fake_quant.x.scale.clone()
    with torch.no_grad():
        made.fake_quant.x(torch.full((2, 3), float("inf")))
    assert torch.equal(made.fake_quant.x.scale, before)


def test_an_override_that_splits_a_unit_leaves_the_norm_beside_it() -> None:
    model = built("residual")
    made = fxquant.prepare(model, mode="qat", example_inputs=(pictures(),), overrides={"bn1": None})
    trained(made, pictures)
    quantized = fxquant.convert(made, backend="reference")
    x = pictures(50)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), made.eval()(x), rtol=0, atol=2e-3)
    assert any(op.path == "bn1" and not op.int8 for op in fxquant.report(quantized).ops)


@pytest.mark.parametrize("name", ["residual", "dense", "tied"])
def test_dynamic_layers_read_rows_that_are_rounded_as_at_run_time(name: str) -> None:
    model, data = built(name), CASES[name][1]
    kinds = [nn.Linear, nn.Conv2d] if name == "residual" else [nn.Linear]
    overrides: dict[Any, Any] = dict.fromkeys(kinds, "dynamic")
    made = fxquant.prepare(model, mode="qat", example_inputs=(data(),), overrides=overrides)
    trained(made, data)
    for backend in ("reference", "x86"):
        quantized = fxquant.convert(made, backend=backend)
        ops = fxquant.report(quantized).ops
        layers = [op for op in ops if op.op.startswith(("linear", "conv2d"))]
        assert len(layers) >= 2 and all(op.int8 for op in layers)
        with torch.no_grad():
            x = data(9)
            found, trained_as = quantized(x), made.eval()(x)
        # Sums in another order decide a tie now and then: a code of a row more or less.
        assert float((found - trained_as).abs().max()) <= 0.02 * float(trained_as.abs().max())
        assert float((found - trained_as).abs().median()) <= 1e-5
        made.train()


def test_a_learned_scale_below_0_counts_by_its_size_and_trains_on() -> None:
    spec = fxquant.QSpec("int8", symmetric=True, observer="minmax", learned=True)
    config = fxquant.QConfig(fxquant.QSpec(learned=True), spec)
    made: Any = fxquant.prepare(
        built("residual"), mode="qat", example_inputs=(pictures(),), qconfig=config
    )
    trained(made, pictures, steps=1)
    scales = [made.fake_quant.x.scale, made.fake_quant.conv1_weight.scale]
    with torch.no_grad():
        wanted = made.eval()(pictures())
        for scale in scales:
            scale.neg_()
        assert torch.equal(made(pictures()), wanted)
    quantized = fxquant.convert(made, backend="reference")
    assert fxquant.verify(made, quantized, [pictures(50)]).ok
    before = [scale.detach().clone() for scale in scales]
    trained(made.train(), pictures, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(scales, before, strict=True))


class Mirror(nn.Module):
    """The weight of a layer is read as a tensor too."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.inside(x)), self.inside.weight.t())


def test_a_weight_that_is_also_read_as_a_tensor_is_read_as_it_was_trained() -> None:
    made = fxquant.prepare(Mirror().train(), mode="qat", example_inputs=(rows(),))
    trained(made, rows)
    for backend in ("reference", "x86"):
        quantized = fxquant.convert(made, backend=backend)
        assert fxquant.verify(made, quantized, [rows(9)]).ok
        with torch.no_grad():
            torch.testing.assert_close(quantized(rows(9)), made.eval()(rows(9)), rtol=0, atol=1e-5)
        made.train()


class Bags(nn.Module):
    """Means of rows of a table."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(20, 16, mode=mode), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(torch.relu(self.bag(x)))
        return made


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_tables_of_bags_are_rounded_as_they_are_deployed(mode: str) -> None:
    made: Any = fxquant.prepare(Bags(mode).train(), mode="qat", example_inputs=(tokens(),))
    assert isinstance(made.fake_quant.bag_weight, FakeQuantizeWeight)
    trained(made, tokens, rate=0.1)
    quantized = fxquant.convert(made, backend="reference")
    assert fxquant.verify(made, quantized, [tokens(9)]).ok
    table = next(op for op in fxquant.report(quantized).ops if op.path == "bag")
    assert table.int8


def test_values_that_nobody_watched_are_told() -> None:
    _, made = prepared("residual")
    fxquant.schedule.set_observers(made, False, "conv2")
    trained(made, pictures)
    with pytest.warns(fxquant.errors.CalibrationWarning, match="1 of 4 values never were watched"):
        quantized = fxquant.convert(made, backend="reference")
    assert not next(op for op in fxquant.report(quantized).ops if op.path == "conv2").int8


def test_empty_batches_are_no_training() -> None:
    made = fxquant.prepare(nn.Sequential(nn.Linear(12, 4), nn.ReLU()).train(), mode="qat")
    made(torch.empty(0, 12))
    with pytest.raises(CalibrationError, match="train the prepared model"):
        fxquant.convert(made)
    with pytest.raises(CalibrationError, match="are the batches empty"):
        fxquant.calibrate(made, [torch.empty(0, 12)])


def test_calibration_data_that_is_not_finite_is_refused() -> None:
    _, made = prepared("residual")
    with pytest.raises(CalibrationError, match=r"768 NaN .* at 'x' in batch 1"):
        fxquant.calibrate(made, [pictures(), torch.full((4, 3, 8, 8), float("nan"))])


def test_an_example_that_the_model_fails_on_is_told() -> None:
    example = torch.full((2, 3), 50)
    with pytest.raises(fxquant.errors.ConfigError, match=r"its example inputs, .*IndexError"):
        fxquant.prepare(built("tied"), mode="qat", example_inputs=(example,))


def test_wrong_arguments_are_refused_before_any_work() -> None:
    with pytest.raises(fxquant.errors.ConfigError, match="pass train="):
        fxquant.quantize(Residual(), mode="qat")
    with pytest.raises(fxquant.errors.ConfigError, match="for mode 'qat' only"):
        fxquant.quantize(Residual(), [pictures()], train=lambda m: m)
