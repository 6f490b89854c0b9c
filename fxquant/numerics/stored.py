"""Weights that are stored as integers and computed with as floats: by channel or by group.

    w[r, k] = (code[r, k] - zero_point[r, k // group_size]) * scale[r, k // group_size]

Codes of at most 4 bits are packed two per byte, the lower half first, as numbers from 0 to 15.
``dequantize_stored`` is a node of the Q/DQ graph: it records itself as one ``call_function`` when
torch.fx traces it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fxquant.errors import QParamError
from fxquant.numerics.affine import quantize_weight
from fxquant.numerics.error_search import weight_qparams
from fxquant.numerics.qparams import QParams
from fxquant.spec import QSpec

_NIBBLE: Final = 8
"""What turns int8 codes of at most 4 bits, -8 to 7, into 0 to 15."""
_BLOCK: Final = 1 << 18
"""How many weights are worked on at once: choosing ranges makes several copies of them."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """An integer weight with its scales, as it is kept in memory and in files.

    Args:
        codes: int8 or uint8 ``[rows, width]``, or packed uint8 ``[rows, ceil(width / 2)]``.
        scale: float32 ``[rows, groups]``, or ``[1, 1]`` where all weights share one.
        zero_point: uint8 or int8, the shape of ``scale``; ``None``: 0, or 8 of packed codes.
        group_size: how many neighbours of a row share a scale; the last group may have fewer.
        width: how many weights a row has.
        packed: whether a byte of ``codes`` holds two weights.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    width: int
    packed: bool


