"""Tensors that a model holds and its graph reads: parameters, buffers, constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node


def device_of(model: nn.Module) -> torch.device | None:
    """The one device that all parameters are on, if there is one.

    Args:
        model: constants of it may stay elsewhere.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def held_tensor(node: object) -> Tensor | None:
    """The tensor that a ``get_attr`` reads; ``None`` if ``node`` is anything else.

    Args:
        node: an argument of a node.

    Example:
        >>> module = torch.fx.symbolic_trace(torch.nn.ReLU())
        >>> held_tensor(next(iter(module.graph.nodes))) is None
        True
    """
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None
