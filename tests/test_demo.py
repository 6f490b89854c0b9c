"""The demo: it learns, int8 keeps what it learnt, it repeats, and it leaves no trace."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import demo
from fxquant.demo import Comparison, Measured

# Whether int8 is faster is the machine's answer, which other work on it can turn.
pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")


def lasting(shown: Comparison) -> dict[str, Any]:
    """What repeats: all but the times."""
    data = shown.to_dict()
    data["report"].pop("timing")
    for model in ("float", "int8"):
        data[model].pop("latency_ms")
    return data


def test_the_demo_keeps_its_promises() -> None:
    lines: list[str] = []
    before = torch.get_rng_state(), torch.get_num_threads()
    shown = demo.run(say=lines.append)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]

    assert shown.real.accuracy > 0.97
    assert abs(shown.codes.accuracy - shown.real.accuracy) <= 0.005
    # A quarter of float32, and the scales, biases and the pickle's frame on top.
    assert 0.25 < shown.codes.bytes / shown.real.bytes <= 0.27
    assert shown.codes.sqnr is not None
    assert 30 < shown.codes.sqnr < 60
    assert shown.report.coverage == 1.0
    assert shown.report.weight_coverage == 1.0
    changes = [(change.kind, change.path) for change in shown.diff.changes]
    assert changes == [
        ("fused", "block2.conv1"), ("fused", "block2.conv2"), ("fused", "block2.shortcut.0"),
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("epoch 3 of 3: loss 0.")]
    data = json.loads(json.dumps(shown.to_dict(), allow_nan=False))
    assert data["int8"]["latency_ms"].keys() == {"1", "64"}


def test_two_runs_give_the_same_but_for_times() -> None:
    def once() -> dict[str, Any]:
        torch.rand(7)  # the caller's own random numbers must not matter
        return lasting(demo.run(epochs=1, seed=3))

    assert once() == once()


def test_the_seed_decides() -> None:
    first, again, other = (demo.load(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.held_out, other.held_out)


def test_held_out_digits_are_never_trained_on() -> None:
    digits = demo.load(torch.Generator().manual_seed(0))
    assert len(digits.train) + len(digits.held_out) == 1797
    assert len(digits.held_out) == demo.HELD_OUT
    assert digits.train.shape[1:] == (1, 16, 16)
    assert 0 <= float(digits.train.min()) < float(digits.train.max()) <= 1
    trained = {image.numpy().tobytes() for image in digits.train}
    assert not [True for image in digits.held_out if image.numpy().tobytes() in trained]


class Fixed(nn.Module):
    """Gives back its only weight, whatever it is fed."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of as many samples as ``x`` has."""
        return self.logits[: len(x)]


def test_measurements_against_numbers_known_beforehand() -> None:
    labels = torch.tensor([0, 1] * 32)
    real = torch.eye(2).repeat(32, 1)
    wrong = real.clone()
    wrong[:16] = wrong[:16].flip(1)  # a quarter read wrong: noise 32, signal 64
    digits = demo.Digits(real, labels, real, labels)
    first, second = demo.measure(Fixed(real), Fixed(wrong), digits)
    assert (first.accuracy, second.accuracy) == (1.0, 0.75)
    assert first.sqnr is None
    assert second.sqnr == pytest.approx(10 * math.log10(2), rel=1e-12)
    assert 64 * 2 * 4 < first.bytes < 64 * 2 * 4 + 4096
    assert first.latency.keys() == second.latency.keys() == {1, 64}
    assert demo.sqnr(real, real) == math.inf


def test_text_shows_what_was_measured() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    quantized = fxquant.quantize(net, [torch.randn(16, 8)], backend="reference")
    shown = Comparison(
        0,
        1,
        Measured(0.991, 1000, {1: 0.5, 64: 20.0}),
        Measured(0.986, 260, {1: 0.25, 64: 5.0}, 38.25),
        fxquant.report(quantized),
        fxquant.diff(quantized),
    )
    lines = str(shown).splitlines()
    assert lines[0].split() == [
        "accuracy", "weights", "file", "batch", "1", "batch", "64", "SQNR",
    ]  # fmt: skip
    assert lines[2].split() == ["float", "99.10%", "1000", "bytes", "0.500", "ms", "20.000", "ms"]
    assert lines[3].split()[-2:] == ["38.2", "dB"]
    assert lines[5] == ("int8: 0.26x the size, 2.0x as fast at batch 1, 4.0x as fast at batch 64")
    assert lines[6].startswith("int8: 1 of 1 ops (100.0%)")
    assert "\n".join(lines[9:]) == str(shown.diff)
    assert "unchanged" in lines[-1]
