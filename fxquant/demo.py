"""The demo: a small network learns to read handwritten digits, becomes int8, and both compare.

The digits are scikit-learn's (1797 pictures of 8 x 8 pixels, UCI's optical recognition of
handwritten digits), which lie in that package: nothing is downloaded. Every number but the
latencies repeats exactly on one machine.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fxquant
from fxquant.graph.diff import GraphDiff
from fxquant.report.report import Report
from fxquant.report.tables import table

EPOCHS: Final = 3
HELD_OUT: Final = 500
CALIBRATION: Final = 200
BLOCK: Final = "block2"
"""The residual block whose rewriting is shown."""

_BATCH: Final = 32
_SIDE: Final = 16
"""Pixels of a side; at the 8 of the originals, calls would cost more than their arithmetic."""
_CHANNELS: Final = 96
_RATE: Final = 4e-3
_ROUNDS: Final = {1: 100, 64: 15}
"""Timed forward passes by batch size."""
_COLUMNS: Final = ("", "accuracy", "weights file", "batch 1", "batch 64", "SQNR")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a way around them.

    Args:
        channels: of the input.
        width: channels of the output.
        stride: of the first convolution and of the way around.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to as many pictures of ``width`` channels."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A stem, two residual blocks, a mean over the picture and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, _CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(_CHANNELS), nn.ReLU()
        )
        self.block1 = ResidualBlock(_CHANNELS, _CHANNELS)
        self.block2 = ResidualBlock(_CHANNELS, 2 * _CHANNELS, stride=2)
        self.head = nn.Linear(2 * _CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [batch, 1, 16, 16] to logits [batch, 10]."""
        features = self.block2(self.block1(self.stem(x)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """The pictures, split at random into those to learn from and those held out.

    Args:
        train: float32 [n, 1, 16, 16], from 0 to 1.
        train_labels: int64 [n].
        held_out: as ``train``; none of them is seen in training or calibration.
        held_out_labels: int64.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Args:
        accuracy: share of held-out pictures that are read right, 0 to 1.
        bytes: size of the file that ``torch.save`` makes of the state dict.
        latency: milliseconds of a forward pass, by batch size.
        sqnr: signal to noise of its logits against the float model's, in dB; for that one None.
    """

    accuracy: float
    bytes: int
    latency: dict[int, float]
    sqnr: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All that the demo shows.

    Args:
        seed: of the weights, the split and the order of training.
        epochs: times that the training pictures were seen.
        real: the float model.
        codes: the int8 model.
        report: what became of every op.
        diff: how the block at :data:`BLOCK` was rewritten.
    """

    seed: int
    epochs: int
    real: Measured
    codes: Measured
    report: Report
    diff: GraphDiff

    def to_dict(self) -> dict[str, Any]:
        """The comparison in plain types that JSON can hold; the keys are stable."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "float": _plain(self.real),
            "int8": _plain(self.codes),
            "report": self.report.to_dict(),
            "block": BLOCK,
            "diff": self.diff.to_dict(),
        }

    def __str__(self) -> str:
        real, codes = self.real, self.codes
        faster = [
            f"{real.latency[n] / codes.latency[n]:.1f}x as fast at batch {n}" for n in _ROUNDS
        ]
        rows = [_cells("float", real), _cells("int8", codes)]
        return "\n".join(
            [
                table(_COLUMNS, rows, right=_COLUMNS[1:]),
                "",
                f"int8: {codes.bytes / real.bytes:.2f}x the size, {', '.join(faster)}",
                self.report.summary.splitlines()[0],
                "",
                f"How {BLOCK} was rewritten:",
                str(self.diff),
            ]
        )


def run(
    *, seed: int = 0, epochs: int = EPOCHS, say: Callable[[str], None] | None = None
) -> Comparison:
    """Train, quantize and compare; the global random state is left as found.

    Args:
        seed: of the weights, the split and the order of training.
        epochs: times to see the training pictures; at least 1.
        say: called with each line of progress.
    """
    say = say or _silent
    generator = torch.Generator().manual_seed(seed)
    digits = load(generator)
    say(f"training on {len(digits.train)} pictures, {len(digits.held_out)} are held out")
    model = train(digits, seed, epochs, generator, say)
    say(f"quantizing with {CALIBRATION} of the training pictures")
    quantized = fxquant.quantize(model, digits.train[:CALIBRATION].split(50), mode="static")
    say("measuring")
    real, codes = measure(model, quantized, digits)
    diff = fxquant.diff(quantized).only(BLOCK)
    return Comparison(seed, epochs, real, codes, fxquant.report(quantized), diff)


def load(generator: torch.Generator) -> Digits:
    """Read the digits, enlarge them and split them.

    Args:
        generator: decides which are held out.
    """
    data = load_digits()
    pixels = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=generator)
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[rest], labels[rest], images[held], labels[held])


