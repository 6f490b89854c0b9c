"""Copies of modules that keep training one weight."""

from __future__ import annotations

import copy

from torch import nn


def share_parameters(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with its own attributes and the very same parameters and buffers."""
    twin = copy.copy(module)
    # copy.copy shares the registries themselves; each twin needs its own.
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[registry] = copy.copy(module.__dict__[registry])
    return twin
