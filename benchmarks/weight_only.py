"""Weight-only and bfloat16 against float32 and torch's bfloat16: a block at one token and at many.

Everything runs in one process, in turns. SQNR is of the block's output against float32.
"""

from __future__ import annotations

import copy
import math
import time
import warnings

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, parser, ratios, say, show, spread
from fxquant.report.checks import size_in_bytes


class Block(nn.Module):
    """The projections of a decoder block; what is between them is the same in every contender."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``[tokens, width]`` to rows of the same shape."""
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(torch.sigmoid(q) * k + v)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def contenders(block: nn.Module, width: int) -> dict[str, nn.Module]:
    """Float32, what fxquant makes of it, and torch's own ``model.bfloat16()``."""
    x = torch.randn(1, width)
    made: dict[str, nn.Module] = {"float32": block}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxquant.errors.SpeedWarning)
        for preset in ("weight-only-int8", "weight-only-int4"):
            made[preset] = fxquant.quantize(
                block, mode="weight_only", qconfig=preset, example_inputs=x
            )
        made["bfloat16"] = fxquant.quantize(block, mode="bfloat16", example_inputs=x)
    made["torch bfloat16"] = copy.deepcopy(block).bfloat16()
    return made


def decibels(exact: Tensor, found: Tensor) -> float:
    """Signal to quantization noise."""
    noise = float(((exact - found.float()) ** 2).sum())
    return 10 * math.log10(float((exact**2).sum()) / noise) if noise else math.inf


def main() -> None:
    """Time, size and SQNR of every contender, for each number of tokens."""
    arguments = parser(__doc__)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = contenders(Block(args.width).eval(), args.width)
    whole = size_in_bytes(models["float32"])
    figures = []
    for tokens in args.tokens:
        say(f"{tokens} tokens")
        x = torch.randn(tokens, args.width)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        signal: dict[str, float] = {}
        with torch.no_grad():
            exact = models["float32"](x)
            for turn in range(args.rounds + 2):
                for name, model in models.items():
                    given = x.bfloat16() if name == "torch bfloat16" else x
                    start = time.perf_counter()
                    result = model(given)
                    if turn >= 2:  # the first two warm up
                        seconds[name].append(time.perf_counter() - start)
                    signal[name] = decibels(exact, result)
        for name, model in models.items():
            size = size_in_bytes(model)
            quotient = ratios(seconds[name], seconds["float32"])
            row = {"tokens": tokens, "name": name, "sqnr": signal[name], "size": size / whole}
            figures.append(row | {"seconds": seconds[name], "ratios": quotient})
    rows = [
        [
            str(row["tokens"]),
            str(row["name"]),
            spread([1e3 * s for s in row["seconds"]]),
            spread(row["ratios"]),
            f"{row['size']:.3f}",
            f"{row['sqnr']:.1f}",
        ]
        for row in figures
    ]
    headers = ["tokens", "contender", "ms", "time / float32", "size / float32", "SQNR dB"]
    show(f"Decoder-like block, width {args.width}", headers, rows)
    finish(args.json, {"weight_only": figures})


if __name__ == "__main__":
    main()
