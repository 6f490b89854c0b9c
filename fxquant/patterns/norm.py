"""Folding batch normalization into the layer before it.

    bn(w * x + b) = (w * s) * x + (b - mean) * s + beta,      s = gamma / sqrt(var + eps)

One ``s`` per output channel, computed in float64, then rounded to the weight's type. The folded
layer is a module of its own call:
another call of the same layer, with or without a batch norm, keeps the original weight.
(Jacob et al. 2018, arXiv:1712.05877, section 3.2.)
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of, op_of
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

CONVS: Final = ("conv1d", "conv2d", "conv3d")
TRANSPOSED: Final = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
LINEAR: Final = ("linear",)


def _norm_of(layers: tuple[str, ...]) -> OpExpr:
    return op("batch_norm", op(layers, var("x"), name="layer"), name="bn")


def output_channels(layer: nn.Module) -> int:
    """How many output channels (features) a convolution or linear layer has."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(getattr(layer, "out_channels", 0))


def has_fixed_statistics(match: Match) -> Reject | None:
    """The norm must be an affine map: eval mode, with running statistics."""
    bn = module_of(match.node("bn"))
    if bn.training:
        return Reject("the batch norm is in training mode", match.node("bn"))
    if getattr(bn, "running_mean", None) is None:
        return Reject("the batch norm tracks no running statistics", match.node("bn"))
    return None


def channels_agree(match: Match) -> Reject | None:
    """The norm must have one value per output channel of the layer."""
    bn, layer = module_of(match.node("bn")), module_of(match.node("layer"))
    wanted, found = output_channels(layer), getattr(bn, "num_features", None)
    if wanted != found:
        return Reject(
            f"the batch norm has {found} channels, the layer before it {wanted}", match.node("bn")
        )
    return None


def normalizes_features(match: Match) -> Reject | None:
    """After a linear the channels are the last dimension only if the input has two."""
    rank = info(match.node("layer")).rank
    if rank is None:
        return Reject(
            "the rank of the linear's input is not known: give example_inputs", match.node("layer")
        )
    if rank != 2:
        return Reject(
            f"the linear's output has {rank} dimensions, so the batch norm normalizes "
            "dimension 1, not the features",
            match.node("layer"),
        )
    return None


def memory_is_free(match: Match) -> Reject | None:
    """Nothing writes in place into a value that would disappear."""
    for node in match.nodes[1:]:
        if info(node).pinned:
            return Reject(info(node).pinned, node)
    return None


def affine_of(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """``s`` and ``beta - mean * s``, float64 [channels]."""
    mean, var_ = bn.get_buffer("running_mean").double(), bn.get_buffer("running_var").double()
    gamma, beta = bn._parameters.get("weight"), bn._parameters.get("bias")
    scale = torch.rsqrt(var_ + float(getattr(bn, "eps", 1e-5)))
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta.double()


def channel_view(scale: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """``scale`` shaped to multiply the weight along its output channels."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # A transposed weight is [in, out / groups, ...]: the inputs of group g meet its outputs.
        per_group = scale.view(layer.groups, 1, -1)
        repeated = per_group.expand(layer.groups, weight.shape[0] // layer.groups, -1)
        return repeated.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return scale.view(-1, *[1] * (weight.dim() - 1))


def folded(layer: nn.Module, bn: nn.Module) -> nn.Module:
    """A copy of ``layer`` that computes ``bn(layer(x))``.

    Args:
        layer: a convolution, transposed convolution or linear.
        bn: a batch norm in eval mode with as many channels.
    """
    with torch.no_grad():
        scale, shift = affine_of(bn)
        weight = layer.get_parameter("weight")
        bias = layer._parameters.get("bias")
        new_weight = weight * channel_view(scale, weight, layer).to(weight.dtype)
        new_bias = shift if bias is None else shift + bias.double() * scale
        twin = share_parameters(layer)
        grad = weight.requires_grad
        twin.register_parameter("weight", nn.Parameter(new_weight.to(weight.dtype), grad))
        twin.register_parameter("bias", nn.Parameter(new_bias.to(weight.dtype), grad))
    return twin


def fold(match: Match, editor: Editor) -> None:
    """Put the folded layer in the place of the layer, and let users of the norm read it."""
    layer, bn = match.node("layer"), match.node("bn")
    path = str(layer.target)
    editor.set_module(path, folded(module_of(layer), module_of(bn)))
    editor.replace(bn, layer)
    rules = (*info(layer).rules, f"fold-{_kind(layer.target, match)}-bn")
    editor.annotate(layer, rules=rules)


def _kind(_: object, match: Match) -> str:
    op_record = op_of(match.node("layer"))
    return "layer" if op_record is None else op_record.name


RULES: Final = (
    Rule(
        "fold-conv-bn",
        _norm_of((*CONVS, *TRANSPOSED)),
        fold,
        (has_fixed_statistics, channels_agree, memory_is_free),
        priority=10,
    ),
    Rule(
        "fold-linear-bn",
        _norm_of(LINEAR),
        fold,
        (has_fixed_statistics, channels_agree, normalizes_features, memory_is_free),
        priority=10,
    ),
)
