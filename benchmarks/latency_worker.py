"""One contender of ``latency`` in a process of its own: builds a model, then times on request.

Speaks lines of JSON: one when ready (or why not), then for each ``<iterations>`` line on stdin
one list of seconds. It blocks on stdin between requests, so an idle contender costs nothing
once its OpenMP threads have gone to sleep (a few milliseconds after their last work).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.peers import fx_static
from tests import zoo

WARMUP = 3


def sqnr(expected: Tensor, got: Tensor) -> float:
    """Signal to quantization noise, in dB: that what is timed still computes the network."""
    noise = (expected - got).double().pow(2).sum().clamp(min=1e-30)
    return float(10 * torch.log10(expected.double().pow(2).sum() / noise))


def contender(name: str, model: nn.Module, data: list[Tensor]) -> nn.Module:
    """``float``, ``fx:ENGINE`` (torch's FX mode), or ``fxquant:BACKEND``.

    ``fxquant:BACKEND/graph`` runs the code of its graph, and no recorded program.
    """
    kind, _, variant = name.partition(":")
    if kind == "float":
        return model
    if kind == "fx":
        return fx_static(model, data, variant)
    backend, _, way = variant.partition("/")
    made = fxquant.quantize(
        model, data, mode="static", backend=backend, example_inputs=(data[0][:1],)
    )
    if way == "graph":
        made.run_by(None)
    return made


def timed(model: nn.Module, x: Tensor, iterations: int) -> list[float]:
    """Seconds of each of ``iterations`` calls, after a few that warm the caches up again."""
    for _ in range(WARMUP):
        model(x)
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def best_layout(model: nn.Module, x: Tensor) -> tuple[str, Tensor]:
    """The memory layout of the input that ``model`` is faster with."""
    layouts = {"contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last)}
    spent = dict.fromkeys(layouts, float("inf"))
    for _ in range(3):
        for name, value in layouts.items():
            spent[name] = min(spent[name], *timed(model, value, 10))
    best = min(spent, key=lambda name: spent[name])
    return best, layouts[best]


def main() -> None:
    """Build, say so, serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("model", choices=zoo.NAMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    original = zoo.build(args.model, size=args.size)
    data = [zoo.example(args.model, 4, args.size, seed) for seed in range(1, 5)]
    x = zoo.example(args.model, args.batch, args.size)
    model = contender(args.contender, original, data)
    with torch.inference_mode():
        quality = sqnr(original(x), model(x))
        layout, x = best_layout(model, x)
        print(json.dumps({"layout": layout, "sqnr": quality}), flush=True)
        for line in sys.stdin:
            print(json.dumps(timed(model, x, int(line))), flush=True)


if __name__ == "__main__":
    main()
