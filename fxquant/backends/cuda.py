"""The CUDA backend: torch's own integer product for dynamic linears, on plain tensors.

    linear(quantize_at_run_time(x), dequantize_weight(w), b)    ->   CudaDynamicLinear(x)
    linear(x, dequantize_stored(codes, scale), b)               ->   StoredLinear(x)

Everything else runs as the Q/DQ graph stands, in float on the same device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.base import MEASURED, Costs
from fxquant.backends.x86_dynamic_rules import at_run_time, call_layer, spec_of
from fxquant.backends.x86_layer_rules import tensors_of
from fxquant.backends.x86_weight_only import WEIGHT_ONLY_RULES
from fxquant.graph.edit import Editor
from fxquant.numerics.dynamic import byte_rows
from fxquant.patterns.match import Match
from fxquant.patterns.rule import Rule
from fxquant.spec import QSpec

_LEAST_ROWS: Final = 17
"""``torch._int_mm`` takes more than 16 rows on CUDA."""
_MULTIPLE: Final = 8
"""And sizes of the other two dimensions that are multiples of 8."""


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

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, spec: QSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("sums", weight.sum(1, dtype=torch.int32), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.sums.copy_(self.weight.sum(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., inputs]`` in any floating dtype to float32 ``[..., outputs]``."""
        outputs, inputs = self.weight.shape
        rows = x.reshape(-1, inputs) if x.numel() else x.new_zeros(0, inputs)
        codes, scale, zero_point = byte_rows(rows, self.spec)
        signed = (codes ^ 128).view(torch.int8)
        made = self._product(signed).sub_((zero_point.to(torch.int32) - 128) * self.sums)
        # As the reference: an exact sum, rounded to float32, then the two scales.
        real = made.to(torch.float32).mul_(scale).mul_(self.weight_scale)
        real = real if self.bias is None else real.add_(self.bias)
        return real.view(*x.shape[:-1], outputs)

    def _product(self, codes: Tensor) -> Tensor:
        """Exact int32 sums; zeros fill up what the kernel wants to be larger."""
        outputs, inputs = self.weight.shape
        count = len(codes)
        rows, wide, high = max(0, _LEAST_ROWS - count), -inputs % _MULTIPLE, -outputs % _MULTIPLE
        weight = F.pad(self.weight, (0, wide, 0, high)) if wide or high else self.weight
        codes = F.pad(codes, (0, wide, 0, rows)) if wide or rows else codes
        return torch._int_mm(codes, weight.t())[:count, :outputs]

    def extra_repr(self) -> str:
        """Shape and what is quantized, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, {self.spec.dtype} per {self.spec.granularity}"


def _lower_linear(match: Match, editor: Editor) -> None:
    layer, rows = match.root, match.node("rows")
    module = CudaDynamicLinear(*tensors_of(layer, editor), spec_of(rows))
    editor.replace(layer, call_layer(editor, module, rows, [layer]), *match.nodes[1:])


@dataclass(frozen=True)
class Cuda:
    """Int8 products of torch on a GPU."""

    name: str = "cuda"
    rules: tuple[Rule, ...] = (
        Rule("cuda-dynamic-linear", at_run_time(("linear",)), _lower_linear),
        *(
            dataclasses.replace(rule, name=f"cuda-{rule.name.partition('-')[2]}")
            for rule in WEIGHT_ONLY_RULES
        ),
    )
    modules: Mapping[type[nn.Module], Callable[..., nn.Module]] = field(default_factory=dict)
    costs: Costs = MEASURED
    cpu_only: bool = False
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
