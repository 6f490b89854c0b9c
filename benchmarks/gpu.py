"""On a GPU: every mode against float32, TF32 and torch's own 16 bits, launched and as CUDA graphs.

Everything runs in one process, in turns; times are the wall clock's, from an idle GPU until it is
idle again. SQNR is of the output against float32 without TF32. Weights are random.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, parser, ratios, say, show, spread
from benchmarks.dynamic_worker import WORDS, Bert
from benchmarks.weight_only import Block
from fxquant.report.checks import size_in_bytes
from tests import zoo

MODES = ("dynamic", "weight_only", "bfloat16", "float16")
BASE = "float32"


@dataclass(frozen=True)
class Contender:
    """A model and how it is run.

    Args:
        model: on the GPU.
        given: what it is fed.
        tf32: whether products of float32 may be rounded to TF32.
    """

    model: nn.Module
    given: Tensor
    tf32: bool = False

    def run(self) -> Any:
        """One forward, queued."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        return self.model(self.given)


def contenders(model: nn.Module, given: Tensor) -> dict[str, Contender]:
    """Float, torch's own 16 bits and what fxquant makes in each mode that has something to do."""
    made = {BASE: Contender(model, given), "TF32": Contender(model, given, tf32=True)}
    for name, dtype in (("torch bfloat16", torch.bfloat16), ("torch float16", torch.float16)):
        rows = given.to(dtype) if given.is_floating_point() else given
        made[name] = Contender(copy.deepcopy(model).to(dtype), rows)
    linears = any(isinstance(module, nn.Linear) for module in model.modules())
    convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    for mode in MODES:
        if mode in ("dynamic", "weight_only") and (convolutions or not linears):
            continue
        quantized = fxquant.quantize(model, mode=mode, example_inputs=given)  # type: ignore[arg-type]  # a Mode
        made[f"fxquant {mode}"] = Contender(quantized, given)
    return made


def decibels(exact: Tensor, found: Tensor) -> float:
    """Signal to quantization noise."""
    noise = float((exact.double() - found.double()).square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / noise) if noise else math.inf


def as_graph(contender: Contender) -> Callable[[], None]:
    """The forward as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.run()
    return graph.replay


def timed(run: Callable[[], Any], seconds: float) -> float:
    """Seconds a call takes, over as many as fill ``seconds``."""
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        calls += 5
    return (time.perf_counter() - start) / calls


def measured(model: nn.Module, given: Tensor, args: Any, *, graphs: bool) -> list[dict[str, Any]]:
    """Every contender's figures."""
    models = contenders(model, given)
    exact, whole = models[BASE].run(), size_in_bytes(model)
    runs: dict[str, dict[str, Callable[[], Any]]] = {"launched": {}, "graph": {}}
    for name, contender in models.items():
        runs["launched"][name] = contender.run
        if graphs:
            runs["graph"][name] = as_graph(contender)
    seconds: dict[str, dict[str, list[float]]] = {
        way: {name: [] for name in found} for way, found in runs.items()
    }
    for turn in range(args.rounds + 1):
        for way, found in runs.items():
            for name, run in found.items():
                spent = timed(run, args.turn)
                if turn:  # the first warms up
                    seconds[way][name].append(spent)
    return [
        {
            "contender": name,
            "sqnr": decibels(exact, contender.run()),
            "size": size_in_bytes(contender.model) / whole,
            **{way: found[name] for way, found in seconds.items() if name in found},
            **{f"{way} ratios": ratios(found[name], found[BASE])
               for way, found in seconds.items() if name in found},
        }
        for name, contender in models.items()
    ]  # fmt: skip


def cases(args: Any) -> list[tuple[str, nn.Module, Tensor, bool]]:
    """What is measured: title, model, what it is fed, whether it can be a graph."""
    made: list[tuple[str, nn.Module, Tensor, bool]] = []
    if "bert" in args.models:
        bert = Bert(args.layers).eval().cuda()
        for batch in (1, 32):
            ids = torch.randint(0, WORDS, (batch, 128), device="cuda")
            made.append((f"BERT, {args.layers} layers, {batch} x 128 tokens", bert, ids, False))
    if "block" in args.models:
        block = Block(args.width).eval().cuda()
        for tokens in (1, 16, 512, 8192):
            x = torch.randn(tokens, args.width, device="cuda")
            made.append((f"decoder-like block of {args.width}, {tokens} tokens", block, x, True))
    if "resnet50" in args.models:
        for batch in (1, 64):
            x = zoo.example("resnet50", batch=batch).cuda()
            model = zoo.build("resnet50").cuda()
            made.append((f"ResNet-50, {batch} pictures", model, x, True))
    return made


def main() -> None:
    """Time, size and SQNR of every contender."""
    arguments = parser(__doc__)
    names = ("bert", "block", "resnet50")
    arguments.add_argument("--models", nargs="+", choices=names, default=names)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--width", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--turn", type=float, default=0.05, help="seconds of work per turn")
    args = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: this benchmark needs one")
    warnings.simplefilter("ignore", fxquant.errors.SpeedWarning)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    figures = {}
    with torch.inference_mode():
        for title, model, given, graphs in cases(args):
            say(title)
            rows = figures[title] = measured(model, given, args, graphs=graphs)
            table = [
                [
                    row["contender"],
                    spread([1e3 * s for s in row["launched"]], 3),
                    spread(row["launched ratios"]),
                    *([spread([1e3 * s for s in row["graph"]], 3), spread(row["graph ratios"])]
                      if graphs else []),
                    f"{row['size']:.3f}",
                    f"{row['sqnr']:.1f}",
                ]
                for row in rows
            ]  # fmt: skip
            graph = ["as a graph, ms", "to float32"] if graphs else []
            headers = ["contender", "ms", "to float32", *graph, "size / float32", "SQNR dB"]
            show(title, headers, table)
    finish(args.json, {"gpu": figures})


if __name__ == "__main__":
    main()
