"""``fxquant bench``: latency of a model in float and quantized, in turns on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxquant.calibration import bind_batch, first_batch
from fxquant.cli.code import call
from fxquant.cli.doctor import machine
from fxquant.cli.job import Job, add_job, load_job
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.parsing import duration, positive, threads
from fxquant.cli.settings import add_settings
from fxquant.cli.terminal import progress
from fxquant.cli.verb import Answer, Verb
from fxquant.errors import CalibrationError, ConfigError
from fxquant.report.tables import table

Run = Callable[[], Any]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the float model")
    parser.add_argument(
        "quantized", metavar="QUANTIZED", nargs="?", help="without it, MODEL is quantized here"
    )
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="of turns (15)")
    parser.add_argument(
        "--seconds", type=duration, default=0.2, metavar="S", help="of work in a turn (0.2)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="of torch")
    parser.add_argument("--rows", type=positive, metavar="N", help="of the batch, from its start")
    add_trust(parser)
    add_settings(parser)
    add_job(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    before = torch.get_num_threads()
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        return _bench(arguments)
    finally:
        torch.set_num_threads(before)


def _bench(arguments: argparse.Namespace) -> Answer:
    job = load_job(arguments)
    args, kwargs, job = _inputs(job)
    if arguments.rows is not None:
        args, kwargs = _head((args, kwargs), arguments.rows)
    if arguments.quantized is None:
        quantized: nn.Module = job.quantized()
    else:
        quantized = load_model(arguments.quantized, arguments).eval()
    with torch.inference_mode():
        runs: tuple[Run, Run] = (
            lambda: job.model(*args, **kwargs),
            lambda: quantized(*args, **kwargs),
        )
        for run, name in zip(runs, ("float", "quantized"), strict=True):
            call(run, f"run the {name} model", CalibrationError)
        rounds = in_turns(runs, arguments.rounds, arguments.seconds)
    return _answer(rounds, (args, kwargs), arguments)


def _inputs(job: Job) -> tuple[tuple[Any, ...], dict[str, Any], Job]:
    """One batch to run on, and the job with nothing of its data lost."""
    if job.example is not None:
        return (*job.example, job)
    if job.data is None:
        raise ConfigError("there is nothing to run the models on: pass --example-inputs")
    first = first_batch(job.data, job.transform, model=job.model)
    if first.args is None:
        raise ConfigError("the data shows no batch: pass --example-inputs")
    args, kwargs = first.args, first.kwargs
    if not kwargs:
        args, kwargs = bind_batch(job.model, args, 0)
    again = dataclasses.replace(job, data=first.replay, transform=None)
    return args, kwargs, again


def _head(inputs: Any, rows: int) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:rows] if t.dim() else t, inputs)


def in_turns(runs: tuple[Run, Run], rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Median seconds of a run, of both, for each round; who begins changes from round to round.

    Args:
        runs: what is timed; each has run before.
        rounds: how many.
        seconds: of work in a turn.
    """
    counts = [max(1, round(seconds / max(_median(run, 3), 1e-9))) for run in runs]
    found: list[tuple[float, float]] = []
    with progress("measuring") as report:
        for index in range(rounds):
            order = (0, 1) if index % 2 == 0 else (1, 0)
            spent = {place: _median(runs[place], counts[place]) for place in order}
            found.append((spent[0], spent[1]))
            if callable(report):
                report(index + 1, rounds)
    return found


def _median(run: Run, count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _answer(
    rounds: list[tuple[float, float]], inputs: Any, arguments: argparse.Namespace
) -> Answer:
    real, codes = ([1e3 * pair[place] for pair in rounds] for place in (0, 1))
    # Formed within a round: what slows the machine for a while slows both sides.
    ratios = [a / b for a, b in zip(real, codes, strict=True)]
    shapes = [list(t.shape) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    rows = [
        ("float", *_spread(real, 3), ""),
        ("quantized", *_spread(codes, 3), f"{statistics.median(ratios):.2f}x"),
    ]
    columns = ("model", "median ms", "least", "most", "as fast")
    text = table(columns, rows, right=columns[1:])
    low, high = min(ratios), max(ratios)
    text += (
        f"\n\ninputs {shapes}, {torch.get_num_threads()} threads, {len(rounds)} rounds in turns; "
        f"ratio of a round {low:.2f} to {high:.2f}"
    )
    data = {
        "model": arguments.model,
        "quantized": arguments.quantized,
        "inputs": shapes,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "float_ms": real,
        "quantized_ms": codes,
        "ratios": ratios,
        "median": {
            "float_ms": statistics.median(real),
            "quantized_ms": statistics.median(codes),
            "ratio": statistics.median(ratios),
        },
    }
    return Answer(text, data)


def _spread(values: list[float], digits: int) -> tuple[str, str, str]:
    found = (statistics.median(values), min(values), max(values))
    return tuple(f"{value:.{digits}f}" for value in found)  # type: ignore[return-value]  # three


BENCH: Final = Verb(
    "bench",
    "time a model in float and quantized, in turns",
    _run,
    _options,
    "cli",
    (
        "fxquant bench mymodels:build --calibration batches/ --rows 1",
        "fxquant bench mymodels:build model.pt --trust-pickle --example-inputs x.npy",
    ),
)
