"""Modules that quantize and dequantize during training: of activations, and of weights.

All state is tensors of fixed shape, so ``state_dict``, ``deepcopy``, ``.to``, DDP and checkpoints
keep all of it. The two switches are plain booleans beside the buffer that stores them: code that
branches on a tensor would wait for the GPU in every call, and could not be compiled as one graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor, nn

from fxquant.numerics.fake_quant import fake_quantize_trained
from fxquant.numerics.observer import NonFiniteError
from fxquant.numerics.qparams import SMALLEST_SCALE, QParams, steps_from_range
from fxquant.numerics.ranks import is_distributed, largest_everywhere
from fxquant.numerics.shards import Part, Watcher, steps_together
from fxquant.spec import QSpec

T = TypeVar("T")

AVERAGING: Final = 0.01
"""The weight of each further batch in the range of an activation."""

_STORAGE: Final = {"uint8": torch.uint8, "int8": torch.int8}


class FakeQuantizer(nn.Module):
    """What both kinds share: switches, a scale and zero point, and how they are read at the end.

    Args:
        spec: what the tensor is to become.
        path: the place in the user's model, for messages.
        channels: how many scales there are.
        axis: their axis in the tensor; ``None``: one scale.
    """

    is_observer: ClassVar[bool] = True
    """How the graph's verifier tells that it must be gone after training."""
    scale: Tensor
    zero_point: Tensor
    switches: Tensor

    def __init__(self, spec: QSpec, path: str, channels: int = 1, axis: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.path = path
        self.axis = axis
        self.observing = True
        self.quantizing = True
        middle = 1 << (spec.bits - 1) if spec.symmetric and spec.dtype == "uint8" else 0
        ones, zeros = torch.ones(channels), torch.full((channels,), float(middle))
        for name, tensor, fixed in (("scale", ones, False), ("zero_point", zeros, spec.symmetric)):
            if spec.learned and not fixed:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("switches", torch.tensor([1, 1], dtype=torch.uint8))

    def switch(self, *, observing: bool | None = None, quantizing: bool | None = None) -> None:
        """Turn watching ranges, or quantization, on or off; ``None`` leaves it as it is."""
        self.observing = self.observing if observing is None else observing
        self.quantizing = self.quantizing if quantizing is None else quantizing
        with torch.no_grad():
            states = [self.observing, self.quantizing]
            self.switches.copy_(torch.tensor(states, dtype=torch.uint8, device="cpu"))

    def scale_in_use(self) -> Tensor:
        """The scale that values are rounded with.

        A step of training may bring a learned one below 0, where it would stay and let nothing
        through. It counts by its size, so that the next steps can correct it.
        """
        return self.scale.abs().clamp(min=SMALLEST_SCALE) if self.spec.learned else self.scale

    def qparams(self) -> QParams:
        """The scales and zero points in use now.

        Raises:
            QParamError: training brought one of them out of its range: it is not finite.
        """
        low, high = self.spec.quant_min, self.spec.quant_max
        scale = self.scale_in_use().detach().to("cpu", torch.float32)
        zero = self.zero_point.detach().to("cpu").round().clamp(low, high).to(torch.int32)
        dtype = _STORAGE[self.spec.dtype]
        return QParams(scale.clone(), zero, low, high, dtype, self.axis)

    def extra_repr(self) -> str:
        """Show the place, the spec and the switches in ``print(model)``."""
        on = [n for n in ("observing", "quantizing") if getattr(self, n)]
        spec = f"dtype={self.spec.dtype}, bits={self.spec.bits}"
        return f"path={self.path!r}, {spec}, {' and '.join(on) or 'switched off'}"

    def _be_with(self, x: Tensor) -> None:
        """Move to where ``x`` is: a model may be spread over several devices."""
        if self.scale.device != x.device:
            self.to(x.device)

    def _set(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        with torch.no_grad():
            self.scale.copy_(scale)
            if zero_point is not None:
                self.zero_point.copy_(zero_point)

    def _fake(self, x: Tensor, step: Tensor, zero: Tensor, count: int) -> Tensor:
        low, high = self.spec.quant_min, self.spec.quant_max
        share = 1.0 / math.sqrt(max(1, count * high)) if self.spec.learned else 1.0
        if self.spec.learned:
            zero = zero.clamp(low, high)
        return fake_quantize_trained(x, step, zero, low, high, share)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        observing, quantizing = self.switches.tolist()
        self.observing, self.quantizing = bool(observing), bool(quantizing)


def in_backward() -> bool:
    """Whether autograd runs this forward a second time, for a gradient checkpoint."""
    # A compiled model recomputes inside its own graph, without running a module again.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class FakeQuantize(FakeQuantizer, Watcher):
    """Return what is left of an activation in a few bits, and follow its range while training.

    The range is a moving average of minimum and maximum (of a spec with ``observer="minmax"``: the
    widest so far). It moves only in training mode: evaluation changes nothing. Batches with NaN
    or infinity, which loss scaling skips, leave it as it is; in calibration they are an error.
    Under ``torch.distributed`` all ranks use the range of the whole batch. Until a range is known
    values pass as they are.

    Args:
        spec: what the tensor is to become.
        path: the place in the user's model.

    Example:
        >>> fake = FakeQuantize(QSpec(), "conv1")
        >>> fake(torch.tensor([0.0, 0.1234, 2.55])).tolist()
        [0.0, 0.11999999731779099, 2.549999952316284]
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, spec: QSpec, path: str) -> None:
        super().__init__(spec, path)
        self.floating = True
        self.calibrating = False
        # Whether there is a range, for code that is compiled: it cannot branch on a tensor.
        self.started = False
        self._steps: list[tuple[Tensor, Tensor]] | None = None
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(1))
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))

    @property
    def seen(self) -> bool:
        """Whether a value came by while it was watching."""
        return int(self.batches) > 0

    def forward(self, x: T) -> T:
        """Return ``x`` quantized and dequantized; what is no floating-point tensor passes."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            self.floating = False
            return x
        if self.observing and (self.training or self.calibrating):
            self._observe(x.detach())
        if self.calibrating or not self.quantizing or not self.started:
            return x
        count = x.numel() // x.shape[0] if x.dim() and x.shape[0] else 1
        return self._fake(x, self.scale_in_use(), self.zero_point, count)  # type: ignore[return-value]  # T is Tensor here

    def start(self, found: QParams) -> None:
        """Begin with what calibration found; from there it goes on as after a first batch.

        Args:
            found: one scale and zero point.
        """
        low, high = found.representable()
        with torch.no_grad():
            self.low.copy_(low)
            self.high.copy_(high)
            self.batches.fill_(1)
            self.started = True
            self._choose()
            if (found.quant_min, found.quant_max) == (self.spec.quant_min, self.spec.quant_max):
                self._set(found.scale, found.zero_point)

    def begin_part(self) -> None:
        """Only write down the ends of what comes by."""
        self._steps = []

    def part(self) -> Part:
        """The ends, in their order."""
        return Part(floating=self.floating, steps=tuple(self._steps or ()))

    def join_parts(self, parts: Sequence[Part]) -> None:
        """Follow the steps of all processes together, as in training."""
        self._steps = None
        self.floating = all(part.floating for part in parts)
        for low, high in steps_together(parts):
            self._follow(low.to(self.low.device), high.to(self.low.device))

    def drop_part(self) -> None:
        """Nothing has changed yet."""
        self._steps = None

    def _observe(self, x: Tensor) -> None:
        if in_backward():
            return
        self._be_with(x)
        with torch.no_grad():
            alone = self._steps is not None or not is_distributed()
            if not x.numel():
                # The other processes may have something, and wait for what this one brings.
                if alone:
                    return
                low = torch.full((), math.inf, device=x.device)
                high = -low
            else:
                low, high = torch.aminmax(x)
            ends = torch.stack((-low, high)).to(torch.float32)
            if self.calibrating and x.numel() and not bool(torch.isfinite(ends).all()):
                nan, inf = int(x.isnan().sum()), int(x.to(torch.float32).isinf().sum())
                raise NonFiniteError(self.path, nan, inf)
            if not alone:
                # What a maximum makes of NaN differs from one library to the next.
                ends = torch.where(ends.isnan(), math.inf, ends)
                ends = largest_everywhere(ends)
            low, high = -ends[:1], ends[1:]
            if self._steps is None:
                self._follow(low, high)
            else:
                self._steps.append((low.cpu(), high.cpu()))

    def _follow(self, low: Tensor, high: Tensor) -> None:
        self.started = True
        with torch.no_grad():
            usable = torch.isfinite(low) & torch.isfinite(high)
            first = self.batches == 0
            if self.spec.learned:
                # The first batch sets the step; from then on it is learned.
                usable = usable & first
            if self.spec.observer == "minmax":
                low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
                weight = torch.ones_like(low)
            else:
                weight = torch.where(first, 1.0, AVERAGING)
            # Not lerp: what is not finite must not reach the sum.
            self.low.add_(torch.where(usable, low - self.low, 0.0) * weight)
            self.high.add_(torch.where(usable, high - self.high, 0.0) * weight)
            self.batches.add_(usable)
            self._choose(usable if self.spec.learned else None)

    def _choose(self, only: Tensor | None = None) -> None:
        """The same steps as :func:`~fxquant.numerics.qparams.choose_qparams`, without waiting."""
        scale, zero = steps_of(self.low, self.high, self.spec)
        if only is not None:
            scale = torch.where(only, scale, self.scale)
            zero = torch.where(only, zero, self.zero_point)
        self._set(scale, zero)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.started = self.seen


def steps_of(low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, float32, as :func:`choose_qparams` would find them."""
    low, high = low.clamp(max=0.0).double(), high.clamp(min=0.0).double()
    scale, zero = steps_from_range(low, high, spec)
    return scale, zero.to(torch.float32)
