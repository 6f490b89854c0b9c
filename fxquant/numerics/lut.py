"""Any function of one 8-bit tensor as a table of its 256 results.

A table has entry k for code k (uint8) or code k - 128 (int8). Torch looks up single bytes slowly,
about 0.7 ns each on one thread whatever operator is used, so there is a second form: a *pair
table* of 65,536 entries, each the results of two neighbouring codes, for half the look-ups.
Measured on 200,704 codes, two threads: ``table[x.long()]`` 244 us, ``index_select`` on the 256
entries 140, ``bytes.translate`` 116, ``index_select`` on the pairs 97.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fxquant.errors import QParamError
from fxquant.numerics.affine import dequantize, quantize
from fxquant.numerics.qparams import QParams


def make_table(fn: Callable[[Tensor], Tensor], in_q: QParams, out_q: QParams) -> Tensor:
    """Return ``quantize(fn(dequantize(code)))`` for every code, as the reference computes it.

    Args:
        fn: an elementwise function of a float32 tensor; called once, on shape [256].
        in_q: qparams of the codes that will be looked up, per tensor.
        out_q: qparams of the result, per tensor.

    Returns:
        [256] of ``out_q.dtype``; entry k belongs to code k, or k - 128 where codes are int8.

    Raises:
        QParamError: qparams are per channel, or ``fn`` does not map [256] floats to [256] floats.

    Example:
        >>> q = QParams.per_tensor(0.1, 128, 0, 255, torch.uint8)
        >>> make_table(torch.relu, q, q)[[0, 128, 200]]
        tensor([128, 128, 200], dtype=torch.uint8)
    """
    info = torch.iinfo(in_q.dtype)
    codes = torch.arange(info.min, info.max + 1).to(in_q.dtype)
    with torch.no_grad():
        result = fn(dequantize(codes, in_q.scale_value, in_q.zero_point_value))
    if result.shape != codes.shape or not result.is_floating_point():
        raise QParamError(
            f"a table needs an elementwise function: of 256 floats this one made a "
            f"{result.dtype} tensor of shape {tuple(result.shape)}"
        )
    return quantize(
        result,
        out_q.scale_value,
        out_q.zero_point_value,
        out_q.quant_min,
        out_q.quant_max,
        out_q.dtype,
    )


def pair_table(table: Tensor, codes: torch.dtype) -> Tensor:
    """Return the table of two codes at a time, [65536, 2], for :func:`apply_table`.

    Args:
        table: [256], from :func:`make_table`.
        codes: what it is looked up with, ``torch.uint8`` or ``torch.int8``.

    Example:
        >>> q = QParams.per_tensor(0.1, 128, 0, 255, torch.uint8)
        >>> pair_table(make_table(torch.relu, q, q), torch.uint8)[200 * 256 + 1]
        tensor([128, 200], dtype=torch.uint8)
    """
    # The bytes of the numbers themselves, so this machine's byte order is the right one.
    pairs = torch.arange(65536, device=table.device).to(torch.uint16).view(torch.uint8)
    by_byte = _by_byte(table, codes)
    return by_byte.index_select(0, pairs.to(torch.int32)).view(65536, 2)


def apply_table(q: Tensor, table: Tensor) -> Tensor:
    """Return the table's entry for every code.

    Args:
        q: uint8 or int8, any shape, strides and memory format, which the result shares; not
            modified.
        table: [256], or [65536, 2] made for this dtype by :func:`pair_table`, which is faster.

    Example:
        >>> table = torch.arange(255, -1, -1).to(torch.uint8)
        >>> apply_table(torch.tensor([[0, 1]], dtype=torch.uint8), table)
        tensor([[255, 254]], dtype=torch.uint8)
    """
    if has_torch_function_variadic(q, table):
        return handle_torch_function(apply_table, (q, table), q, table)
    look_up = _look_up_pairs if table.dim() == 2 else _look_up
    if q.is_contiguous():
        return look_up(q.view(-1), table).view(q.shape)
    order = sorted(range(q.dim()), key=q.stride, reverse=True)
    in_order = q.permute(order)
    back = sorted(range(q.dim()), key=order.__getitem__)
    found = look_up(in_order.contiguous().view(-1), table)
    return found.view(in_order.shape).permute(back)


def _by_byte(table: Tensor, codes: torch.dtype) -> Tensor:
    """Reorder a table so that the bits of a code, read as uint8, are its index."""
    return table.roll(128) if codes == torch.int8 else table


def _look_up(flat: Tensor, table: Tensor) -> Tensor:
    index = flat.to(torch.int32)
    return table.index_select(0, index.add_(128) if flat.dtype == torch.int8 else index)


def _look_up_pairs(flat: Tensor, pairs: Tensor) -> Tensor:
    count = flat.numel()
    if count % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    elif flat.storage_offset() % 2:
        flat = flat.clone()
    index = flat.view(torch.uint16).to(torch.int32)
    found = pairs.view(torch.int16).view(-1).index_select(0, index)
    return found.view(pairs.dtype)[:count]
