"""Op table: activation functions, all but ``glu`` functions of one element."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, plain, sig, spellings

ACTIVATION: Final = (
    plain("relu", torch.relu, F.relu, module=nn.ReLU, inplace=(torch.relu_,)),
    plain("relu6", F.relu6, module=nn.ReLU6, method=False),
    plain(
        "sigmoid",
        torch.sigmoid,
        F.sigmoid,
        torch.special.expit,
        module=nn.Sigmoid,
        inplace=(torch.sigmoid_,),
    ),
    plain("tanh", torch.tanh, F.tanh, module=nn.Tanh, inplace=(torch.tanh_,)),
    plain("silu", F.silu, module=nn.SiLU, method=False),
    plain("mish", F.mish, module=nn.Mish, method=False),
    plain("hardswish", F.hardswish, module=nn.Hardswish, method=False),
    plain("hardsigmoid", F.hardsigmoid, module=nn.Hardsigmoid, method=False),
    plain("selu", F.selu, torch.selu, module=nn.SELU, inplace=(torch.selu_,), method=False),
    plain("softsign", F.softsign, module=nn.Softsign, method=False),
    plain("logsigmoid", F.logsigmoid, module=nn.LogSigmoid, method=False),
    plain("tanhshrink", F.tanhshrink, module=nn.Tanhshrink, method=False),
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
        "rrelu",
        Kind.UNARY,
        F.rrelu,
        sig(lambda input, lower=1 / 8, upper=1 / 3, training=False: None),
        functions=spellings(
            (F.rrelu,), lambda input, lower=1 / 8, upper=1 / 3, training=False, inplace=False: None
        )
        | spellings((torch.rrelu,), lambda input, lower=1 / 8, upper=1 / 3, training=False: None)
        | spellings(
            (torch.rrelu_,),
            lambda input, lower=1 / 8, upper=1 / 3, training=False: None,
            inplace=True,
        ),
        modules=(nn.RReLU,),
    ),
    entry(
        "glu",
        Kind.ARITH,
        F.glu,
        sig(lambda input, dim=-1: None),
        modules=(nn.GLU,),
    ),
    entry(
        "hardshrink",
        Kind.UNARY,
        F.hardshrink,
        sig(lambda input, lambd=0.5: None),
        methods=spellings(("hardshrink",), lambda input, lambd=0.5: None),
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
        )
        | spellings((torch.clamp_min,), lambda input, min: None)
        | spellings((torch.clamp_min_,), lambda input, min: None, inplace=True)
        | spellings((torch.clamp_max,), lambda input, max: None)
        | spellings((torch.clamp_max_,), lambda input, max: None, inplace=True),
        methods=spellings(("clamp", "clip"), lambda input, min=None, max=None: None)
        | spellings(("clamp_", "clip_"), lambda input, min=None, max=None: None, inplace=True)
        | spellings(("clamp_min",), lambda input, min: None)
        | spellings(("clamp_min_",), lambda input, min: None, inplace=True)
        | spellings(("clamp_max",), lambda input, max: None)
        | spellings(("clamp_max_",), lambda input, max: None, inplace=True),
    ),
)
