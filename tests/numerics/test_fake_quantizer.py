"""The modules that quantize during training: ranges, switches, and what they keep."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import QParamError
from fxquant.numerics.affine import fake_quantize
from fxquant.numerics.fake_quant import fake_quantize_trained
from fxquant.numerics.fake_quantizer import AVERAGING, FakeQuantize
from fxquant.numerics.fake_weights import FakeQuantizeWeight, Rounding, fold_factor
from fxquant.numerics.observers import make_observer
from fxquant.numerics.qparams import choose_qparams
from fxquant.spec import QSpec

PER_TENSOR = QSpec("int8", symmetric=True, observer="minmax")
PER_CHANNEL = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")


def fed(fake: FakeQuantize, *batches: Tensor) -> FakeQuantize:
    for batch in batches:
        fake(batch)
    return fake


def test_a_first_batch_sets_the_range_and_later_ones_move_it() -> None:
    fake = fed(FakeQuantize(QSpec(), "x"), torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 13.0]))
    assert (float(fake.low), float(fake.high)) == pytest.approx(
        (-1.0 + AVERAGING, 3.0 + 10 * AVERAGING)
    )
    wanted = choose_qparams(fake.low, fake.high, QSpec())
    assert float(fake.scale) == wanted.scale_value
    assert int(fake.zero_point) == wanted.zero_point_value
    assert int(fake.batches) == 2 and fake.seen


def test_until_a_range_is_known_values_pass() -> None:
    fake = FakeQuantize(QSpec(), "x").eval()
    x = torch.randn(50)
    assert fake(x) is x
    fed(fake.train(), x)
    assert not torch.equal(fake.eval()(x), x)
    fresh = FakeQuantize(QSpec(), "x").eval()
    fresh.load_state_dict(fake.state_dict())
    assert torch.equal(fresh(x), fake(x))
    fake.load_state_dict(FakeQuantize(QSpec(), "x").state_dict())
    assert fake(x) is x


def test_minmax_covers_everything() -> None:
    spec = QSpec(observer="minmax")
    fake = fed(FakeQuantize(spec, "x"), torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 13.0]))
    assert (float(fake.low), float(fake.high)) == (-1.0, 13.0)


@pytest.mark.parametrize("spec", [QSpec(), QSpec(bits=4), QSpec("int8", symmetric=True)])
def test_it_computes_what_its_qparams_say(spec: QSpec) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    fake = fed(FakeQuantize(spec, "x"), x).eval()
    assert torch.equal(fake(3 * x), fake_quantize(3 * x, fake.qparams()))


def test_evaluation_frozen_observers_and_bad_batches_move_nothing() -> None:
    fake = fed(FakeQuantize(QSpec(), "x"), torch.tensor([0.0, 1.0]))
    before = copy.deepcopy(fake.state_dict())
    fake.eval()(torch.tensor([9.0]))
    fake.train()
    for bad in (math.nan, math.inf, -math.inf):
        fake(torch.tensor([5.0, bad]))
    fake(torch.empty(0))
    fake.switch(observing=False)
    fake(torch.tensor([9.0]))
    fake.switch(observing=True)
    for key, value in before.items():
        assert torch.equal(fake.state_dict()[key], value), key


def test_switched_off_it_gives_the_tensor_itself() -> None:
    fake = FakeQuantize(QSpec(), "x")
    fake.switch(quantizing=False)
    x = torch.randn(3)
    assert fake(x) is x and fake.seen
    assert "observing" in repr(fake) and "quantizing" not in repr(fake)


def test_what_is_no_float_tensor_passes() -> None:
    fake = FakeQuantize(QSpec(), "x")
    assert fake(3) == 3 and not fake.floating
    fake = FakeQuantize(QSpec(), "x")
    x = torch.arange(3)
    assert fake(x) is x and not fake.floating and not fake.seen


def test_a_learned_step_starts_at_the_first_batch_and_then_is_left_to_training() -> None:
    spec = QSpec(learned=True)
    fake = FakeQuantize(spec, "x")
    fake(torch.tensor([0.0, 2.55]))
    assert isinstance(fake.scale, nn.Parameter) and isinstance(fake.zero_point, nn.Parameter)
    assert float(fake.scale.detach()) == pytest.approx(0.01)
    fake(torch.tensor([0.0, 100.0])).sum().backward()
    assert float(fake.scale.detach()) == pytest.approx(0.01)
    assert fake.scale.grad is not None
    symmetric = FakeQuantize(QSpec("int8", symmetric=True, learned=True), "x")
    assert not isinstance(symmetric.zero_point, nn.Parameter)


def test_the_gradient_of_a_learned_step_is_divided_by_its_size() -> None:
    """By sqrt(N * quant_max), N being the values of one sample, or of one channel of a weight."""
    fake = FakeQuantize(QSpec(bits=4, learned=True), "x")
    x = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))
    fed(fake, x)(2 * x).sum().backward()
    scale, zero = (p.detach().clone().requires_grad_() for p in (fake.scale, fake.zero_point))
    fake_quantize_trained(2 * x, scale, zero, 0, 15).sum().backward()
    assert fake.scale.grad is not None and scale.grad is not None
    torch.testing.assert_close(fake.scale.grad, scale.grad / math.sqrt(15 * 15))
    spec = QSpec("int8", symmetric=True, granularity="channel", observer="minmax", learned=True)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    other = FakeQuantizeWeight(spec, "fc", (4, 6), 0)
    other(weight)
    other(3 * weight).sum().backward()
    scale = other.scale.detach().clone().requires_grad_()
    step = scale.view(4, 1)
    fake_quantize_trained(3 * weight, step, torch.zeros(4, 1), -127, 127).sum().backward()
    assert other.scale.grad is not None and scale.grad is not None
    torch.testing.assert_close(other.scale.grad, scale.grad / math.sqrt(6 * 127))


def test_a_step_that_training_destroyed_is_named_when_it_is_read() -> None:
    fake = fed(FakeQuantize(QSpec(learned=True), "x"), torch.tensor([0.0, 1.0]))
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            fake.scale.fill_(bad)
        with pytest.raises(QParamError):
            fake.qparams()


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moving_average"])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_starts_from_what_calibration_found(observer: str, bits: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seen = make_observer(QSpec(observer=observer), "x")  # type: ignore[arg-type]  # one of them
    seen(x)
    fake = FakeQuantize(QSpec(bits=bits), "x")
    fake.start(seen.qparams())
    found = seen.qparams()
    low, high = (end.float() for end in found.representable())
    assert fake.seen and torch.equal(fake.low, low) and torch.equal(fake.high, high)
    if bits == 8:
        assert torch.equal(fake.scale, found.scale)
        assert torch.equal(fake.zero_point, found.zero_point.float())
    else:
        assert float(fake.scale) == pytest.approx(float(high - low) / 15)
    fake(x)
    assert int(fake.batches) == 2 and float(fake.high) != float(high)


def test_state_dicts_copies_and_pickles_keep_range_and_switches() -> None:
    one = fed(FakeQuantize(QSpec(), "x"), torch.tensor([-1.0, 2.0]))
    one.switch(observing=False)
    two = FakeQuantize(QSpec(), "x")
    two.load_state_dict(one.state_dict())
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    for twin in (two, copy.deepcopy(one), torch.load(file, weights_only=False)):
        assert torch.equal(twin.scale, one.scale) and not twin.observing and twin.quantizing


def test_a_weight_keeps_one_scale_for_each_channel_and_follows_it() -> None:
    weight = torch.tensor([[1.27, -0.5], [0.0, 0.0], [-2.54, 1.0]])
    fake = FakeQuantizeWeight(PER_CHANNEL, "fc", (3, 2), 0)
    made = fake.eval()(weight)
    torch.testing.assert_close(fake.scale, torch.tensor([0.01, 1.0, 0.02]))
    codes, scale = fake.codes(weight)
    assert torch.equal(made, codes * scale.view(-1, 1)) and int(codes.abs().max()) == 127
    fake(2 * weight)
    torch.testing.assert_close(fake.scale, torch.tensor([0.02, 1.0, 0.04]))
    fake.switch(observing=False)
    fake(4 * weight)
    torch.testing.assert_close(fake.scale, torch.tensor([0.02, 1.0, 0.04]))
    assert int(fake.codes(4 * weight)[0].max()) == 127


def test_a_weight_that_is_not_finite_leaves_its_scale() -> None:
    fake = FakeQuantizeWeight(PER_TENSOR, "fc", (2, 2), 0)
    fake(torch.ones(2, 2))
    before = fake.scale.clone()
    fake(torch.full((2, 2), math.nan))
    assert torch.equal(fake.scale, before)


@pytest.mark.parametrize("spec", [PER_TENSOR, PER_CHANNEL])
def test_the_rounded_weight_is_that_of_the_folded_one(spec: QSpec) -> None:
    """``fq(w) * f`` is what quantizing ``w * f`` gives, for every gain but 0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.5, 1.0, 0.1]))
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 4.0]))  # type: ignore[union-attr]
    factor = fold_factor(norm.weight, norm.running_var, norm.eps)  # type: ignore[arg-type]
    fake = FakeQuantizeWeight(spec, "conv", tuple(weight.shape), 0)
    made = fake(weight, None if spec.granularity == "channel" else factor)
    assert torch.equal(made, Rounding(fake, None if fake.axis == 0 else norm)(weight))
    wide = factor.view(-1, 1, 1, 1)
    folded = weight * wide
    most = folded.abs().amax((1, 2, 3), keepdim=True)
    step = (most if fake.axis == 0 else most.max()) / spec.quant_max
    torch.testing.assert_close(made * wide, (folded / step).round() * step, rtol=1e-5, atol=1e-6)


