"""``fxquant quantize``: a model becomes an int8 one, or shows what would become of it."""

from __future__ import annotations

import argparse
import functools
import json
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import GraphModule

import fxquant
from fxquant.calibration import first_batch
from fxquant.cli.job import Job, add_job, load_job
from fxquant.cli.models import add_trust
from fxquant.cli.output import check_writable, write, write_text
from fxquant.cli.settings import add_settings
from fxquant.cli.verb import Answer, Verb
from fxquant.errors import ConfigError, LoweringError
from fxquant.report.ops import runs_in
from fxquant.report.report import Report
from fxquant.report.tables import table

_MOST: Final = 12
_REPORTS: Final[dict[str, Callable[[Report], str]]] = {
    ".json": lambda report: json.dumps(report.to_dict(), indent=2, allow_nan=False),
    ".html": lambda report: report.to_html(),
    ".txt": str,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="package.module:factory, or a file")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the model here, as a pickle")
    parser.add_argument(
        "--report", metavar="FILE", help="write the report here: .html, .json or .txt"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would become of each op; write nothing"
    )
    add_trust(parser)
    add_settings(parser)
    add_job(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    render = _report_of(arguments.report)
    for path in filter(None, (arguments.output, arguments.report)):
        check_writable(path)
    job = load_job(arguments)
    if arguments.dry_run:
        return _plan(job, arguments)
    made = job.quantized()
    report = fxquant.report(made)
    text = [report.summary]
    left = [(op.path, op.op, op.why) for op in report.ops if runs_in(op) == "float"]
    if left:
        more = f"\nand {len(left) - _MOST} more" if len(left) > _MOST else ""
        text += ["", table(("left in float", "op", "why"), left[:_MOST], limit=100) + more]
    if arguments.output is not None:
        write(arguments.output, functools.partial(_save, made))
        text += [
            "",
            f"wrote {arguments.output}, a pickle: reading it runs code, here with --trust-pickle, "
            "in Python with torch.load(..., weights_only=False)",
        ]
    if arguments.report is not None:
        write_text(arguments.report, render(report))
        text.append(f"wrote {arguments.report}")
    data = {
        "model": arguments.model,
        "dry_run": False,
        "settings": job.settings.to_dict(),
        "output": arguments.output,
        "report": report.to_dict(),
    }
    return Answer("\n".join(text), data)


def _report_of(path: str | None) -> Callable[[Report], str]:
    if path is None:
        return str
    for ending, render in _REPORTS.items():
        if path.endswith(ending):
            return render
    raise ConfigError(f"cannot write a report as {path!r}: it is to end with {list(_REPORTS)}")


def _save(made: GraphModule, stream: Any) -> None:
    try:
        torch.save(made, stream)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LoweringError(f"the model cannot be pickled: {error}") from error


def _plan(job: Job, arguments: argparse.Namespace) -> Answer:
    """What the prepared model says of its ops; nothing is calibrated."""
    example = job.example_inputs
    if example is None and job.data is not None:
        first = first_batch(job.data, job.transform, model=job.model)
        example = first.kwargs or first.args
    prepared = fxquant.prepare(job.model, example_inputs=example, **job.settings.keywords())
    planned = fxquant.explain(prepared, "*")
    rows = [
        (op.path, op.op, {True: "int8", False: "float", None: ""}[op.int8], op.by, op.why)
        for op in planned
    ]
    text = table(("path", "op", "planned", "decided by", "why"), rows, limit=100)
    data = {
        "model": arguments.model,
        "dry_run": True,
        "settings": job.settings.to_dict(),
        "output": None,
        "plan": planned.to_dict()["ops"],
    }
    note = "nothing was calibrated, converted or written; measured costs may leave more in float"
    return Answer(f"{text}\n\n{note}", data)


QUANTIZE: Final = Verb(
    "quantize",
    "quantize a model",
    _run,
    _options,
    "cli",
    (
        "fxquant quantize mymodels:build --calibration batches/ -o model.pt",
        "fxquant quantize mymodels:build --mode dynamic --override head=float --json",
        "fxquant quantize mymodels:build -c settings.toml --calibration data:loader --dry-run",
    ),
)
