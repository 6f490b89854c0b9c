"""``fxquant compare``: how far the results of two models lie apart, as a check for CI."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration import bind_batch
from fxquant.calibration.binding import tensors
from fxquant.cli.code import call, imported
from fxquant.cli.data import load_data, load_transform
from fxquant.cli.job import add_seed, seeded
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.output import check_writable, write_text
from fxquant.cli.parsing import positive, real
from fxquant.cli.terminal import progress
from fxquant.cli.verb import Answer, Exit, Verb
from fxquant.errors import CalibrationError, ConfigError
from fxquant.numerics.agreement import Agreement, AgreementSums
from fxquant.report.compare import Comparison
from fxquant.report.tables import table


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("float", metavar="FLOAT", help="the model to measure against")
    parser.add_argument("int8", metavar="INT8", help="the model to measure")
    parser.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help="a file (.npy, .npz, .safetensors), a folder of them, or package.module:loader",
    )
    parser.add_argument("--transform", metavar="MODULE:FUNCTION", help="makes batches of the data")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="split what files hold")
    parser.add_argument("--max-batches", type=positive, metavar="N", help="look at so many")
    parser.add_argument(
        "--worst", type=positive, metavar="N", help="also show the N ops that add most of the error"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a report of INT8 that shows where the error comes from",
    )
    parser.add_argument("--min-sqnr", type=real, metavar="DB", help="exit with 1 if less, in dB")
    parser.add_argument(
        "--metric", metavar="MODULE:FUNCTION", help="f(model) gives a number, more is better"
    )
    parser.add_argument(
        "--max-drop", type=real, metavar="X", help="exit with 1 if the metric drops by more"
    )
    add_trust(parser)
    add_seed(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    if arguments.max_drop is not None and arguments.metric is None:
        raise ConfigError("--max-drop needs --metric: what is it that must not drop?")
    if arguments.html is not None:
        check_writable(arguments.html)
    metric = _metric(arguments.metric)
    first = load_model(arguments.float, arguments, weights=arguments.weights).eval()
    second = load_model(arguments.int8, arguments).eval()
    found, batches = _measure(first, second, arguments)
    rows = [(place, sums.elements, sums.agreement) for place, sums in found.items()]
    lines = [_table(rows)]
    failed = _failures(rows, arguments.min_sqnr)
    ops = None
    if arguments.html is not None or arguments.worst is not None:
        comparison = _ops(first, second, arguments)
        if arguments.html is not None:
            page = fxquant.report(second).to_html(comparison=comparison)
            write_text(arguments.html, page)
    if arguments.worst is not None:
        comparison = dataclasses.replace(comparison, rows=comparison.worst(arguments.worst))
        ops = comparison.to_dict()["ops"]
        lines += ["", comparison.table, "", *comparison.summary.splitlines()[1:]]
    scores = None
    if metric is not None:
        real, codes = (_score(metric, arguments.metric, model) for model in (first, second))
        scores = {"float": real, "int8": codes, "drop": real - codes}
        lines += ["", f"metric: {real:.6g} in float, {codes:.6g} in int8, drop {real - codes:.6g}"]
        if arguments.max_drop is not None and real - codes > arguments.max_drop:
            failed.append(
                f"the metric drops by {real - codes:.6g}, more than {arguments.max_drop:g}"
            )
    lines += [f"FAILED: {each}" for each in failed]
    if failed and ops is None:
        lines.append("--worst 10 shows the ops that add most of the error")
    outputs = [_plain(*row) for row in rows]
    data = {
        "batches": batches, "outputs": outputs, "ops": ops, "metric": scores, "failed": failed,
    }  # fmt: skip
    return Answer("\n".join(lines), data, Exit.CHECK if failed else Exit.OK)


def _table(rows: list[tuple[str, int, Agreement]]) -> str:
    columns = ("output", "SQNR dB", "cosine", "largest difference", "values")
    cells = [
        (place, f"{made.sqnr:.2f}", f"{made.cosine:.6f}", f"{made.max_error:.6g}", count)
        for place, count, made in rows
    ]
    return table(columns, cells, right=columns[1:])


def _failures(rows: list[tuple[str, int, Agreement]], least: float | None) -> list[str]:
    failed = []
    for place, _, made in rows:
        if math.isinf(made.max_error):
            failed.append(f"output {place}: the int8 model gives NaN or infinity")
        elif least is not None and made.sqnr < least:
            failed.append(f"output {place}: {made.sqnr:.2f} dB, less than {least} dB")
    return failed


def _plain(place: str, count: int, made: Agreement) -> dict[str, Any]:
    finite = not math.isinf(made.max_error)
    return {
        "output": place,
        "equal": made.sqnr == math.inf,
        "finite": finite,
        "sqnr_db": made.sqnr if math.isfinite(made.sqnr) else None,
        "cosine": made.cosine,
        "max_error": made.max_error if finite else None,
        "elements": count,
    }


def _ops(first: nn.Module, second: nn.Module, arguments: argparse.Namespace) -> Comparison:
    """Every op, on the same batches once more."""
    data = load_data(arguments.data, arguments.batch_size)
    transform = load_transform(arguments.transform)
    with seeded(arguments.seed):
        return fxquant.compare(
            first, second, data, transform=transform, max_batches=arguments.max_batches
        )


def _measure(
    first: nn.Module, second: nn.Module, arguments: argparse.Namespace
) -> tuple[dict[str, AgreementSums], int]:
    """Feed both the same batches, one at a time."""
    data = load_data(arguments.data, arguments.batch_size)
    if callable(data):
        raise ConfigError("--data runs the model itself: name a loader that gives batches")
    transform = load_transform(arguments.transform)
    found: dict[str, AgreementSums] = {}
    done = 0
    with progress("comparing") as report, torch.no_grad(), seeded(arguments.seed):
        for done, item in enumerate(itertools.islice(data, arguments.max_batches), start=1):
            batch = item
            if transform is not None:
                make = functools.partial(transform, item)
                batch = call(make, f"transform batch {done - 1}", CalibrationError)
            args, kwargs = bind_batch(first, batch, done - 1)
            outputs = []
            for model, name in ((first, "float"), (second, "int8")):
                run = functools.partial(model, *args, **kwargs)
                output = call(run, f"run the {name} model on batch {done - 1}", CalibrationError)
                outputs.append(list(tensors(output)))
            _add(found, *outputs)
            if callable(report):
                report(done, None)
    if not done:
        raise CalibrationError(f"0 batches: {arguments.data!r} gave nothing")
    return found, done


def _add(found: dict[str, AgreementSums], first: list[Tensor], second: list[Tensor]) -> None:
    shapes = [[tuple(each.shape) for each in given] for given in (first, second)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(f"the models give different outputs: {shapes[0]} and {shapes[1]}")
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        if torch.isnan(a).any():
            raise CalibrationError(
                f"output {place} of the float model holds NaN: nothing can be measured against that"
            )
        found.setdefault(str(place), AgreementSums()).add(a, b)


def _metric(spec: str | None) -> Callable[[nn.Module], Any] | None:
    if spec is None:
        return None
    found = imported(spec, ConfigError, "the metric")
    if not callable(found):
        raise ConfigError(f"the metric {spec!r} is a {type(found).__name__}: name a function")
    return found  # type: ignore[no-any-return]  # callable() says that much and no more


def _score(metric: Callable[[nn.Module], Any], spec: str, model: nn.Module) -> float:
    what = f"measure {spec}(model)"
    with torch.no_grad():
        score = call(lambda: float(metric(model)), what, CalibrationError)
    if not math.isfinite(score):
        raise CalibrationError(f"the metric {spec!r} gave {score}")
    return float(score)


COMPARE: Final = Verb(
    "compare",
    "how far the results of two models lie apart",
    _run,
    _options,
    "cli",
    (
        "fxquant compare mymodels:build model.pt --trust-pickle --data held_out/ --min-sqnr 20",
        "fxquant compare mymodels:build model.pt --trust-pickle --data held_out/ "
        "--metric mymodels:accuracy --max-drop 0.01",
    ),
)
