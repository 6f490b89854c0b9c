"""What counts as calibration data, and the peek at its first batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxquant.calibration import first_batch
from fxquant.calibration.data import as_batches, check_options, is_function, length
from fxquant.errors import CalibrationError, ConfigError
from tests.calibration.models import Pair, Watched, batches


@dataclass
class OneBatch:
    x: Tensor


class Countless:
    """An iterable that knows no length, and says so the wrong way."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches())


def refusal(data: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        list(as_batches(data))
    return str(caught.value)


@pytest.mark.parametrize(
    "data", [torch.zeros(4, 3), {"x": torch.zeros(4, 3)}, OneBatch(torch.ones(2))]
)
def test_a_lone_batch_is_one_batch(data: Any) -> None:
    (only,) = as_batches(data)
    assert only is data


def test_an_iterable_is_taken_as_it_is() -> None:
    data = batches()
    assert as_batches(data) is data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ["NoneType", "DataLoader"]),
        ("images/", ["a str", "'images/'", "DataLoader"]),
        (b"", ["a bytes"]),
        (Path("images"), ["Path"]),
        (7, ["a int"]),
        (np.zeros((4, 3)), ["numpy.ndarray", "torch.from_numpy"]),
        (nn.Sequential(nn.ReLU()), ["is a model"]),
        (TensorDataset(torch.zeros(4, 3)), ["TensorDataset", "DataLoader(data, batch_size=32)"]),
    ],
)
def test_other_things_are_refused_with_the_way_out(data: Any, words: list[str]) -> None:
    text = refusal(data)
    assert all(word in text for word in words), text


def test_the_advice_for_arrays_works() -> None:
    array = np.zeros((64, 3))
    parts = torch.from_numpy(array).float().split(32)
    assert [tuple(part.shape) for part in as_batches(parts)] == [(32, 3)] * 2


def test_a_function_of_a_model_is_known() -> None:
    assert is_function(lambda model: None)
    assert not is_function(batches()) and not is_function(nn.ReLU())
    assert not is_function(torch.zeros(2)) and not is_function(None)


def test_a_function_that_makes_batches_has_to_be_called() -> None:
    with pytest.raises(CalibrationError, match=r"pass what it returns, f\(\)"):
        is_function(batches_without_arguments)


def batches_without_arguments() -> Iterator[Tensor]:
    yield from batches()


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_max_batches_has_to_be_a_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_batches is"):
        check_options([], None, value)


def test_zero_max_batches_is_zero_batches() -> None:
    with pytest.raises(CalibrationError, match="0 batches"):
        check_options([], None, 0)


def test_transform_has_to_be_a_function() -> None:
    with pytest.raises(ConfigError, match="transform is a int"):
        check_options([], 3)


@pytest.mark.parametrize("options", [(lambda b: b, None), (None, 3)])
def test_options_that_would_do_nothing_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="do both in the function"):
        check_options(lambda model: None, *options)


def test_length_where_it_is_known() -> None:
    assert length(batches(4)) == 4
    assert length(DataLoader(TensorDataset(torch.zeros(10, 3)), batch_size=4)) == 3
    assert length(x for x in batches()) is None
    assert length(Countless()) is None


def test_peeking_loses_nothing_of_a_generator() -> None:
    source = batches(4)
    args, kwargs, replay = first_batch(x for x in source)
    assert args is not None and args[0] is source[0] and kwargs == {}
    assert all(a is b for a, b in zip(list(replay), source, strict=True))


def test_peeking_draws_one_batch_only() -> None:
    drawn: list[int] = []

    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(batches(3)):
            drawn.append(i)
            yield x

    _, _, replay = first_batch(stream())
    assert drawn == [0]
    assert length(replay) is None
    assert len(list(replay)) == 3 and drawn == [0, 1, 2]


def test_replay_knows_what_is_left() -> None:
    _, _, replay = first_batch(batches(4))
    assert length(replay) == 4
    next(replay)
    assert length(replay) == 3


def test_each_batch_is_transformed_exactly_once() -> None:
    source = [(x.clone(), "label") for x in batches(3)]
    expected = [x + 1 for x, _ in source]
    # In place, so that a batch transformed twice would show.
    args, _, replay = first_batch(iter(source), lambda b: b[0].add_(1))
    assert args is not None and torch.equal(args[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(list(replay), expected, strict=True))


def test_peeking_binds_names_and_checks_the_model() -> None:
    x, y = batches(2)
    args, kwargs, _ = first_batch([{"x": x, "y": y}], model=Pair())
    assert args == () and kwargs["x"] is x and kwargs["y"] is y
    with pytest.raises(CalibrationError, match=r"transform=lambda b: b\[0\]"):
        first_batch([(x, y)], model=Watched())


def test_peeking_a_function_shows_no_batch() -> None:
    def run(model: nn.Module) -> None:
        raise AssertionError("must not run")

    args, kwargs, replay = first_batch(run)
    assert args is None and kwargs == {} and replay is run


def test_peeking_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"0 batches: the data \(list\) .* is empty"):
        first_batch([])
    used = (x for x in batches(1))
    list(used)
    with pytest.raises(CalibrationError, match=r"0 batches.*used up"):
        first_batch(used)


def test_peeking_refuses_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="transform is a int"):
        first_batch(batches(), 3)  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ConfigError, match="do both in the function"):
        first_batch(lambda model: None, lambda b: b)


def test_a_failing_transform_names_batch_and_contents() -> None:
    with pytest.raises(CalibrationError, match=r"batch 0, dict of 1 .*KeyError: 'image'") as caught:
        first_batch([{"x": torch.zeros(2, 3)}], lambda b: b["image"])
    assert isinstance(caught.value.__cause__, KeyError)
    _, _, replay = first_batch([[1, torch.zeros(2)], [2]], lambda b: b[1])
    next(replay)
    with pytest.raises(CalibrationError, match="batch 1, list of 1"):
        next(replay)


def test_replay_lets_the_first_batch_go() -> None:
    peeked = first_batch(torch.zeros(2, 3) + i for i in range(2))
    assert peeked.args is not None
    alive = weakref.ref(peeked.args[0])
    replay = peeked.replay
    del peeked
    next(replay)
    gc.collect()
    assert alive() is None
