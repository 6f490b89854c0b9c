"""What all processes of a distributed run agree on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes work on one run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest_everywhere(values: Tensor) -> Tensor:
    """The largest of each number over all processes; alone, the numbers themselves.

    Args:
        values: changed in place where there are several processes.
    """
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
