"""Op table: ops with parameters, whose canonical form is a call of the standard ``nn`` module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from fxquant.graph.integer_modules import IntegerEmbedding, IntegerEmbeddingBag
from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import adopt, entry, sig, spellings


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * rank


def _build_conv(
    cls: Callable[..., nn.Module], rank: int
) -> Callable[[Mapping[str, Any]], nn.Module]:
    def build(given: Mapping[str, Any]) -> nn.Module:
        weight, groups = given["weight"], given["groups"]
        padding = given["padding"]
        module = cls(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_tuple(given["stride"], rank),
            padding=padding if isinstance(padding, str) else _tuple(padding, rank),
            dilation=_tuple(given["dilation"], rank),
            groups=groups,
            bias=given["bias"] is not None,
            device="meta",
        )
        return adopt(module, given, ("weight", "bias"))

    return build


def _build_conv_transpose(
    cls: Callable[..., nn.Module], rank: int
) -> Callable[[Mapping[str, Any]], nn.Module]:
    def build(given: Mapping[str, Any]) -> nn.Module:
        weight, groups = given["weight"], given["groups"]
        module = cls(
            weight.shape[0],
            weight.shape[1] * groups,
            tuple(weight.shape[2:]),
            stride=_tuple(given["stride"], rank),
            padding=_tuple(given["padding"], rank),
            output_padding=_tuple(given["output_padding"], rank),
            groups=groups,
            bias=given["bias"] is not None,
            dilation=_tuple(given["dilation"], rank),
            device="meta",
        )
        return adopt(module, given, ("weight", "bias"))

    return build


def _build_linear(given: Mapping[str, Any]) -> nn.Module:
    out_features, in_features = given["weight"].shape
    bias = given["bias"] is not None
    return adopt(
        nn.Linear(in_features, out_features, bias, device="meta"), given, ("weight", "bias")
    )


def _build_embedding(given: Mapping[str, Any]) -> nn.Module:
    weight = given["weight"]
    module = nn.Embedding(
        weight.shape[0], weight.shape[1], padding_idx=given["padding_idx"], device="meta"
    )
    return adopt(module, given, ("weight",))


def _build_prelu(given: Mapping[str, Any]) -> nn.Module:
    return adopt(nn.PReLU(given["weight"].numel(), device="meta"), given, ("weight",))


def _conv(rank: int, functions: tuple[Function, ...], module: type[nn.Module]) -> Op:
    like = lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None
    return entry(
        f"conv{rank}d",
        Kind.CONTRACT,
        None,
        sig(like),
        tensors=("input", "weight", "bias"),
        functions=spellings(functions, like),
        modules=(module,),
        build=_build_conv(module, rank),
    )


def _conv_transpose(rank: int, functions: tuple[Function, ...], module: type[nn.Module]) -> Op:
    like = (
        lambda input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1: (
            None
        )
    )
    return entry(
        f"conv_transpose{rank}d",
        Kind.CONTRACT,
        None,
        sig(like),
        tensors=("input", "weight", "bias"),
        functions=spellings(functions, like),
        modules=(module,),
        build=_build_conv_transpose(module, rank),
    )


_linear = lambda input, weight, bias=None: None
WEIGHTED: Final = (
    _conv(1, (F.conv1d,), nn.Conv1d),
    _conv(2, (F.conv2d,), nn.Conv2d),
    _conv(3, (F.conv3d,), nn.Conv3d),
    _conv_transpose(1, (F.conv_transpose1d,), nn.ConvTranspose1d),
    _conv_transpose(2, (F.conv_transpose2d,), nn.ConvTranspose2d),
    _conv_transpose(3, (F.conv_transpose3d,), nn.ConvTranspose3d),
    entry(
        "linear",
        Kind.CONTRACT,
        None,
        sig(_linear),
        tensors=("input", "weight", "bias"),
        functions=spellings((F.linear,), _linear),
        modules=(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
        build=_build_linear,
    ),
    entry(
        "embedding",
        Kind.FLOAT,
        None,
        sig(lambda input, weight, padding_idx=None: None),
        tensors=("input", "weight"),
        absorb={
            "max_norm": (None,),
            "norm_type": (2.0,),
            "scale_grad_by_freq": (False,),
            "sparse": (False,),
        },
        functions=spellings(
            (F.embedding,),
            lambda input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False: (
                None
            ),
        ),
        modules=(nn.Embedding, IntegerEmbedding),
        build=_build_embedding,
    ),
    entry(
        "embedding_bag",
        Kind.FLOAT,
        None,
        sig(lambda input, offsets=None, per_sample_weights=None: None),
        tensors=("input", "offsets", "per_sample_weights"),
        modules=(nn.EmbeddingBag, IntegerEmbeddingBag),
    ),
    entry(
        "prelu",
        Kind.ARITH,
        None,
        sig(lambda input, weight: None),
        tensors=("input", "weight"),
        functions=spellings((F.prelu,), lambda input, weight: None),
        methods=spellings(("prelu",), lambda input, weight: None),
        modules=(nn.PReLU,),
        build=_build_prelu,
    ),
)
