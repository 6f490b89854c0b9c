"""What running a model changes: tensors that its own forward writes to, and the random state."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.held import held_tensor
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
            tensor = held_tensor(node) if info(node).pinned else None
            if tensor is not None:
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


@contextlib.contextmanager
def random_kept(*models: object) -> Generator[None]:
    """Put the random state back at the end: the processor's, and those of GPUs the models are on.

    Args:
        models: what will be run; what is no module, and refused later, has no device.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    held = (tensor for m in modules for tensor in (*m.parameters(), *m.buffers()))
    devices = {tensor.device for tensor in held if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
