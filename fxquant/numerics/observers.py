"""All observers, how to make the one a spec asks for, and the one-shot qparams of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fxquant.numerics.error_search import weight_qparams
from fxquant.numerics.histogram import HistogramObserver, search_together
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
    "summaries",
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


def summaries(observers: Sequence[Observer]) -> tuple[ObserverSummary, ...]:
    """What each observer saw and chose; the ranges are searched together, which is much faster.

    Args:
        observers: of any kind, whether or not they saw anything.

    Example:
        >>> summaries([make_observer(QSpec(), "conv1")])[0].elements
        0
    """
    search_together(o for o in observers if isinstance(o, HistogramObserver))
    return tuple(observer.summary() for observer in observers)
