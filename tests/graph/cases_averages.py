"""Spelling cases: averages and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from tests.graph.spelling import Case, Spelled


def _avg_pool(rank: int, make: Callable[..., nn.Module]) -> Case:
    given: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    given |= {"ceil_mode": True, "count_include_pad": False}
    if rank > 1:
        given["divisor_override"] = None
    return Case((2, 4) + (8,) * rank, given, (Spelled(lambda: make(**given)),))


def _lp_pool(rank: int, make: Callable[..., nn.Module]) -> Case:
    given = {"norm_type": 3, "kernel_size": 3, "stride": 2, "ceil_mode": True}
    module = Spelled(lambda: make(**given))
    return Case((2, 4) + (8,) * rank, given, (module,), positive=True)


def _pooled(make: Callable[..., nn.Module]) -> Spelled:
    return Spelled(lambda: make(3))


_NEAREST: Final[dict[str, Any]] = {
    "size": None,
    "scale_factor": 2.0,
    "mode": "nearest",
    "align_corners": None,
    "recompute_scale_factor": None,
    "antialias": False,
}

AVERAGES: Final[dict[str, Case]] = {
    "interpolate": Case(
        shape=(2, 4, 4, 4),
        options=_NEAREST,
        modules=(
            Spelled(lambda: nn.Upsample(scale_factor=2)),
            Spelled(lambda: nn.UpsamplingNearest2d(scale_factor=2)),
            Spelled(
                lambda: nn.UpsamplingBilinear2d(scale_factor=2),
                options={**_NEAREST, "mode": "bilinear", "align_corners": True},
            ),
        ),
    ),
    "avg_pool1d": _avg_pool(1, nn.AvgPool1d),
    "avg_pool2d": _avg_pool(2, nn.AvgPool2d),
    "avg_pool3d": _avg_pool(3, nn.AvgPool3d),
    **{
        f"adaptive_{kind}_pool{rank}d": Case(
            (2, 4) + (6,) * rank, {"output_size": 3}, (_pooled(make),)
        )
        for kind, rank, make in (
            ("avg", 1, nn.AdaptiveAvgPool1d),
            ("avg", 2, nn.AdaptiveAvgPool2d),
            ("avg", 3, nn.AdaptiveAvgPool3d),
        )
    },
    "sum": Case(options={"dim": (1, 2), "keepdim": True}),
    "amax": Case(
        options={"dim": (1, 2), "keepdim": True},
        only={key: {"dim": (), "keepdim": False} for key in (torch.max, "max")},
    ),
    "amin": Case(
        options={"dim": (1, 2), "keepdim": True},
        only={key: {"dim": (), "keepdim": False} for key in (torch.min, "min")},
    ),
    "var": Case(options={"dim": (1, 2), "unbiased": False, "keepdim": True}),
    "std": Case(options={"dim": (1, 2), "unbiased": False, "keepdim": True}),
    "logsumexp": Case(options={"dim": (1, 2), "keepdim": True}),
    "norm": Case(options={"p": 1, "dim": (1, 2), "keepdim": True}),
    "vector_norm": Case(options={"ord": 3, "dim": (1, 2), "keepdim": True}),
    **{
        f"lp_pool{rank}d": _lp_pool(rank, make)
        for rank, make in ((1, nn.LPPool1d), (2, nn.LPPool2d), (3, nn.LPPool3d))
    },
    "mean": Case(options={"dim": (1, 2), "keepdim": True}),
}
