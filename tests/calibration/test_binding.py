"""How one batch becomes the arguments of ``forward``, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant.calibration import bind_batch
from fxquant.calibration.binding import describe, moved, tensors
from fxquant.errors import CalibrationError
from tests.calibration.models import Optional, Pair, Watched, traced

IMAGE, LABEL = torch.zeros(4, 3), torch.arange(4)
IDS, MASK = torch.ones(4, 7, dtype=torch.long), torch.ones(4, 7, dtype=torch.long)


class Tokens(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


class Steps(nn.Module):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return x


class Many(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


class NamedRest(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor, flag: bool = False) -> Tensor:
        return x


class Point(NamedTuple):
    a: Any
    b: Any


@dataclass
class PairOfInputs:
    x: Tensor
    y: Tensor


def refusal(model: nn.Module, batch: Any, index: int = 3) -> str:
    with pytest.raises(CalibrationError) as caught:
        bind_batch(model, batch, index)
    return str(caught.value)


@pytest.mark.parametrize("batch", [(IMAGE, IMAGE), [IMAGE, IMAGE], Point(IMAGE, IMAGE)])
def test_a_tuple_or_list_is_spread_over_the_inputs(batch: Any) -> None:
    args, kwargs = bind_batch(Pair(), batch, 0)
    assert len(args) == 2 and args[0] is IMAGE and args[1] is IMAGE and kwargs == {}


def test_a_tensor_is_the_one_input() -> None:
    args, kwargs = bind_batch(Watched(), IMAGE, 0)
    assert len(args) == 1 and args[0] is IMAGE and kwargs == {}


@pytest.mark.parametrize("batch", [{"x": IMAGE, "y": LABEL}, PairOfInputs(IMAGE, LABEL)])
def test_a_mapping_or_dataclass_is_fed_by_name(batch: Any) -> None:
    args, kwargs = bind_batch(Pair(), batch, 0)
    assert args == () and kwargs["x"] is IMAGE and kwargs["y"] is LABEL and len(kwargs) == 2


@pytest.mark.parametrize("make", [Watched, lambda: traced(Watched())])
def test_image_and_label_for_one_input_say_the_transform(make: Callable[[], nn.Module]) -> None:
    text = refusal(make(), [IMAGE, LABEL])
    assert "transform=lambda b: b[0]" in text
    assert "batch has 2 items, model takes 1" in text
    assert "batch 3 is list of 2 (float32[4, 3], int64[4])" in text
    assert "forward(x)" in text


def test_too_many_items_for_two_inputs_keep_two() -> None:
    assert "transform=lambda b: b[:2]" in refusal(Pair(), (IMAGE, IMAGE, LABEL))


def test_a_missing_input_is_named() -> None:
    for batch in (IMAGE, (IMAGE,)):
        text = refusal(Pair(), batch)
        assert "'y'" in text and "batch has 1 item, model takes 2" in text
        assert "transform=lambda b: b[0]" not in text


def test_unknown_names_keep_the_known_ones() -> None:
    text = refusal(Watched(), {"x": IMAGE, "label": LABEL})
    assert "transform=lambda b: {'x': b['x']}" in text and "'label'" in text


def test_only_unknown_names_offer_the_first_tensor_and_the_whole() -> None:
    text = refusal(Watched(), {"id": "a.png", "image": IMAGE, "label": LABEL})
    assert "lambda b: b['image']" in text and "lambda b: (b,)" in text


@pytest.mark.parametrize("make", [Optional, lambda: traced(Optional())])
def test_labels_do_not_slip_into_an_optional_input(make: Callable[[], nn.Module]) -> None:
    text = refusal(make(), [IMAGE, LABEL])
    assert "item 1 looks like one label per sample" in text and "'extra'" in text
    assert "transform=lambda b: b[0];" in text
    # The way out is spelled in full, and it works.
    spelled = re.search(r"on purpose, transform=(lambda b: .*\})", text)
    assert spelled is not None
    on_purpose: Callable[[Any], Any] = eval(spelled[1])
    _, kwargs = bind_batch(make(), on_purpose([IMAGE, LABEL]), 3)
    assert kwargs["x"] is IMAGE and kwargs["extra"] is LABEL


@pytest.mark.parametrize("model", [Tokens(), Many(), NamedRest()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_are_refused_beside_tokens_and_in_starred_inputs(
    model: nn.Module, dtype: torch.dtype
) -> None:
    assert "looks like one label per sample" in refusal(model, (IDS, LABEL.to(dtype)))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Tokens(), (IDS, MASK)),  # a mask per token is no label
        (Steps(), (IMAGE, LABEL)),  # an input without default is meant
        (Optional(), (IMAGE, torch.zeros(4))),  # floats are no classes
        (Optional(), (IMAGE, LABEL > 1)),  # nor are flags
        (Optional(), (IMAGE, torch.arange(5))),  # not one per sample
        (Optional(), (torch.arange(4), LABEL)),  # beside 1-D ids, as for an EmbeddingBag
        (Optional(), (IMAGE, None)),
        (Optional(), {"x": IMAGE, "extra": LABEL}),  # by name is on purpose
        (Many(), (IMAGE, IMAGE, IMAGE)),
    ],
)
def test_what_is_no_label_is_let_through(model: nn.Module, batch: Any) -> None:
    args, kwargs = bind_batch(model, batch, 0)
    fed = list(args) + list(kwargs.values())
    given = list(batch.values()) if isinstance(batch, dict) else list(batch)
    assert len(fed) == len(given)
    assert all(a is b for a, b in zip(fed, given, strict=True))


@pytest.mark.parametrize(
    ("batch", "word"), [("text", "str"), (3, "int"), (None, "NoneType"), ([], "list of 0")]
)
def test_a_batch_without_tensors_is_refused(batch: Any, word: str) -> None:
    text = refusal(Watched(), batch)
    assert "no tensor" in text and f"batch 3 is {word}" in text and "transform=" in text


def test_an_array_is_refused_with_the_conversion() -> None:
    assert "torch.from_numpy" in refusal(Watched(), np.zeros((4, 3)))


def test_a_mapping_with_numbers_for_names_is_refused() -> None:
    assert "not all names" in refusal(Watched(), {0: IMAGE})


def test_describe_shortens_long_batches() -> None:
    text = describe([IMAGE] * 9)
    assert text.startswith("list of 9 (float32[4, 3], ") and text.endswith("...)")
    assert text.count("float32") == 6


def test_tensors_are_found_in_any_nesting() -> None:
    nested = {"a": (IMAGE, [LABEL, "x"]), "b": {"c": IDS}, "d": 1}
    found = list(tensors(nested))
    assert len(found) == 3
    assert all(a is b for a, b in zip(found, (IMAGE, LABEL, IDS), strict=True))


def test_moved_keeps_structure_and_leaves_alone_what_is_there() -> None:
    nested = {"a": (IMAGE, [LABEL, "x"]), "b": Point(IDS, 2)}
    assert moved(nested, torch.device("cpu")) is nested
    assert moved(nested, None) is nested
    there = moved(nested, torch.device("meta"))
    assert [t.device.type for t in tensors(there)] == ["meta"] * 3
    assert there["a"][1][1] == "x" and type(there["b"]) is Point and there["b"].b == 2
    assert IMAGE.device.type == "cpu"


@dataclass(frozen=True)
class _Pictures:
    image: Tensor
    note: str = "none"


def test_dataclasses_inside_batches_hold_tensors_and_move() -> None:
    batch = {"batch": _Pictures(torch.ones(2))}
    assert [t.shape for t in tensors(batch)] == [torch.Size([2])]
    there = moved(batch, torch.device("meta"))["batch"]
    assert type(there) is _Pictures and there.image.is_meta and there.note == "none"
    assert not batch["batch"].image.is_meta
