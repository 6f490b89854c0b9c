"""Folding what a layer's result is multiplied with, or what is added to it, into the layer.

    conv(x) * scale + bias          a frozen batch norm (torchvision's detectors, DETR)
    linear(x) * gamma               layer scale (ConvNeXt, DINOv2; Touvron et al. 2021,
                                    arXiv:2103.17239)

as batch norms are, see :mod:`fxquant.patterns.norm`: one factor and one term per output channel,
which the model holds. Computed in float64, then rounded to the weight's type.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from fxquant.patterns.expr import OpExpr, Var, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import (
    CONVS,
    LINEAR,
    TRANSPOSED,
    channel_view,
    memory_is_free,
    output_channels,
)
from fxquant.patterns.rule import Rule

_LAYERS: Final = (*CONVS, *TRANSPOSED, *LINEAR)


def _held(node: Any) -> Tensor | None:
    """The numbers of the model's own that ``node`` reads and nothing changes."""
    found = held_tensor(node)
    return None if found is None or not found.is_floating_point() or info(node).pinned else found


def _is_held(value: Any) -> str | None:
    return None if _held(value) is not None else "the other operand is no tensor of the model"


def _of_layer(name: str, **options: Any) -> OpExpr:
    held, layer = Var("held", _is_held), op(_LAYERS, var("x"), name="layer")
    return op(name, held, layer, name="applied", **options)


def per_channel(match: Match) -> Reject | None:
    """The tensor must have one value, or one per output channel of the layer."""
    layer, held = match.node("layer"), _held(match.bound["held"])
    if layer.op != "call_module":
        return Reject("the weight of the layer is computed", layer)
    module = module_of(layer)
    if held is None or held.dtype != module.get_parameter("weight").dtype:
        return Reject("the tensor is of another type than the weight", match.root)
    if _values(held, module) is None:
        return Reject(
            f"a tensor of shape {list(held.shape)} is not one value for each of the "
            f"{output_channels(module)} channels",
            match.root,
        )
    rank = info(layer).rank
    if held.dim() > _behind(module) + 1 and (rank is None or held.dim() > rank):
        return Reject("it may give the result more dimensions: give example_inputs", match.root)
    return None


def weight_is_its_own(match: Match) -> Reject | None:
    """No other module may hold the weight: it would be stored once more."""
    owner, layer = match.root.graph.owning_module, module_of(match.node("layer"))
    weight, holders = layer.get_parameter("weight"), 0
    for module in owner.modules() if owner is not None else ():
        holders += any(parameter is weight for parameter in module._parameters.values())
    if holders > 1:
        return Reject("other modules share the weight", match.node("layer"))
    return None


def _behind(layer: nn.Module) -> int:
    """How many dimensions come after the channels."""
    return 0 if isinstance(layer, nn.Linear) else layer.get_parameter("weight").dim() - 2


def _values(held: Tensor, layer: nn.Module) -> Tensor | None:
    """One value per channel, float64, if the tensor has one for each or one for all."""
    channels, place = output_channels(layer), held.dim() - 1 - _behind(layer)
    if held.numel() == 1:
        return held.detach().double().reshape(1).expand(channels)
    if place < 0 or held.numel() != channels or held.shape[place] != channels:
        return None
    return held.detach().double().reshape(channels)


def _changed(match: Match, factor: Tensor | None, term: Tensor | None) -> nn.Module:
    """A copy of the layer whose result is multiplied with ``factor``, then added to ``term``."""
    layer = module_of(match.node("layer"))
    twin, weight = share_parameters(layer), layer.get_parameter("weight")
    bias, grad = layer._parameters.get("bias"), weight.requires_grad
    added = None if bias is None else bias.detach().double()
    with torch.no_grad():
        if factor is not None:
            scaled = weight.double() * channel_view(factor, weight, layer)
            twin.register_parameter("weight", nn.Parameter(scaled.to(weight.dtype), grad))
            added = None if added is None else added * factor
        if term is not None:
            added = term if added is None else added + term
        if added is not None:
            kept = added.to(weight.dtype).clone()
            twin.register_parameter("bias", nn.Parameter(kept, grad))
    return twin


def _put(match: Match, editor: Editor, twin: nn.Module, rule: str) -> None:
    layer = match.node("layer")
    editor.set_module(str(layer.target), twin)
    editor.replace(match.root, layer)
    editor.annotate(layer, rules=(*info(layer).rules, rule))


def _scale(match: Match, editor: Editor) -> None:
    held = _held(match.bound["held"])
    factor = None if held is None else _values(held, module_of(match.node("layer")))
    _put(match, editor, _changed(match, factor, None), "fold-scale")


def _shift(match: Match, editor: Editor) -> None:
    held = _held(match.bound["held"])
    term = None if held is None else _values(held, module_of(match.node("layer")))
    _put(match, editor, _changed(match, None, term), "fold-shift")


RULES: Final = (
    Rule(
        "fold-scale",
        _of_layer("mul"),
        _scale,
        (per_channel, weight_is_its_own, memory_is_free),
        priority=10,
    ),
    Rule(
        "fold-shift",
        _of_layer("add", alpha=1),
        _shift,
        (per_channel, memory_is_free),
        priority=10,
    ),
)
