"""Watchers that share the data: each ends as one would that saw all of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import make_observer
from fxquant.numerics.shapes import ShapeRecorder
from fxquant.numerics.shards import Watcher
from fxquant.spec import QSpec

CHANNELS = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")
MEANS = QSpec("int8", symmetric=True, granularity="channel", observer="moving_average")
EXACT: dict[str, Any] = {
    "histogram": lambda: make_observer(QSpec(), "x"),
    "minmax": lambda: make_observer(QSpec(observer="minmax"), "x"),
    "channels": lambda: make_observer(CHANNELS, "x", 0),
}
FOLLOWING: dict[str, Any] = {
    "moving average": lambda: make_observer(QSpec(observer="moving_average"), "x"),
    "moving average of channels": lambda: make_observer(MEANS, "x", 0),
    "fake-quant": lambda: calibrating(FakeQuantize(QSpec(), "x")),
    "fake-quant, minmax": lambda: calibrating(FakeQuantize(QSpec(observer="minmax"), "x")),
    "fake-quant, learned": lambda: calibrating(FakeQuantize(QSpec(learned=True), "x")),
}


def calibrating(fake: FakeQuantize) -> FakeQuantize:
    fake.calibrating = True
    return fake.eval()


def state(watcher: Watcher, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in watcher.state_dict().items() if k not in but}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(other[key], value), key


def shared(watcher: Any, shares: Sequence[Sequence[Tensor]]) -> list[Any]:
    """What each process ends with, each after its share."""
    ranks = [copy.deepcopy(watcher) for _ in shares]
    for rank, share in zip(ranks, shares, strict=True):
        rank.begin_part()
        for x in share:
            rank(x)
    parts = [rank.part() for rank in ranks]
    for rank in ranks:
        rank.join_parts(parts)
    return ranks


def tensors(*sizes: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [size * torch.randn(3, 40, generator=generator) for size in sizes]


@pytest.mark.parametrize("kind", EXACT)
@given(
    shares=st.lists(
        st.lists(st.sampled_from([1e-3, 0.5, 1.0, 7.0, 300.0]), max_size=3), min_size=1, max_size=4
    ),
    before=st.lists(st.sampled_from([0.1, 20.0]), max_size=2),
)
@settings(max_examples=25, deadline=None)
def test_it_is_as_if_one_saw_everything(
    kind: str, shares: list[list[float]], before: list[float]
) -> None:
    watcher = EXACT[kind]()
    for x in tensors(*before):
        watcher(x)
    data = [tensors(*share) for share in shares]
    alone = copy.deepcopy(watcher)
    for x in (x for share in data for x in share):
        alone(x)
    for rank in shared(watcher, data):
        same(state(alone), state(rank))
        if alone.seen:
            assert rank.qparams() == alone.qparams() or torch.equal(
                rank.qparams().scale, alone.qparams().scale
            )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_steps_are_taken_together(kind: str) -> None:
    watcher = FOLLOWING[kind]()
    watcher(tensors(0.7)[0])
    shares = [tensors(1.0, 2.0, 0.1), tensors(3.0), []]
    alone = copy.deepcopy(watcher)
    for step in range(3):
        # Channels stand first: what they hold of one step lies side by side.
        alone(torch.cat([share[step] for share in shares if step < len(share)], 1))
    # How many tensors there were, and what was outside the range of the time, each counts itself.
    for rank in shared(watcher, shares):
        same(state(alone, ("tally",)), state(rank, ("tally",)))


@pytest.mark.parametrize("kind", [*EXACT, *FOLLOWING])
def test_a_part_that_is_dropped_leaves_no_trace(kind: str) -> None:
    watcher = (EXACT | FOLLOWING)[kind]()
    watcher(tensors(1.0)[0])
    before = state(watcher)
    watcher.begin_part()
    watcher(tensors(50.0)[0])
    watcher.drop_part()
    same(before, state(watcher))
    alone = copy.deepcopy(watcher)
    for each in (watcher, alone):
        each(tensors(9.0)[0])
    same(state(alone), state(watcher))


def test_nobody_saw_anything() -> None:
    for make in (EXACT | FOLLOWING).values():
        watcher = make()
        for rank in shared(watcher, [[], []]):
            same(state(watcher), state(rank))


def test_shapes_dtypes_and_what_is_no_float_are_known_to_all() -> None:
    first, second = shared(ShapeRecorder("x"), [[], [torch.zeros(2, 5)]])
    assert first.first_shape == second.first_shape == (2, 5)
    for rank in shared(make_observer(QSpec(), "x"), [[], tensors(1.0)]):
        assert rank.first_shape == (3, 40) and rank.first_dtype == "float32"
    for make in (EXACT["minmax"], FOLLOWING["fake-quant"]):
        for rank in shared(make(), [[torch.arange(3)], tensors(1.0)]):
            assert not rank.floating
