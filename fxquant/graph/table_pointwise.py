"""Op table: real functions of one element, and what needs floating point inside."""

from __future__ import annotations

import operator
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.chain import UnaryChain
from fxquant.graph.functions import power_of
from fxquant.graph.ops import Kind
from fxquant.graph.random_drops import RandomDrop
from fxquant.graph.table_entry import entry, plain, sig, spellings

_REAL_FUNCTIONS: Final = (
    plain("exp", torch.exp, inplace=(torch.exp_,)),
    plain("exp2", torch.exp2, torch.special.exp2, inplace=(torch.exp2_,)),
    plain("expm1", torch.expm1, torch.special.expm1, inplace=(torch.expm1_,)),
    plain("log", torch.log, inplace=(torch.log_,)),
    plain("log2", torch.log2, inplace=(torch.log2_,)),
    plain("log10", torch.log10, inplace=(torch.log10_,)),
    plain("log1p", torch.log1p, torch.special.log1p, inplace=(torch.log1p_,)),
    plain("sqrt", torch.sqrt, inplace=(torch.sqrt_,)),
    plain("rsqrt", torch.rsqrt, inplace=(torch.rsqrt_,)),
    plain("square", torch.square, inplace=(torch.square_,)),
    plain("abs", torch.abs, torch.absolute, operator.abs, inplace=(torch.abs_,), alias="absolute"),
    plain("neg", torch.neg, torch.negative, operator.neg, inplace=(torch.neg_,), alias="negative"),
    plain("sign", torch.sign),
    plain("ceil", torch.ceil, inplace=(torch.ceil_,)),
    plain("floor", torch.floor, inplace=(torch.floor_,)),
    plain("trunc", torch.trunc, torch.fix, inplace=(torch.trunc_,), alias="fix"),
    plain("frac", torch.frac, inplace=(torch.frac_,)),
    plain("erf", torch.erf, torch.special.erf, inplace=(torch.erf_,)),
    plain("erfc", torch.erfc, torch.special.erfc, inplace=(torch.erfc_,)),
    plain("erfinv", torch.erfinv, torch.special.erfinv),
    plain("sin", torch.sin, inplace=(torch.sin_,)),
    plain("cos", torch.cos, inplace=(torch.cos_,)),
    plain("tan", torch.tan, inplace=(torch.tan_,)),
    plain("asin", torch.asin, torch.arcsin, inplace=(torch.asin_,), alias="arcsin"),
    plain("acos", torch.acos, torch.arccos, inplace=(torch.acos_,), alias="arccos"),
    plain("atan", torch.atan, torch.arctan, inplace=(torch.atan_,), alias="arctan"),
    plain("sinh", torch.sinh, inplace=(torch.sinh_,)),
    plain("cosh", torch.cosh, inplace=(torch.cosh_,)),
    plain("asinh", torch.asinh, torch.arcsinh, inplace=(torch.asinh_,), alias="arcsinh"),
    plain("acosh", torch.acosh, torch.arccosh, inplace=(torch.acosh_,), alias="arccosh"),
    plain("atanh", torch.atanh, torch.arctanh, inplace=(torch.atanh_,), alias="arctanh"),
    plain("sinc", torch.sinc, torch.special.sinc, inplace=(torch.sinc_,)),
    plain("lgamma", torch.lgamma, torch.special.gammaln),
    plain("deg2rad", torch.deg2rad, inplace=(torch.deg2rad_,)),
    plain("rad2deg", torch.rad2deg, inplace=(torch.rad2deg_,)),
    plain("positive", torch.positive, operator.pos, overwriting=False),
    plain("reciprocal", torch.reciprocal, inplace=(torch.reciprocal_,)),
    entry(
        "round",
        Kind.UNARY,
        torch.round,
        sig(lambda input, *, decimals=0: None),
        functions=spellings((torch.round, torch.special.round), lambda input, *, decimals=0: None)
        | spellings((torch.round_,), lambda input, *, decimals=0: None, inplace=True),
        methods=spellings(("round",), lambda input, *, decimals=0: None)
        | spellings(("round_",), lambda input, *, decimals=0: None, inplace=True),
    ),
    entry(
        "logit",
        Kind.UNARY,
        torch.logit,
        sig(lambda input, eps=None: None),
        functions=spellings((torch.logit, torch.special.logit), lambda input, eps=None: None)
        | spellings((torch.logit_,), lambda input, eps=None: None, inplace=True),
        methods=spellings(("logit",), lambda input, eps=None: None)
        | spellings(("logit_",), lambda input, eps=None: None, inplace=True),
    ),
    entry(
        "nan_to_num",
        Kind.UNARY,
        torch.nan_to_num,
        sig(lambda input, nan=0.0, posinf=None, neginf=None: None),
        functions=spellings(
            (torch.nan_to_num_,),
            lambda input, nan=0.0, posinf=None, neginf=None: None,
            inplace=True,
        ),
        methods=spellings(("nan_to_num",), lambda input, nan=0.0, posinf=None, neginf=None: None)
        | spellings(
            ("nan_to_num_",),
            lambda input, nan=0.0, posinf=None, neginf=None: None,
            inplace=True,
        ),
    ),
    entry("unary", Kind.UNARY, None, sig(lambda input: None), modules=(UnaryChain,)),
    entry(
        "power_of",
        Kind.UNARY,
        power_of,
        sig(lambda input, base: None),
    ),
    entry(
        "rsub",
        Kind.UNARY,
        torch.rsub,
        sig(lambda input, other, *, alpha=1: None),
    ),
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
    *(
        entry(
            name,
            Kind.ARITH,
            target,
            sig(lambda input, dim: None),
            absorb={"_stacklevel": (3,), "dtype": (None,)},
            functions=spellings((target,), lambda input, dim, dtype=None: None)
            | spellings((special,), lambda input, dim, *, dtype=None: None)
            | spellings((functional,), lambda input, dim=None, _stacklevel=3, dtype=None: None),
            methods=spellings((name,), lambda input, dim, dtype=None: None),
            modules=modules,
            module_constants={nn.Softmax2d: {"dim": -3}},
        )
        for name, target, functional, special, modules in (
            (
                "softmax",
                torch.softmax,
                F.softmax,
                torch.special.softmax,
                (nn.Softmax, nn.Softmax2d),
            ),
            (
                "log_softmax",
                torch.log_softmax,
                F.log_softmax,
                torch.special.log_softmax,
                (nn.LogSoftmax,),
            ),
        )
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
        modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, RandomDrop),
    ),
)

POINTWISE: Final = (*_REAL_FUNCTIONS, *_FLOAT)
