"""Moves on codes beside the same moves on float: the ratio of their times, in turns.

python -m benchmarks.moves_on_codes [part of a name]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends import x86_moves as moves
from fxquant.backends.x86_pools import AdaptiveMaxPoolCodes, LocatedMaxPoolCodes, MaxPoolCodes

Call = Callable[[Tensor], Any]
POOL: Final[dict[str, Any]] = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
MASK: Final = torch.rand(1, 1, 56, 56) > 0.5
FULL: Final = torch.rand(1, 64, 56, 56) > 0.5
PLACES: Final = torch.randperm(64)[:32]
ALONG: Final = torch.randint(0, 56, (1, 64, 56, 20))
BACK: Final = torch.arange(3136).reshape(1, 1, 56, 56).expand(1, 64, 56, 56).contiguous()

SAME: Final[dict[str, Call]] = {
    "transpose, copied": lambda x: x.transpose(1, 2).contiguous(),
    "flip": lambda x: x.flip(3),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "roll": lambda x: torch.roll(x, (3, 3), (2, 3)),
    "index_select": lambda x: x.index_select(1, PLACES),
    "mask": lambda x: x[FULL],
    "masked_select": lambda x: x.masked_select(FULL),
    "gather": lambda x: x.gather(3, ALONG),
    "take": lambda x: x.take(ALONG),
    "index_fill": lambda x: x.index_fill(1, PLACES, 1),
    "index_put": lambda x: x.index_put((torch.tensor([0]),), x[0]),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "hstack": lambda x: torch.hstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "unfold, copied": lambda x: x.unfold(2, 3, 1).contiguous(),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "pad constant": lambda x: F.pad(x, (1, 1, 1, 1), value=3),
    "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "pad circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(3),
    "max": lambda x: x.max(3),
    "argmax": lambda x: x.argmax(3),
    "topk": lambda x: x.topk(5, 3),
    "sort": lambda x: x.sort(3),
    "argsort": lambda x: x.argsort(3),
    "cummax": lambda x: x.cummax(3),
    "kthvalue": lambda x: x.kthvalue(3, 3),
}
"""Moves that are the same call on codes."""

OWN: Final[dict[str, tuple[Call, Call]]] = {
    "where": (
        lambda x: torch.where(MASK, x, x),
        lambda q: moves.where_codes(q, q, condition=MASK),
    ),
    "masked_fill": (
        lambda x: x.masked_fill(MASK, 0.5),
        lambda q: moves.masked_fill_codes(q, mask=MASK, value=7),
    ),
    "take_along_dim": (
        lambda x: torch.take_along_dim(x, ALONG, 3),
        lambda q: moves.take_along_dim_codes(q, indices=ALONG, dim=3),
    ),
    "tril": (lambda x: x.tril(), lambda q: moves.tril_codes(q, diagonal=0, zero_point=7)),
    "pixel_shuffle": (
        lambda x: F.pixel_shuffle(x, 2),
        lambda q: moves.pixel_shuffle_codes(q, upscale_factor=2),
    ),
    "pixel_unshuffle": (
        lambda x: F.pixel_unshuffle(x, 2),
        lambda q: moves.pixel_unshuffle_codes(q, downscale_factor=2),
    ),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(2, 3),
        lambda q: moves.repeat_interleave_codes(q, repeats=2, dim=3),
    ),
    "list of places": (
        lambda x: x[:, [3, 1, 2]],
        lambda q: moves.getitem_codes(q, (slice(None), [3, 1, 2])),
    ),
    "tensor of places": (
        lambda x: x[:, PLACES],
        lambda q: moves.getitem_codes(q, (slice(None), PLACES)),
    ),
    "im2col": (
        lambda x: F.unfold(x, 3, padding=1),
        lambda q: moves.im2col_codes(
            q, kernel_size=3, dilation=1, padding=1, stride=1, zero_point=7
        ),
    ),
    "max_unpool2d": (
        lambda x: F.max_unpool2d(x, BACK, [2, 2], output_size=[112, 112]),
        lambda q: moves.max_unpool_codes(
            q,
            rank=2,
            indices=BACK,
            kernel_size=2,
            stride=2,
            padding=0,
            output_size=[112, 112],
            zero_point=7,
        ),
    ),
    "max_pool1d": (
        lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1),
        lambda q: MaxPoolCodes(1, {**POOL, "ceil_mode": False})(q.flatten(2)),
    ),
    "max_pool2d": (
        lambda x: F.max_pool2d(x, 3, 2, 1),
        MaxPoolCodes(2, {**POOL, "ceil_mode": False}),
    ),
    "max_pool3d": (
        lambda x: F.max_pool3d(x.unflatten(1, (8, 8)), 3, 2, 1),
        lambda q: MaxPoolCodes(3, {**POOL, "ceil_mode": False})(q.unflatten(1, (8, 8))),
    ),
    "max_pool2d with indices": (
        lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
        LocatedMaxPoolCodes("max_pool2d_with_indices", {**POOL, "ceil_mode": False}),
    ),
    "adaptive_max_pool2d": (
        lambda x: F.adaptive_max_pool2d(x, 7),
        AdaptiveMaxPoolCodes(2, {"output_size": 7}),
    ),
    "adaptive_max_pool2d, uneven": (
        lambda x: F.adaptive_max_pool2d(x, 5),
        AdaptiveMaxPoolCodes(2, {"output_size": 5}),
    ),
}


def _seconds(call: Call, x: Tensor, times: int = 5) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call(x)
    return (time.perf_counter() - start) / times


def main(part: str = "", rounds: int = 11) -> None:
    """Print microseconds of float and codes, and their ratio, of every move."""
    torch.set_num_threads(1)
    real = torch.randn(1, 64, 56, 56)
    codes = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    pairs = {**{name: (call, call) for name, call in SAME.items()}, **OWN}
    for name, (in_float, on_codes) in pairs.items():
        if part not in name:
            continue
        in_float(real), on_codes(codes)
        times = [(_seconds(in_float, real), _seconds(on_codes, codes)) for _ in range(rounds)]
        a, b = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
        print(f"{name:28s} float {a:8.0f} us   codes {b:8.0f} us   {b / a:5.2f}")


if __name__ == "__main__":
    main("".join(sys.argv[1:2]))
