"""Weights that modules compute anew in every call, replaced by their values in a copy."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_COMPUTES_A_WEIGHT: Final = (WeightNorm, SpectralNorm, BasePruningMethod)
_PARALLEL: Final = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def settle(root: nn.Module) -> None:
    """Make static what is static in eval mode: weight norm, spectral norm, parametrizations.

    Compiled modules inside are replaced by the modules they were compiled from.

    Args:
        root: a copy of the user's model, in eval mode; changed in place.
    """
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, uncompiled(child))
    for module in list(root.modules()):
        _settle_hooks(module)
        if parametrize.is_parametrized(module):
            _settle_parametrizations(module)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; any other module is returned as it is."""
    # Nobody has compiled anything while this is not loaded, and it takes a second to load.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    while frames is not None and isinstance(module, frames.OptimizedModule):
        module = module._orig_mod
    return module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``."""
    while isinstance(model, nn.Module):
        inner = model.module if isinstance(model, _PARALLEL) else uncompiled(model)
        if inner is model:
            break
        model = inner
    return model


def computes_a_weight(hook: object) -> bool:
    """Whether a forward pre-hook belongs to ``weight_norm``, ``spectral_norm`` or pruning."""
    return isinstance(hook, _COMPUTES_A_WEIGHT)


def _settle_hooks(module: nn.Module) -> None:
    """The older ``nn.utils.weight_norm``, and pruning, compute the weight in a forward pre-hook."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if not isinstance(hook, _COMPUTES_A_WEIGHT):
            continue
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        with torch.no_grad():
            hook(module, ())
        value = getattr(module, name)
        if isinstance(hook, BasePruningMethod):
            del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        else:
            hook.remove(module)
        del module._forward_pre_hooks[key]
        _put(module, name, value)
    hooks: tuple[dict[int, Any], ...] = (
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
    )
    for registry in hooks:
        for key, hook in list(registry.items()):
            # They look for the tensors that the weight was computed from.
            if _home(hook).startswith("torch.nn.utils."):
                del registry[key]


def _home(hook: Any) -> str:
    """The module that defines a hook; torch wraps functions that want the module too."""
    inner = getattr(hook, "hook", hook)
    return str(getattr(inner, "__module__", ""))


def _settle_parametrizations(module: nn.Module) -> None:
    with torch.no_grad():
        values = {name: getattr(module, name).clone() for name in module.parametrizations}  # type: ignore[union-attr]
    # Not remove_parametrizations(): it changes the class, which a copy shares with the user's
    # own module.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        _put(module, name, value)


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    module._parameters.pop(name, None)
    module.__dict__.pop(name, None)
    module.register_parameter(name, nn.Parameter(value.detach().clone()))
