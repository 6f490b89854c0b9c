"""The CUDA backend: torch's own integer product for dynamic linears, on plain tensors.

    linear(quantize_at_run_time(x), dequantize_weight(w), b)    ->   CudaDynamicLinear(x)
    linear(x, dequantize_stored(codes, scale), b)               ->   StoredLinear(x)

What stands around the product is fused, see :mod:`fxquant.backends.cuda_rows`; where that cannot
be, and in models that are compiled, which fuse it themselves, it is plain torch.

Everything else runs as the Q/DQ graph stands, in float on the same device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.base import MEASURED, Costs
from fxquant.backends.cuda_rows import kernels_fail, real_sums, signed_rows
from fxquant.backends.layer_parts import tensors_of, weight_of
from fxquant.backends.x86_dynamic_rules import at_run_time, call_layer, spec_of
from fxquant.backends.x86_weight_only import WEIGHT_ONLY_RULES
from fxquant.graph.edit import Editor
from fxquant.graph.user_class import Executor
from fxquant.numerics.dynamic import byte_rows
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule
from fxquant.spec import QSpec

_LEAST_ROWS: Final = 17
"""``torch._int_mm`` takes more than 16 rows on CUDA."""
_MULTIPLE: Final = 8
"""And sizes of the other two dimensions that are multiples of 8, none of them 0."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def product_fails(device: torch.device) -> str | None:
    """Why ``torch._int_mm`` does not multiply on ``device``, in the layout that is used here.

    The device is asked, not its version: which layouts cuBLAS multiplies depends on both, and some
    devices have no integer product at all. Rows stand one after the other, the weight is the
    transposed of one that lies so, which is the one layout that all devices with a product take.

    Args:
        device: where the layer is.
    """
    rows = torch.full((_LEAST_ROWS, _MULTIPLE), -3, dtype=torch.int8, device=device)
    weight = torch.arange(2 * _MULTIPLE**2, device=device).view(-1, _MULTIPLE).to(torch.int8)
    try:
        made = torch._int_mm(rows, weight.t())
    except RuntimeError as error:
        return f"torch's integer product fails on {device}: {str(error).splitlines()[0]}"
    if not torch.equal(made.cpu(), (-3 * weight.cpu().sum(1, dtype=torch.int32)).expand_as(made)):
        return f"torch's integer product is wrong on {device}"
    return None


class CudaDynamicLinear(nn.Module):
    """A linear layer with int8 weights; each row it reads is quantized by itself.

    Codes of a row with scale ``s`` and zero point ``z`` and a weight with scale ``t`` give
    ``s * t * (sum(codes * w) - z * sum(w)) + bias``, in which the integer sums are exact. The
    product takes signed codes: unsigned ones and their zero points move down by 128.

    Args:
        weight: int8 ``[outputs, inputs]``.
        scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]`` or ``None``.
        spec: how rows are quantized.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    sums: Tensor
    filled: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, spec: QSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self._lay_out()

    def _lay_out(self) -> None:
        """What calls read: sums of the weight, and where the kernel wants it larger, that."""
        outputs, inputs = self.weight.shape
        wide, high = (max(-size % _MULTIPLE, _MULTIPLE * (not size)) for size in (inputs, outputs))
        filled = F.pad(self.weight, (0, wide, 0, high)) if wide or high else None
        sums = self.weight.sum(1, dtype=torch.int32)
        for name, tensor in (("sums", sums), ("filled", filled)):
            self.register_buffer(name, tensor, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._lay_out()

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., inputs]`` in any floating dtype to float32 ``[..., outputs]``."""
        outputs, inputs = self.weight.shape
        rows = x.detach().reshape(math.prod(x.shape[:-1]), inputs)
        real = self._fused(rows) if self._fuses(rows) else self._plain(rows)
        return real.view(*x.shape[:-1], outputs)

    def _fuses(self, rows: Tensor) -> bool:
        return (
            rows.is_cuda
            and type(rows) is Tensor
            and rows.dtype in _FLOATS
            and rows.numel() > 0
            and not torch.compiler.is_compiling()
            # A kernel of torch.cuda.jiterator is launched where the process is.
            and rows.device.index == torch.cuda.current_device()
            and kernels_fail(rows.device, self.spec) is None
        )

    def _fused(self, rows: Tensor) -> Tensor:
        """In five launches. Zeros widen no range, and so may be added before it is known."""
        signed, scale, zero_point = signed_rows(self._filled(rows), self.spec)
        count = len(rows)
        acc = self._product(signed)[:count]
        steps = (scale[:count], zero_point[:count])
        return real_sums(acc, *steps, self.sums, self.weight_scale, self.bias)

    def _plain(self, rows: Tensor) -> Tensor:
        codes, scale, zero_point = byte_rows(rows, self.spec)
        signed = self._filled((codes ^ 128).view(torch.int8))
        made = self._product(signed)[: len(rows)]
        made.sub_((zero_point.to(torch.int32) - 128) * self.sums)
        # As the reference: an exact sum, rounded to float32, then the two scales.
        real = made.to(torch.float32).mul_(scale).mul_(self.weight_scale)
        return real if self.bias is None else real.add_(self.bias)

    def _filled(self, rows: Tensor) -> Tensor:
        """With zeros, as large as the kernel wants it."""
        wanted = self.weight if self.filled is None else self.filled
        wide, more = wanted.shape[1] - rows.shape[1], max(0, _LEAST_ROWS - len(rows))
        return F.pad(rows, (0, wide, 0, more)) if wide or more else rows.contiguous()

    def _product(self, codes: Tensor) -> Tensor:
        """Exact int32 sums."""
        weight = self.weight if self.filled is None else self.filled
        return torch._int_mm(codes, weight.t())[:, : len(self.weight)]

    def extra_repr(self) -> str:
        """Shape and what is quantized, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.spec.dtype} per {self.spec.granularity}"


def _can_multiply(match: Match) -> Reject | None:
    why = product_fails(weight_of(match.node("layer")).device)
    return None if why is None else Reject(why, match.node("layer"))


def _lower_linear(match: Match, editor: Editor) -> None:
    layer, rows = match.root, match.node("rows")
    module = CudaDynamicLinear(*tensors_of(layer, editor), spec_of(rows))
    editor.replace(layer, call_layer(editor, module, rows, [layer]), *match.nodes[1:])


@dataclass(frozen=True)
class Cuda:
    """Int8 products of torch on a GPU."""

    name: str = "cuda"
    rules: tuple[Rule, ...] = (
        Rule("cuda-dynamic-linear", at_run_time(("linear",)), _lower_linear, (_can_multiply,)),
        *(
            dataclasses.replace(rule, name=f"cuda-{rule.name.partition('-')[2]}")
            for rule in WEIGHT_ONLY_RULES
        ),
    )
    modules: Mapping[type[nn.Module], Callable[..., nn.Module]] = field(default_factory=dict)
    costs: Costs = MEASURED
    cpu_only: bool = False
    executor: Callable[[], Executor] | None = None
    saturates_pairs: bool = False
    reads_unsigned: bool = False

    def missing(self) -> str | None:
        """No GPU that torch can use, or a torch without the product."""
        if not torch.backends.cuda.is_built() and not torch.cuda.is_available():
            return "this torch is built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if not hasattr(torch, "_int_mm"):
            return f"torch {torch.__version__} has no torch._int_mm"
        return None
