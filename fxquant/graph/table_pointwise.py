"""Op table: elementwise ops, of one tensor (tables can hold them) and of two."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, sig, spellings


def _plain(
    name: str,
    target: Function,
    *more: Function,
    module: type[nn.Module] | None = None,
    inplace: tuple[Function, ...] = (),
    method: bool = True,
) -> Op:
    """A unary op without options: ``f(input)``, ``f(input, inplace=)``, ``x.f()``, ``x.f_()``."""
    methods: dict[str, Any] = {}
    if method:
        methods = spellings((name,), lambda input: None)
        methods |= spellings((f"{name}_",), lambda input: None, inplace=True)
    both = {
        **spellings((target, *more), lambda input, inplace=False: None),
        **spellings(inplace, lambda input: None, inplace=True),
    }
    return entry(
        name,
        Kind.UNARY,
        target,
        sig(lambda input: None),
        functions=both,
        methods=methods,
        modules=(module,) if module is not None else (),
    )


_ACTIVATIONS: Final = (
    _plain("relu", torch.relu, F.relu, module=nn.ReLU, inplace=(torch.relu_,)),
    _plain("relu6", F.relu6, module=nn.ReLU6, method=False),
    _plain("sigmoid", torch.sigmoid, F.sigmoid, module=nn.Sigmoid, inplace=(torch.sigmoid_,)),
    _plain("tanh", torch.tanh, F.tanh, module=nn.Tanh, inplace=(torch.tanh_,)),
    _plain("silu", F.silu, module=nn.SiLU, method=False),
    _plain("mish", F.mish, module=nn.Mish, method=False),
    _plain("hardswish", F.hardswish, module=nn.Hardswish, method=False),
    _plain("hardsigmoid", F.hardsigmoid, module=nn.Hardsigmoid, method=False),
    _plain("selu", F.selu, torch.selu, module=nn.SELU, inplace=(torch.selu_,), method=False),
    _plain("softsign", F.softsign, module=nn.Softsign, method=False),
    _plain("logsigmoid", F.logsigmoid, module=nn.LogSigmoid, method=False),
    _plain("tanhshrink", F.tanhshrink, module=nn.Tanhshrink, method=False),
    entry(
        "hardtanh",
        Kind.UNARY,
        F.hardtanh,
        sig(lambda input, min_val=-1.0, max_val=1.0: None),
        functions=spellings(
            (F.hardtanh,), lambda input, min_val=-1.0, max_val=1.0, inplace=False: None
        )
        | spellings((F.hardtanh_,), lambda input, min_val=-1.0, max_val=1.0: None, inplace=True),
        modules=(nn.Hardtanh,),
    ),
    entry(
        "leaky_relu",
        Kind.UNARY,
        F.leaky_relu,
        sig(lambda input, negative_slope=0.01: None),
        functions=spellings((F.leaky_relu,), lambda input, negative_slope=0.01, inplace=False: None)
        | spellings((F.leaky_relu_,), lambda input, negative_slope=0.01: None, inplace=True),
        modules=(nn.LeakyReLU,),
    ),
    entry(
        "elu",
        Kind.UNARY,
        F.elu,
        sig(lambda input, alpha=1.0: None),
        functions=spellings((F.elu,), lambda input, alpha=1.0, inplace=False: None)
        | spellings((F.elu_,), lambda input, alpha=1.0: None, inplace=True),
        modules=(nn.ELU,),
    ),
    entry(
        "celu",
        Kind.UNARY,
        F.celu,
        sig(lambda input, alpha=1.0: None),
        functions=spellings((F.celu, torch.celu), lambda input, alpha=1.0, inplace=False: None)
        | spellings((torch.celu_,), lambda input, alpha=1.0: None, inplace=True),
        modules=(nn.CELU,),
    ),
    entry(
        "gelu",
        Kind.UNARY,
        F.gelu,
        sig(lambda input, *, approximate="none": None),
        modules=(nn.GELU,),
    ),
    entry(
        "softplus",
        Kind.UNARY,
        F.softplus,
        sig(lambda input, beta=1.0, threshold=20.0: None),
        modules=(nn.Softplus,),
    ),
    entry(
        "threshold",
        Kind.UNARY,
        F.threshold,
        sig(lambda input, threshold, value: None),
        functions=spellings((F.threshold,), lambda input, threshold, value, inplace=False: None)
        | spellings((torch.threshold_,), lambda input, threshold, value: None, inplace=True),
        modules=(nn.Threshold,),
    ),
    entry(
        "hardshrink",
        Kind.UNARY,
        F.hardshrink,
        sig(lambda input, lambd=0.5: None),
        modules=(nn.Hardshrink,),
    ),
    entry(
        "softshrink",
        Kind.UNARY,
        F.softshrink,
        sig(lambda input, lambd=0.5: None),
        modules=(nn.Softshrink,),
    ),
    entry(
        "clamp",
        Kind.UNARY,
        torch.clamp,
        sig(lambda input, min=None, max=None: None),
        functions=spellings((torch.clamp, torch.clip), lambda input, min=None, max=None: None)
        | spellings(
            (torch.clamp_, torch.clip_), lambda input, min=None, max=None: None, inplace=True
        ),
        methods=spellings(("clamp", "clip"), lambda input, min=None, max=None: None)
        | spellings(("clamp_", "clip_"), lambda input, min=None, max=None: None, inplace=True)
        | spellings(("clamp_min",), lambda input, min: None)
        | spellings(("clamp_min_",), lambda input, min: None, inplace=True)
        | spellings(("clamp_max",), lambda input, max: None)
        | spellings(("clamp_max_",), lambda input, max: None, inplace=True),
    ),
)

_REAL_FUNCTIONS: Final = (
    _plain("exp", torch.exp, inplace=(torch.exp_,)),
    _plain("expm1", torch.expm1, inplace=(torch.expm1_,)),
    _plain("log", torch.log, inplace=(torch.log_,)),
    _plain("log1p", torch.log1p, inplace=(torch.log1p_,)),
    _plain("sqrt", torch.sqrt, inplace=(torch.sqrt_,)),
    _plain("rsqrt", torch.rsqrt, inplace=(torch.rsqrt_,)),
    _plain("square", torch.square, inplace=(torch.square_,)),
    _plain("abs", torch.abs, torch.absolute, operator.abs, inplace=(torch.abs_,)),
    _plain("neg", torch.neg, torch.negative, operator.neg, inplace=(torch.neg_,)),
    _plain("erf", torch.erf, inplace=(torch.erf_,)),
    _plain("sin", torch.sin, inplace=(torch.sin_,)),
    _plain("cos", torch.cos, inplace=(torch.cos_,)),
    _plain("reciprocal", torch.reciprocal, inplace=(torch.reciprocal_,)),
    entry(
        "pow",
        Kind.UNARY,
        torch.pow,
        sig(lambda input, exponent: None),
        functions=spellings((torch.pow, operator.pow), lambda input, exponent: None)
        | spellings((operator.ipow,), lambda input, exponent: None, inplace=True),
        methods=spellings(("pow",), lambda input, exponent: None)
        | spellings(("pow_",), lambda input, exponent: None, inplace=True),
    ),
)

_PAIR: Final = ("input", "other")

_BINARY: Final = (
    entry(
        "add",
        Kind.ARITH,
        torch.add,
        sig(lambda input, other, *, alpha=1: None),
        tensors=_PAIR,
        commutes=True,
        functions=spellings((operator.add,), lambda input, other: None)
        | spellings((operator.iadd,), lambda input, other: None, inplace=True),
        methods=spellings(("add",), lambda input, other, *, alpha=1: None)
        | spellings(("add_",), lambda input, other, *, alpha=1: None, inplace=True),
    ),
    entry(
        "sub",
        Kind.ARITH,
        torch.sub,
        sig(lambda input, other, *, alpha=1: None),
        tensors=_PAIR,
        functions=spellings((torch.subtract,), lambda input, other, *, alpha=1: None)
        | spellings((operator.sub,), lambda input, other: None)
        | spellings((operator.isub,), lambda input, other: None, inplace=True),
        methods=spellings(("sub", "subtract"), lambda input, other, *, alpha=1: None)
        | spellings(("sub_", "subtract_"), lambda input, other, *, alpha=1: None, inplace=True),
    ),
    entry(
        "mul",
        Kind.ARITH,
        torch.mul,
        sig(lambda input, other: None),
        tensors=_PAIR,
        commutes=True,
        functions=spellings((torch.multiply, operator.mul), lambda input, other: None)
        | spellings((operator.imul,), lambda input, other: None, inplace=True),
        methods=spellings(("mul", "multiply"), lambda input, other: None)
        | spellings(("mul_", "multiply_"), lambda input, other: None, inplace=True),
    ),
    entry(
        "div",
        Kind.ARITH,
        torch.div,
        sig(lambda input, other: None),
        tensors=_PAIR,
        absorb={"rounding_mode": (None,)},
        functions=spellings(
            (torch.div, torch.divide), lambda input, other, rounding_mode=None: None
        )
        | spellings((operator.truediv, torch.true_divide), lambda input, other: None)
        | spellings((operator.itruediv,), lambda input, other: None, inplace=True),
        methods=spellings(("div", "divide"), lambda input, other, rounding_mode=None: None)
        | spellings(("true_divide",), lambda input, other: None)
        | spellings(
            ("div_", "divide_"), lambda input, other, rounding_mode=None: None, inplace=True
        ),
    ),
    entry(
        "matmul",
        Kind.FLOAT,
        torch.matmul,
        sig(lambda input, other: None),
        tensors=_PAIR,
        functions=spellings((operator.matmul,), lambda input, other: None),
        methods=spellings(("matmul",), lambda input, other: None),
    ),
)

_FLOAT: Final = (
    entry(
        "softmax",
        Kind.FLOAT,
        torch.softmax,
        sig(lambda input, dim: None),
        absorb={"_stacklevel": (3,), "dtype": (None,)},
        functions=spellings((torch.softmax,), lambda input, dim, dtype=None: None)
        | spellings((F.softmax,), lambda input, dim, _stacklevel=3, dtype=None: None),
        methods=spellings(("softmax",), lambda input, dim, dtype=None: None),
        modules=(nn.Softmax,),
    ),
    entry(
        "dropout",
        Kind.MOVE,
        F.dropout,
        sig(lambda input, p=0.5, training=True: None),
        functions=spellings(
            (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
            lambda input, p=0.5, training=True, inplace=False: None,
        )
        | spellings((torch.dropout,), lambda input, p, training: None),
        modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    ),
)

POINTWISE: Final = (*_ACTIVATIONS, *_REAL_FUNCTIONS, *_BINARY, *_FLOAT)
