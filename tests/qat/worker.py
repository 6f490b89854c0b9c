"""What each process of the distributed test runs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxquant

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


def train_shard(rank: int, folder: str) -> None:
    """Train under DDP and write the state of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        prepared = fxquant.prepare(plain(), mode="qat", example_inputs=(shard(0, 0),))
        model = DistributedDataParallel(prepared)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(BATCHES):
            optimizer.zero_grad()
            model(shard(step, rank)).square().mean().backward()
            optimizer.step()
        torch.save(prepared.state_dict(), Path(folder) / f"rank{rank}.pt")
        # What is wrapped converts as it is.
        fxquant.convert(model, backend="reference")
    finally:
        dist.destroy_process_group()
