"""Op table: views, selections, joins, pools, and questions about shapes."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, sig, spellings

_VIEWS: Final = (
    entry(
        "reshape",
        Kind.MOVE,
        torch.reshape,
        sig(lambda input, shape: None),
        alias=True,
        methods=spellings(("reshape", "view"), lambda input, *shape: None),
    ),
    entry(
        "flatten",
        Kind.MOVE,
        torch.flatten,
        sig(lambda input, start_dim=0, end_dim=-1: None),
        alias=True,
        methods=spellings(("flatten",), lambda input, start_dim=0, end_dim=-1: None),
        modules=(nn.Flatten,),
    ),
    entry(
        "permute",
        Kind.MOVE,
        torch.permute,
        sig(lambda input, dims: None),
        alias=True,
        methods=spellings(("permute",), lambda input, *dims: None),
    ),
    entry(
        "transpose",
        Kind.MOVE,
        torch.transpose,
        sig(lambda input, dim0, dim1: None),
        alias=True,
        functions=spellings((torch.swapaxes, torch.swapdims), lambda input, dim0, dim1: None),
        methods=spellings(("transpose", "swapaxes", "swapdims"), lambda input, dim0, dim1: None),
    ),
    entry(
        "squeeze",
        Kind.MOVE,
        torch.squeeze,
        sig(lambda input, dim=None: None),
        alias=True,
        methods=spellings(("squeeze",), lambda input, dim=None: None),
    ),
    entry(
        "unsqueeze",
        Kind.MOVE,
        torch.unsqueeze,
        sig(lambda input, dim: None),
        alias=True,
        methods=spellings(("unsqueeze",), lambda input, dim: None),
    ),
    entry(
        "expand",
        Kind.MOVE,
        torch.Tensor.expand,
        sig(lambda input, size: None),
        alias=True,
        functions=spellings((torch.Tensor.expand,), lambda input, size: None),
        methods=spellings(("expand",), lambda input, *size: None),
    ),
    entry(
        "narrow",
        Kind.MOVE,
        torch.narrow,
        sig(lambda input, dim, start, length: None),
        alias=True,
        methods=spellings(("narrow",), lambda input, dim, start, length: None),
    ),
    entry(
        "select",
        Kind.MOVE,
        torch.select,
        sig(lambda input, dim, index: None),
        alias=True,
        methods=spellings(("select",), lambda input, dim, index: None),
    ),
    entry(
        "getitem",
        Kind.MOVE,
        operator.getitem,
        sig(lambda input, index: None),
        alias=True,
    ),
    entry(
        "contiguous",
        Kind.MOVE,
        torch.Tensor.contiguous,
        sig(lambda input: None),
        alias=True,
        absorb={"memory_format": (torch.contiguous_format, torch.channels_last)},
        methods=spellings(
            ("contiguous",), lambda input, memory_format=torch.contiguous_format: None
        ),
    ),
)

_COPIES: Final = (
    entry(
        "repeat",
        Kind.MOVE,
        torch.Tensor.repeat,
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
    entry(
        "interpolate",
        Kind.ARITH,
        F.interpolate,
        sig(
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None: (
                None
            )
        ),
        absorb={"antialias": (False,)},
        functions=spellings(
            (F.interpolate,),
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False: (
                None
            ),
        ),
        modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
)

_JOINS: Final = (
    entry(
        "cat",
        Kind.JOIN,
        torch.cat,
        sig(lambda tensors, dim=0: None),
        tensors=("tensors",),
        functions=spellings((torch.concat, torch.concatenate), lambda tensors, dim=0: None),
    ),
    entry("stack", Kind.JOIN, torch.stack, sig(lambda tensors, dim=0: None), tensors=("tensors",)),
)

_SPLITS: Final = (
    entry(
        "chunk",
        Kind.SPLIT,
        torch.chunk,
        sig(lambda input, chunks, dim=0: None),
        alias=True,
        methods=spellings(("chunk",), lambda input, chunks, dim=0: None),
    ),
    entry(
        "split",
        Kind.SPLIT,
        torch.split,
        sig(lambda input, split_size_or_sections, dim=0: None),
        alias=True,
        methods=spellings(("split",), lambda input, split_size_or_sections, dim=0: None),
    ),
    entry(
        "unbind",
        Kind.SPLIT,
        torch.unbind,
        sig(lambda input, dim=0: None),
        alias=True,
        methods=spellings(("unbind",), lambda input, dim=0: None),
    ),
)

_QUESTIONS: Final = (
    entry(
        "size",
        Kind.SHAPE,
        torch.Tensor.size,
        sig(lambda input, dim=None: None),
        functions=spellings((torch.Tensor.size,), lambda input, dim=None: None),
        methods=spellings(("size",), lambda input, dim=None: None),
    ),
    entry(
        "dim",
        Kind.SHAPE,
        torch.Tensor.dim,
        sig(lambda input: None),
        functions=spellings((torch.Tensor.dim,), lambda input: None),
        methods=spellings(("dim", "ndimension"), lambda input: None),
    ),
    entry(
        "numel",
        Kind.SHAPE,
        torch.numel,
        sig(lambda input: None),
        methods=spellings(("numel", "nelement"), lambda input: None),
    ),
)


def _one_way(arguments: dict[str, Any]) -> dict[str, Any]:
    """``kernel_size=(2, 2), stride=None`` is ``kernel_size=2, stride=2``."""
    found = {name: _one_number(value) for name, value in arguments.items()}
    if found.get("stride", 0) in (None, ()):
        found["stride"] = found["kernel_size"]
    return found


def _one_number(value: Any) -> Any:
    if isinstance(value, tuple | list) and value and all(type(side) is int for side in value):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


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
        tidy=_one_way,
    )


def _adaptive(kind: Kind, name: str, target: Function, direct: Function, module: Any) -> Op:
    if kind is Kind.ARITH:
        return entry(
            name,
            kind,
            target,
            sig(lambda input, output_size: None),
            functions=spellings((direct,), lambda input, output_size: None),
            modules=(module,),
            tidy=_one_way,
        )
    return entry(
        name,
        kind,
        target,
        sig(lambda input, output_size: None),
        absorb={"return_indices": (False,)},
        functions=spellings((target,), lambda input, output_size, return_indices=False: None),
        modules=(module,),
        tidy=_one_way,
    )


_POOLS: Final = (
    _max_pool(1, F.max_pool1d, torch.max_pool1d, nn.MaxPool1d),
    _max_pool(2, F.max_pool2d, torch.max_pool2d, nn.MaxPool2d),
    _max_pool(3, F.max_pool3d, torch.max_pool3d, nn.MaxPool3d),
    entry(
        "avg_pool1d",
        Kind.ARITH,
        F.avg_pool1d,
        sig(
            lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True: (
                None
            )
        ),
        modules=(nn.AvgPool1d,),
        tidy=_one_way,
    ),
    *(
        entry(
            f"avg_pool{rank}d",
            Kind.ARITH,
            target,
            sig(
                lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None: (
                    None
                )
            ),
            modules=(module,),
            tidy=_one_way,
        )
        for rank, target, module in (
            (2, F.avg_pool2d, nn.AvgPool2d),
            (3, F.avg_pool3d, nn.AvgPool3d),
        )
    ),
    *(
        _adaptive(Kind.ARITH, f"adaptive_avg_pool{rank}d", target, direct, module)
        for rank, target, direct, module in (
            (1, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, nn.AdaptiveAvgPool1d),
            (2, F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d),
            (3, F.adaptive_avg_pool3d, torch._C._nn.adaptive_avg_pool3d, nn.AdaptiveAvgPool3d),
        )
    ),
    *(
        _adaptive(Kind.MOVE, f"adaptive_max_pool{rank}d", target, target, module)
        for rank, target, module in (
            (1, F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d),
            (2, F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
            (3, F.adaptive_max_pool3d, nn.AdaptiveMaxPool3d),
        )
    ),
    entry(
        "mean",
        Kind.ARITH,
        torch.mean,
        sig(lambda input, dim=None, keepdim=False: None),
        absorb={"dtype": (None,)},
        functions=spellings((torch.mean,), lambda input, dim=None, keepdim=False, dtype=None: None),
        methods=spellings(("mean",), lambda input, dim=None, keepdim=False, dtype=None: None),
    ),
)

MOVES: Final = (*_VIEWS, *_COPIES, *_JOINS, *_SPLITS, *_QUESTIONS, *_POOLS)
