"""Op table: averages over pixels and dimensions, and interpolation."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, one_way, sig, spellings


def _adaptive(rank: int, target: Function, direct: Function, module: Any) -> Op:
    return entry(
        f"adaptive_avg_pool{rank}d",
        Kind.ARITH,
        target,
        sig(lambda input, output_size: None),
        functions=spellings((direct,), lambda input, output_size: None),
        modules=(module,),
        tidy=one_way,
    )


AVERAGES: Final = (
    entry(
        "avg_pool1d",
        Kind.ARITH,
        F.avg_pool1d,
        sig(
            lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True: (
                None
            )
        ),
        modules=(nn.AvgPool1d,),
        tidy=one_way,
    ),
    *(
        entry(
            f"avg_pool{rank}d",
            Kind.ARITH,
            target,
            sig(
                lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None: (
                    None
                )
            ),
            modules=(module,),
            tidy=one_way,
        )
        for rank, target, module in (
            (2, F.avg_pool2d, nn.AvgPool2d),
            (3, F.avg_pool3d, nn.AvgPool3d),
        )
    ),
    _adaptive(1, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, nn.AdaptiveAvgPool1d),
    _adaptive(2, F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d),
    _adaptive(3, F.adaptive_avg_pool3d, torch._C._nn.adaptive_avg_pool3d, nn.AdaptiveAvgPool3d),
    entry(
        "mean",
        Kind.ARITH,
        torch.mean,
        sig(lambda input, dim=None, keepdim=False: None),
        absorb={"dtype": (None,)},
        functions=spellings((torch.mean,), lambda input, dim=None, keepdim=False, dtype=None: None),
        methods=spellings(("mean",), lambda input, dim=None, keepdim=False, dtype=None: None),
    ),
    entry(
        "interpolate",
        Kind.ARITH,
        F.interpolate,
        sig(
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None: (
                None
            )
        ),
        absorb={"antialias": (False,)},
        functions=spellings(
            (F.interpolate,),
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False: (
                None
            ),
        ),
        modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
)
