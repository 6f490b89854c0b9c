"""What every observer shares: it watches one tensor go by and chooses its quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError
from fxquant.numerics.qparams import QParams, choose_qparams
from fxquant.numerics.shards import Part, Watcher, first_fact
from fxquant.spec import QSpec

T = TypeVar("T")

CHUNK: Final = 2**17
"""How many values are worked on at a time: half a megabyte of float32 stays in the cache."""


class NonFiniteError(CalibrationError):
    """A tensor seen during calibration holds NaN or infinity.

    Args:
        path: the observed place.
        nan: how many NaN it holds.
        inf: how many infinities, counted in float32.
    """

    def __init__(self, path: str, nan: int, inf: int) -> None:
        super().__init__(
            f"{path}: {nan} NaN and {inf} infinite values during calibration: no range covers "
            "them; check this batch and the layers before this place"
        )
        self.path = path
        self.nan = nan
        self.inf = inf

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, int]]:
        """Make the error survive a trip between processes."""
        return type(self), (self.path, self.nan, self.inf)


@dataclass(frozen=True)
class ObserverSummary:
    """What an observer saw and what it chose; all numbers are 0 when it saw nothing.

    Args:
        path: the observed place.
        kind: ``"histogram"``, ``"minmax"`` or ``"moving_average"``.
        batches: how many tensors came by, empty ones included.
        elements: how many values they held.
        low: smallest value seen.
        high: largest value seen.
        range_low: smallest number the chosen codes stand for.
        range_high: largest number the chosen codes stand for.
        clipped: share of the values (0 to 1) outside that range by more than half a step; a moving
            average counts against its range at the time, a histogram within its bins.
        shape: of the first tensor that was not empty.
        dtype: of that tensor, as in ``"float32"``.
        counts: a histogram's shape for reports: about how many values fell in each of 64 equal
            bins from ``low`` to ``high``; empty for other kinds.
    """

    path: str
    kind: str
    batches: int
    elements: int
    low: float
    high: float
    range_low: float
    range_high: float
    clipped: float
    shape: tuple[int, ...] | None
    dtype: str | None
    counts: tuple[int, ...] = ()


class Observer(Watcher):
    """Return the input unchanged and remember what is needed to choose its qparams.

    The state is buffers, so ``deepcopy``, ``state_dict`` and ``.to`` keep it; nothing of the
    tensors themselves is kept. A subclass implements :meth:`_observe` and :meth:`_chosen_range`.

    Args:
        spec: what the tensor is to become.
        path: the place that is watched, for messages.
        axis: the channel axis; used only where ``spec.granularity`` is ``"channel"``.

    Raises:
        ConfigError: one scale per channel is asked for, and no axis or an observer without it.
        NonFiniteError: (in forward) the tensor holds NaN or infinity.

    Example:
        >>> from fxquant.numerics.observers import make_observer
        >>> observer = make_observer(QSpec(observer="minmax"), "conv1")
        >>> _ = observer(torch.tensor([-1.0, 1.55]))
        >>> round(observer.qparams().scale_value, 4)
        0.01
    """

    kind: ClassVar[str]
    is_observer: ClassVar[bool] = True
    """How the graph's verifier, which knows no numerics, tells an observer."""
    _per_channel: ClassVar[dict[str, float]] = {"low": math.inf, "high": -math.inf}
    low: Tensor
    high: Tensor
    tally: Tensor

    def __init__(self, spec: QSpec, path: str, axis: int | None = None) -> None:
        super().__init__()
        if spec.granularity == "channel" and axis is None:
            raise ConfigError(f"{path}: granularity 'channel' needs to know the channel axis")
        self.spec = spec
        self.path = path
        self.axis = axis if spec.granularity == "channel" else None
        self.enabled = True
        self.floating = True
        self.first_shape: tuple[int, ...] | None = None
        self.first_dtype: str | None = None
        self._before: dict[str, Tensor] | None = None
        # Per channel, the number of channels is known only once a tensor came by.
        channels = 1 if self.axis is None else 0
        for name, start in self._per_channel.items():
            self.register_buffer(name, torch.full((channels,), start))
        self.register_buffer("tally", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: T) -> T:
        """Return ``x`` itself; what is not a floating-point tensor only clears ``floating``."""
        if not self.enabled:
            return x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            self.floating = False
            return x
        with torch.no_grad():
            self._watch(x.detach())
        return x

    @property
    def seen(self) -> bool:
        """Whether at least one value came by."""
        return int(self.tally[1]) > 0

    def qparams(self) -> QParams:
        """Choose the qparams for everything seen so far.

        Raises:
            CalibrationError: nothing was seen.
        """
        self._need_values()
        low, high = self._chosen_range()
        return choose_qparams(low, high, self.spec, self.axis)

    def _need_values(self) -> None:
        if not self.seen:
            batches = int(self.tally[0])
            raise CalibrationError(
                f"{self.path}: calibration brought no values here ({batches} empty tensors): pass "
                "data whose forward reaches this place, or leave it in float"
            )

    def summary(self) -> ObserverSummary:
        """Report what was seen and chosen; works before anything was seen too."""
        batches, elements, outside = (int(n) for n in self.tally.tolist())
        if not elements:
            return ObserverSummary(
                self.path, self.kind, batches, 0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None
            )
        qparams = self.qparams()
        low, high = qparams.representable()
        return ObserverSummary(
            path=self.path,
            kind=self.kind,
            batches=batches,
            elements=elements,
            low=float(self.low.min()),
            high=float(self.high.max()),
            range_low=float(low.min()),
            range_high=float(high.max()),
            clipped=self._clipped(qparams, outside / elements),
            shape=self.first_shape,
            dtype=self.first_dtype,
            counts=self._report_counts(),
        )

    def begin_part(self) -> None:
        """Put what was seen aside and begin anew."""
        self._before = self._state()
        self._forget()

    def part(self) -> Part:
        """What was seen since then; nothing of the tensors themselves."""
        facts = {"shape": self.first_shape, "dtype": self.first_dtype}
        return Part(self._before or {}, self._state(), facts, self.floating)

    def join_parts(self, parts: Sequence[Part]) -> None:
        """Take in what each process saw; the order of the processes does not matter."""
        self._restore(parts[0].before)
        self._before = None
        for part in parts:
            self._take_in(part.own)
        self.first_shape, self.first_dtype = (first_fact(n, parts) for n in ("shape", "dtype"))
        self.floating = all(part.floating for part in parts)

    def drop_part(self) -> None:
        """As it was at the beginning."""
        self._restore(self._before or {})
        self._before = None

    def _state(self) -> dict[str, Tensor]:
        return {name: buffer.cpu().clone() for name, buffer in self.named_buffers()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        for name, saved in state.items():
            self.get_buffer(name).resize_(saved.shape).copy_(saved)

    def _forget(self) -> None:
        for name, start in self._per_channel.items():
            self.get_buffer(name).resize_(1 if self.axis is None else 0).fill_(start)
        self.tally.zero_()

    def _take_in(self, seen: dict[str, Tensor]) -> None:
        """Add what another observer of the same place saw."""
        low, high, tally = (seen[n].to(self.tally.device) for n in ("low", "high", "tally"))
        if int(tally[1]):
            self._fit_channels(low)
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
        self.tally.add_(tally)

    def extra_repr(self) -> str:
        """Show the place and the spec in ``print(model)``."""
        return f"path={self.path!r}, dtype={self.spec.dtype}, bits={self.spec.bits}"

    def _observe(self, values: Tensor, lows: Tensor, highs: Tensor) -> int:
        """Take in one tensor; return how many of its values are clipped.

        ``self.low`` and ``self.high`` still are the bounds of what came before.

        Args:
            values: float32, [N] in memory order, or [C, N / C] with an axis; none is NaN or inf.
            lows: the smallest value of each piece of ``CHUNK`` values, or of each channel.
            highs: the largest, likewise.
        """
        raise NotImplementedError

    def _chosen_range(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _clipped(self, qparams: QParams, counted: float) -> float:
        del qparams
        return counted

    def _report_counts(self) -> tuple[int, ...]:
        return ()

    def _watch(self, x: Tensor) -> None:
        if self.tally.device != x.device:
            self.to(x.device)  # Made on the CPU, it follows the model to where that runs.
        outside = 0
        if x.numel():
            if self.first_shape is None:
                self.first_shape = tuple(x.shape)
                self.first_dtype = str(x.dtype).removeprefix("torch.")
            values = self._arrange(x.to(torch.float32))
            lows, highs = self._bounds(values)
            self._fit_channels(lows)
            outside = self._observe(values, lows, highs)
            torch.minimum(self.low, self._overall(lows, torch.amin), out=self.low)
            torch.maximum(self.high, self._overall(highs, torch.amax), out=self.high)
        self.tally.add_(torch.tensor([1, x.numel(), outside], device=x.device))

    def _arrange(self, x: Tensor) -> Tensor:
        """View ``x`` as [N] in memory order, or as [C, N / C]; a copy only where it must be."""
        if self.axis is not None:
            return x.transpose(0, self.axis).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
        if x.is_contiguous():
            return x.view(-1)
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return x.permute(order).reshape(-1)

    def _bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact minima and maxima, of pieces or of channels.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        if self.axis is None:
            # Without dim= the reduction runs on all threads.
            if values.numel() <= CHUNK:
                lows, highs = (end.view(1) for end in values.aminmax())
            else:
                pieces = [piece.aminmax() for piece in values.split(CHUNK)]
                lows, highs = (torch.stack(ends) for ends in zip(*pieces, strict=True))
        else:
            # Two reductions: aminmax(dim=), in one, takes several times as long on CPUs.
            lows, highs = values.amin(1), values.amax(1)
        if not all(map(math.isfinite, lows.tolist() + highs.tolist())):
            nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
            raise NonFiniteError(self.path, nan, inf)
        return lows, highs

    def _overall(self, ends: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Reduce the ends of pieces to that of the tensor, [1]; those of channels stay."""
        whole = self.axis is not None or ends.numel() == 1
        return ends if whole else reduce(ends, 0, keepdim=True)

    def _fit_channels(self, lows: Tensor) -> None:
        if self.axis is None or self.low.shape == lows.shape:
            return
        if self.low.numel():
            raise CalibrationError(
                f"{self.path}: axis {self.axis} had {self.low.numel()} channels and now has "
                f"{lows.numel()}: one scale per channel needs a fixed number of them"
            )
        for name, start in self._per_channel.items():
            self.get_buffer(name).resize_(lows.shape).fill_(start)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take on the number of channels that was saved; torch refuses a changed shape."""
        for name in self._per_channel:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and self.axis is not None:
                self.get_buffer(name).resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
