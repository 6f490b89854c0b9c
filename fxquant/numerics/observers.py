"""All observers, how to make the one a spec asks for, and the one-shot qparams of weights."""

from __future__ import annotations

from typing import Final

from fxquant.numerics.error_search import weight_qparams
from fxquant.numerics.histogram import HistogramObserver
from fxquant.numerics.observer import NonFiniteError, Observer, ObserverSummary
from fxquant.numerics.ranges import MinMaxObserver, MovingAverageObserver
from fxquant.spec import QSpec

__all__ = [
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "NonFiniteError",
    "Observer",
    "ObserverSummary",
    "make_observer",
    "weight_qparams",
]

_KINDS: Final[dict[str, type[Observer]]] = {
    kind.kind: kind for kind in (HistogramObserver, MinMaxObserver, MovingAverageObserver)
}


def make_observer(spec: QSpec, path: str, axis: int | None = None) -> Observer:
    """Make the observer that ``spec.observer`` names.

    Args:
        spec: what the tensor is to become.
        path: the place that is watched, for messages.
        axis: the channel axis; needed where ``spec.granularity`` is ``"channel"``.

    Raises:
        ConfigError: one scale per channel is asked for without an axis or of a histogram.

    Example:
        >>> make_observer(QSpec(), "conv1").kind
        'histogram'
    """
    return _KINDS[spec.observer](spec, path, axis)
