"""What the test needs to know of a model: how it is made, what it is fed, what must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.statistics import randomize_bn, smooth_images

Data = Callable[[int, int, int], Any]


@dataclass(frozen=True)
class Case:
    """One small model.

    Args:
        make: builds it; the weights come from the global random state, which is seeded before.
        data: ``data(batch, seed, size)`` is what it is fed: a tensor, a tuple or a dict.
        size: the size it is calibrated at (side of a picture, length of a sequence).
        other: another size it takes in float; ``None`` if it takes one only.
        plain: a plain CNN, which must come nearer to float than others.
        empty: whether torch itself runs it on an empty batch.
        bias: mean of the biases of its batch norms.
        macs: the least share of multiply-accumulates in int8.
        why: the reason, where that is less than 0.95.
    """

    make: Callable[[], nn.Module]
    data: Data
    size: int
    other: int | None = None
    plain: bool = False
    empty: bool = True
    bias: float = 0.0
    macs: float = 0.95
    why: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, its batch norms settled on data of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().eval()
            batch = self.data(8, 1000 + seed, self.size)
            randomize_bn(model, seed, batch, bias=self.bias)
        return model


def feed(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on a batch as a user would: a dict by keyword, a tuple by position."""
    with torch.no_grad():
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of an output, in order: tuples, lists, dicts, dataclasses, None."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def images(channels: int = 3) -> Data:
    """Smooth pictures ``[batch, channels, size, size]``."""
    return lambda batch, seed, size: smooth_images(batch, channels, size, seed)


def signals(channels: int) -> Data:
    """Smooth signals ``[batch, channels, size]``."""

    def make(batch: int, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        slow = torch.randn(batch, channels, 6, generator=generator)
        fast = torch.randn(batch, channels, size, generator=generator)
        grown = F.interpolate(slow, size=size, mode="linear", align_corners=False)
        return grown + 0.3 * fast

    return make


def rows(channels: int) -> Data:
    """Features ``[batch, size, channels]``, neighbours alike."""
    make = signals(channels)

    def turned(batch: int, seed: int, size: int) -> Tensor:
        return make(batch, seed, size).transpose(1, 2).contiguous()

    return turned


def features(channels: int) -> Data:
    """Correlated features ``[batch, channels]``; the size is ignored."""

    def make(batch: int, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(8, channels, generator=torch.Generator().manual_seed(7))
        own = torch.randn(batch, channels, generator=generator)
        return 0.3 * torch.randn(batch, 8, generator=generator) @ mixing + 0.5 * own

    return make


def tokens(vocabulary: int) -> Data:
    """Indices ``[batch, size]``, common ones more often."""

    def make(batch: int, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        even = torch.rand(batch, size, generator=generator)
        return (even.square() * vocabulary).long().clamp(max=vocabulary - 1)

    return make
