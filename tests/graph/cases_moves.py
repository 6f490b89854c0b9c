"""Spelling cases: moves, padding and max pools."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.spelling import Case, Spelled, Unpooled


def _max_pool(rank: int, make: Callable[..., nn.Module], indices: bool = False) -> Case:
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}
    modules = () if indices else (Spelled(lambda: make(**given)),)
    target = getattr(F, f"max_pool{rank}d")
    asked = {target: {**given, "return_indices": True}} if indices else {}
    return Case((2, 4) + (8,) * rank, given, modules, says=asked)


def _pads() -> tuple[Spelled, ...]:
    """Every padding module, on inputs of its rank."""
    found = []
    for rank in (1, 2, 3):
        sides, shape = (1, 2) * rank, (2, 4) + (5,) * rank
        for word in ("Zero", "Constant", "Reflection", "Replication", "Circular"):
            make = getattr(nn, f"{word}Pad{rank}d")
            given = (sides, 0.5) if word == "Constant" else (sides,)
            mode = {"Zero": "constant", "Reflection": "reflect", "Replication": "replicate"}
            value = {"Zero": 0.0, "Constant": 0.5}.get(word)
            wanted = {"pad": sides, "mode": mode.get(word, word.lower()), "value": value}
            found.append(Spelled(functools.partial(make, *given), shape, wanted))
    return tuple(found)


def _pooled(make: Callable[..., nn.Module]) -> Spelled:
    return Spelled(lambda: make(3))


def _unpool(rank: int, make: Callable[..., nn.Module]) -> Case:
    """Values 2 apart, in the order they have in memory."""
    count = 3**rank
    row = torch.arange(count) * 2
    indices = row.reshape((1, 1) + (3,) * rank).expand((2, 4) + (3,) * rank).contiguous()
    given = {"indices": indices, "kernel_size": 3, "stride": 2, "padding": 0}
    return Case(
        (2, 4) + (3,) * rank,
        {**given, "output_size": None},
        (Spelled(lambda: Unpooled(make(3, 2), indices)),),
    )


_LIKE: Final = torch.zeros(1)

MOVES: Final[dict[str, Case]] = {
    "repeat": Case(options={"repeats": (1, 2, 1)}),
    "tile": Case(options={"dims": (2, 1)}),
    "repeat_interleave": Case(options={"repeats": 2, "dim": 1}),
    "flip": Case(
        options={"dims": (1, -1)},
        only={
            **{key: {"dims": (1,)} for key in (torch.fliplr, "fliplr")},
            **{key: {"dims": (0,)} for key in (torch.flipud, "flipud")},
        },
    ),
    "rot90": Case(options={"k": 3, "dims": (1, 2)}),
    "roll": Case(options={"shifts": (2, -1), "dims": (1, -1)}),
    "tril": Case(options={"diagonal": -1}),
    "triu": Case(options={"diagonal": 1}),
    "index_select": Case(options={"dim": 1, "index": torch.tensor([2, 0])}),
    "gather": Case(options={"dim": -1, "index": torch.randint(6, (2, 4, 3))}),
    "take_along_dim": Case(options={"indices": torch.randint(6, (2, 4, 3)), "dim": -1}),
    "take": Case(options={"index": torch.tensor([[3, 41], [7, 0]])}),
    "masked_select": Case(options={"mask": torch.rand(2, 4, 6) > 0.5}),
    "masked_fill": Case(options={"mask": torch.rand(4, 6) > 0.5, "value": 0.25}),
    "index_fill": Case(options={"dim": -2, "index": torch.tensor([2, 0]), "value": 0.25}),
    "cast": Case(
        options={"dtype": torch.float32, "device": None, "like": None},
        says={"to": {"targets": (torch.float32,)}, "type_as": {"other": _LIKE}},
        only={
            "cpu": {"dtype": None, "device": "cpu", "like": None},
            "type_as": {"dtype": None, "device": None, "like": _LIKE},
        },
    ),
    "pad": Case(
        options={"pad": (1, 2), "mode": "constant", "value": 0.25},
        modules=_pads(),
    ),
    "im2col": Case(
        (2, 4, 7, 6),
        {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 1, "stride": (2, 1)},
        (Spelled(lambda: nn.Unfold((3, 2), (1, 2), 1, (2, 1))),),
    ),
    "fold": Case(
        (2, 12, 12),
        {"output_size": (4, 5), "kernel_size": 2, "dilation": 1, "padding": 0, "stride": 1},
        (Spelled(lambda: nn.Fold((4, 5), 2)),),
    ),
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
    "max_pool1d": _max_pool(1, nn.MaxPool1d),
    "max_pool2d": _max_pool(2, nn.MaxPool2d),
    "max_pool3d": _max_pool(3, nn.MaxPool3d),
    **{
        f"max_pool{rank}d_with_indices": _max_pool(rank, make, indices=True)
        for rank, make in ((1, nn.MaxPool1d), (2, nn.MaxPool2d), (3, nn.MaxPool3d))
    },
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
    **{
        f"adaptive_max_pool{rank}d_with_indices": Case(
            (2, 4) + (6,) * rank,
            {"output_size": 3},
            says={
                getattr(F, f"adaptive_max_pool{rank}d"): {"output_size": 3, "return_indices": True}
            },
        )
        for rank in (1, 2, 3)
    },
    "max_unpool1d": _unpool(1, nn.MaxUnpool1d),
    "max_unpool2d": _unpool(2, nn.MaxUnpool2d),
    "max_unpool3d": _unpool(3, nn.MaxUnpool3d),
}
