"""Fake-quantization of weights, which are quantized as they will be once a batch norm is folded.

The folded weight of an output channel is ``w * f`` with ``f = gamma / sqrt(running_var + eps)``,
and ``round(w f / s) s = round(w / (s / |f|)) (s / |f|) f``: so the weight itself is quantized, with
the step ``s / |f|``. With one scale per channel ``f`` cancels out. A convolution and its batch norm
stay two modules, nothing is divided by a gamma that may be 0, and with quantization off the unit
is what it was. (The fold is that of Jacob et al. 2018, arXiv:1712.05877, section 3.2, with the
correction of Krishnamoorthi 2018, arXiv:1806.08342: running statistics in the weight, those of
the batch in the norm.)

The statistics are those of the rounded layer, which is what is deployed. Those of the float weight,
as in the first paper, cost a second convolution; on CIFAR-10 with 4 bits per tensor they were no
better, and without their gradient far worse: a shifted mean is not taken out. Where statistics
swing, norms are frozen (``Schedule(freeze_norms_at=0)``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.numerics.fake_quantizer import FakeQuantizer
from fxquant.numerics.qparams import SMALLEST_SCALE
from fxquant.spec import QSpec


def fold_factor(gamma: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """The size of what a batch norm multiplies each channel by, float32 ``[C]``; no gradient.

    Args:
        gamma: the weight of the norm, if it has one.
        running_var: its running variance.
        eps: its epsilon.
    """
    scale = torch.rsqrt(running_var.detach().to(torch.float32) + eps)
    return scale if gamma is None else scale * gamma.detach().to(torch.float32).abs()


class FakeQuantizeWeight(FakeQuantizer):
    """Return what is left of a weight in a few bits; symmetric, per tensor or per channel.

    While it is observing the scale follows the weight, in training and in evaluation; when that
    is switched off, the scale stays.

    Args:
        spec: what the weight is to become.
        path: the layer.
        shape: of the weight.
        axis: its channel axis; used where ``spec.granularity`` is ``"channel"``.
        groups: of a transposed convolution, whose groups share the scale of a channel.

    Example:
        >>> spec = QSpec("int8", bits=2, symmetric=True, granularity="channel", observer="minmax")
        >>> fake = FakeQuantizeWeight(spec, "fc", (2, 2), 0)
        >>> fake(torch.tensor([[1.0, 0.4], [2.0, -1.5]])).tolist()
        [[1.0, 0.0], [2.0, -2.0]]
    """

    batches: Tensor

    def __init__(
        self, spec: QSpec, path: str, shape: tuple[int, ...], axis: int, groups: int = 1
    ) -> None:
        per_channel = spec.granularity == "channel"
        channels = shape[axis] if per_channel else 1
        super().__init__(spec, path, channels, axis if per_channel else None)
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
        # What the buffer says, for code that is compiled: it cannot branch on a tensor.
        self.started = False
        self.groups = groups
        self._channel_axis = axis
        self._view = [1] * len(shape)
        if per_channel:
            self._view[axis] = -1

    def forward(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        """Return ``weight`` quantized and dequantized.

        Args:
            weight: the weight that is trained.
            factor: ``[C]``, what a batch norm will multiply each output channel by; only where
                one scale serves channels that are multiplied by different numbers.
        """
        spread = None if factor is None else self.spread(factor, weight)
        if self._follows():
            self._be_with(weight)
            with torch.no_grad():
                self._set(self.covering(weight.detach(), spread))
                self.batches.fill_(1)
            self.started = True
        if not self.quantizing:
            return weight
        step = self.step(weight.detach(), self.scale_in_use(), spread)
        zero = torch.zeros_like(step, requires_grad=False)
        return self._fake(weight, step, zero, weight.numel() // self.scale.numel())

    def spread(self, factor: Tensor, weight: Tensor) -> Tensor:
        """``factor`` shaped to multiply the weight along its output channels."""
        if self._channel_axis == 1:
            # A transposed weight is [in, out / groups, ...]: inputs of a group meet its outputs.
            rows = factor.view(self.groups, 1, -1)
            rows = rows.expand(self.groups, weight.shape[0] // self.groups, -1)
            return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
        return factor.view(-1, *[1] * (weight.dim() - 1))

    def covering(self, weight: Tensor, spread: Tensor | None = None) -> Tensor:
        """The scales that cover the weight as it is now; the old ones if it is not finite."""
        size = weight.to(torch.float32).abs()
        size = size if spread is None else size * spread
        if self.axis is None:
            most = size.amax().view(1)
        else:
            most = size.amax([d for d in range(size.dim()) if d != self.axis])
        scale = most.double() / self.spec.quant_max
        scale = torch.where(scale == 0.0, 1.0, scale.clamp(min=SMALLEST_SCALE)).to(torch.float32)
        return torch.where(torch.isfinite(scale), scale, self.scale.detach())

    def step(self, weight: Tensor, scale: Tensor, spread: Tensor | None = None) -> Tensor:
        """The step of each element of the weight, in a shape that broadcasts."""
        step = scale.view(self._view)
        if spread is None:
            return step
        # A channel that is multiplied by 0 keeps steps of its own: nothing is seen of it.
        own = weight.to(torch.float32).abs().amax([*range(1, weight.dim())], keepdim=True)
        own = (own / self.spec.quant_max).clamp(min=SMALLEST_SCALE)
        return torch.where(spread > 0, step / spread.clamp(min=SMALLEST_SCALE), own)

    def codes(self, weight: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The codes of the weight, as float32, and the scale of each step before folding.

        Args:
            weight: the trained weight.
            factor: as for a call.
        """
        with torch.no_grad():
            spread = None if factor is None else self.spread(factor, weight)
            follows = self._follows()
            scale = self.covering(weight, spread) if follows else self.scale_in_use().detach()
            scale = scale.clamp(min=SMALLEST_SCALE)
            steps = (weight.to(torch.float32) / self.step(weight, scale, spread)).round_()
            return steps.clamp_(self.spec.quant_min, self.spec.quant_max), scale

    def _follows(self) -> bool:
        """A step that is learned follows the weight until training has used it once."""
        return self.observing and not (self.spec.learned and self.started)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.started = bool(self.batches)


class Rounding:
    """Rounds the weight of one layer as training does, with the batch norm that follows it.

    Args:
        fake: of the layer.
        norm: the batch norm that one scale for all channels has to look at, if there is one.
    """

    def __init__(self, fake: FakeQuantizeWeight, norm: nn.Module | None = None) -> None:
        self._fake, self._norm = fake, norm

    def __call__(self, weight: Tensor) -> Tensor:
        """What is left of the weight."""
        norm: Any = self._norm
        factor = None if norm is None else fold_factor(norm.weight, norm.running_var, norm.eps)
        made: Tensor = self._fake(weight, factor)
        return made
