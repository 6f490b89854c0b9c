"""Whether the int8 kernels of this torch, on this processor, add products in pairs of 16 bits.

The kernels are asked, not the processor: which instructions oneDNN uses depends on what it was
built with and on ``ONEDNN_MAX_CPU_ISA`` too, and an answer for the wrong kernels would be silently
wrong numbers (``vpmaddubsw`` saturates, see :func:`fxquant.numerics.integer.pair_saturates`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

P = ParamSpec("P")
R = TypeVar("R")
TAKES_UNSIGNED: Final = TorchVersion(torch.__version__) >= TorchVersion("2.13")
"""Whether ``torch._int_mm`` takes uint8 codes on a processor: that of torch 2.11 does not."""
_WIDTH: Final = 64
_CODE: Final = 255
_WEIGHT: Final = 127


def asked_once(probe: Callable[P, R]) -> functools._lru_cache_wrapper[R]:
    """Keep what a question to the kernels of the processor was answered.

    It is asked with tensors on the processor, whatever torch's default device is at that moment.
    """

    @functools.cache
    @functools.wraps(probe)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return probe(*args, **kwargs)

    return ask


def has_vnni() -> bool:
    """Whether this processor adds u8*s8 products straight into 32 bits."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(probe()) if probe is not None else False


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = (getattr(torch.cpu, name, None) for name in probes)
    return any(probe() for probe in found if probe is not None)


def has_tiles() -> bool:
    """Whether this processor multiplies whole tiles of bfloat16 (AMX)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False


@asked_once
def has_avx512_kernels() -> bool:
    """Whether convolutions and linears run on the kernels for AVX512 with VNNI."""
    probe = getattr(torch.cpu, "_is_avx512_supported", None)
    return probe is not None and bool(probe()) and not layers_saturate()


@asked_once
def layers_saturate() -> bool:
    """Whether the kernels of convolutions and linears lose the largest products."""
    onednn, zeros = torch.ops.onednn, torch.zeros(_WIDTH, dtype=torch.int32)
    codes = torch.full((_WIDTH, _WIDTH), _CODE, dtype=torch.uint8)
    weight = torch.full((_WIDTH, _WIDTH), _WEIGHT, dtype=torch.int8)
    scale = torch.ones(_WIDTH)
    plain: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    linear = onednn.qlinear_pointwise.default(
        codes, 1.0, 0, onednn.qlinear_prepack(weight, None), scale, zeros, None, *plain
    )
    walk = ([1, 1], [0, 0], [1, 1], 1)
    filters = weight.view(_WIDTH, _WIDTH, 1, 1).expand(-1, -1, 3, 3).contiguous()
    packed = onednn.qconv_prepack(filters, scale, 1.0, 0, *walk, None)
    pixels = codes.view(1, _WIDTH, 8, 8)
    conv = onednn.qconv_pointwise.default(pixels, 1.0, 0, packed, scale, zeros, None, *walk, *plain)
    exact = float(_CODE * _WEIGHT * _WIDTH)
    return not (bool((linear == exact).all()) and bool((conv == 9 * exact).all()))


@asked_once
def products_saturate() -> bool:
    """Whether ``torch._int_mm`` does; without VNNI torch has a loop of its own, which does not."""
    codes = torch.full((_WIDTH, _WIDTH), _CODE, dtype=torch.uint8)
    weight = torch.full((_WIDTH, _WIDTH), _WEIGHT, dtype=torch.int8)
    return not bool((integer_product(codes, weight) == _CODE * _WEIGHT * _WIDTH).all())


def integer_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The exact product of two matrices of codes, int32 ``[rows, columns]``.

    Args:
        a: uint8 or int8 ``[rows, inner]``, on a processor.
        b: int8 ``[inner, columns]``.
        out: where to write it.
    """
    if a.dtype == torch.int8 or TAKES_UNSIGNED:
        return torch._int_mm(a, b, out=out)
    # Codes are 128 less, and the sums of columns 128 times more.
    made = torch._int_mm((a ^ 128).view(torch.int8), b, out=out)
    return made.add_(b.sum(0, dtype=torch.int32), alpha=128)
