"""Modules of the user's that drop something at random in training and are nothing in evaluation.

Stochastic depth is the best known: Huang et al., "Deep Networks with Stochastic Depth", 2016.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.graph.copies import deep_copy
from fxquant.graph.held_state import random_kept

_SHAPES: Final = ((2, 3, 4, 4), (2, 3, 4), (2, 3))


class RandomDrop(nn.Module):
    """Stands for such a module while a model is traced, and calls it in training only.

    Args:
        module: the module; anyone else who holds it may still set its probability.
    """

    # As of nn.Dropout, for whoever asks; the module itself knows its probability.
    p = 0.5

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """What the module makes of ``x`` in training, ``x`` in evaluation."""
        return self.module(x) if self.training else x


def with_stand_ins(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of ``model`` with stand-ins for what only drops at random, and their paths.

    Args:
        model: is given back itself where it has none.
    """
    found = {path: m for path, m in model.named_modules() if path and only_drops(m)}
    if not found:
        return model, ()
    memo: dict[int, Any] = {id(m): RandomDrop(copy.deepcopy(m)) for m in found.values()}
    return deep_copy(model, memo), tuple(found)


def take_out(root: nn.Module, paths: tuple[str, ...]) -> None:
    """Put the modules themselves back where :func:`with_stand_ins` put stand-ins.

    Args:
        root: the copy, or a copy of it.
        paths: what it gave.
    """
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        stand_in = root.get_submodule(path)
        if isinstance(stand_in, RandomDrop):
            setattr(root.get_submodule(parent), leaf, stand_in.module)


def only_drops(module: nn.Module) -> bool:
    """Whether a module of the user's own holds nothing and does nothing in evaluation."""
    if type(module).__module__.startswith("torch.") or any(module.children()):
        return False
    held = (*module.parameters(), *module.buffers())
    if held or module._forward_hooks or module._forward_pre_hooks or not _one_input(module):
        return False
    twin = copy.deepcopy(module).eval()
    return all(_gives_back(twin, torch.zeros(shape)) for shape in _SHAPES)


def _one_input(module: nn.Module) -> bool:
    needed = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 1


def _gives_back(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad(), random_kept(module):
            # What works in place, as x.tanh_() does, gives back the tensor, and changes it.
            return module(x) is x and not x._version
    # The user's code, called with what it may not be made for: then it is not what is looked for.
    except Exception:  # noqa: BLE001
        return False
