"""What every observer promises: I14, the faults of calibration data, and its state."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError
from fxquant.numerics.affine import choose_qparams
from fxquant.numerics.observers import (
    MinMaxObserver,
    MovingAverageObserver,
    NonFiniteError,
    Observer,
    make_observer,
    summaries,
)
from fxquant.spec import QSpec

KINDS = ("histogram", "minmax", "moving_average")
SPECS = {
    "histogram": QSpec(observer="histogram"),
    "minmax": QSpec(observer="minmax"),
    "moving_average": QSpec(observer="moving_average"),
}
CHANNEL = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")

NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


def observed(kind: str, *tensors: Tensor) -> Observer:
    observer = make_observer(SPECS[kind], "layer1.conv")
    for x in tensors:
        observer(x)
    return observer


def state(observer: Observer) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in observer.state_dict().items()}


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_min_max_ignores_order_and_batch_split(batches: list[list[float]]) -> None:
    together = observed("minmax", torch.tensor([v for batch in batches for v in batch]))
    apart = observed("minmax", *(torch.tensor(batch) for batch in batches))
    back = observed("minmax", *(torch.tensor(batch[::-1]) for batch in batches[::-1]))
    assert apart.qparams().same_as(together.qparams())
    assert apart.qparams().same_as(back.qparams())


@given(st.lists(NUMBERS, min_size=2, max_size=6))
def test_more_data_never_shrinks_the_range_of_min_max(batches: list[list[float]]) -> None:
    observer = make_observer(SPECS["minmax"], "x")
    low, high = math.inf, -math.inf
    for batch in batches:
        observer(torch.tensor(batch))
        seen = observer.summary()
        assert seen.low <= low and seen.high >= high
        low, high = seen.low, seen.high
    assert (low, high) == (min(map(min, batches)), max(map(max, batches)))


def test_moving_average_follows_its_formula_and_depends_on_order() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 9.0]), torch.tensor([0.0, 4.0])]
    low, high = -1.0, 2.0
    for batch in batches[1:]:
        low += 0.01 * (float(batch.min()) - low)
        high += 0.01 * (float(batch.max()) - high)
    got = observed("moving_average", *batches).qparams()
    expected = choose_qparams(torch.tensor(low), torch.tensor(high), QSpec())
    # The average is kept in float32: two updates, two roundings each.
    assert got.scale_value == pytest.approx(expected.scale_value, rel=4 * 2.0**-24)
    back = observed("moving_average", *batches[::-1]).qparams()
    assert back.scale_value > got.scale_value * 1.2


def test_moving_average_counts_what_it_clips() -> None:
    observer = observed("moving_average", torch.tensor([0.0, 1.0]), torch.tensor([0.5, 50.0]))
    assert observer.summary().clipped == 1 / 4
    assert observed("moving_average", torch.tensor([5.0, 6.0])).summary().clipped == 0.0


def test_moving_average_survives_the_width_of_float32() -> None:
    observer = observed("moving_average", torch.tensor([3e38]), torch.tensor([-3e38]))
    assert math.isfinite(observer.qparams().scale_value)


@pytest.mark.parametrize("averaging", [0.0, -0.5, 1.5, math.nan])
def test_a_useless_average_is_refused(averaging: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        MovingAverageObserver(SPECS["moving_average"], "x", averaging=averaging)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensor_goes_through_untouched_and_is_not_kept(kind: str) -> None:
    observer = make_observer(SPECS[kind], "x")
    x = torch.randn(100, requires_grad=True)
    before = x.detach().clone()
    assert observer(x) is x
    assert torch.equal(x.detach(), before)
    assert all(not buffer.requires_grad for buffer in observer.buffers())
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_sees_nothing(kind: str) -> None:
    observer = make_observer(SPECS[kind], "x")
    observer.enabled = False
    observer(torch.randn(10))
    assert not observer.seen and observer.summary().batches == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "thing",
    [torch.arange(5), torch.tensor([True]), 3, None, (1, 2), torch.zeros(2, dtype=torch.cfloat)],
)
def test_what_is_not_floating_passes_and_is_remembered(kind: str, thing: object) -> None:
    observer = make_observer(SPECS[kind], "x")
    assert observer(thing) is thing
    assert (observer.floating, observer.seen) == (False, False)


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_the_error_says_where_and_what_to_do(kind: str) -> None:
    observer = make_observer(SPECS[kind], "layer1.conv")
    with pytest.raises(CalibrationError, match=r"layer1\.conv: .*no values.*leave it in float"):
        observer.qparams()
    seen = observer.summary()
    assert (seen.path, seen.batches, seen.elements, seen.shape) == ("layer1.conv", 0, 0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_tensors_count_as_batches_only(kind: str) -> None:
    observer = observed(kind, torch.zeros(0, 3))
    assert not observer.seen and observer.summary().batches == 1
    with pytest.raises(CalibrationError, match="1 empty tensors"):
        observer.qparams()
    observer(torch.tensor([[1.0, 2.0]]))
    observer(torch.zeros(0))
    seen = observer.summary()
    assert (seen.batches, seen.elements, seen.shape) == (3, 2, (1, 2))
    assert (seen.low, seen.high) == (1.0, 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "nan", "inf"),
    [
        ([1.0, math.nan, 2.0], 1, 0),
        ([math.inf, 1.0, -math.inf], 0, 2),
        ([math.nan, math.inf, math.nan], 2, 1),
    ],
)
def test_nan_and_infinity_are_counted_and_named(
    kind: str, values: list[float], nan: int, inf: int
) -> None:
    observer = observed(kind, torch.tensor([0.0, 1.0]))
    before = state(observer)
    with pytest.raises(NonFiniteError) as caught:
        observer(torch.tensor(values))
    error = caught.value
    assert (error.path, error.nan, error.inf) == ("layer1.conv", nan, inf)
    assert f"layer1.conv: {nan} NaN and {inf} infinite" in str(error)
    assert isinstance(error, CalibrationError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.nan, again.inf, str(again)) == (nan, inf, str(error))
    assert state(observer) == before, "a refused batch must leave no trace"


def test_one_nan_among_many_chunks_is_found() -> None:
    x = torch.zeros(500_000)
    x[400_001] = math.nan
    with pytest.raises(NonFiniteError):
        make_observer(QSpec(), "x")(x)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_past_float32_is_an_infinity(kind: str) -> None:
    with pytest.raises(NonFiniteError, match="1 infinite"):
        observed(kind, torch.tensor([1.0, 1e300], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_observed_as_float32(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    observer = observed(kind, x)
    assert observer.qparams().same_as(observed(kind, x.to(torch.float32)).qparams())
    assert observer.summary().dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS)
def test_constants_and_zeros_get_valid_qparams(kind: str) -> None:
    zeros = observed(kind, torch.zeros(10)).qparams()
    assert (zeros.scale_value, zeros.zero_point_value) == (1.0, 0)
    fives = observed(kind, torch.full((10,), -5.0)).qparams()
    assert fives.scale_value == pytest.approx(5 / 255, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_does_not_matter(kind: str) -> None:
    x = torch.randn(2, 6, 5, 7)
    expected = observed(kind, x).qparams()
    wide = torch.zeros(2, 6, 5, 14)
    wide[..., 1::2] = x
    for view in (
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 3).contiguous().transpose(0, 3),
        wide[..., 1::2],
        x.unsqueeze(0).expand(3, -1, -1, -1, -1),
    ):
        assert observed(kind, view).qparams().same_as(expected)
    assert observed(kind, torch.tensor(0.5)).summary().shape == ()


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_deepcopy_pickle_and_state_dict(kind: str) -> None:
    observer = observed(kind, torch.randn(100), torch.randn(100) * 3)
    fresh = make_observer(SPECS[kind], "layer1.conv")
    fresh.load_state_dict(observer.state_dict())
    for again in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), fresh):
        assert again.qparams().same_as(observer.qparams())
        again(torch.randn(100) * 10)
        assert not again.qparams().same_as(observer.qparams()), "the copy shares its buffers"


@pytest.mark.parametrize("kind", KINDS)
def test_works_inside_inference_mode_and_after_it(kind: str) -> None:
    observer = make_observer(SPECS[kind], "x")
    with torch.inference_mode():
        observer(torch.randn(10))
    observer(torch.randn(10))
    assert observer.summary().batches == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_says_what_was_seen(kind: str) -> None:
    seen = observed(kind, torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.0, 1.0]])).summary()
    assert (seen.path, seen.kind, seen.batches, seen.elements) == ("layer1.conv", kind, 2, 4)
    assert (seen.low, seen.high, seen.shape, seen.dtype) == (-1.0, 2.0, (1, 2), "float32")
    # Every rounding is below a step (3/255), a moving average's step to [0, 1] below 1 %.
    assert seen.range_low == pytest.approx(-1.0, abs=0.03)
    assert seen.range_high == pytest.approx(2.0, abs=0.03)


def test_channels_are_observed_one_by_one() -> None:
    observer = MinMaxObserver(CHANNEL, "x", axis=1)
    a, b = torch.randn(4, 3, 5), torch.randn(2, 3, 7) * 2
    observer(a)
    observer(b)
    both = torch.cat((a.transpose(0, 1).flatten(1), b.transpose(0, 1).flatten(1)), 1)
    expected = choose_qparams(both.amin(1), both.amax(1), CHANNEL, axis=1)
    assert observer.qparams().same_as(expected)
    assert observer.summary().high == float(both.max())


def test_channels_survive_a_state_dict() -> None:
    moving = replace(CHANNEL, observer="moving_average")
    for spec in (CHANNEL, moving):
        observer = make_observer(spec, "x", axis=0)
        observer(torch.randn(3, 5))
        fresh = make_observer(spec, "x", axis=0)
        fresh.load_state_dict(observer.state_dict())
        assert fresh.qparams().same_as(observer.qparams())


def test_a_moving_average_per_channel_is_that_of_each_channel() -> None:
    observer = make_observer(replace(CHANNEL, observer="moving_average"), "x", axis=0)
    batches = torch.randn(4, 3, 50)
    for x in batches:
        observer(x)
    for channel in range(3):
        alone = make_observer(QSpec("int8", symmetric=True, observer="moving_average"), "x")
        for x in batches:
            alone(x[channel])
        assert float(observer.qparams().scale[channel]) == alone.qparams().scale_value


def test_a_changed_number_of_channels_is_an_error() -> None:
    observer = MinMaxObserver(CHANNEL, "x", axis=0)
    observer(torch.randn(3, 5))
    with pytest.raises(CalibrationError, match="had 3 channels and now has 4"):
        observer(torch.randn(4, 5))


def test_channels_need_an_axis_and_an_observer_that_has_them() -> None:
    with pytest.raises(ConfigError, match="channel axis"):
        make_observer(CHANNEL, "x")
    with pytest.raises(ConfigError, match="minmax"):
        make_observer(replace(CHANNEL, observer="histogram"), "x", axis=0)


def test_a_per_tensor_spec_ignores_the_axis() -> None:
    observer = make_observer(SPECS["minmax"], "x", axis=1)
    observer(torch.randn(2, 3))
    assert observer.qparams().axis is None


def test_make_observer_makes_what_the_spec_says() -> None:
    for kind in KINDS:
        assert make_observer(SPECS[kind], "x").kind == kind


def test_summaries_together_are_those_of_each() -> None:
    observers = [
        make_observer(spec, f"{kind} {place}")
        for kind in KINDS
        for place, spec in enumerate((SPECS[kind], replace(SPECS[kind], bits=4)) * 2)
    ]
    for place, observer in enumerate(observers[:-1]):
        observer(torch.randn(500) * 3.0**place if place % 3 else torch.rand(50))
    alone = [copy.deepcopy(observer).summary() for observer in observers]
    assert list(summaries(observers)) == alone
    assert alone[-1].elements == 0


def test_a_histogram_that_saw_more_searches_again() -> None:
    observer = make_observer(SPECS["histogram"], "x")
    observer(torch.rand(100))
    before = observer.qparams()
    assert observer.qparams() is before
    observer(torch.rand(100) * 9)
    assert observer.qparams().scale_value > 4 * before.scale_value
