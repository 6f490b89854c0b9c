"""What the tests name as ``package.module:factory``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fxquant

LENGTH = 8


def build() -> nn.Module:
    """A small network; what it prints is no result."""
    print("noise of the user's code")
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Pair(nn.Module):
    """Two inputs by name, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Both sides."""
        return {"sum": self.left(a) + self.right(b), "left": torch.relu(self.left(a))}


class Branch(nn.Module):
    """Nothing in it can be captured but the model as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        """Depends on values."""
        return x if x.sum() > 0 else -x


class Holder:
    """Things with dots in their path."""

    made = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()


HOSTILE = "\x1b[31mred<img src=x onerror=alert(1)>\u202e|"


class Hostile(nn.Module):
    """A layer whose name acts on terminals."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(8, 8))
        self.tail = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Through both."""
        return self.tail(torch.relu(getattr(self, HOSTILE)(x)))


class Unpicklable(nn.Module):
    """It holds a function without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.key = nn.Linear(8, 8), lambda: None

    def forward(self, x: Tensor) -> Tensor:
        """Through the layer."""
        return self.layer(x)


def quantized() -> nn.Module:
    """A model that fxquant made."""
    return fxquant.quantize(build(), loader(), backend="reference")


def poisoned() -> nn.Module:
    """A model that gives NaN."""

    class Poisoned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4] * float("nan")

    return Poisoned()


def loader() -> list[Tensor]:
    """Batches."""
    return [torch.randn(LENGTH, 8) for _ in range(3)]


def stream() -> Iterator[Tensor]:
    """Batches, once."""
    yield from loader()


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Batches with labels."""
    return [(x, torch.zeros(len(x), dtype=torch.int64)) for x in loader()]


def first(batch: Any) -> Any:
    """The batch without its labels."""
    return batch[0]


def feed(model: nn.Module) -> None:
    """Runs the model itself."""
    for x in loader():
        model(x)


def fails() -> nn.Module:
    """A factory that does not work."""
    raise KeyError("oops")


def leaves() -> nn.Module:
    """A factory that ends the process."""
    raise SystemExit(3)


def interrupts() -> nn.Module:
    """Somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def tears() -> Iterator[Tensor]:
    """Data that ends in an error."""
    yield from loader()
    raise KeyError("the disk is gone")


def train(model: nn.Module) -> None:
    """Trains a little."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in loader():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def feeds_badly(model: nn.Module) -> None:
    """Fails while it runs the model."""
    raise OSError("no network")


def empty() -> list[Tensor]:
    """No data."""
    return []


def broken() -> list[Tensor]:
    """Data that is not finite."""
    return [torch.full((4, 8), float("nan"))]


def score(model: nn.Module) -> float:
    """A metric: more is better."""
    return float(model(torch.ones(1, 8)).sum())


@fxquant.pattern
def double_linear(x, layer: nn.Linear):  # type: ignore[no-untyped-def]  # as users write patterns
    """A linear and a ReLU."""
    return torch.relu(layer(x))
