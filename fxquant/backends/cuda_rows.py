"""Rows that are quantized at run time on a GPU, in few passes over memory.

    low, high = ends of rows   ->   scale, zero_point = steps(low, high)
    x, scale, zero_point       ->   int8 codes, four of a row in each number that is written
    sums of products           ->   real numbers, with scales and bias

In eager torch every step of this arithmetic is a launch and a pass over memory, over thirty for a
linear. Here they are three, beside the ends of rows and the product: elementwise kernels that
``torch.cuda.jiterator`` compiles with what CUDA builds of torch carry (NVRTC; once, then kept on
disk). They follow :mod:`fxquant.numerics.dynamic` operation by operation and give its bits.

A kernel reads and writes one type of number. Integers pass as floats of the same bits: sums of
products on their way in, four codes on their way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.errors import SpeedWarning, warn_user
from fxquant.numerics.dynamic import byte_rows
from fxquant.numerics.qparams import SMALLEST_SCALE
from fxquant.spec import QSpec

TOGETHER: Final = 4
"""How many codes are written as one number."""
_UNSIGNED: Final = 128
"""What is taken from unsigned codes and their zero points: products are of signed ones."""

_SYMMETRIC: Final = """
template <typename T> void steps(T low, T high, T& scale, T& zero) {{
  T made = (-low > high ? -low : high) / T({steps});
  made = made + made * T(0);
  scale = made < T({smallest}) ? T({smallest}) : made;
  zero = T({zero});
}}
"""
_ASYMMETRIC: Final = """
template <typename T> void steps(T low, T high, T& scale, T& zero) {{
  low = low > T(0) ? T(0) : low;
  high = high < T(0) ? T(0) : high;
  T made = high / T({steps}) - low / T({steps});
  made = made + made * T(0);
  made = made < T({smallest}) ? T({smallest}) : made;
  T at = T({zero}) - rintf(low / made);
  scale = made;
  zero = at == at ? at : T({zero});
}}
"""
_CODES: Final = """
template <typename T> T codes(T a, T b, T c, T d, T scale, T zero) {{
  T given[4] = {{a, b, c, d}};
  T most = T({most}) - zero;
  int made = 0;
  for (int i = 0; i < 4; ++i) {{
    T step = given[i] / scale;
    int code = int(rintf(step > most ? most : step)) + int(zero);
    made |= (code & 255) << (8 * i);
  }}
  return __int_as_float(made);
}}
"""
_REAL: Final = """
template <typename T> T real(T acc, T sums, T zero, T scale, T weight) {
  T made = T(__float_as_int(acc) - int(zero) * __float_as_int(sums));
  return __fmul_rn(__fmul_rn(made, scale), weight);
}
"""
_BIASED: Final = """
template <typename T> T real(T acc, T sums, T zero, T scale, T weight, T bias) {
  T made = T(__float_as_int(acc) - int(zero) * __float_as_int(sums));
  return __fadd_rn(__fmul_rn(__fmul_rn(made, scale), weight), bias);
}
"""


@functools.cache
def _compiled(code: str, outputs: int = 1) -> Callable[..., Any]:
    """A kernel of torch's; it is compiled when it is first called."""
    if outputs == 1:
        return torch.cuda.jiterator._create_jit_fn(code)
    return torch.cuda.jiterator._create_multi_output_jit_fn(code, outputs)


@functools.cache
def sources(spec: QSpec) -> tuple[str, str]:
    """What finds scales and zero points of signed codes from the ends of rows, and what codes.

    Args:
        spec: how rows are quantized.
    """
    low, high = spec.quant_min, spec.quant_max
    away = _UNSIGNED if spec.dtype == "uint8" else 0
    fields: dict[str, Any] = {"smallest": SMALLEST_SCALE, "most": high - away}
    if not spec.symmetric:
        fields |= {"steps": high - low, "zero": low - away}
        return _ASYMMETRIC.format(**fields), _CODES.format(**fields)
    middle = 1 << (spec.bits - 1) if spec.dtype == "uint8" else 0
    fields |= {"steps": min(middle - low, high - middle), "zero": middle - away}
    return _SYMMETRIC.format(**fields), _CODES.format(**fields)


