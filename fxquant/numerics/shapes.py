"""Remembers the shape of a value that calibration passes by and that needs no range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxquant.numerics.shards import Part, Watcher, first_fact

T = TypeVar("T")


class ShapeRecorder(Watcher):
    """Return the input unchanged and remember the shape of the first tensor with elements.

    Args:
        path: the place that is watched.

    Example:
        >>> import torch
        >>> recorder = ShapeRecorder("head")
        >>> _ = recorder(torch.zeros(2, 3))
        >>> recorder.first_shape
        (2, 3)
    """

    is_observer: ClassVar[bool] = True
    """How the graph's verifier tells that it must be gone after calibration."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.first_shape: tuple[int, ...] | None = None

    def forward(self, x: T) -> T:
        """Return ``x`` itself; what is neither a tensor nor a packed sequence leaves no trace."""
        if self.first_shape is None:
            found = x.data if isinstance(x, PackedSequence) else x
            if isinstance(found, Tensor) and found.numel():
                self.first_shape = tuple(found.shape)
        return x

    def begin_part(self) -> None:
        """Watch on: the first shape is the same, whoever sees it."""

    def part(self) -> Part:
        """The shape, if one was seen."""
        return Part(facts={"shape": self.first_shape})

    def join_parts(self, parts: Sequence[Part]) -> None:
        """The shape that the first process saw."""
        self.first_shape = first_fact("shape", parts)

    def drop_part(self) -> None:
        """Keep the shape: it does no harm."""

    def extra_repr(self) -> str:
        """Show the place in ``print(model)``."""
        return f"path={self.path!r}"
