"""Op table: max pools."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, one_way, sig, spellings


def _max_pool(rank: int, target: Function, direct: Function, module: type[nn.Module]) -> Op:
    return entry(
        f"max_pool{rank}d",
        Kind.MOVE,
        target,
        sig(lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False: None),
        absorb={"return_indices": (False,)},
        functions=spellings(
            (target,),
            lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (
                None
            ),
        )
        | spellings(
            (direct,),
            lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False: None,
        ),
        modules=(module,),
        tidy=one_way,
    )


def _adaptive(rank: int, target: Function, module: type[nn.Module]) -> Op:
    return entry(
        f"adaptive_max_pool{rank}d",
        Kind.MOVE,
        target,
        sig(lambda input, output_size: None),
        absorb={"return_indices": (False,)},
        functions=spellings((target,), lambda input, output_size, return_indices=False: None),
        modules=(module,),
        tidy=one_way,
    )


POOLS: Final = (
    _max_pool(1, F.max_pool1d, torch.max_pool1d, nn.MaxPool1d),
    _max_pool(2, F.max_pool2d, torch.max_pool2d, nn.MaxPool2d),
    _max_pool(3, F.max_pool3d, torch.max_pool3d, nn.MaxPool3d),
    _adaptive(1, F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d),
    _adaptive(2, F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
    _adaptive(3, F.adaptive_max_pool3d, nn.AdaptiveMaxPool3d),
)
