"""Op table: ops with parameters, whose canonical form is a call of the standard ``nn`` module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, sig, spellings


class FunctionalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm written as ``F.batch_norm``, which takes inputs of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch_norm needs at least 2 dimensions, got {input.dim()}")


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * rank


def _adopt(module: nn.Module, given: Mapping[str, Any], names: tuple[str, ...]) -> nn.Module:
    """Give ``module`` the caller's own tensors: training it trains the user's parameters."""
    for name in names:
        value = given[name]
        if isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


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
        return _adopt(module, given, ("weight", "bias"))

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
        return _adopt(module, given, ("weight", "bias"))

    return build


def _build_linear(given: Mapping[str, Any]) -> nn.Module:
    out_features, in_features = given["weight"].shape
    bias = given["bias"] is not None
    return _adopt(
        nn.Linear(in_features, out_features, bias, device="meta"), given, ("weight", "bias")
    )


def _build_batch_norm(given: Mapping[str, Any]) -> nn.Module:
    mean = given["running_mean"]
    module = FunctionalBatchNorm(
        mean.shape[0],
        eps=given["eps"],
        momentum=given["momentum"],
        affine=given["weight"] is not None,
        device="meta",
    )
    module.running_mean = mean
    module.running_var = given["running_var"]
    module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    _adopt(module, given, ("weight", "bias"))
    return module.eval()


def _build_layer_norm(given: Mapping[str, Any]) -> nn.Module:
    shape = tuple(given["normalized_shape"])
    affine = given["weight"] is not None
    module = nn.LayerNorm(shape, eps=given["eps"], elementwise_affine=affine, device="meta")
    return _adopt(module, given, ("weight", "bias"))


def _build_group_norm(given: Mapping[str, Any]) -> nn.Module:
    weight = given["weight"]
    module = nn.GroupNorm(given["num_groups"], weight.shape[0], eps=given["eps"], device="meta")
    return _adopt(module, given, ("weight", "bias"))


def _build_embedding(given: Mapping[str, Any]) -> nn.Module:
    weight = given["weight"]
    module = nn.Embedding(
        weight.shape[0], weight.shape[1], padding_idx=given["padding_idx"], device="meta"
    )
    return _adopt(module, given, ("weight",))


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
_batch_norm = (
    lambda input, running_mean, running_var, weight=None, bias=None, momentum=0.1, eps=1e-5: None
)

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
        "batch_norm",
        Kind.ARITH,
        None,
        sig(_batch_norm),
        tensors=("input", "running_mean", "running_var", "weight", "bias"),
        absorb={"training": (False,)},
        functions=spellings(
            (F.batch_norm,),
            lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: (
                None
            ),
        ),
        modules=(
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.SyncBatchNorm,
            FunctionalBatchNorm,
        ),
        build=_build_batch_norm,
    ),
    entry(
        "layer_norm",
        Kind.FLOAT,
        None,
        sig(lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None),
        tensors=("input", "weight", "bias"),
        functions=spellings(
            (F.layer_norm,), lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None
        ),
        modules=(nn.LayerNorm,),
        build=_build_layer_norm,
    ),
    entry(
        "group_norm",
        Kind.FLOAT,
        None,
        sig(lambda input, num_groups, weight, bias=None, eps=1e-5: None),
        tensors=("input", "weight", "bias"),
        functions=spellings(
            (F.group_norm,), lambda input, num_groups, weight, bias=None, eps=1e-5: None
        ),
        modules=(nn.GroupNorm,),
        build=_build_group_norm,
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
        modules=(nn.Embedding,),
        build=_build_embedding,
    ),
    entry(
        "prelu",
        Kind.ARITH,
        None,
        sig(lambda input, weight: None),
        tensors=("input", "weight"),
        modules=(nn.PReLU,),
    ),
)
