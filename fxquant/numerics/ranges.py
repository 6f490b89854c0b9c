"""Observers that keep nothing but a range: exact min and max, or a moving average of them."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import ConfigError
from fxquant.numerics.observer import Observer
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
    weighing more: [0, 1] then [0, 9] gives about 1.08, the reverse about 8.92.

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

    def _observe(self, values: Tensor, lows: Tensor, highs: Tensor) -> int:
        low, high = self._overall(lows, torch.amin), self._overall(highs, torch.amax)
        weight = self.averaging if self.seen else 1.0
        # Not lerp_: its difference of the two overflows between -3e38 and 3e38.
        self.mean_low.mul_(1.0 - weight).add_(low, alpha=weight)
        self.mean_high.mul_(1.0 - weight).add_(high, alpha=weight)
        least, most = self.mean_low.clamp(max=0.0), self.mean_high.clamp(min=0.0)
        if bool(((low >= least) & (high <= most)).all()):
            return 0
        below, above = values < least.unsqueeze(-1), values > most.unsqueeze(-1)
        return int(torch.count_nonzero(below.logical_or_(above)))

    def _chosen_range(self) -> tuple[Tensor, Tensor]:
        return self.mean_low, self.mean_high
