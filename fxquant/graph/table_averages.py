"""Op table: reductions over dimensions, averages over windows, and interpolation."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, fixed, in_tuples, one_way, sig, spellings


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


def _lp_pool(rank: int, target: Function, module: Any) -> Op:
    return entry(
        f"lp_pool{rank}d",
        Kind.ARITH,
        target,
        sig(lambda input, norm_type, kernel_size, stride=None, ceil_mode=False: None),
        modules=(module,),
        tidy=one_way,
    )


def _bare_dim(arguments: dict[str, Any]) -> dict[str, Any]:
    """``x.var(False)`` means ``unbiased``, not a dimension."""
    if isinstance(arguments["dim"], bool):
        return {**arguments, "dim": None, "unbiased": arguments["dim"]}
    return arguments


def _spread(name: str, target: Function) -> Op:
    like = lambda input, dim=None, unbiased=True, keepdim=False: None
    return entry(
        name,
        Kind.ARITH,
        target,
        sig(like),
        methods=spellings((name,), like),
        tidy=_bare_dim,
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
        "sum",
        Kind.ARITH,
        torch.sum,
        sig(lambda input, dim=None, keepdim=False: None),
        absorb={"dtype": (None,)},
        functions=spellings((torch.sum,), lambda input, dim=None, keepdim=False, dtype=None: None),
        methods=spellings(("sum",), lambda input, dim=None, keepdim=False, dtype=None: None),
    ),
    *(
        entry(
            name,
            Kind.MOVE,
            target,
            sig(lambda input, dim=(), keepdim=False: None),
            tidy=in_tuples("dim"),
            functions=spellings((target,), lambda input, dim=(), keepdim=False: None)
            | spellings((whole,), lambda input: None, read=fixed()),
            methods=spellings((name,), lambda input, dim=(), keepdim=False: None)
            | spellings((whole.__name__,), lambda input: None, read=fixed()),
        )
        for name, target, whole in (
            ("amax", torch.amax, torch.max),
            ("amin", torch.amin, torch.min),
        )
    ),
    _spread("var", torch.var),
    _spread("std", torch.std),
    entry(
        "logsumexp",
        Kind.ARITH,
        torch.logsumexp,
        sig(lambda input, dim, keepdim=False: None),
        functions=spellings((torch.special.logsumexp,), lambda input, dim, keepdim=False: None),
        methods=spellings(("logsumexp",), lambda input, dim, keepdim=False: None),
    ),
    entry(
        "norm",
        Kind.ARITH,
        torch.norm,
        sig(lambda input, p="fro", dim=None, keepdim=False: None),
        absorb={"dtype": (None,), "out": (None,)},
        functions=spellings(
            (torch.norm,),
            lambda input, p="fro", dim=None, keepdim=False, out=None, dtype=None: None,
        ),
        methods=spellings(
            ("norm",), lambda input, p="fro", dim=None, keepdim=False, dtype=None: None
        ),
    ),
    entry(
        "vector_norm",
        Kind.ARITH,
        torch.linalg.vector_norm,
        sig(lambda input, ord=2, dim=None, keepdim=False: None),
        absorb={"dtype": (None,)},
        functions=spellings(
            (torch.linalg.vector_norm,),
            lambda input, ord=2, dim=None, keepdim=False, *, dtype=None: None,
        ),
    ),
    _lp_pool(1, F.lp_pool1d, nn.LPPool1d),
    _lp_pool(2, F.lp_pool2d, nn.LPPool2d),
    _lp_pool(3, F.lp_pool3d, nn.LPPool3d),
    entry(
        "interpolate",
        Kind.ARITH,
        F.interpolate,
        sig(
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False: (
                None
            )
        ),
        modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
)
