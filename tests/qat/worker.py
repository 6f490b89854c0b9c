"""The network and the batches of the distributed tests, the same in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCHES = 3


class Plain(nn.Module):
    """Nothing that depends on the size of the batch: shards add up to the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.relu(self.conv(x)).flatten(1))
        return made


def plain() -> nn.Module:
    """The same network in every process."""
    torch.manual_seed(0)
    return Plain().train()


def shard(step: int, rank: int) -> Tensor:
    """The batch of one process; ranks see other ranges."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (1.0 + rank) * torch.randn(4, 3, 8, 8, generator=generator)
