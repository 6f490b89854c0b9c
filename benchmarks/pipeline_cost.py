"""What quantizing itself costs: passes, calibration, long graphs, import time, memory.

Each part can be run alone with ``--parts``.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, machine, parser, ratios, say, show, spread
from tests import zoo

Figures = dict[str, Any]


class ChainBlock(nn.Module):
    """conv, relu, conv, add, relu; maps x >= 0 to about relu(0.5 x + b)."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = self._conv(1.0, channels, generator)
        self.second = self._conv(-0.5, channels, generator)

    @staticmethod
    def _conv(factor: float, channels: int, generator: torch.Generator) -> nn.Conv2d:
        conv = nn.Conv2d(channels, channels, 1)
        noise = 0.05 * torch.randn(channels, channels, generator=generator)
        conv.weight.data = (factor * torch.eye(channels) + noise)[:, :, None, None]
        conv.bias = nn.Parameter(0.3 * torch.rand(channels, generator=generator))
        return conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + x)


def long_chain(nodes: int) -> nn.Sequential:
    """A model of ``nodes`` graph nodes in a row, whose values stay in range whatever its length."""
    generator = torch.Generator().manual_seed(0)
    return nn.Sequential(*(ChainBlock(4, generator) for _ in range(nodes // 5))).eval()


def passes(args: Namespace) -> Figures:
    """prepare and convert of ResNet-50, without the calibration between them."""
    model = zoo.build("resnet50")
    x = zoo.example("resnet50")
    prepare, convert = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        prepared = fxquant.prepare(model, mode="static", backend="x86", example_inputs=(x,))
        prepare.append(time.perf_counter() - start)
        fxquant.calibrate(prepared, [x])
        start = time.perf_counter()
        fxquant.convert(prepared, backend="x86")
        convert.append(time.perf_counter() - start)
    both = [a + b for a, b in zip(prepare, convert, strict=True)]
    table = [[spread(prepare), spread(convert), spread(both), "2.0"]]
    show("ResNet-50, seconds", ["prepare", "convert", "both", "at most"], table)
    return {"prepare_s": prepare, "convert_s": convert}


def calibration(args: Namespace) -> Figures:
    """calibrate of ResNet-18 against the plain float forward over the same batches."""
    model = zoo.build("resnet18")
    table, figures = [], {}
    for size, count in ((1, 16), (8, 4), (32, 1)):
        data = [zoo.example("resnet18", size, seed=seed) for seed in range(count)]
        plain, observed = [], []
        for _ in range(args.rounds):
            prepared = fxquant.prepare(model, backend="x86", example_inputs=(data[0][:1],))
            start = time.perf_counter()
            with torch.no_grad():
                for batch in data:
                    model(batch)
            plain.append(time.perf_counter() - start)
            start = time.perf_counter()
            fxquant.calibrate(prepared, data)
            observed.append(time.perf_counter() - start)
        quotient = ratios(observed, plain)
        table.append([f"{count} x {size}", spread(plain), spread(observed), spread(quotient)])
        figures[f"batch {size}"] = {"float_s": plain, "calibrate_s": observed, "ratio": quotient}
    headers = ["batches", "float forward s", "calibrate s", "ratio (at most 1.6)"]
    show("Calibration of ResNet-18, 224x224", headers, table)
    return figures


def chain(args: Namespace) -> Figures:
    """The whole static pipeline over graphs of doubling length."""
    x = torch.rand(1, 4, 2, 2)
    table: list[list[str]] = []
    seconds: dict[int, float] = {}
    processor: dict[int, float] = {}  # what it costs on a busy machine too
    for nodes in args.nodes:
        model = long_chain(nodes)
        gc.collect()
        start, used = time.perf_counter(), time.process_time()
        fxquant.quantize(model, [x], mode="static", backend="x86", example_inputs=(x,))
        seconds[nodes] = time.perf_counter() - start
        processor[nodes] = time.process_time() - used
        say(f"{nodes} nodes: {seconds[nodes]:.2f} s")
        spent = processor[nodes]
        growth = f"{spent / processor[nodes // 2]:.2f}" if nodes // 2 in processor else "-"
        each = f"{1e3 * spent / nodes:.2f}"
        table.append([f"{nodes:,}", f"{seconds[nodes]:.2f}", f"{spent:.2f}", each, growth])
    headers = ["nodes", "seconds", "processor s", "ms per node", "time(n) / time(n/2)"]
    show("A chain through the whole static pipeline (20,000 nodes: at most 60 s)", headers, table)
    return {"seconds": seconds, "processor_s": processor}


def imports(args: Namespace) -> Figures:
    """import fxquant after import torch, each time in a fresh interpreter."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
        "import fxquant; print(b - a, time.perf_counter() - b)"
    )
    torch_s, own_s = [], []
    with tempfile.TemporaryDirectory() as cache:
        # As installed: pip compiles what it installs, wherever this runs from.
        there = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        there.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(args.rounds + 1):
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=there)
            first, second = done.stdout.split()
            torch_s.append(float(first))
            own_s.append(float(second))
    del torch_s[0], own_s[0]  # the first one reads the files from disk and writes bytecode
    table = [[spread(torch_s), spread(own_s, 3), "0.3"]]
    show("Import, seconds", ["torch", "fxquant on top", "at most"], table)
    return {"torch_s": torch_s, "fxquant_s": own_s}


def peak_mib() -> float:
    """Highest resident memory of this process so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_stream(lengths: list[int], peaks: dict[int, float]) -> Iterator[Tensor]:
    """Ever new batches, noting the peak memory as each length is reached."""
    for index in range(max(lengths) + 1):
        if index in lengths:
            peaks[index] = peak_mib()
        yield zoo.example("resnet18", 8, 64, seed=index)


def memory_worker(args: Namespace) -> None:
    """Calibrate from a generator and print the peaks; a process of its own, for a clean peak."""
    model = zoo.build("resnet18")
    x = zoo.example("resnet18", 1, 64)
    prepared = fxquant.prepare(model, backend="x86", example_inputs=(x,))
    peaks: dict[int, float] = {}
    fxquant.calibrate(prepared, memory_stream(args.stream, peaks))
    print(json.dumps(peaks))


def memory(args: Namespace) -> Figures:
    """Peak memory of calibration as the stream of data gets longer."""
    command = [sys.executable, "-m", "benchmarks.pipeline_cost", "--memory-worker"]
    command += ["--threads", str(args.threads), "--stream", *map(str, args.stream)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks: dict[str, float] = json.loads(done.stdout)
    first = next(iter(peaks.values()))
    table = [[count, f"{peak:.0f}", f"{peak - first:+.1f}"] for count, peak in peaks.items()]
    headers = ["batches so far", "peak MiB", "since the first line"]
    show("Memory of calibrating ResNet-18, batches of 8 at 64x64", headers, table)
    return dict(peaks)


PARTS = {
    "passes": passes,
    "calibration": calibration,
    "chain": chain,
    "imports": imports,
    "memory": memory,
}


def main() -> None:
    """Run the parts asked for."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args_parser.add_argument("--rounds", type=int, default=5)
    args_parser.add_argument("--nodes", type=int, nargs="+", default=[2500, 5000, 10000, 20000])
    args_parser.add_argument("--stream", type=int, nargs="+", default=[8, 32, 128, 512])
    args_parser.add_argument("--memory-worker", action="store_true", help="(used by itself)")
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_worker:
        memory_worker(args)
        return
    print(", ".join(machine().values()) + f", {args.threads} threads")
    figures = {part: PARTS[part](args) for part in args.parts}

    finish(args.json, figures)


if __name__ == "__main__":
    main()
