"""Latency of one picture: eager float, torch's FX mode with each engine, and fxquant.

Each contender runs in a process of its own, and they take turns: A B C, B C A, C A B, ... so that
no turn always follows the same one. Figures are medians per round; ratios are formed within a
round, so that whatever slows the machine for a while slows both sides.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import finish, machine, parser, ratios, say, show, spread
from benchmarks.peers import engines
from tests import zoo

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
# GNU OpenMP threads spin for some milliseconds after their last work before they sleep.
SETTLE = 0.03


@dataclass
class Worker:
    """A contender's process, what it said when ready, and its median seconds of each round."""

    name: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)
    iterations: int = 10

    def answer(self) -> Any:
        """The next line of the worker, decoded; None if it died (its traceback is on stderr)."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def measure(self) -> float | None:
        """Median seconds of one turn, None if the worker died."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.iterations}\n")
        self.process.stdin.flush()
        seconds = self.answer()
        return None if seconds is None else statistics.median(seconds)

    def close(self) -> None:
        """End of input is the signal to stop."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def start(name: str, model: str, threads: int, size: int, batch: int) -> Worker | None:
    """Start a contender of a model."""
    command = [sys.executable, "-m", "benchmarks.latency_worker", name, model]
    command += ["--threads", str(threads), "--size", str(size), "--batch", str(batch)]
    return start_worker(name, command)


def start_worker(name: str, command: list[str]) -> Worker | None:
    """Start a contender and wait until it is ready, so that no two build at the same time."""
    pipe = subprocess.PIPE
    worker = Worker(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    ready = worker.answer()
    if ready is None:
        worker.process.wait()
        say(f"{name} could not be built; the reason stands above")
        return None
    worker.ready = ready
    return worker


def take_turns(workers: list[Worker], rounds: int, turn: float) -> None:
    """Fill ``rounds`` of every worker, ``turn`` seconds of work at a time."""
    for worker in workers:
        once = worker.measure() or 1.0
        worker.iterations = max(5, round(turn / once))
    for index in range(rounds):
        shift = index % len(workers)
        for worker in workers[shift:] + workers[:shift]:
            time.sleep(SETTLE)
            seconds = worker.measure()
            if seconds is None:
                raise SystemExit(f"{worker.name} died while it was timed")
            worker.rounds.append(seconds)


def rows(workers: list[Worker]) -> tuple[list[list[str]], dict[str, Any]]:
    """The table of one model and its figures."""
    by_name = {worker.name: worker for worker in workers}
    peers = [worker for worker in workers if worker.name.startswith("fx:")]
    best = min(peers, key=lambda worker: statistics.median(worker.rounds), default=None)
    eager = by_name.get("float")
    table, figures = [], {}
    for worker in workers:
        to_float = ratios(worker.rounds, eager.rounds) if eager else []
        to_fx = ratios(worker.rounds, best.rounds) if best else []
        figures[worker.name] = {
            **worker.ready,
            "ms": [1e3 * seconds for seconds in worker.rounds],
            "ratio_to_float": to_float,
            "ratio_to_best_fx": to_fx,
        }
        name = f"{worker.name} (best FX)" if worker is best else worker.name
        table.append(
            [
                name,
                spread([1e3 * seconds for seconds in worker.rounds]),
                spread(to_float, 3) if to_float else "-",
                spread(to_fx, 3) if to_fx else "-",
                worker.ready["layout"],
                "exact" if worker.name == "float" else f"{worker.ready['sqnr']:.1f}",
            ]
        )
    return table, figures


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--models", nargs="+", default=list(MODELS), choices=zoo.NAMES)
    args_parser.add_argument("--contenders", nargs="+", help="default: all of them")
    args_parser.add_argument("--rounds", type=int, default=15)
    args_parser.add_argument("--turn", type=float, default=0.25, help="seconds of work per turn")
    args_parser.add_argument("--size", type=int, default=224)
    args_parser.add_argument("--batch", type=int, default=1)
    args = args_parser.parse_args()
    names = args.contenders or ["float", *(f"fx:{name}" for name in engines()), "fxquant:x86"]
    print(", ".join(machine().values()) + f", {args.threads} threads")
    figures: dict[str, Any] = {"threads": args.threads, "batch": args.batch, "size": args.size}
    missing = False
    for model in args.models:
        say(f"{model}: building {len(names)} contenders")
        started = [start(name, model, args.threads, args.size, args.batch) for name in names]
        workers = [worker for worker in started if worker is not None]
        missing = missing or len(workers) < len(names)
        take_turns(workers, args.rounds, args.turn)
        for worker in workers:
            worker.close()
        table, figures[model] = rows(workers)
        headers = ["contender", "ms", "to float", "to best FX", "input", "SQNR dB"]
        title = f"{model}, batch {args.batch}, {args.size}x{args.size}: median (min..max) of rounds"
        show(title, headers, table)
    finish(args.json, figures)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
