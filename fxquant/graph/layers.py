"""Layers over tensors that exist already."""

from __future__ import annotations

from torch import Tensor, nn


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer over the given tensors themselves; views become constants of their own.

    Args:
        weight: float ``[out, in]``; a parameter stays the caller's own.
        bias: float ``[out]`` or ``None``.
    """
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), tensor.requires_grad)
        made.register_parameter(name, tensor)
    return made
