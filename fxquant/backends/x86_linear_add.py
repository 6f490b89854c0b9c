"""A linear that adds up a float sum as well, on torch's oneDNN int8 operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.backends.x86_layers import X86Linear
from fxquant.backends.x86_pairs import asked_once

_ONEDNN: Final = torch.ops.onednn
_GLOBAL_HOOK: Final[Callable[[], bool] | None] = getattr(
    nn.modules.module, "_has_any_global_hook", None
)
"""Whether there is a hook on all modules; torch keeps the question to itself."""
_OTHER: Final = 5
"""The place of what is added among the arguments of the kernel: after the weight's."""


@asked_once
def keeps_summand(real: torch.dtype) -> bool:
    """Whether the kernel adds a summand of type ``real`` without writing over it.

    Without AVX512 there is no such kernel in bfloat16 (torch 2.13); in float32 there always is.
    """
    codes = torch.zeros(1, 1, dtype=torch.uint8)
    packed = _ONEDNN.qlinear_prepack(torch.zeros(1, 1, dtype=torch.int8), None)
    zero = torch.zeros(1, dtype=torch.int32)
    head = (codes, 1.0, 0, packed, torch.ones(1), zero, torch.zeros(1, 1, dtype=real))
    try:
        _ONEDNN.qlinear_pointwise.binary(
            *head, None, 1.0, 0, real, 1.0, 0, "add", 1.0, "none", [], ""
        )
    except RuntimeError:
        return False
    return True


class X86LinearAdd(X86Linear):
    """``linear(x) + other`` in float, with one rounding at its end.

    Args:
        args: those of a plain linear.
        overwrites: whether the memory of ``other`` is free afterwards; writing over it saves half
            of what is left of an addition of its own.
        seen_by: the modules that make or read ``other``. While one of them has a hook, which may
            have kept it, nothing is overwritten.
        kwargs: those of a plain linear.
    """

    def __init__(
        self, *args: Any, overwrites: bool, seen_by: Sequence[nn.Module] = (), **kwargs: Any
    ) -> None:
        self.overwrites = overwrites
        super().__init__(*args, **kwargs)
        # In a tuple they are no submodules: they have their own places in the model.
        self._seen_by = tuple(seen_by)

    def pack(self) -> None:
        """As for a plain linear; and the arguments that follow ``other``, for either way to add."""
        super().pack()
        self._head = self._call[:_OTHER]
        bias, out, post = self._call[_OTHER], self._output(), self._call[_OTHER + 4 :]
        self._endings = {
            overwrites: (bias, *out, 1.0, 0, "sum" if overwrites else "add", 1.0, *post)
            for overwrites in (False, True)
        }
        self._keeps = keeps_summand(self.real)

    def forward(self, codes: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]  # nn.Module.forward is open to any arguments
        """One kernel call; ``other`` is float shaped as the result, or is added by torch."""
        shape = (*codes.shape[:-1], self.weight_shape[0])
        # Autograd does not see into the kernel.
        tracked = torch.is_grad_enabled()
        fits = other.dtype is self.real and other.shape == shape and codes.numel() > 0
        if not fits or (tracked and other.requires_grad):
            return super().forward(codes) + other
        total = other.contiguous()
        spare = self.overwrites and not tracked and not self._is_hooked()
        free = (total is not other or spare) and not torch.compiler.is_compiling()
        if not free and not self._keeps:
            if torch.compiler.is_compiling():
                return super().forward(codes) + other
            total, free = other.clone(memory_format=torch.contiguous_format), True
        ending = self._endings[free]
        result: Tensor = _ONEDNN.qlinear_pointwise.binary(codes, *self._head, total, *ending)
        return result

    def _is_hooked(self) -> bool:
        # A loop takes a third of what any() with a generator does, in every call.
        for module in self._seen_by:
            if module._forward_hooks or module._forward_pre_hooks:
                return True
        if self._forward_hooks or self._forward_pre_hooks:
            return True
        return _GLOBAL_HOOK is None or bool(_GLOBAL_HOOK())
