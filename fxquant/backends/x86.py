"""The x86 backend: torch's built-in oneDNN int8 operators on plain tensors, nothing to install."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from fxquant.backends.base import MEASURED, WITHOUT_VNNI, Costs
from fxquant.backends.half_convs import PLANNED
from fxquant.backends.programs.programs import Programs
from fxquant.backends.x86_attention import ATTENTION_RULES
from fxquant.backends.x86_dynamic_products import DYNAMIC_PRODUCT_RULES
from fxquant.backends.x86_dynamic_rules import DYNAMIC_RULES
from fxquant.backends.x86_float_sums import FLOAT_SUM_RULES
from fxquant.backends.x86_layer_rules import LAYER_RULES
from fxquant.backends.x86_matmul import MATMUL_RULES
from fxquant.backends.x86_move_rules import MOVE_RULES
from fxquant.backends.x86_pairs import has_vnni, layers_saturate
from fxquant.backends.x86_quantize import QUANTIZE_RULES
from fxquant.backends.x86_real_rules import REAL_RULES
from fxquant.backends.x86_recurrent import X86Recurrent
from fxquant.backends.x86_rules import OP_RULES
from fxquant.backends.x86_stacked import STACKED_RULES
from fxquant.backends.x86_unit_rules import UNIT_RULES
from fxquant.backends.x86_weight_only import INT4_RULES, WEIGHT_ONLY_RULES
from fxquant.graph.user_class import Executor
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.patterns.rule import Rule

_NEEDED: Final = {
    "qconv_prepack": "default",
    "qconv_pointwise": "default",
    "qconv2d_pointwise": "binary",
    "qlinear_prepack": "default",
    "qlinear_pointwise": "default",
    "qbatch_norm2d": "default",
}

_MODULES: Final[Mapping[type[nn.Module], Callable[..., nn.Module]]] = {
    IntegerRecurrent: X86Recurrent,
    **PLANNED,
}


@dataclass(frozen=True)
class X86:
    """Int8 kernels of the oneDNN that torch is built with."""

    name: str = "x86"
    rules: tuple[Rule, ...] = (
        *LAYER_RULES, *STACKED_RULES, *FLOAT_SUM_RULES, *DYNAMIC_RULES, *DYNAMIC_PRODUCT_RULES,
        *WEIGHT_ONLY_RULES, *INT4_RULES, *MATMUL_RULES, *OP_RULES, *REAL_RULES, *MOVE_RULES,
        *UNIT_RULES, *ATTENTION_RULES, *QUANTIZE_RULES,
    )  # fmt: skip
    modules: Mapping[type[nn.Module], Callable[..., nn.Module]] = field(
        default_factory=lambda: dict(_MODULES)
    )
    reads_unsigned: bool = True
    costs: Costs = field(default_factory=lambda: MEASURED if has_vnni() else WITHOUT_VNNI)

    cpu_only: bool = True
    executor: Callable[[], Executor] = Programs

    @property
    def saturates_pairs(self) -> bool:
        """Without VNNI the kernels add products in pairs of 16 bits."""
        return layers_saturate()

    def missing(self) -> str | None:
        """Another processor, a torch without oneDNN, or one whose operators have moved."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"this is a {platform.machine()} processor"
        if not torch.backends.mkldnn.is_available():
            return "this torch is built without oneDNN"
        gone = [
            name
            for name, overload in _NEEDED.items()
            if not hasattr(getattr(torch.ops.onednn, name, None), overload)
        ]
        if gone:
            return f"torch {torch.__version__} has no torch.ops.onednn.{gone[0]}"
        return None
