"""The streaming histogram: exact bins, any order, any size, and a range as good as brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics import histogram
from fxquant.numerics.histogram import BINS, HistogramObserver, grid_for, sample_stride
from fxquant.spec import QSpec
from tests.numerics.oracles import best_error, quantization_error, specs

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=8), min_size=1, max_size=6)


def observed(*tensors: Tensor, spec: QSpec | None = None) -> HistogramObserver:
    observer = HistogramObserver(spec or QSpec(), "x")
    for x in tensors:
        observer(x)
    return observer


def expected_bins(x: Tensor) -> tuple[int, int, list[int]]:
    """Count with Python integers: exponent, first bin, counts."""
    numbers = [float(v) for v in x.flatten()]
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    exponent = -126
    while True:
        width = math.ldexp(1.0, exponent)
        first, last = int(low / width), int(high / width)
        if last - first < BINS:
            break
        exponent += 1
    counts = [0] * BINS
    for number in numbers:
        counts[int(number / width) - first] += 1
    return exponent, first, counts


@given(BATCHES)
def test_the_bins_are_those_of_a_histogram_made_at_once(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    observer = observed(*tensors)
    exponent, first, counts = expected_bins(torch.cat(tensors))
    assert observer.grid.tolist() == [exponent, first]
    assert observer.bins.tolist() == counts


@given(BATCHES, st.integers(0, 2**32), specs())
def test_neither_order_nor_batch_split_matters(
    batches: list[list[float]], seed: int, spec: QSpec
) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed))
    one = observed(*tensors, spec=spec)
    for other in (
        observed(*(tensors[i] for i in order), spec=spec),
        observed(torch.cat(tensors), spec=spec),
    ):
        assert torch.equal(one.bins, other.bins)
        assert one.qparams().same_as(other.qparams())


@given(FLOATS, FLOATS)
def test_the_grid_holds_the_range_in_the_finest_bins_that_can(a: float, b: float) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    exponent, first = grid_for(low, high)
    width = math.ldexp(1.0, exponent)
    assert first == int(low / width) and int(high / width) - first < BINS
    if exponent > -126:
        assert int(high / (width / 2)) - int(low / (width / 2)) >= BINS


def test_edges_enclose_exactly_what_was_counted() -> None:
    x = torch.randn(5000) * 7
    counts, edges = observed(x).histogram()
    assert edges.shape == (BINS + 1,) and bool((edges.diff() > 0).all())
    # numpy's bins are closed below, ours towards 0: the numbers are mirrored for the lower half.
    above = np.histogram(x[x >= 0].double().numpy(), edges[edges >= 0].numpy())[0]
    lower = edges[edges <= 0].neg().flip(0)
    below = np.histogram(-x[x < 0].double().numpy(), lower.numpy())[0]
    middle = int(((edges[:-1] < 0) & (edges[1:] > 0)).nonzero())
    got = counts.numpy()
    assert got[middle] == int((x.abs() < edges[middle + 1]).sum())
    assert (got[middle + 1 :] == above).all()
    assert (got[:middle][::-1] == below).all()


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "relu": lambda n: torch.randn(n).relu(),
    "negative": lambda n: -torch.randn(n).abs(),
    "laplace": lambda n: torch.randn(n).sign() * torch.rand(n).log(),
    "uniform": lambda n: torch.rand(n),
    "silu": lambda n: torch.nn.functional.silu(torch.randn(n) * 2),
    "hardswish": lambda n: torch.nn.functional.hardswish(torch.randn(n) * 3),
    "heavy": lambda n: torch.randn(n) / torch.randn(n).abs().clamp(min=0.05),
    "two humps": lambda n: torch.cat((torch.randn(n - 50) * 0.01, torch.randn(50) + 10)),
    "zero or one": lambda n: (torch.rand(n) > 0.9).float(),
    "far from 0": lambda n: torch.rand(n) + 100,
    "constant": lambda n: torch.full((n,), 5.0),
    "huge": lambda n: torch.randn(n).clamp(-3, 3) * 1e38,
    "small": lambda n: torch.randn(n) * 1e-30,
    "channels": lambda n: torch.randn(n // 10, 10) * torch.logspace(-2, 1, 10),
}
SPECS = {
    "uint8": QSpec(),
    "uint8 symmetric": QSpec(symmetric=True),
    "int8": QSpec("int8"),
    "int8 symmetric": QSpec("int8", symmetric=True),
    "4 bits": QSpec(bits=4),
    "int4 symmetric": QSpec("int8", bits=4, symmetric=True),
    "2 bits": QSpec(bits=2),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_range_is_as_good_as_the_best_of_brute_force(name: str, spec: str) -> None:
    x = DISTRIBUTIONS[name](3000)
    observer = observed(x, spec=SPECS[spec])
    numbers = x.flatten().double().numpy()
    low, high = (float(end) for end in observer.qparams().representable())
    error = quantization_error(numbers, low, high, SPECS[spec])
    shares = 2.0 ** -np.arange(0, 6, 0.25)
    best = best_error(numbers, SPECS[spec], shares)
    # Steps of 2 % near a flat minimum, and a bin is 1/4 to 1/8 of an 8-bit step wide: 3 % more
    # squared error (0.13 dB) at most. Brute force may hit single values the bins do not resolve.
    noise = (float(np.abs(numbers).max()) / 1024) ** 2 / 12 * numbers.size
    assert error <= 1.03 * best + noise


@pytest.mark.parametrize("spec", SPECS)
def test_the_search_beats_min_max_where_there_are_outliers(spec: str) -> None:
    x = torch.randn(20000)
    x[:20] *= 3
    numbers = x.double().numpy()
    low, high = (float(end) for end in observed(x, spec=SPECS[spec]).qparams().representable())
    full = quantization_error(numbers, float(x.min()), float(x.max()), SPECS[spec])
    assert quantization_error(numbers, low, high, SPECS[spec]) < full


def test_symmetric_uint8_has_its_zero_in_the_middle() -> None:
    assert observed(torch.randn(100), spec=QSpec(symmetric=True)).qparams().zero_point_value == 128


def test_one_outlier_costs_neither_memory_nor_the_counts() -> None:
    batches = [torch.randn(1000) for _ in range(20)]
    observer = observed(*batches)
    size = sum(buffer.numel() for buffer in observer.buffers())
    observer(torch.tensor([1e6]))
    assert sum(buffer.numel() for buffer in observer.buffers()) == size
    assert int(observer.bins.sum()) == 20_001
    assert observer.summary().high == 1e6


def test_data_too_small_to_quantize_gets_the_smallest_scale() -> None:
    observer = observed(torch.randn(1000) * 1e-40)
    assert observer.qparams().scale_value == torch.finfo(torch.float32).tiny


def test_tiny_data_first_does_not_change_the_range() -> None:
    normal = torch.randn(1000)
    after = observed(torch.zeros(5), torch.full((5,), 1e-40), normal).summary()
    alone = observed(normal).summary()
    assert (after.range_low, after.range_high) == (alone.range_low, alone.range_high)


def test_zeros_do_not_weigh() -> None:
    """However many zeros a ReLU makes, the range is that of the rest."""
    x = torch.randn(2000).abs() + 0.01
    sparse = observed(x, torch.zeros(1_000_000))
    assert sparse.qparams().same_as(observed(x).qparams())


@pytest.mark.parametrize("name", ["normal", "heavy", "4 bits"])
def test_the_clipped_share_is_that_of_the_data(name: str) -> None:
    spec = SPECS.get(name, QSpec(bits=4))
    x = DISTRIBUTIONS.get(name, torch.randn)(20000)
    observer = observed(x, spec=spec)
    seen, half = observer.summary(), observer.qparams().scale_value / 2
    outside = (x < seen.range_low - half) | (x > seen.range_high + half)
    # Known to within the two bins the ends lie in.
    wide = math.ldexp(1.0, int(observer.grid[0]))
    near = sum(
        int(((x - end).abs() <= wide).sum())
        for end in (seen.range_low - half, seen.range_high + half)
    )
    assert abs(seen.clipped - float(outside.double().mean())) <= near / x.numel()


def test_nothing_is_clipped_of_what_is_covered() -> None:
    for x in (torch.zeros(10), torch.full((10,), 3.0), torch.tensor([-1.0, 0.0])):
        assert observed(x).summary().clipped == 0.0


def test_the_report_has_at_most_64_bins_with_every_value_in_one() -> None:
    seen = observed(torch.randn(1000), torch.rand(500)).summary()
    assert len(seen.counts) == 64 and sum(seen.counts) == 1500
    assert observed(torch.full((7,), 2.0)).summary().counts == (7,)


@given(st.one_of(st.integers(1, 2**19), st.integers(1, 10**10)))
def test_the_sample_is_bounded_and_leaves_nothing_out(count: int) -> None:
    stride = sample_stride(count)
    assert math.gcd(stride, count) == 1
    assert (stride == 1) == (count <= histogram.WHOLE)
    assert -(-count // stride) <= histogram.SAMPLED
    # Among 40 consecutive numbers one has no prime in common with a number below 10**10.
    wanted = 1 if count <= histogram.WHOLE else max(3, -(-count // histogram.SAMPLED))
    assert wanted <= stride <= wanted + 40


def test_a_sampled_tensor_weighs_as_much_as_it_has_values() -> None:
    x = torch.randn(2**20 + 1)
    observer = observed(x)
    # The last stride may be cut short, and the extremes of each piece are counted once more.
    assert int(observer.bins.sum()) == pytest.approx(x.numel(), abs=3 + 2 * 9)
    assert (observer.summary().low, observer.summary().high) == (float(x.min()), float(x.max()))


def activations(seed: int) -> dict[str, Tensor]:
    """Channels of very different size, as after BatchNorm; one column that sticks out."""
    torch.manual_seed(seed)
    x = torch.randn(2, 32, 60, 60) * torch.randn(32).exp().view(1, 32, 1, 1)
    edge = x.clone()
    edge[:, :, :, 3] *= 6
    last = x.to(memory_format=torch.channels_last)
    return {"signed": x, "relu": x.relu(), "channels last": last, "edge": edge.relu()}


@pytest.mark.parametrize(
    ("sampled", "slack"),
    [
        # Every third of 230,400: the tail that decides is known to a few percent.
        (2**20, 1.15),
        # One in 15: what one value in 10,000 does is known to about 1.5 dB.
        (2**14, 1.4),
    ],
)
@pytest.mark.parametrize("name", activations(0))
def test_a_sample_chooses_nearly_the_same_range(
    name: str, sampled: int, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        x = activations(seed)[name]
        numbers = x.flatten().double().numpy()
        errors = []
        for whole in (2**30, 2**17):
            monkeypatch.setattr(histogram, "WHOLE", whole)
            monkeypatch.setattr(histogram, "SAMPLED", sampled)
            ends = observed(x).qparams().representable()
            errors.append(quantization_error(numbers, float(ends[0]), float(ends[1]), QSpec()))
        assert errors[1] <= slack * errors[0]


def test_a_sample_is_not_blind_to_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every channel, row and column has its share, in either memory format."""
    monkeypatch.setattr(histogram, "WHOLE", 2**10)
    monkeypatch.setattr(histogram, "SAMPLED", 2**11)
    for axis in range(4):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        x = torch.arange(1.0, 9.0).view(shape).expand(8, 8, 8, 8).contiguous()
        for view in (x, x.to(memory_format=torch.channels_last)):
            counts = observed(view).bins[observed(view).bins > 100]
            assert len(counts) == 8
            # 8 equal shares of 4,096, each known to one stride per run of equal values.
            assert counts.tolist() == pytest.approx([512] * 8, rel=0.1)
