"""What every op of the table is called with, and which canonical arguments that must give."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import trained

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spelled:
    """A module that spells an op.

    Args:
        make: makes it.
        shape: of its input, where the case's own does not fit.
        options: canonical arguments, where the case's own are not those of the module.
    """

    make: Callable[[], nn.Module]
    shape: Shape | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Case:
    """How the spellings of one op are exercised.

    Args:
        shape: of each tensor input.
        options: the canonical arguments that are not tensors, defaults written out.
        modules: modules that spell the op.
        parameters: shapes of the tensors of an op with parameters, by argument name.
        positive: inputs lie in 0.1 to 0.9.
        gone: canonical form drops the call.
        joins: how many tensors a join takes.
        only: function or method to the options that it can say.
        shapes: function to the input shape that it takes.
    """

    shape: Shape = (2, 4, 6)
    options: dict[str, Any] = field(default_factory=dict)
    modules: tuple[Spelled, ...] = ()
    parameters: dict[str, Shape] = field(default_factory=dict)
    positive: bool = False
    gone: bool = False
    joins: int = 0
    only: dict[Any, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[Any, Shape] = field(default_factory=dict)


def _activation(make: Callable[..., nn.Module], **given: Any) -> Case:
    modules: tuple[Spelled, ...] = (Spelled(lambda: make(**given)),)
    if "inplace" in inspect.signature(make).parameters:
        modules = (*modules, Spelled(lambda: make(**given, inplace=True)))
    return Case(options=given, modules=modules)


def _conv(rank: int, make: Callable[..., nn.Module]) -> Case:
    kernel, one, two = (3,) * rank, (1,) * rank, (2,) * rank
    return Case(
        (2, 4) + (7,) * rank,
        {"stride": two, "padding": one, "dilation": one, "groups": 2},
        (Spelled(lambda: make(4, 6, 3, stride=2, padding=1, groups=2)),),
        {"weight": (6, 2, *kernel), "bias": (6,)},
    )


def _deconv(rank: int, make: Callable[..., nn.Module]) -> Case:
    kernel, one, two = (3,) * rank, (1,) * rank, (2,) * rank
    given = {"stride": two, "padding": one, "output_padding": one, "groups": 2, "dilation": one}
    return Case(
        (2, 4) + (4,) * rank,
        given,
        (Spelled(lambda: make(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),),
        {"weight": (4, 3, *kernel), "bias": (6,)},
    )


def _norm(make: Callable[..., nn.Module], *sides: int) -> Spelled:
    return Spelled(lambda: trained(make(4, eps=1e-3)), (2, 4, *sides))


def _max_pool(rank: int, make: Callable[..., nn.Module]) -> Case:
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}
    return Case((2, 4) + (8,) * rank, given, (Spelled(lambda: make(**given)),))


def _avg_pool(rank: int, make: Callable[..., nn.Module]) -> Case:
    given: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    given |= {"ceil_mode": True, "count_include_pad": False}
    if rank > 1:
        given["divisor_override"] = None
    return Case((2, 4) + (8,) * rank, given, (Spelled(lambda: make(**given)),))


def _pooled(make: Callable[..., nn.Module]) -> Spelled:
    return Spelled(lambda: make(3))


_NEAREST: Final[dict[str, Any]] = {
    "size": None,
    "scale_factor": 2.0,
    "mode": "nearest",
    "align_corners": None,
    "recompute_scale_factor": None,
}

CASES: Final[dict[str, Case]] = {
    "conv1d": _conv(1, nn.Conv1d),
    "conv2d": _conv(2, nn.Conv2d),
    "conv3d": _conv(3, nn.Conv3d),
    "conv_transpose1d": _deconv(1, nn.ConvTranspose1d),
    "conv_transpose2d": _deconv(2, nn.ConvTranspose2d),
    "conv_transpose3d": _deconv(3, nn.ConvTranspose3d),
    "linear": Case(
        modules=(
            Spelled(lambda: nn.Linear(6, 3)),
            Spelled(lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 3)),
        ),
        parameters={"weight": (3, 6), "bias": (3,)},
    ),
    "batch_norm": Case(
        options={"momentum": 0.1, "eps": 1e-3},
        modules=(
            _norm(nn.BatchNorm1d, 5),
            _norm(nn.BatchNorm2d, 5, 5),
            _norm(nn.BatchNorm3d, 3, 3, 3),
            _norm(nn.SyncBatchNorm, 5, 5),
        ),
        parameters={"running_mean": (4,), "running_var": (4,), "weight": (4,), "bias": (4,)},
    ),
    "layer_norm": Case(
        options={"normalized_shape": (6,), "eps": 1e-3},
        modules=(Spelled(lambda: nn.LayerNorm(6, eps=1e-3)),),
        parameters={"weight": (6,), "bias": (6,)},
    ),
    "group_norm": Case(
        options={"num_groups": 2, "eps": 1e-3},
        modules=(Spelled(lambda: nn.GroupNorm(2, 4, eps=1e-3)),),
        parameters={"weight": (4,), "bias": (4,)},
    ),
    "embedding": Case(
        options={"padding_idx": 1},
        modules=(Spelled(lambda: nn.Embedding(5, 3, padding_idx=1)),),
        parameters={"weight": (5, 3)},
    ),
    "prelu": Case(modules=(Spelled(lambda: nn.PReLU(4)),)),
    "relu": _activation(nn.ReLU),
    "relu6": _activation(nn.ReLU6),
    "sigmoid": _activation(nn.Sigmoid),
    "tanh": _activation(nn.Tanh),
    "silu": _activation(nn.SiLU),
    "mish": _activation(nn.Mish),
    "hardswish": _activation(nn.Hardswish),
    "hardsigmoid": _activation(nn.Hardsigmoid),
    "selu": _activation(nn.SELU),
    "softsign": _activation(nn.Softsign),
    "logsigmoid": _activation(nn.LogSigmoid),
    "tanhshrink": _activation(nn.Tanhshrink),
    "hardtanh": _activation(nn.Hardtanh, min_val=-0.5, max_val=0.75),
    "leaky_relu": _activation(nn.LeakyReLU, negative_slope=0.2),
    "elu": _activation(nn.ELU, alpha=0.7),
    "celu": _activation(nn.CELU, alpha=0.7),
    "gelu": _activation(nn.GELU, approximate="tanh"),
    "softplus": _activation(nn.Softplus, beta=2.0, threshold=5.0),
    "threshold": _activation(nn.Threshold, threshold=0.3, value=0.1),
    "hardshrink": _activation(nn.Hardshrink, lambd=0.3),
    "softshrink": _activation(nn.Softshrink, lambd=0.3),
    "clamp": Case(
        options={"min": -0.5, "max": 0.25},
        only={
            name: {"min": -0.5, "max": None} if "min" in name else {"min": None, "max": 0.25}
            for name in ("clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
        },
    ),
    **{
        name: Case(positive=True)
        for name in (
            *("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "abs", "neg", "erf"),
            *("sin", "cos", "reciprocal"),
        )
    },
    "pow": Case(options={"exponent": 2}),
    "add": Case(
        options={"alpha": 0.5}, only={f: {"alpha": 1} for f in (operator.add, operator.iadd)}
    ),
    "sub": Case(
        options={"alpha": 0.5}, only={f: {"alpha": 1} for f in (operator.sub, operator.isub)}
    ),
    "mul": Case(),
    "div": Case(positive=True),
    "matmul": Case(shape=(2, 4, 4)),
    "softmax": Case(options={"dim": 1}, modules=(Spelled(lambda: nn.Softmax(1)),)),
    "dropout": Case(
        options={"p": 0.5, "training": False},
        modules=(
            Spelled(lambda: nn.Dropout(0.5)),
            Spelled(lambda: nn.Dropout1d(0.5)),
            Spelled(lambda: nn.Dropout2d(0.5), (2, 4, 3, 3)),
            Spelled(lambda: nn.Dropout3d(0.5), (2, 4, 3, 3, 3)),
            Spelled(lambda: nn.AlphaDropout(0.5)),
        ),
        gone=True,
        shapes={F.dropout2d: (2, 4, 3, 3), F.dropout3d: (2, 4, 3, 3, 3)},
    ),
    "reshape": Case(options={"shape": (2, 24)}),
    "flatten": Case(
        shape=(2, 3, 2, 2),
        options={"start_dim": 1, "end_dim": 2},
        modules=(Spelled(lambda: nn.Flatten(1, 2)),),
    ),
    "permute": Case(options={"dims": (0, 2, 1)}),
    "transpose": Case(options={"dim0": 1, "dim1": 2}),
    "squeeze": Case(shape=(2, 1, 6), options={"dim": 1}),
    "unsqueeze": Case(options={"dim": 1}),
    "expand": Case(shape=(2, 1, 6), options={"size": (2, 4, 6)}),
    "narrow": Case(options={"dim": 2, "start": 1, "length": 3}),
    "select": Case(options={"dim": 2, "index": 3}),
    "getitem": Case(options={"index": (slice(None), slice(1, 3))}),
    "contiguous": Case(gone=True),
    "repeat": Case(options={"repeats": (1, 2, 1)}),
    "flip": Case(options={"dims": (1,)}),
    "roll": Case(options={"shifts": 2, "dims": 1}),
    "index_select": Case(options={"dim": 1, "index": torch.tensor([2, 0])}),
    "clone": Case(gone=True),
    "pad": Case(options={"pad": (1, 2), "mode": "constant", "value": None}),
    "pixel_shuffle": Case(
        shape=(2, 4, 3, 3),
        options={"upscale_factor": 2},
        modules=(Spelled(lambda: nn.PixelShuffle(2)),),
    ),
    "pixel_unshuffle": Case(
        shape=(2, 4, 4, 4),
        options={"downscale_factor": 2},
        modules=(Spelled(lambda: nn.PixelUnshuffle(2)),),
    ),
    "channel_shuffle": Case(
        shape=(2, 4, 4, 4), options={"groups": 2}, modules=(Spelled(lambda: nn.ChannelShuffle(2)),)
    ),
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
    "cat": Case(options={"dim": 1}, joins=2),
    "stack": Case(options={"dim": 1}, joins=2),
    "chunk": Case(options={"chunks": 2, "dim": 1}),
    "split": Case(options={"split_size_or_sections": [1, 3], "dim": 1}),
    "unbind": Case(options={"dim": 1}),
    "size": Case(options={"dim": 1}),
    "dim": Case(),
    "numel": Case(),
    "max_pool1d": _max_pool(1, nn.MaxPool1d),
    "max_pool2d": _max_pool(2, nn.MaxPool2d),
    "max_pool3d": _max_pool(3, nn.MaxPool3d),
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
            ("max", 1, nn.AdaptiveMaxPool1d),
            ("max", 2, nn.AdaptiveMaxPool2d),
            ("max", 3, nn.AdaptiveMaxPool3d),
        )
    },
    "mean": Case(options={"dim": (1, 2), "keepdim": True}),
}
