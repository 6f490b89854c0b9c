"""BERT-base: float, torch's dynamic quantization, ours, and ours in static int8 with bfloat16.

Each in a process of its own, in interleaved rounds: what slows the whole machine for a while
cancels out in the ratios. Then the peak memory of quantizing linears of 400 MB.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks.common import finish, machine, parser, ratios, say, show, spread
from benchmarks.latency import Worker, start_worker, take_turns

CONTENDERS = ("float", "torch:fbgemm", "torch:onednn", "fxquant:dynamic", "fxquant:int8-bf16")


def start(name: str, args: Any) -> Worker | None:
    """Start a contender and wait until it is ready."""
    command = [sys.executable, "-m", "benchmarks.dynamic_worker", name]
    for option in ("threads", "layers", "tokens", "batch"):
        command += [f"--{option}", str(getattr(args, option))]
    return start_worker(name, command)


def rows(workers: list[Worker]) -> tuple[list[list[str]], dict[str, Any]]:
    """The table and its figures; the best of torch's engines is the one that others compare to."""
    peers = [worker for worker in workers if worker.name.startswith("torch:")]
    best = min(peers, key=lambda worker: statistics.median(worker.rounds), default=None)
    bases = {worker.name: worker for worker in workers if worker.name == "float"}
    if best is not None:
        bases["torch"] = best
    table, figures = [], {}
    for worker in workers:
        cells = [worker.name, spread([1e3 * seconds for seconds in worker.rounds])]
        found: dict[str, Any] = {**worker.ready, "ms": [1e3 * s for s in worker.rounds]}
        for base in ("float", "torch"):
            to_base = ratios(worker.rounds, bases[base].rounds) if base in bases else []
            found[f"ratio_to_{base}"] = to_base
            cells.append(spread(to_base, 3) if to_base else "-")
        cells.append("exact" if worker.name == "float" else f"{worker.ready['sqnr']:.1f}")
        figures[worker.name] = found
        table.append(cells)
    return table, figures


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--rounds", type=int, default=15)
    args_parser.add_argument("--turn", type=float, default=0.5, help="seconds of work per turn")
    args_parser.add_argument("--layers", type=int, default=12)
    args_parser.add_argument("--tokens", type=int, default=128)
    args_parser.add_argument("--batch", type=int, default=1)
    args_parser.add_argument("--no-memory", action="store_true")
    args = args_parser.parse_args()
    print(", ".join(machine().values()) + f", {args.threads} threads")
    figures: dict[str, Any] = {"options": {k: v for k, v in vars(args).items() if k != "json"}}
    say(f"BERT: building {len(CONTENDERS)} contenders")
    started = [start(name, args) for name in CONTENDERS]
    workers = [worker for worker in started if worker is not None]
    take_turns(workers, args.rounds, args.turn)
    for worker in workers:
        worker.close()
    table, figures["bert"] = rows(workers)
    headers = ["contender", "ms", "to float", "to torch's best", "SQNR dB"]
    size = f"{args.layers} layers, {args.tokens} tokens, batch {args.batch}"
    show(f"BERT, {size}: median (min..max) of rounds", headers, table)
    if not args.no_memory:
        measured = start("memory", args)
        if measured is not None:
            measured.close()
            figures["memory"] = measured.ready
            cells = [f"{measured.ready[name]:.2f}" for name in ("float_mb", "peak", "result")]
            show(
                "Linears, memory to that of the float model",
                ["float MB", "peak, the float model included", "result"],
                [cells],
            )
    finish(args.json, figures)
    sys.exit(1 if len(workers) < len(CONTENDERS) else 0)


if __name__ == "__main__":
    main()