def signed_rows(x: Tensor, spec: QSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of rows as signed ones, their scales and zero points.

    Args:
        x: ``[rows, inputs]`` on a GPU, contiguous, float32 or of 16 bits; inputs in fours.
        spec: how rows are quantized.

    Returns:
        int8 ``[rows, inputs]``, and float32 scales and zero points that broadcast over them.
    """
    steps, codes = sources(spec)
    # A kernel that reads numbers of several types takes longer than this does.
    wide = x.to(torch.float32)
    rows = wide if spec.granularity == "row" else wide.view(1, -1)
    scale, zero = _compiled(steps, 2)(*torch.aminmax(rows, dim=1, keepdim=True))
    quarters = wide.view(len(x), -1, TOGETHER).unbind(-1)
    made: Tensor = _compiled(codes)(*quarters, scale, zero)
    return made.view(torch.int8), scale, zero


def real_sums(
    acc: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """What sums of products stand for, float32 ``[rows, outputs]``.

    Args:
        acc: int32 ``[rows, outputs]`` on a GPU.
        scale: of the rows, as :func:`signed_rows` gives it.
        zero_point: likewise.
        sums: int32 ``[outputs]``, of the codes of each output's weight.
        weight_scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]`` or ``None``.
    """
    given = (acc.view(torch.float32), sums.view(torch.float32), zero_point, scale, weight_scale)
    made: Tensor = _compiled(_REAL)(*given) if bias is None else _compiled(_BIASED)(*given, bias)
    return made


@functools.cache
def kernels_fail(device: torch.device, spec: QSpec) -> str | None:
    """Why these kernels do not do on ``device`` what they are to; then eager torch has to.

    The device is asked, as it is for its product: torch calls its compiler of kernels a beta. A
    failure is said once, as it costs time.

    Args:
        device: where the layer is.
        spec: how rows are quantized.
    """
    x = torch.linspace(-3.0, 5.0, 8 * TOGETHER).view(8, TOGETHER)
    x[1] = 0.0
    if spec.granularity == "row":
        x[2, 1], x[3, 2] = float("nan"), float("inf")
    codes, scale, zero_point = byte_rows(x, spec)
    signed, away = (codes ^ _UNSIGNED).view(torch.int8), zero_point - _UNSIGNED
    weight = torch.tensor([3, -100, 7], dtype=torch.int32)
    acc = signed.sum(1, keepdim=True, dtype=torch.int32) * weight
    sums, scales, bias = TOGETHER * weight, torch.tensor([0.1, 0.01, 3.0]), torch.linspace(-1, 1, 3)
    plain = (acc - away.to(torch.int32) * sums).to(torch.float32) * scale * scales
    wanted = (signed, scale, away, plain, plain + bias)
    try:
        a, b, c, d, e, f = (t.to(device) for t in (acc, scale, away, sums, scales, bias))
        found = (
            *signed_rows(x.to(device), spec),
            *(real_sums(a, b, c, d, e, g) for g in (None, f)),
        )
    except (RuntimeError, AttributeError) as error:
        return _said(f"kernels of torch.cuda.jiterator fail: {str(error).splitlines()[0]}")
    # A row with a NaN or an infinity has no codes.
    rows = scale.isfinite().flatten() if scale.numel() > 1 else slice(None)
    same = torch.equal(found[0].cpu()[rows], wanted[0][rows]) and all(
        torch.equal(a.cpu().nan_to_num(0.5), b.nan_to_num(0.5))
        for a, b in zip(found[1:], wanted[1:], strict=True)
    )
    if same:
        return None
    return _said("kernels of torch.cuda.jiterator give other numbers than eager torch")


def _said(why: str) -> str:
    warn_user(
        f"dynamic linears run in eager torch on this GPU, which takes about three times as long "
        f"for few rows: {why}",
        SpeedWarning,
    )
    return why
