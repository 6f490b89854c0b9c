"""Op table: padding, and windows of pixels as columns."""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, one_way, sig

_MODES: Final[dict[str, tuple[type[nn.Module], ...]]] = {
    "constant": (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    ),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def _one_pad(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constants are padded with 0.0 where nothing is said; other modes have no value."""
    pad, value = arguments["pad"], arguments["value"]
    pad = tuple(pad) if isinstance(pad, list) else pad
    if arguments["mode"] != "constant":
        # F.pad ignores a zero there, and refuses another value in every call.
        value = None if value == 0 else value
    elif value is None or type(value) is int:
        value = float(value or 0)
    return {**arguments, "pad": pad, "value": value}


_im2col = lambda input, kernel_size, dilation=1, padding=0, stride=1: None
_fold = lambda input, output_size, kernel_size, dilation=1, padding=0, stride=1: None

PADS: Final = (
    entry(
        "pad",
        Kind.MOVE,
        F.pad,
        sig(lambda input, pad, mode="constant", value=None: None),
        modules=tuple(cls for classes in _MODES.values() for cls in classes),
        module_constants={
            cls: {"mode": mode} for mode, classes in _MODES.items() for cls in classes
        },
        module_names={"pad": "padding"},
        tidy=_one_pad,
    ),
    entry("im2col", Kind.MOVE, F.unfold, sig(_im2col), modules=(nn.Unfold,), tidy=one_way),
    entry("fold", Kind.FLOAT, F.fold, sig(_fold), modules=(nn.Fold,), tidy=one_way),
)
