"""Modules that hold integer weights of any layout: linears, and tables of embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.numerics.stored import rows_of


class StoredParts(nn.Module):
    """Holds the codes, scales and zero points of a weight of any bits, and how they are laid out.

    Args:
        weight: codes, as in :class:`fxquant.numerics.stored.StoredWeight`.
        scale: as there.
        zero_point: as there.
        layout: the group size, the width of a row, and whether codes are packed.
        bits: how many bits a code has.
        bias: float ``[rows]`` or ``None``.
    """

    def __init__(
        self,
        weight: Tensor | None,
        scale: Tensor | None,
        zero_point: Tensor | None,
        layout: tuple[int, int, bool],
        bits: int,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Buffers: integers cannot require gradients, and what users do to all parameters may.
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("bias", bias)
        self.layout, self.bits = layout, bits

    @property
    def kind(self) -> str:
        """How the weight is stored, in words: ``int4 per group of 32``."""
        scale = self.get_buffer("weight_scale")
        size, width, _ = self.layout
        if size < width:
            granularity = f"group of {size}"
        else:
            granularity = "tensor" if scale.shape[0] == 1 else "channel 0"
        return f"int{self.bits} per {granularity}"

    @property
    def elements(self) -> int:
        """How many weights there are."""
        return self.get_buffer("weight").shape[0] * self.layout[1]

    def real_rows(self, indices: Tensor) -> Tensor:
        """The rows at ``indices`` as float32 ``[..., width]``."""
        scale: Tensor = self.get_buffer("weight_scale")
        zeros: Tensor | None = self._buffers["weight_zero_point"]
        codes = F.embedding(indices, self.get_buffer("weight"))
        if scale.shape[0] > 1:
            scale = F.embedding(indices, scale)
            zeros = None if zeros is None else F.embedding(indices, zeros)
        return rows_of(codes, scale, zeros, *self.layout)

    def extra_repr(self) -> str:
        """Size and granularity, for ``print(model)``."""
        rows = self.get_buffer("weight").shape[0]
        return f"{rows}, {self.layout[1]}, {self.kind}"


class StoredEmbedding(StoredParts):
    """An embedding whose table is stored as integers; the arguments are those of its parts."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table as float32 ``[..., width]``; ``input`` holds indices."""
        return self.real_rows(input)


class StoredEmbeddingBag(StoredParts):
    """Sums, means or maxima of rows of a table that is stored as integers.

    Args:
        bag: the float module it stands for.
        parts: what holds its table.
    """

    def __init__(self, bag: nn.EmbeddingBag, parts: StoredParts) -> None:
        held = parts._buffers
        weight, scale = parts.get_buffer("weight"), parts.get_buffer("weight_scale")
        super().__init__(weight, scale, held["weight_zero_point"], parts.layout, parts.bits)
        self.mode, self.include_last_offset = bag.mode, bag.include_last_offset
        self.padding_idx = bag.padding_idx

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`torch.nn.EmbeddingBag.forward`."""
        flat = input.reshape(-1)
        rows = self.real_rows(flat)
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
