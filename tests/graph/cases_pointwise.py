"""Spelling cases: elementwise ops."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.spelling import Case, Spelled


def _activation(make: Callable[..., nn.Module], **given: Any) -> Case:
    modules: tuple[Spelled, ...] = (Spelled(lambda: make(**given)),)
    if "inplace" in inspect.signature(make).parameters:
        modules = (*modules, Spelled(lambda: make(**given, inplace=True)))
    return Case(options=given, modules=modules)


POINTWISE: Final[dict[str, Case]] = {
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
            **{
                key: {"min": -0.5, "max": None}
                for key in ("clamp_min", "clamp_min_", torch.clamp_min, torch.clamp_min_)
            },
            **{
                key: {"min": None, "max": 0.25}
                for key in ("clamp_max", "clamp_max_", torch.clamp_max, torch.clamp_max_)
            },
        },
    ),
    **{
        name: Case(positive=True)
        for name in (
            *("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "abs", "neg", "erf"),
            *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "atanh"),
            *("exp2", "log2", "log10", "sign", "ceil", "floor", "trunc", "frac", "erfc", "erfinv"),
            *("sinc", "lgamma", "deg2rad", "rad2deg", "positive", "reciprocal"),
        )
    },
    "acosh": Case(above_one=True),
    "round": Case(options={"decimals": 1}),
    "logit": Case(options={"eps": 0.2}),
    "nan_to_num": Case(options={"nan": 0.5, "posinf": 2.0, "neginf": -2.0}),
    "rrelu": Case(
        options={"lower": 0.1, "upper": 0.3, "training": False},
        modules=(
            Spelled(lambda: nn.RReLU(0.1, 0.3)),
            Spelled(lambda: nn.RReLU(0.1, 0.3, inplace=True)),
        ),
    ),
    "glu": Case(options={"dim": 1}, modules=(Spelled(lambda: nn.GLU(1)),)),
    "pow": Case(options={"exponent": 2}),
    "unary": Case(),
    "power_of": Case(options={"base": 2}),
    "rsub": Case(options={"other": 2, "alpha": 0.5}),
    "add": Case(
        options={"alpha": 0.5}, only={f: {"alpha": 1} for f in (operator.add, operator.iadd)}
    ),
    "sub": Case(
        options={"alpha": 0.5}, only={f: {"alpha": 1} for f in (operator.sub, operator.isub)}
    ),
    "mul": Case(),
    "div": Case(positive=True),
    "maximum": Case(),
    "minimum": Case(),
    "addcmul": Case(options={"value": 0.5}),
    "addcdiv": Case(options={"value": 0.5}, positive=True),
    "lerp": Case(options={"weight": 0.25}),
    "softmax": Case(
        options={"dim": 1},
        modules=(
            Spelled(lambda: nn.Softmax(1)),
            Spelled(lambda: nn.Softmax2d(), (2, 4, 3, 3), {"dim": -3}),
        ),
    ),
    "log_softmax": Case(options={"dim": 1}, modules=(Spelled(lambda: nn.LogSoftmax(1)),)),
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
}
