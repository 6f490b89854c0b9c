"""Op table: ops that copy, select or rearrange elements."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph import tensor_methods
from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, sig, spellings

MOVES: Final = (
    entry(
        "repeat",
        Kind.MOVE,
        tensor_methods.repeat,
        sig(lambda input, repeats: None),
        functions=spellings((torch.Tensor.repeat,), lambda input, repeats: None),
        methods=spellings(("repeat",), lambda input, *repeats: None),
    ),
    entry(
        "flip",
        Kind.MOVE,
        torch.flip,
        sig(lambda input, dims: None),
        methods=spellings(("flip",), lambda input, *dims: None),
    ),
    entry(
        "roll",
        Kind.MOVE,
        torch.roll,
        sig(lambda input, shifts, dims=None: None),
        methods=spellings(("roll",), lambda input, shifts, dims=None: None),
    ),
    entry(
        "index_select",
        Kind.MOVE,
        torch.index_select,
        sig(lambda input, dim, index: None),
        methods=spellings(("index_select",), lambda input, dim, index: None),
    ),
    entry(
        "clone",
        Kind.MOVE,
        torch.clone,
        sig(lambda input: None),
        absorb={"memory_format": (None, torch.preserve_format)},
        functions=spellings(
            (torch.clone,), lambda input, memory_format=torch.preserve_format: None
        ),
        methods=spellings(("clone",), lambda input, memory_format=torch.preserve_format: None),
    ),
    entry(
        "pad",
        Kind.MOVE,
        F.pad,
        sig(lambda input, pad, mode="constant", value=None: None),
    ),
    entry(
        "pixel_shuffle",
        Kind.MOVE,
        F.pixel_shuffle,
        sig(lambda input, upscale_factor: None),
        functions=spellings((torch.pixel_shuffle,), lambda input, upscale_factor: None),
        modules=(nn.PixelShuffle,),
    ),
    entry(
        "pixel_unshuffle",
        Kind.MOVE,
        F.pixel_unshuffle,
        sig(lambda input, downscale_factor: None),
        functions=spellings((torch.pixel_unshuffle,), lambda input, downscale_factor: None),
        modules=(nn.PixelUnshuffle,),
    ),
    entry(
        "channel_shuffle",
        Kind.MOVE,
        F.channel_shuffle,
        sig(lambda input, groups: None),
        functions=spellings((torch.channel_shuffle,), lambda input, groups: None),
        modules=(nn.ChannelShuffle,),
    ),
)
