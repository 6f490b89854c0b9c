"""Copies of modules: of one that keeps its weights, and quick ones of whole models."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any, Final, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def share_parameters(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with its own attributes and the very same parameters and buffers."""
    twin = copy.copy(module)
    # copy.copy shares the registries themselves; each twin needs its own.
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[registry] = copy.copy(module.__dict__[registry])
    return twin


_ATOMS: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
)
_CONTAINERS: Final = frozenset({dict, OrderedDict, list, set})
_REGISTRIES: Final = frozenset({"_parameters", "_buffers", "_modules"})
_COPYING: Final = (
    "__new__",
    "__deepcopy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)


def deep_copy(root: M, memo: dict[int, Any]) -> M:
    """What ``copy.deepcopy(root, memo)`` gives, several times as fast.

    Every module has a dozen empty dictionaries, for hooks, and copy.deepcopy takes its time over
    each. Modules that say themselves how to be copied are asked, as ever.

    Args:
        root: any module.
        memo: as for ``copy.deepcopy``: ids of objects, and what stands for them in the copy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> twin = deep_copy(model, {})
        >>> twin[0].weight is model[0].weight, bool((twin[0].weight == model[0].weight).all())
        (False, True)
    """
    usual: dict[type, bool] = {}
    for module in root.modules():
        _module(module, memo, usual)
    made = copy.deepcopy(root, memo)
    _flatten_recurrent(root, made)
    return made


def _flatten_recurrent(root: nn.Module, made: nn.Module) -> None:
    """Lay the weights of recurrent layers side by side again, which kernels of GPUs ask for.

    Copies lie each by itself, and every call would move them together, with a warning. (Layers on
    a processor are left as they are.)
    """
    layers = [module for module in made.modules() if isinstance(module, nn.RNNBase)]
    if layers:
        held = {id(parameter) for parameter in root.parameters()}
        for layer in layers:
            # What is shared with the original is not moved under its feet.
            if not any(id(weight) in held for weight in layer.parameters(recurse=False)):
                layer.flatten_parameters()


def _module(module: nn.Module, memo: dict[int, Any], usual: dict[type, bool]) -> None:
    """Put a copy into ``memo`` of a module that is copied in the usual way."""
    cls = type(module)
    if cls not in usual:
        usual[cls] = _is_usual(cls)
    if id(module) in memo or not usual[cls]:
        return
    twin = memo[id(module)] = cls.__new__(cls)
    for child in module._modules.values():
        if child is not None:
            _module(child, memo, usual)
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _REGISTRIES and type(value) is dict:
            state[name] = {key: copy.deepcopy(held, memo) for key, held in value.items()}
        else:
            state[name] = _value(value, memo)
    twin.__setstate__(state)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    cls = type(value)
    if cls in _ATOMS or (cls is tuple and all(type(item) in _ATOMS for item in value)):
        return value
    if cls in _CONTAINERS and not value:
        return memo.setdefault(id(value), cls())
    return copy.deepcopy(value, memo)


def _is_usual(cls: type) -> bool:
    """Whether copy.deepcopy would copy nothing but the attributes of such a module."""
    return (
        all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPYING)
        and not any("__slots__" in vars(base) for base in cls.__mro__)
        and cls not in copyreg.dispatch_table
    )
