"""Op table: ops that copy, select or rearrange elements."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F

from fxquant.graph import tensor_methods
from fxquant.graph.functions import cast
from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, fixed, in_tuples, sig, spellings


def _triangle(name: str, target: Function) -> Op:
    like = lambda input, diagonal=0: None
    return entry(
        name,
        Kind.MOVE,
        target,
        sig(like),
        methods=spellings((name,), like) | spellings((f"{name}_",), like, inplace=True),
    )


_REPEATED: Final = (
    entry(
        "repeat",
        Kind.MOVE,
        tensor_methods.repeat,
        sig(lambda input, repeats: None),
        tidy=in_tuples("repeats"),
        functions=spellings((torch.Tensor.repeat,), lambda input, repeats: None),
        methods=spellings(("repeat",), lambda input, *repeats: None),
    ),
    entry(
        "tile",
        Kind.MOVE,
        torch.tile,
        sig(lambda input, dims: None),
        tidy=in_tuples("dims"),
        methods=spellings(("tile",), lambda input, *dims: None),
    ),
    entry(
        "repeat_interleave",
        Kind.MOVE,
        torch.repeat_interleave,
        sig(lambda input, repeats, dim=None: None),
        absorb={"output_size": (None,)},
        functions=spellings(
            (torch.repeat_interleave,),
            lambda input, repeats, dim=None, *, output_size=None: None,
        ),
        methods=spellings(
            ("repeat_interleave",), lambda input, repeats, dim=None, *, output_size=None: None
        ),
    ),
)

_TURNED: Final = (
    entry(
        "flip",
        Kind.MOVE,
        torch.flip,
        sig(lambda input, dims: None),
        tidy=in_tuples("dims"),
        functions=spellings((torch.flip,), lambda input, dims: None)
        | spellings((torch.fliplr,), lambda input: None, read=fixed(dims=(1,)))
        | spellings((torch.flipud,), lambda input: None, read=fixed(dims=(0,))),
        methods=spellings(("flip",), lambda input, *dims: None)
        | spellings(("fliplr",), lambda input: None, read=fixed(dims=(1,)))
        | spellings(("flipud",), lambda input: None, read=fixed(dims=(0,))),
    ),
    entry(
        "rot90",
        Kind.MOVE,
        torch.rot90,
        sig(lambda input, k=1, dims=(0, 1): None),
        tidy=in_tuples("dims"),
        methods=spellings(("rot90",), lambda input, k=1, dims=(0, 1): None),
    ),
    entry(
        "roll",
        Kind.MOVE,
        torch.roll,
        sig(lambda input, shifts, dims=None: None),
        tidy=in_tuples("shifts", "dims"),
        methods=spellings(("roll",), lambda input, shifts, dims=None: None),
    ),
    _triangle("tril", torch.tril),
    _triangle("triu", torch.triu),
)

_SELECTED: Final = (
    entry(
        "index_select",
        Kind.MOVE,
        torch.index_select,
        sig(lambda input, dim, index: None),
        methods=spellings(("index_select",), lambda input, dim, index: None),
    ),
    entry(
        "gather",
        Kind.MOVE,
        torch.gather,
        sig(lambda input, dim, index: None),
        absorb={"sparse_grad": (False,)},
        functions=spellings((torch.gather,), lambda input, dim, index, *, sparse_grad=False: None),
        methods=spellings(("gather",), lambda input, dim, index, *, sparse_grad=False: None),
    ),
    entry(
        "take_along_dim",
        Kind.MOVE,
        torch.take_along_dim,
        sig(lambda input, indices, dim=None: None),
        methods=spellings(("take_along_dim",), lambda input, indices, dim=None: None),
    ),
    entry(
        "take",
        Kind.MOVE,
        torch.take,
        sig(lambda input, index: None),
        methods=spellings(("take",), lambda input, index: None),
    ),
    entry(
        "masked_select",
        Kind.MOVE,
        torch.masked_select,
        sig(lambda input, mask: None),
        methods=spellings(("masked_select",), lambda input, mask: None),
    ),
    entry(
        "masked_fill",
        Kind.MOVE,
        torch.masked_fill,
        sig(lambda input, mask, value: None),
        methods=spellings(("masked_fill",), lambda input, mask, value: None)
        | spellings(("masked_fill_",), lambda input, mask, value: None, inplace=True),
    ),
    entry(
        "index_fill",
        Kind.MOVE,
        torch.index_fill,
        sig(lambda input, dim, index, value: None),
        methods=spellings(("index_fill",), lambda input, dim, index, value: None)
        | spellings(("index_fill_",), lambda input, dim, index, value: None, inplace=True),
    ),
)


_FORMATS: Final = (
    *(None, torch.contiguous_format, torch.preserve_format),
    *(torch.channels_last, torch.channels_last_3d),
)
"""Memory formats say nothing about values."""


def _first_given(given: dict[str, Any]) -> dict[str, Any]:
    """``x.to(torch.float32)``, ``x.to("cpu")``, ``x.to(y)`` tell their argument by its kind."""
    found = dict(given)
    for value in found.pop("targets"):
        # `x.to(torch.float32, True)` says non_blocking.
        found["non_blocking" if isinstance(value, bool) else _kind_of_target(value)] = value
    return found


def _kind_of_target(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return "dtype"
    return "device" if isinstance(value, str | torch.device) else "like"


_to = (
    lambda input, *targets, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None: (
        None
    )
)


_CONVERTED: Final = (
    entry(
        "cast",
        Kind.FLOAT,
        cast,
        sig(lambda input, *, dtype=None, device=None, like=None: None),
        absorb={"non_blocking": (False, True), "copy": (False,), "memory_format": _FORMATS},
        methods=spellings(("to",), _to, read=_first_given)
        | spellings(
            ("float",), lambda input, *, memory_format=None: None, read=fixed(dtype=torch.float32)
        )
        | spellings(("cpu",), lambda input, *, memory_format=None: None, read=fixed(device="cpu"))
        | spellings(("type",), lambda input, dtype, non_blocking=False: None)
        | spellings(
            ("type_as",),
            lambda input, other: None,
            read=lambda given: {"input": given["input"], "like": given["other"]},
        ),
    ),
)

_PIXELS: Final = (
    entry(
        "pixel_shuffle",
        Kind.MOVE,
        F.pixel_shuffle,
        sig(lambda input, upscale_factor: None),
        functions=spellings((torch.pixel_shuffle,), lambda input, upscale_factor: None),
        modules=(torch.nn.PixelShuffle,),
    ),
    entry(
        "pixel_unshuffle",
        Kind.MOVE,
        F.pixel_unshuffle,
        sig(lambda input, downscale_factor: None),
        functions=spellings((torch.pixel_unshuffle,), lambda input, downscale_factor: None),
        modules=(torch.nn.PixelUnshuffle,),
    ),
    entry(
        "channel_shuffle",
        Kind.MOVE,
        F.channel_shuffle,
        sig(lambda input, groups: None),
        alias=True,
        functions=spellings(
            (torch.channel_shuffle, torch.native_channel_shuffle), lambda input, groups: None
        ),
        modules=(torch.nn.ChannelShuffle,),
    ),
)

MOVES: Final = (*_REPEATED, *_TURNED, *_SELECTED, *_CONVERTED, *_PIXELS)