def test_a_channel_that_is_multiplied_by_nothing_keeps_steps_of_its_own() -> None:
    weight = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    fake = FakeQuantizeWeight(PER_TENSOR, "fc", (2, 2), 0)
    made = fake(weight, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(made, weight, rtol=0.01, atol=0)


def test_a_grouped_transposed_weight_is_spread_over_its_groups() -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    fake = FakeQuantizeWeight(PER_TENSOR, "up", tuple(layer.weight.shape), 1, groups=2)
    spread = fake.spread(torch.arange(1.0, 7.0), layer.weight)
    assert spread.shape == (4, 3, 1, 1)
    assert spread[:2, :, 0, 0].tolist() == [[1, 2, 3]] * 2
    assert spread[2:, :, 0, 0].tolist() == [[4, 5, 6]] * 2


def test_a_learned_step_of_a_weight_is_set_once_also_after_loading() -> None:
    spec = QSpec("int8", symmetric=True, observer="minmax", learned=True)
    fake = FakeQuantizeWeight(spec, "fc", (2, 2), 0)
    fake(torch.ones(2, 2)).sum().backward()
    step = fake.scale.detach().clone()
    fake(5 * torch.ones(2, 2))
    assert torch.equal(fake.scale.detach(), step)
    other = FakeQuantizeWeight(spec, "fc", (2, 2), 0)
    other.load_state_dict(fake.state_dict())
    other(5 * torch.ones(2, 2))
    assert torch.equal(other.scale.detach(), step)
    fresh = FakeQuantizeWeight(spec, "fc", (2, 2), 0)
    other.load_state_dict(fresh.state_dict())
    other(5 * torch.ones(2, 2))
    assert float(other.scale.detach()) == pytest.approx(5 / 127)


@pytest.mark.parametrize("learned", [False, True])
def test_fake_quants_move_to_what_they_watch(learned: bool) -> None:
    """A model may be spread over several devices."""
    there = torch.device("meta")
    spec = QSpec(learned=learned)
    fake = FakeQuantize(spec, "a")
    fake(torch.ones(3, device=there))
    assert {t.device for t in (*fake.parameters(), *fake.buffers())} == {there}
    weight = FakeQuantizeWeight(PER_CHANNEL, "b", (2, 3), 0)
    assert weight(torch.ones(2, 3, device=there)).device == there
    assert weight.scale.device == there
