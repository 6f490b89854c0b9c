"""Modules that hold integer weights and compute on every device: what lookups become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IntegerEmbedding(nn.Embedding):
    """An embedding whose table is int8, with one scale for each row or one for all.

    Args:
        codes: int8 ``[rows, width]``.
        scale: float32 ``[rows]`` or ``[1]``.

    Example:
        >>> table = IntegerEmbedding(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5]))
        >>> table(torch.tensor([0]))
        tensor([[ 0.5000, -1.0000]])
    """

    weight_scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes.shape[0], codes.shape[1], device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table as float32 ``[..., width]``; ``input`` holds indices."""
        rows = F.embedding(input, self.weight).to(torch.float32)
        if self.weight_scale.numel() == 1:
            return rows.mul_(self.weight_scale)
        return rows.mul_(F.embedding(input, self.weight_scale.unsqueeze(1)))

    def extra_repr(self) -> str:
        """Size and granularity, for ``print(model)``."""
        kind = "row" if self.weight_scale.numel() > 1 else "tensor"
        return f"{self.num_embeddings}, {self.embedding_dim}, int8 per {kind}"
