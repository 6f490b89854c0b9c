"""Example inputs that do not fit are told in words, in every mode; packed sequences do fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxquant
from fxquant.errors import ConfigError, TraceError

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning"),
    pytest.mark.filterwarnings("ignore:.*needs no calibration data"),
]
WITHOUT_DATA = ("dynamic", "weight_only", "bfloat16", "float16")


class Net(nn.Module):
    """Two layers; the second is where widths do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Through both."""
        y: Tensor = self.second(self.first(x)) * scale
        return y


def _no_training(model: nn.Module) -> None:
    """Nothing: it is not reached."""


WRONG: dict[str, tuple[Any, str]] = {
    "shape": (torch.randn(3, 2, 7), r"float32\[3, 2, 7\], at second \(.*test_example_inputs\.py"),
    "dtype": (torch.zeros(3, 2, 8, dtype=torch.long), r"int64\[3, 2, 8\], at first"),
    "array": (np.zeros((3, 2, 8), np.float32), r"ndarray, at first.*TypeError"),
    "text": ("an example", r"str, at first"),
    "by name": ({"x": torch.randn(3, 2, 7)}, r"dict of 1 \('x': float32\[3, 2, 7\]\), at second"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("mode", [*WITHOUT_DATA, "qat"])
def test_what_the_model_fails_on_is_named(
    mode: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example, said = WRONG[name]
    train = _no_training if mode == "qat" else None
    with pytest.raises(ConfigError, match=rf"(?s)fails on its example inputs, {said}.*Pass one"):
        fxquant.quantize(
            Net().eval(), mode=mode, example_inputs=example, backend="reference", train=train
        )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", WITHOUT_DATA)
def test_data_that_is_an_example_only_is_named_too(mode: Any) -> None:
    with pytest.raises(ConfigError, match=r"example inputs, float32\[3, 2, 7\], at second"):
        fxquant.quantize(Net().eval(), [torch.randn(3, 2, 7)], mode=mode, backend="reference")


@pytest.mark.parametrize("mode", [*WITHOUT_DATA, "qat", "static"])
def test_what_forward_does_not_take_is_refused(mode: Any) -> None:
    x = torch.randn(3, 2, 8)
    train = _no_training if mode == "qat" else None
    for example in ((x, x), {"y": x}, {"x": x, "y": x}):
        with pytest.raises(TraceError, match=r"do not fit Net\.forward\(.*a dict of arguments"):
            fxquant.quantize(Net().eval(), [x], mode=mode, example_inputs=example, train=train)


class Tagger(nn.Module):
    """Takes a packed sequence and looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, packed: PackedSequence) -> tuple[Tensor, Tensor]:
        """Labels and lengths."""
        out, _ = self.rnn(packed)
        rows, lengths = pad_packed_sequence(out, batch_first=True)
        return self.head(rows), lengths


def packed(*lengths: int, ordered: bool = True) -> PackedSequence:
    """Sequences of those lengths."""
    rows = torch.randn(len(lengths), max(lengths), 8)
    return pack_padded_sequence(
        rows, torch.tensor(lengths), batch_first=True, enforce_sorted=ordered
    )


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("backend", ["x86", "reference"])
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only", "bfloat16"])
def test_packed_sequences_are_one_argument(mode: Any, backend: str, ordered: bool) -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    example = packed(5, 3, 2, ordered=ordered)
    data = [packed(4, 4, 1, ordered=ordered), example] if mode == "static" else None
    for given in (example, (example,), None):
        calibration = [example] if given is None else data
        made = fxquant.quantize(
            model, calibration, mode=mode, backend=backend, example_inputs=given
        )
        for lengths in ((5, 3, 2), (7, 1), (2, 6, 3) if not ordered else (6, 3, 2)):
            fed = packed(*lengths, ordered=ordered)
            with torch.no_grad():
                (wanted, sizes), (found, counts) = model(fed), made(fed)
            assert torch.equal(sizes, counts)
            # Steps of 8 bits add up over a sequence; one in a wrong place is all wrong.
            assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