def train(
    digits: Digits,
    seed: int,
    epochs: int,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> DigitNet:
    """Train a network and return it in eval mode.

    Args:
        digits: what to learn from.
        seed: of the first weights.
        epochs: times to see every picture.
        generator: decides the order of the pictures.
        say: called after every epoch.
    """
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = DigitNet()
        steps = epochs * math.ceil(len(digits.train) / _BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in torch.randperm(len(digits.train), generator=generator).split(_BATCH):
                loss = cross_entropy(model(digits.train[batch]), digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            say(f"epoch {epoch} of {epochs}: loss {statistics.fmean(losses):.3f}")
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that sums have one order and other work on the machine costs less.

    Threads that wait for each other at every layer stall where something else has the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def measure(model: nn.Module, quantized: nn.Module, digits: Digits) -> tuple[Measured, Measured]:
    """Measure the float model and its int8 version on the held-out pictures."""
    real, codes = model(digits.held_out), quantized(digits.held_out)
    times = {size: latency((model, quantized), digits.held_out[:size]) for size in _ROUNDS}
    labels = digits.held_out_labels
    return (
        Measured(accuracy(real, labels), weights_file(model), {n: t[0] for n, t in times.items()}),
        Measured(
            accuracy(codes, labels),
            weights_file(quantized),
            {n: t[1] for n, t in times.items()},
            sqnr(real, codes),
        ),
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of logits [n, classes] whose largest is that of the label [n]."""
    return float((logits.argmax(1) == labels).double().mean())


def sqnr(signal: Tensor, noisy: Tensor) -> float:
    """Decibels of ``signal`` over its difference from ``noisy``; infinite if there is none.

    Example:
        >>> round(sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 3)
        20.0
    """
    noise = float((signal.double() - noisy.double()).square().sum())
    power = float(signal.double().square().sum())
    return 10 * math.log10(power / noise) if noise else math.inf


def weights_file(model: nn.Module) -> int:
    """Bytes of the file that ``torch.save`` makes of the state dict."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def latency(models: tuple[nn.Module, nn.Module], batch: Tensor) -> tuple[float, float]:
    """Median milliseconds of both models, timed in turns so that a busy machine slows both."""
    rounds = [
        [_milliseconds(model, batch) for model in models] for _ in range(_ROUNDS[len(batch)] + 1)
    ]
    first, second = zip(*rounds[1:], strict=True)  # the first round warms up
    return statistics.median(first), statistics.median(second)


def _milliseconds(model: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    model(batch)
    return (time.perf_counter() - start) * 1e3


def _cells(name: str, measured: Measured) -> tuple[str, ...]:
    return (
        name,
        f"{measured.accuracy:.2%}",
        f"{measured.bytes} bytes",
        *(f"{measured.latency[size]:.3f} ms" for size in _ROUNDS),
        "" if measured.sqnr is None else f"{measured.sqnr:.1f} dB",
    )


def _plain(measured: Measured) -> dict[str, Any]:
    return {
        "accuracy": measured.accuracy,
        "bytes": measured.bytes,
        "latency_ms": {str(size): value for size, value in measured.latency.items()},
        "sqnr_db": measured.sqnr,
    }


def _silent(line: str) -> None:
    pass
