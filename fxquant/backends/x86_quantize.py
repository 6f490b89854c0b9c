"""Float tensors become codes in one pass over memory.

    quantize(x)     ->   quantize_bounded(x), where nothing in x can be too large for an integer

Eager torch takes four passes to divide, round, clamp and narrow. FBGEMM's quantization of tables
by row has them in one, see :mod:`fxquant.backends.x86_row_codes`; here all rows have the same
ends. 128 rows of 768: 14 us against 56 in float32 and 33 against 76 in bfloat16, of which its
conversion to float32 is half (two threads with AMX).

The kernel saturates, but not what is no 32-bit integer of codes: that becomes code 0, be it large
or small. The rule looks for a bound of what is quantized, and leaves alone what has none.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxquant.backends.x86_row_codes import byte_kernel
from fxquant.graph.bounds import largest
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import argument, register_kernel
from fxquant.numerics.affine import quantize
from fxquant.patterns.boundary import QUANTIZE
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

_BLOCK: Final = 32
"""The kernel saturates whole blocks of so many numbers, and lets others wrap around."""
_WIDE: Final = 256
"""Rows narrower than this are joined: the kernel writes eight bytes behind each."""
_ALONE: Final = 2**17
"""Up to so many numbers one row is faster: one thread, and no copy without the eight bytes."""
_READS: Final = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN: Final = (Tensor, torch.nn.Parameter)
_MOST_CODES: Final = 2.0**30


def quantize_bounded(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """Return what :func:`fxquant.numerics.affine.quantize` does, in one pass where it can.

    Codes may differ by one where a number lies within ``2**-13`` steps of a half.

    Args:
        x: any shape and strides; no number larger than ``2**30`` scales.
        scale: positive.
        zero_point: the code of 0.0.
        quant_min: 0.
        quant_max: 255.
        dtype: ``torch.uint8``.

    Example:
        >>> x = torch.tensor([-4.0, 0.0, 1.2, 300.0]).repeat(8)
        >>> quantize_bounded(x, 0.5, 3, 0, 255, torch.uint8)[:4]
        tensor([  0,   3,   5, 255], dtype=torch.uint8)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            quantize_bounded,
            (x,),
            x,
            scale=scale,
            zero_point=zero_point,
            quant_min=quant_min,
            quant_max=quant_max,
            dtype=dtype,
        )
    # Compilers know neither the kernel nor what is kept.
    compiled = torch.compiler.is_compiling()
    made = None if compiled else codes_between(x, _ends(scale, zero_point))
    return quantize(x, scale, zero_point, quant_min, quant_max, dtype) if made is None else made


def codes_between(x: Tensor, ends: Tensor) -> Tensor | None:
    """The codes of ``x`` in one pass; ``None`` where the kernel does not take it.

    Compilers do not know the kernel: it is for the caller to ask whether one is at work.

    Args:
        x: any shape and strides; no number further than ``2**30`` codes from ``ends``.
        ends: float32 ``[1, 2]``, the numbers of the codes 0 and 255.

    Example:
        >>> codes_between(torch.arange(3.0), torch.tensor([[0.0, 255.0]])) is None  # too few
        True
    """
    # Nor do fake tensors.
    plain = type(x) in _PLAIN and x.dtype in _READS and x.is_cpu
    kernel = byte_kernel() if plain else None
    if kernel is None:
        return None
    x, count = x.detach(), x.numel()
    # By the size of a sample: who else is in the batch must not decide how one is rounded.
    if count == 0 or (count // x.shape[0] if x.dim() > 1 else count) % _BLOCK:
        return None
    if x.is_contiguous() and count <= _ALONE:
        # What most are, without what costs others a few microseconds.
        one = kernel(x.reshape(1, count).to(torch.float32), ends)
        return one.narrow(1, 0, count).view(x.shape)
    order = _order(x)
    if order is None:
        return None
    dense = x.permute(order) if order else x
    width = _width(dense)
    if width % _BLOCK:
        return None
    rows = dense.reshape(-1, width).to(torch.float32)
    codes = kernel(rows, ends if len(rows) == 1 else ends.expand(len(rows), 2))
    made = codes[:, :width].contiguous().view(dense.shape)
    return made.permute([order.index(dim) for dim in range(x.dim())]) if order else made


def _order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions as they lie in memory; empty as they stand, ``None`` if there are gaps."""
    if x.is_contiguous():
        return ()
    order = tuple(
        sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.shape[dim]), reverse=True)
    )
    return order if x.permute(order).is_contiguous() else None


def _width(x: Tensor) -> int:
    """How many numbers a row for the kernel has: all, or those of some last dimensions."""
    if x.numel() <= _ALONE:
        return x.numel()
    width = 1
    for size in reversed(x.shape):
        width *= size
        if width >= _WIDE and width % _BLOCK == 0:
            break
    return width


@functools.lru_cache(maxsize=4096)
def _ends(scale: float, zero_point: int) -> Tensor:
    """The numbers of the codes 0 and 255; the kernel adds 1e-8 to the distance between them."""
    with torch.inference_mode(False):
        low, high = -zero_point * scale, (255 - zero_point) * scale - 1e-8
        return torch.tensor([[low, high]], dtype=torch.float32, device="cpu")


register_kernel(QUANTIZE, quantize_bounded)


def all_bytes(match: Match) -> Reject | None:
    """The kernel has the codes 0 to 255, and one addition to every distance between them."""
    node = match.root
    limits = (argument(node, "quant_min"), argument(node, "quant_max"), argument(node, "dtype"))
    if limits != (0, 255, torch.uint8):
        return Reject(f"the kernel makes codes 0 to 255, not {limits[0]} to {limits[1]}", node)
    if not _SCALES[0] <= argument(node, "scale") <= _SCALES[1]:
        return Reject("its scale is beyond the kernel's", node)
    return None


_SCALES: Final = (2.0**-20, 2.0**90)
"""Below the first, 1e-8 is too large a part of a step; above the second, widths overflow."""


def is_bounded(match: Match) -> Reject | None:
    """No number may be too large for a 32-bit integer of codes."""
    node, given = match.root, match.root.args[0]
    bound = largest(given) if isinstance(given, Node) else None
    if bound is None or bound > _MOST_CODES * argument(node, "scale"):
        return Reject("nothing says how large its numbers get", node)
    return None


def has_no_kernel(match: Match) -> Reject | None:
    """Once is enough."""
    done = match.root.target is quantize_bounded
    return Reject("it has its kernel", match.root) if done else None


def _lower(match: Match, editor: Editor) -> None:
    node = match.root
    editor.set_call(node, quantize_bounded, node.args, dict(node.kwargs))


QUANTIZE_RULES: Final = (
    Rule(
        "x86-quantize",
        op(QUANTIZE, var("x"), name="q"),
        _lower,
        (has_no_kernel, all_bytes, is_bounded),
        priority=-100,
    ),
)
