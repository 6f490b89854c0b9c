"""Spelling cases: views, moves, joins, splits and max pools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from tests.graph.spelling import Case, Spelled


def _max_pool(rank: int, make: Callable[..., nn.Module]) -> Case:
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}
    return Case((2, 4) + (8,) * rank, given, (Spelled(lambda: make(**given)),))


def _pooled(make: Callable[..., nn.Module]) -> Spelled:
    return Spelled(lambda: make(3))


MOVES: Final[dict[str, Case]] = {
    "reshape": Case(options={"shape": (2, 24)}),
    "flatten": Case(
        shape=(2, 3, 2, 2),
        options={"start_dim": 1, "end_dim": 2},
        modules=(Spelled(lambda: nn.Flatten(1, 2)),),
    ),
    "permute": Case(options={"dims": (0, 2, 1)}),
    "transpose": Case(options={"dim0": 1, "dim1": 2}),
    "squeeze": Case(shape=(2, 1, 6), options={"dim": 1}),
    "unsqueeze": Case(options={"dim": 1}),
    "unflatten": Case(options={"dim": 2, "sizes": (2, 3)}),
    "movedim": Case(options={"source": 0, "destination": -2}),
    "expand": Case(shape=(2, 1, 6), options={"size": (2, 4, 6)}),
    "narrow": Case(options={"dim": 2, "start": 1, "length": 3}),
    "select": Case(options={"dim": 2, "index": 3}),
    "getitem": Case(options={"index": (slice(None), slice(1, 3))}),
    "contiguous": Case(gone=True),
    "repeat": Case(options={"repeats": (1, 2, 1)}),
    "flip": Case(options={"dims": (1,)}),
    "roll": Case(options={"shifts": 2, "dims": 1}),
    "index_select": Case(options={"dim": 1, "index": torch.tensor([2, 0])}),
    "clone": Case(gone=True),
    "pad": Case(options={"pad": (1, 2), "mode": "constant", "value": None}),
    "pixel_shuffle": Case(
        shape=(2, 4, 3, 3),
        options={"upscale_factor": 2},
        modules=(Spelled(lambda: nn.PixelShuffle(2)),),
    ),
    "pixel_unshuffle": Case(
        shape=(2, 4, 4, 4),
        options={"downscale_factor": 2},
        modules=(Spelled(lambda: nn.PixelUnshuffle(2)),),
    ),
    "channel_shuffle": Case(
        shape=(2, 4, 4, 4), options={"groups": 2}, modules=(Spelled(lambda: nn.ChannelShuffle(2)),)
    ),
    "cat": Case(options={"dim": 1}, joins=2),
    "stack": Case(options={"dim": 1}, joins=2),
    "chunk": Case(options={"chunks": 2, "dim": 1}),
    "split": Case(options={"split_size_or_sections": [1, 3], "dim": 1}),
    "unbind": Case(options={"dim": 1}),
    "size": Case(options={"dim": 1}),
    "dim": Case(),
    "numel": Case(),
    "max_pool1d": _max_pool(1, nn.MaxPool1d),
    "max_pool2d": _max_pool(2, nn.MaxPool2d),
    "max_pool3d": _max_pool(3, nn.MaxPool3d),
    **{
        f"adaptive_{kind}_pool{rank}d": Case(
            (2, 4) + (6,) * rank, {"output_size": 3}, (_pooled(make),)
        )
        for kind, rank, make in (
            ("max", 1, nn.AdaptiveMaxPool1d),
            ("max", 2, nn.AdaptiveMaxPool2d),
            ("max", 3, nn.AdaptiveMaxPool3d),
        )
    },
}
