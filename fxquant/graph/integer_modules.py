"""Modules that hold integer weights and compute on every device: what lookups become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hold_codes(module: nn.Module, codes: Tensor, scale: Tensor) -> None:
    """Keep integers in the place of a module's weight.

    Args:
        module: a module that has a float weight.
        codes: what it holds from now on: a buffer, for integers cannot require gradients.
        scale: their scale.
    """
    del module._parameters["weight"]
    module.register_buffer("weight", codes)
    module.register_buffer("weight_scale", scale)


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
        hold_codes(self, codes, scale)

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


class IntegerEmbeddingBag(nn.EmbeddingBag):
    """Sums, means or maxima of rows of an int8 table.

    Args:
        bag: the float module it stands for.
        codes: int8 ``[rows, width]``.
        scale: float32 ``[rows]`` or ``[1]``.

    Example:
        >>> codes, scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([0.5])
        >>> bag = IntegerEmbeddingBag(nn.EmbeddingBag(2, 2, mode="sum"), codes, scale)
        >>> bag(torch.tensor([[0, 1]]))
        tensor([[2., 1.]])
    """

    weight_scale: Tensor

    def __init__(self, bag: nn.EmbeddingBag, codes: Tensor, scale: Tensor) -> None:
        super().__init__(
            codes.shape[0],
            codes.shape[1],
            mode=bag.mode,
            include_last_offset=bag.include_last_offset,
            padding_idx=bag.padding_idx,
            device="meta",
        )
        hold_codes(self, codes, scale)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`torch.nn.EmbeddingBag.forward`: only the rows that are read become float."""
        flat = input.reshape(-1)
        rows = F.embedding(flat, self.weight).to(torch.float32)
        scale = self.weight_scale
        rows.mul_(scale if scale.numel() == 1 else F.embedding(flat, scale.unsqueeze(1)))
        places = torch.arange(flat.numel(), dtype=input.dtype, device=input.device)
        skipped = None
        if self.padding_idx is not None:
            # Padding counts for nothing, in means too: all of it reads one row more.
            skipped = flat.numel()
            places = places.masked_fill(flat == self.padding_idx, skipped)
            rows = F.pad(rows, (0, 0, 0, 1))
        return F.embedding_bag(
            places.view(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=skipped,
        )

    def extra_repr(self) -> str:
        """Size, mode and granularity, for ``print(model)``."""
        kind = "row" if self.weight_scale.numel() > 1 else "tensor"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.mode}, int8 per {kind}"
