"""Observers that keep nothing but a range: exact min and max, or a moving average of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import ConfigError
from fxquant.numerics.observer import Observer
from fxquant.numerics.shards import Part, steps_together
from fxquant.spec import QSpec


class MinMaxObserver(Observer):
    """Cover every value seen: nothing is clipped, and the order of the data does not matter.

    Args and errors are those of :class:`~fxquant.numerics.observer.Observer`.

    Example:
        >>> observer = MinMaxObserver(QSpec(observer="minmax"), "conv1")
        >>> _ = observer(torch.tensor([-1.0, 1.55]))
        >>> observer.qparams().zero_point_value
        100
    """

    kind: ClassVar[str] = "minmax"

    def _observe(self, values: Tensor, lows: Tensor, highs: Tensor) -> int:
        del values, lows, highs
        return 0

    def _chosen_range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverageObserver(Observer):
    """Follow the range of each tensor: ``range += averaging * (range of this one - range)``.

    The first tensor sets the range. The result depends on the order of the data, later tensors
    weighing more: [0, 1] then [0, 9] gives about 1.08, the reverse about 8.92. Several processes
    take their steps together: the n-th tensors of all of them count as one.

    Args:
        spec: as for every observer.
        path: as for every observer.
        axis: as for every observer.
        averaging: the weight of each further tensor, above 0, at most 1.

    Raises:
        ConfigError: ``averaging`` is not in that range.

    Example:
        >>> observer = MovingAverageObserver(QSpec(observer="moving_average"), "conv1")
        >>> _ = observer(torch.tensor([0.0, 1.0])), observer(torch.tensor([0.0, 9.0]))
        >>> round(observer.summary().range_high, 2)
        1.08
    """

    kind: ClassVar[str] = "moving_average"
    _per_channel: ClassVar[dict[str, float]] = {
        "low": math.inf,
        "high": -math.inf,
        "mean_low": 0.0,
        "mean_high": 0.0,
    }
    mean_low: Tensor
    mean_high: Tensor

    def __init__(
        self, spec: QSpec, path: str, axis: int | None = None, averaging: float = 0.01
    ) -> None:
        super().__init__(spec, path, axis)
        if not 0.0 < averaging <= 1.0:
            raise ConfigError(f"averaging is {averaging!r}: it must be above 0 and at most 1")
        self.averaging = averaging
        self._steps: list[tuple[Tensor, Tensor]] | None = None

    def begin_part(self) -> None:
        """As of every observer; every step is written down."""
        super().begin_part()
        self._steps = []

    def part(self) -> Part:
        """As of every observer, with the steps."""
        return dataclasses.replace(super().part(), steps=tuple(self._steps or ()))

    def join_parts(self, parts: Sequence[Part]) -> None:
        """Take the steps of all processes together, one after the other."""
        self._restore(parts[0].before)
        seen = self.seen
        for low, high in steps_together(parts):
            self._fit_channels(low)
            self._follow(low.to(self.low.device), high.to(self.low.device), not seen)
            seen = True
        after = {name: self.get_buffer(name).clone() for name in ("mean_low", "mean_high")}
        super().join_parts(parts)
        for name, mean in after.items():
            self.get_buffer(name).copy_(mean)
        self._steps = None

    def drop_part(self) -> None:
        """As of every observer."""
        super().drop_part()
        self._steps = None

    def _observe(self, values: Tensor, lows: Tensor, highs: Tensor) -> int:
        low, high = self._overall(lows, torch.amin), self._overall(highs, torch.amax)
        if self._steps is not None:
            self._steps.append((low.cpu(), high.cpu()))
        self._follow(low, high, not self.seen)
        least, most = self.mean_low.clamp(max=0.0), self.mean_high.clamp(min=0.0)
        if bool(((low >= least) & (high <= most)).all()):
            return 0
        below, above = values < least.unsqueeze(-1), values > most.unsqueeze(-1)
        return int(torch.count_nonzero(below.logical_or_(above)))

    def _follow(self, low: Tensor, high: Tensor, first: bool) -> None:
        weight = 1.0 if first else self.averaging
        # Not lerp_: its difference of the two overflows between -3e38 and 3e38.
        self.mean_low.mul_(1.0 - weight).add_(low, alpha=weight)
        self.mean_high.mul_(1.0 - weight).add_(high, alpha=weight)

    def _chosen_range(self) -> tuple[Tensor, Tensor]:
        return self.mean_low, self.mean_high
