"""Tensors of a model that its own forward writes to: counters, caches, running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.info import info


def held_state(model: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that graphs inside ``model`` write into, each once.

    Args:
        model: holds one graph module or several; modules that keep their own code are not read.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "get_attr" and info(node).pinned:
                parent, _, leaf = str(node.target).rpartition(".")
                tensor = getattr(module.get_submodule(parent), leaf)
                found[id(tensor)] = tensor
    return tuple(found.values())


@contextlib.contextmanager
def state_kept(*models: nn.Module) -> Generator[None]:
    """Put the tensors of :func:`held_state` back at the end: trial runs leave no trace."""
    before = [(tensor, tensor.detach().clone()) for m in models for tensor in held_state(m)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
