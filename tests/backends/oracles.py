"""What tests of kernels share: codes over the whole range, float64 truth, the distance to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.backends.x86 import X86
from fxquant.graph.info import QType
from fxquant.numerics.qparams import QParams

KERNEL_TOLERANCE = 0.6
"""Half a code of rounding and a tenth for float32: the sum is exact in int32, and scale, bias and
activation are a handful of float32 operations on numbers below 2**8 codes (2**-24 each)."""


def uint8(scale: float = 0.05, zero_point: int = 128) -> QType:
    """The type of full uint8 codes."""
    return QType(scale, zero_point, 0, 255, torch.uint8)


def int8(scale: float = 0.05, zero_point: int = 0) -> QType:
    """The type of full int8 codes."""
    return QType(scale, zero_point, -128, 127, torch.int8)


def qparams(qtype: QType) -> QParams:
    """The same for the references of ``fxquant.numerics.integer``."""
    return QParams.per_tensor(
        qtype.scale, qtype.zero_point, qtype.quant_min, qtype.quant_max, qtype.dtype
    )


def some_codes(*shape: int, qtype: QType | None = None, seed: int = 0) -> Tensor:
    """Random codes over the whole range, both ends included where there is room for them."""
    qtype = qtype or uint8()
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(qtype.quant_min, qtype.quant_max + 1, shape, generator=generator)
    flat = codes.view(-1)
    if flat.numel() >= 2:
        flat[0], flat[-1] = qtype.quant_min, qtype.quant_max
    return codes.to(qtype.dtype)


def weight_codes(
    *shape: int, pairs: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random codes as a weight may have them on this machine, both ends included.

    Where kernels add products in pairs of 16 bits the library emits no weights two of whose
    products could pass them; ``pairs=False`` is for sums over one input channel, which have none.
    """
    most = 64 if pairs and X86().saturates_pairs else 127
    codes = torch.randint(-most, most + 1, shape, generator=generator).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = -most, most
    return codes


def real(codes: Tensor, qtype: QType) -> Tensor:
    """The numbers that codes mean, float64."""
    return (codes.to(torch.float64) - qtype.zero_point) * qtype.scale


def fitting(values: Tensor, zero_point: int, like: QType | None = None) -> QType:
    """A type whose codes most of ``values`` fall on: a few percent saturate, as in real use."""
    base = like or uint8()
    usual = max(float(values.abs().quantile(0.97)), 1e-3) if values.numel() else 1.0
    room = max(base.quant_max - zero_point, zero_point - base.quant_min)
    return QType(usual / room, zero_point, base.quant_min, base.quant_max, base.dtype)


def assert_within(got: Tensor, wanted: Tensor, writes: QType) -> None:
    """Every code within :data:`KERNEL_TOLERANCE` of the unrounded float64 result."""
    assert got.dtype == writes.dtype
    assert got.shape == wanted.shape
    exact = wanted.to(torch.float64) / writes.scale + writes.zero_point
    exact = exact.clamp(writes.quant_min, writes.quant_max)
    error = (got.to(torch.float64) - exact).abs()
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= KERNEL_TOLERANCE, f"off by {worst:.3f} codes at {int(error.argmax())}"
    if got.numel() >= 64:
        # A test whose results all saturate would pass whatever the kernel does.
        inside = (got > writes.quant_min) & (got < writes.quant_max)
        assert inside.double().mean() > 0.1


def same_layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values with other strides, other storage offsets, other memory formats."""
    order = list(range(x.dim()))[::-1]
    padded = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    padded[..., 2:-1] = x
    every_second = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    every_second[..., ::2] = x
    found = {
        "contiguous": x.contiguous(),
        "transposed": x.permute(order).contiguous().permute(order),
        "offset": padded[..., 2:-1],
        "strided": every_second[..., ::2],
        "swapped": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    if x.dim() == 4:
        found["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        found["channels_last_3d"] = x.contiguous(memory_format=torch.channels_last_3d)
    for name, view in found.items():
        assert torch.equal(view, x), name
    return found


def assert_layout_is_no_matter(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Exactly the same codes whatever the strides of the input; and expanded inputs too."""
    wanted = run(x.contiguous())
    for name, view in same_layouts(x).items():
        before = view.clone()
        assert torch.equal(run(view), wanted), name
        assert torch.equal(view, before), f"{name}: the input was written to"
    one = x[:1]
    assert torch.equal(run(one.expand(3, *x.shape[1:])), run(one.repeat(3, *([1] * (x.dim() - 1)))))
