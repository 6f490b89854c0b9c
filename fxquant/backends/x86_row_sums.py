"""Integer products of rows and a weight, of a few rows or many.

torch has two kernels: oneDNN's, which takes 140 us for one row and a 2048 x 512 weight on a
processor without VNNI, and FBGEMM's, which takes 25 to 40 (torch 2.13, two AVX2 cores; a float
product: 100). FBGEMM's is deprecated without a successor, and used as long as it is there.
Both add up integers: a row has the same sums from either.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_pairs import asked_once

_ONEDNN: Final = torch.ops.onednn
_ENDS: Final = (-128.0, 127.0)
"""FBGEMM's kernel takes scale and zero point from the least and the largest number it is given:
with these two beside every row they are 1 and 128, and rows of codes are taken as they are."""
_ENDS_ROW: Final = torch.tensor(_ENDS, device="cpu")


class RowSums:
    """Exact sums of products of int8 codes, as float32.

    Args:
        weight: int8 ``[outputs, inputs]``; on processors without VNNI, no two weights of a row may
            saturate a pair (:func:`fxquant.numerics.integer.pair_saturates`).

    Example:
        >>> sums = RowSums(torch.tensor([[1, 2], [3, -4]], dtype=torch.int8))
        >>> room = sums.room(1)
        >>> room[:, :2] = torch.tensor([100, -1.0])
        >>> sums(room)
        tensor([[ 98., 304.]])
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._legacy = has_fbgemm()
        if self._legacy:
            wide = F.pad(weight, (0, len(_ENDS)))
            zeros = torch.zeros(self.outputs, device="cpu")
            self._call: tuple[Any, ...] = (
                # Only its shape is looked at.
                weight.new_zeros(()).expand(wide.shape),
                torch.fbgemm_pack_quantized_matrix(wide),
                wide.sum(1, dtype=torch.int32),
                1.0,
                0,
                zeros,
            )
        else:
            ones = torch.ones(self.outputs, device="cpu")
            zeros = torch.zeros(self.outputs, dtype=torch.int32, device="cpu")
            packed = _ONEDNN.qlinear_prepack(weight, None)
            self._call = (
                1.0,
                128,
                packed,
                ones,
                zeros,
                None,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )

    @property
    def legacy(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The tensors that FBGEMM's kernel is called with; ``None`` where oneDNN's is."""
        if not self._legacy:
            return None
        shape, packed, offsets, _, _, zeros = self._call
        return shape, packed, offsets, zeros

    def room(self, rows: int) -> Tensor:
        """Memory for so many rows; codes -128 to 127 go into its first ``inputs`` columns."""
        made = torch.empty(rows, self.inputs + len(_ENDS), device="cpu")
        made[:, self.inputs :] = _ENDS_ROW
        return made

    def __call__(self, room: Tensor) -> Tensor:
        """The sums ``[rows, outputs]``; numbers in ``room`` are finite, and rounded half to even.

        What lies within 2**-16 of a half counts as one.
        """
        if room.shape[0] == 0:
            return room.new_zeros(0, self.outputs)
        if self._legacy:
            return torch.fbgemm_linear_int8_weight_fp32_activation(room, *self._call)
        codes = room[:, : self.inputs].round().add_(128.0).to(torch.uint8)
        result: Tensor = _ONEDNN.qlinear_pointwise.default(codes, *self._call)
        return result


class ByteSums:
    """The same sums for many rows of bytes, of which 128 stands for the code 0.

    FBGEMM's kernel reads a float for every code; with VNNI, oneDNN's is faster from a few rows on.

    Args:
        weight: int8 ``[outputs, inputs]``.
        extra: how many bytes without a meaning follow the codes of a row.

    Example:
        >>> codes = torch.tensor([[228, 127]], dtype=torch.uint8)
        >>> ByteSums(torch.tensor([[1, 2], [3, -4]], dtype=torch.int8), 0)(codes)
        tensor([[ 98., 304.]])
    """

    def __init__(self, weight: Tensor, extra: int) -> None:
        outputs = weight.shape[0]
        packed = _ONEDNN.qlinear_prepack(F.pad(weight, (0, extra)), None)
        zeros = torch.zeros(outputs, dtype=torch.int32, device="cpu")
        output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        ones = torch.ones(outputs, device="cpu")
        self._call = (1.0, 128, packed, ones, zeros, None, *output)

    def __call__(self, codes: Tensor) -> Tensor:
        """The sums ``[rows, outputs]`` of uint8 ``[rows, inputs + extra]``, one row at least."""
        result: Tensor = _ONEDNN.qlinear_pointwise.default(codes, *self._call)
        return result


@asked_once
def has_fbgemm() -> bool:
    """Whether this torch has FBGEMM's kernel, and it computes what is expected of it."""
    weight = torch.tensor([[3, -5, 0, 0]], dtype=torch.int8)
    row = torch.tensor([[127.0, -126.0, *_ENDS]])
    try:
        with warnings.catch_warnings():
            # Said once in a process, and nothing that a user can act on.
            warnings.simplefilter("ignore")
            packed = torch.fbgemm_pack_quantized_matrix(weight)
            made = torch.fbgemm_linear_int8_weight_fp32_activation(
                row, weight, packed, weight.sum(1, dtype=torch.int32), 1.0, 0, torch.zeros(1)
            )
    except (AttributeError, RuntimeError):
        return False
    return made.tolist() == [[1011.0]]