def store_weight(w: Tensor, spec: QSpec) -> StoredWeight:
    """Quantize a weight for storing: ranges by channel, by group or for all of it.

    Below 8 bits the range of each group is searched for the least squared error. A group of
    zeros gets scale 1.0 and stays exactly zero.

    Args:
        w: any floating dtype, ``[rows, ...]``; its rows are the output channels.
        spec: dtype, bits, symmetry and granularity: ``"tensor"``, ``"channel"`` or ``"group"``.

    Raises:
        QParamError: the weight holds NaN or infinity, or is empty.

    Example:
        >>> spec = QSpec("int8", bits=4, symmetric=True, granularity="group", group_size=8)
        >>> store_weight(torch.ones(2, 12), spec).codes.shape
        torch.Size([2, 6])
    """
    if w.numel() == 0:
        raise QParamError(f"a weight of shape {tuple(w.shape)} has nothing to store")
    flat = w.detach().reshape(w.shape[0], -1)
    width = flat.shape[1]
    packed = spec.bits <= 4
    size = min(spec.group_size, width) if spec.granularity == "group" else width
    one = weight_qparams(flat, spec, 0) if spec.granularity == "tensor" else None
    # What stays is made first: memory freed between pieces that stay is of little use.
    stored = torch.uint8 if packed or spec.dtype == "uint8" else torch.int8
    held = math.ceil(width / 2) if packed else width
    codes = torch.empty((flat.shape[0], held), dtype=stored, device=flat.device)
    found = []
    step = max(1, _BLOCK // width)
    for part, place in zip(flat.split(step), codes.split(step), strict=True):
        qparams = one or _of_groups(part, size, spec)
        made = _codes(part, size, qparams)
        if packed:
            made = pack_nibbles(made + _NIBBLE if spec.dtype == "int8" else made)
        place.copy_(made)
        found.append(qparams)
    kept = found[:1] if one is not None else found
    shape = (-1, 1 if one is not None else math.ceil(width / size))
    scale = torch.cat([each.scale for each in kept]).view(shape)
    zero_point = torch.cat([each.zero_point for each in kept]).view(shape)
    zeros = None
    if not (spec.symmetric and spec.dtype == "int8"):
        shift = _NIBBLE if packed and spec.dtype == "int8" else 0
        zeros = (zero_point + shift).to(codes.dtype)
    return StoredWeight(codes, scale, zeros, size, width, packed)


def _of_groups(flat: Tensor, size: int, spec: QSpec) -> QParams:
    """Every group as a channel of its own; zeros that fill up the last one widen no range."""
    each = dataclasses.replace(spec, granularity="channel", group_size=0)
    return weight_qparams(_in_groups(flat, size), each, 0)


def _codes(flat: Tensor, size: int, qparams: QParams) -> Tensor:
    rows, width = flat.shape
    return quantize_weight(_in_groups(flat, size), qparams).reshape(rows, -1)[:, :width]


def _in_groups(flat: Tensor, size: int) -> Tensor:
    missing = -flat.shape[1] % size
    return (F.pad(flat, (0, missing)) if missing else flat).reshape(-1, size)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes from 0 to 15 two per byte, the lower half first.

    Args:
        codes: any integer dtype ``[rows, width]``; an odd width is filled up with a 0.

    Example:
        >>> pack_nibbles(torch.tensor([[1, 2, 3]]))
        tensor([[33,  3]], dtype=torch.uint8)
    """
    bytes_ = codes.to(torch.uint8)
    if bytes_.shape[-1] % 2:
        bytes_ = F.pad(bytes_, (0, 1))
    return bytes_[..., 0::2] | (bytes_[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """Return the codes that :func:`pack_nibbles` packed, as uint8 ``[..., width]``.

    Args:
        packed: uint8 ``[..., ceil(width / 2)]``.
        width: how many codes a row has.

    Example:
        >>> unpack_nibbles(torch.tensor([[33, 3]], dtype=torch.uint8), 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    both = torch.stack((packed & 15, packed >> 4), dim=-1)
    return both.flatten(-2)[..., :width]


def dequantize_stored(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    shape: tuple[int, ...],
    packed: bool,
) -> Tensor:
    """Return the real weight of stored codes, as float32 of ``shape``.

    Args:
        q: codes, as in :class:`StoredWeight`.
        scale: as there.
        zero_point: as there.
        group_size: as there.
        shape: the shape of the weight; its first dimension has the rows of ``q``.
        packed: as there.

    Raises:
        QParamError: codes, scales and ``shape`` do not belong together.

    Example:
        >>> q = torch.tensor([[1, -2, 4]], dtype=torch.int8)
        >>> dequantize_stored(q, torch.tensor([[0.5, 2.0]]), None, 2, (1, 3), False)
        tensor([[ 0.5000, -1.0000,  8.0000]])
    """
    given = (q, scale) if zero_point is None else (q, scale, zero_point)
    if has_torch_function_variadic(*given):
        return handle_torch_function(
            dequantize_stored, given, q, scale, zero_point, group_size, shape, packed
        )
    width = math.prod(shape[1:])
    held, groups = math.ceil(width / 2) if packed else width, math.ceil(width / group_size)
    if q.shape[-1] != held or tuple(scale.shape[1:]) not in ((groups,), (1,)):
        raise QParamError(
            f"codes {tuple(q.shape)} and scales {tuple(scale.shape)} do not make a weight of shape "
            f"{shape} in groups of {group_size}"
        )
    return rows_of(q, scale, zero_point, group_size, width, packed).reshape(shape)


def rows_of(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    width: int,
    packed: bool,
) -> Tensor:
    """Rows of a stored weight as float32 ``[..., width]``; the arguments are its parts.

    Args:
        q: codes ``[..., width]``, or packed ones.
        scale: ``[..., groups]``, or broadcasting to that.
        zero_point: the shape of ``scale``, or ``None``.
        group_size: how many neighbours share a scale.
        width: how many weights a row has.
        packed: whether a byte holds two codes.

    Example:
        >>> q = torch.tensor([[2, 4]], dtype=torch.int8)
        >>> rows_of(q, torch.tensor([[0.5]]), None, 2, 2, False)
        tensor([[1., 2.]])
    """
    steps = (unpack_nibbles(q, width) if packed else q).to(torch.float32)
    scales = scale.to(torch.float32)
    zeros = None if zero_point is None else zero_point.to(torch.float32)
    if scale.shape[-1] > 1:
        scales = _spread(scales, group_size, width)
        zeros = None if zeros is None else _spread(zeros, group_size, width)
    if zeros is not None:
        steps.sub_(zeros)
    elif packed:
        steps.sub_(_NIBBLE)
    return steps.mul_(scales)


def _spread(values: Tensor, size: int, width: int) -> Tensor:
    return values.repeat_interleave(size, dim=-1)[..., :width]
