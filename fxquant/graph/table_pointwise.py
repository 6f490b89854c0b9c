"""Op table: real functions of one element, and what needs floating point inside."""

from __future__ import annotations

import operator
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, plain, sig, spellings

_REAL_FUNCTIONS: Final = (
    plain("exp", torch.exp, inplace=(torch.exp_,)),
    plain("expm1", torch.expm1, inplace=(torch.expm1_,)),
    plain("log", torch.log, inplace=(torch.log_,)),
    plain("log1p", torch.log1p, inplace=(torch.log1p_,)),
    plain("sqrt", torch.sqrt, inplace=(torch.sqrt_,)),
    plain("rsqrt", torch.rsqrt, inplace=(torch.rsqrt_,)),
    plain("square", torch.square, inplace=(torch.square_,)),
    plain("abs", torch.abs, torch.absolute, operator.abs, inplace=(torch.abs_,)),
    plain("neg", torch.neg, torch.negative, operator.neg, inplace=(torch.neg_,)),
    plain("erf", torch.erf, inplace=(torch.erf_,)),
    plain("sin", torch.sin, inplace=(torch.sin_,)),
    plain("cos", torch.cos, inplace=(torch.cos_,)),
    plain("reciprocal", torch.reciprocal, inplace=(torch.reciprocal_,)),
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

_FLOAT: Final = (
    entry(
        "matmul",
        Kind.FLOAT,
        torch.matmul,
        sig(lambda input, other: None),
        tensors=("input", "other"),
        functions=spellings((operator.matmul,), lambda input, other: None),
        methods=spellings(("matmul",), lambda input, other: None),
    ),
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

POINTWISE: Final = (*_REAL_FUNCTIONS, *_FLOAT)
