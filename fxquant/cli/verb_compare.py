"""``fxquant compare``: how far the results of two models lie apart, as a check for CI."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.calibration import bind_batch
from fxquant.calibration.binding import tensors
from fxquant.cli.code import call, imported
from fxquant.cli.data import load_data, load_transform
from fxquant.cli.job import add_seed
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.parsing import positive, real
from fxquant.cli.terminal import progress
from fxquant.cli.verb import Answer, Exit, Verb
from fxquant.errors import CalibrationError, ConfigError
from fxquant.report.tables import table


@dataclass
class Apart:
    """How far one output of two models lies apart, over all batches; summed in float64.

    Args:
        signal: sum of squares of the first model's values.
        noise: sum of squares of the differences.
        other: sum of squares of the second model's values.
        product: sum of the products of both.
        worst: largest difference.
        elements: how many values.
        broken: whether the second model gave NaN or infinity.
    """

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    elements: int = 0
    broken: bool = False

    def add(self, first: Tensor, second: Tensor) -> None:
        """Count one batch in."""
        a, b = first.detach().double().flatten(), second.detach().double().flatten()
        self.elements += a.numel()
        if not torch.isfinite(b).all():
            self.broken = True
            return
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)
        self.noise += float((a - b) @ (a - b))
        if a.numel():
            self.worst = max(self.worst, float((a - b).abs().max()))

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB; infinite where there is no difference."""
        if self.broken:
            return -math.inf
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; 1 where both are zero."""
        length = math.sqrt(self.signal * self.other)
        return self.product / length if length else float(self.signal == self.other)


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
    metric = _metric(arguments.metric)
    first = load_model(arguments.float, arguments, weights=arguments.weights).eval()
    second = load_model(arguments.int8, arguments).eval()
    found, batches = _measure(first, second, arguments)
    failed = []
    for place, apart in found.items():
        if apart.broken:
            failed.append(f"output {place}: the int8 model gives NaN or infinity")
        elif arguments.min_sqnr is not None and apart.sqnr < arguments.min_sqnr:
            failed.append(f"output {place}: {apart.sqnr:.2f} dB, less than {arguments.min_sqnr} dB")
    rows = [
        (place, f"{apart.sqnr:.2f}", f"{apart.cosine:.6f}", f"{apart.worst:.6g}", apart.elements)
        for place, apart in found.items()
    ]
    columns = ("output", "SQNR dB", "cosine", "largest difference", "values")
    lines = [table(columns, rows, right=columns[1:])]
    scores = None
    if metric is not None:
        scores = [_score(metric, arguments.metric, model) for model in (first, second)]
        drop = scores[0] - scores[1]
        lines.append(
            f"\nmetric: {scores[0]:.6g} in float, {scores[1]:.6g} in int8, drop {drop:.6g}"
        )
        if arguments.max_drop is not None and drop > arguments.max_drop:
            failed.append(f"the metric drops by {drop:.6g}, more than {arguments.max_drop:g}")
    lines += [f"FAILED: {each}" for each in failed]
    data = {
        "batches": batches,
        "outputs": [_plain(place, apart) for place, apart in found.items()],
        "metric": None
        if scores is None
        else {"float": scores[0], "int8": scores[1], "drop": scores[0] - scores[1]},
        "failed": failed,
    }
    return Answer("\n".join(lines), data, Exit.CHECK if failed else Exit.OK)


def _plain(place: str, apart: Apart) -> dict[str, Any]:
    return {
        "output": place,
        "equal": not (apart.noise or apart.broken),
        "finite": not apart.broken,
        "sqnr_db": apart.sqnr if math.isfinite(apart.sqnr) else None,
        "cosine": apart.cosine,
        "max_error": apart.worst,
        "elements": apart.elements,
    }


def _measure(
    first: nn.Module, second: nn.Module, arguments: argparse.Namespace
) -> tuple[dict[str, Apart], int]:
    """Feed both the same batches, one at a time."""
    data = load_data(arguments.data, arguments.batch_size)
    if callable(data):
        raise ConfigError("--data runs the model itself: name a loader that gives batches")
    transform = load_transform(arguments.transform)
    found: dict[str, Apart] = {}
    done = 0
    with progress("comparing") as report, torch.no_grad():
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


def _add(found: dict[str, Apart], first: list[Tensor], second: list[Tensor]) -> None:
    shapes = [[tuple(each.shape) for each in given] for given in (first, second)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(f"the models give different outputs: {shapes[0]} and {shapes[1]}")
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.isfinite(a).all():
            raise CalibrationError(
                f"output {place} of the float model holds NaN or infinity: nothing can be measured "
                "against that"
            )
        found.setdefault(str(place), Apart()).add(a, b)


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
