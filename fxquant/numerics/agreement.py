"""How far one tensor is from another: sums over a stream of batches, no tensor is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How well a tensor stands for a float one.

    Args:
        sqnr: signal to quantization noise in decibels, ``10 log10(sum f^2 / sum (q - f)^2)``;
            infinite where both are equal.
        cosine: of the angle between the two, -1 to 1; 1 where both are zero.
        max_error: the largest absolute difference, in the unit of the values.
    """

    sqnr: float
    cosine: float
    max_error: float


class AgreementSums:
    """Adds up what :class:`Agreement` is made of, in float64.

    Elements that are the same infinity, or NaN in both, agree; one that is finite in one tensor
    only is an infinite error.

    Example:
        >>> sums = AgreementSums()
        >>> sums.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        >>> round(sums.agreement.sqnr, 2)
        20.0
    """

    def __init__(self) -> None:
        self.signal = self.noise = self.max_error = 0.0
        self._other = self._product = 0.0
        self.elements = 0

    def add(self, real: Tensor, other: Tensor) -> None:
        """Take in one pair.

        Args:
            real: the float tensor.
            other: what stands for it, of the same shape.
        """
        if real.numel() == 0:
            return
        self.elements += real.numel()
        real, other = real.detach().double(), other.detach().double()
        error = other - real
        if not torch.isfinite(error).all():
            same = ~real.isfinite() & ((real == other) | (real.isnan() & other.isnan()))
            real, other = real[~same], other[~same]
            if not real.numel():
                return
            error = other - real
            if not torch.isfinite(error).all():
                self.noise = self.max_error = math.inf
                return
        self.noise += _power(error)
        self.signal += _power(real)
        self._other += _power(other)
        self._product += (real * other).sum().item()
        self.max_error = max(self.max_error, error.abs().max().item())

    @property
    def agreement(self) -> Agreement:
        """What the sums come to so far."""
        length = math.sqrt(self.signal * self._other)
        if self.noise == 0:
            cosine = 1.0
        elif math.isinf(self.noise) or length == 0:
            cosine = 0.0
        else:
            cosine = min(1.0, max(-1.0, self._product / length))
        return Agreement(decibels(self.signal, self.noise), cosine, self.max_error)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise, minus infinity without signal."""
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def weight_sqnr(real: Tensor, stored: Tensor) -> float:
    """The SQNR of a weight in decibels, up to one factor for each output channel.

    Such a factor is what a folded batch norm puts into a weight; it is taken out by least squares.

    Args:
        real: float weight ``[out, ...]``.
        stored: the weight that the quantized layer computes with, of the same shape.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> weight_sqnr(weight, weight * torch.tensor([[2.0], [0.5]]))
        inf
    """
    a = real.detach().to(torch.float64).flatten(1)
    b = stored.detach().to(torch.float64).flatten(1)
    power = (a * a).sum(1, keepdim=True)
    factor = (a * b).sum(1, keepdim=True) / torch.where(power == 0, 1.0, power)
    signal = b.square().sum().item()
    noise = (b - factor * a).square().sum().item()
    # Rounding of float32 weights, and of a folded factor, is no quantization noise.
    return math.inf if noise <= signal * 1e-13 else decibels(signal, noise)


def _power(x: Tensor) -> float:
    return x.square().sum().item()
