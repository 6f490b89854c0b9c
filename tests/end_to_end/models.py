"""Small models that the end-to-end tests share."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """conv-bn-relu, a residual sum, a gate, a concatenation, a pool and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(self.norm(self.conv(y)) + y)
        z = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        pooled = torch.cat([y, z], 1).mean((2, 3))
        found: Tensor = self.head(pooled)
        return found


def residual(seed: int = 0) -> nn.Module:
    """:class:`Residual` in eval mode, its norms with the statistics of :func:`images`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Residual()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                module.momentum = 1.0
        with torch.no_grad():
            model(torch.randn(64, 3, 12, 12))
    return model.eval()


def images(count: int = 3, batch: int = 4, seed: int = 1) -> list[Tensor]:
    """Batches for :func:`residual`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 12, 12, generator=generator) for _ in range(count)]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a module that a caller could notice a change of."""
    state = {
        name: (tensor.dtype, tuple(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return {
        "state": state,
        "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "grad": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
    }


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
