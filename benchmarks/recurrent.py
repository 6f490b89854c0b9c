"""Recurrent layers: float, torch's own dynamic quantization, and ours, in processes of their own.

Interleaved rounds: what slows the whole machine for a while cancels out in the ratios.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks.common import finish, machine, parser, ratios, say, show, spread
from benchmarks.latency import Worker, start_worker, take_turns

KINDS = ("LSTM", "GRU")
CONTENDERS = ("float", "torch:dynamic", "fxquant:x86")


def start(name: str, args: Any, kind: str) -> Worker | None:
    """Start a contender and wait until it is ready."""
    command = [sys.executable, "-m", "benchmarks.recurrent_worker", name, kind]
    for option in ("threads", "width", "hidden", "layers", "steps", "batch"):
        command += [f"--{option}", str(getattr(args, option))]
    return start_worker(name, command)


def rows(workers: list[Worker]) -> tuple[list[list[str]], dict[str, Any]]:
    """The table of one layer and its figures."""
    by_name = {worker.name: worker for worker in workers}
    table, figures = [], {}
    for worker in workers:
        cells = [worker.name, spread([1e3 * seconds for seconds in worker.rounds])]
        found: dict[str, Any] = {**worker.ready, "ms": [1e3 * s for s in worker.rounds]}
        for base in ("float", "torch:dynamic"):
            to_base = ratios(worker.rounds, by_name[base].rounds) if base in by_name else []
            found[f"ratio_to_{base}"] = to_base
            cells.append(spread(to_base, 3) if to_base else "-")
        cells.append("exact" if worker.name == "float" else f"{worker.ready['sqnr']:.1f}")
        figures[worker.name] = found
        table.append(cells)
    return table, figures


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--kinds", nargs="+", default=["LSTM"], choices=KINDS)
    args_parser.add_argument("--rounds", type=int, default=15)
    args_parser.add_argument("--turn", type=float, default=0.25, help="seconds of work per turn")
    args_parser.add_argument("--width", type=int, default=256)
    args_parser.add_argument("--hidden", type=int, default=512)
    args_parser.add_argument("--layers", type=int, default=2)
    args_parser.add_argument("--steps", type=int, default=64)
    args_parser.add_argument("--batch", type=int, default=1)
    args = args_parser.parse_args()
    print(", ".join(machine().values()) + f", {args.threads} threads")
    figures: dict[str, Any] = {"options": {k: v for k, v in vars(args).items() if k != "json"}}
    missing = False
    for kind in args.kinds:
        say(f"{kind}: building {len(CONTENDERS)} contenders")
        started = [start(name, args, kind) for name in CONTENDERS]
        workers = [worker for worker in started if worker is not None]
        missing = missing or len(workers) < len(CONTENDERS)
        take_turns(workers, args.rounds, args.turn)
        for worker in workers:
            worker.close()
        table, figures[kind] = rows(workers)
        best = statistics.median(figures[kind]["fxquant:x86"]["ratio_to_torch:dynamic"])
        figures[kind]["ratio"] = best
        size = f"{args.width}-{args.hidden} x{args.layers}, {args.steps} steps, batch {args.batch}"
        headers = ["contender", "ms", "to float", "to torch's dynamic", "SQNR dB"]
        show(f"{kind} {size}: median (min..max) of rounds", headers, table)
    finish(args.json, figures)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
