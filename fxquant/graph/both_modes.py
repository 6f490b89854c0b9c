"""Capture for training: one graph that is right in training and in evaluation mode.

The model is traced in both modes. Where the two graphs differ in nothing but whether something is
dropped at random, a module that follows ``train()`` and ``eval()`` takes that call's place. Any
other difference is a branch on ``self.training``, and one graph cannot hold both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from fxquant.errors import TraceError
from fxquant.graph.capture import SYMBOLIC, Captured, capture
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of, module_op
from fxquant.graph.random_drops import RandomDrop, take_out, with_stand_ins
from fxquant.graph.settle import computes_a_weight

_DROPOUTS: Final[Mapping[Any, type[nn.Module]]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    torch.dropout: nn.Dropout,
}
_ATTENTION: Final = F.scaled_dot_product_attention
_ARGUMENTS: Final = ("input", "p", "training")
_ATTENTION_ARGUMENTS: Final = ("query", "key", "value", "attn_mask", "dropout_p")


class AttentionDropout(nn.Module):
    """Scaled dot product attention that drops weights in training mode only.

    Args:
        p: the probability of a weight to be dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the function; ``dropout_p`` is decided by the mode."""
        kwargs["dropout_p"] = self.p if self.training else 0.0
        return _ATTENTION(*args, **kwargs)

    def extra_repr(self) -> str:
        """The probability, for ``print(model)``."""
        return f"p={self.p}"


@dataclass(frozen=True)
class Trainable:
    """A model captured for training.

    Args:
        captured: its graph, as in training mode.
        droppers: by the name of the node that calls it, what drops at random in training, and its
            path in the user's model; empty for a new module.
    """

    captured: Captured
    droppers: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)


def capture_both(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trainable:
    """Capture a model for training; it is copied and never changed.

    Args:
        model: the user's model, in either mode.
        args: positional example inputs, if there are any.
        kwargs: keyword example inputs.

    Raises:
        TraceError: it cannot be traced as a whole; it branches on ``self.training``; a weight is
            computed by a parametrization.
    """
    _refuse_parametrizations(model)
    model, drops = with_stand_ins(model)
    train = capture(model, args, kwargs, train=True)
    evaluated = capture(model, args, kwargs, evaluate=True)
    for each in (train, evaluated):
        if each.rung != SYMBOLIC:
            raise TraceError(
                f"{type(model).__name__} cannot be trained as one graph: {each.why}. Move what "
                "cannot be traced out of the model, or prepare the submodules that can on their own"
            )
    droppers = _compare(train.module, evaluated.module)
    if train.root is not None:
        take_out(train.root, drops)
    return Trainable(train, droppers)


def _refuse_parametrizations(model: nn.Module) -> None:
    for path, module in model.named_modules():
        hooked = any(computes_a_weight(hook) for hook in module._forward_pre_hooks.values())
        if hooked or parametrize.is_parametrized(module):
            raise TraceError(
                f"a weight of {path or type(model).__name__} is computed anew in every call, by a "
                "parametrization such as weight_norm: call "
                "torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm, "
                "remove_spectral_norm, prune.remove) before quantization-aware training, which "
                "trains the weight itself"
            )


def _compare(train: fx.GraphModule, evaluated: fx.GraphModule) -> dict[str, tuple[str, nn.Module]]:
    mine, theirs = list(train.graph.nodes), list(evaluated.graph.nodes)
    droppers: dict[str, tuple[str, nn.Module]] = {}
    for a, b in zip(mine, theirs, strict=False):
        if (a.op, a.target, a.name) != (b.op, b.target, b.name):
            raise _branches(a, b)
        if a.op == "call_module":
            op = module_op(module_of(a))
            if op is not None and op.name == "dropout":
                dropper = module_of(a)
                own = "" if isinstance(dropper, RandomDrop) else str(a.target)
                droppers[a.name] = (own, dropper)
        if _constants(a) != _constants(b):
            droppers[a.name] = ("", _dropper(a, b))
    if len(mine) != len(theirs):
        longer = mine if len(mine) > len(theirs) else theirs
        raise _branches(longer[min(len(mine), len(theirs))], None)
    return droppers


def _constants(node: Node) -> str:
    """The arguments of a call as text: two graphs of one model have equal names."""
    return repr((node.args, node.kwargs))


def _dropper(a: Node, b: Node) -> nn.Module:
    """The module that drops where call ``a`` does in training and ``b`` does not."""
    names = _ARGUMENTS if a.target in _DROPOUTS else _ATTENTION_ARGUMENTS
    here, there = (dict(zip(names, n.args, strict=False)) | n.kwargs for n in (a, b))
    if a.target in _DROPOUTS:
        p = here.get("p", 0.5)
        drops = here.get("training", True) is True
        keeps = there.get("training", True) is False or there.get("p", 0.5) == 0.0
        if isinstance(p, int | float) and drops and keeps:
            return _DROPOUTS[a.target](float(p))
    if a.target is _ATTENTION:
        p = here.get("dropout_p", 0.0)
        if isinstance(p, int | float) and there.get("dropout_p", 0.0) == 0.0:
            return AttentionDropout(float(p))
    raise _branches(a, b)


def _branches(a: Node, b: Node | None) -> TraceError:
    where = info(a).source or info(a).path or a.name
    other = f"%{b.name} ({info(b).source or info(b).path})" if b is not None else "nothing"
    return TraceError(
        f"the model computes something else in training mode than in evaluation mode: at {where} "
        f"it calls %{a.name} in one and {other} in the other. One graph cannot hold both sides of "
        "a branch on self.training: take the branch out of the model (an auxiliary head can be "
        "switched off, a loss computed by the caller), or prepare the submodules on both sides"
    )
