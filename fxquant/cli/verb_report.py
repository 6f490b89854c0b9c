"""``fxquant report`` and ``fxquant explain``: what became of a model's ops, and why."""

from __future__ import annotations

import argparse
from typing import Final

import fxquant
from fxquant.cli.code import imported
from fxquant.cli.job import add_seed
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.output import check_writable, write_text
from fxquant.cli.verb import Answer, Verb
from fxquant.errors import ConfigError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a quantized model: package.module:factory, or a file"
    )
    add_trust(parser)
    add_seed(parser)


def _report_options(parser: argparse.ArgumentParser) -> None:
    _options(parser)
    parser.add_argument("--html", metavar="FILE", help="also write it as a page of its own")


def _report(arguments: argparse.Namespace) -> Answer:
    if arguments.html is not None:
        check_writable(arguments.html)
    model = load_model(arguments.model, arguments, weights=arguments.weights)
    report = fxquant.report(model)
    if arguments.html is not None:
        write_text(arguments.html, report.to_html())
    return Answer(str(report), report.to_dict())


def _explain_options(parser: argparse.ArgumentParser) -> None:
    _options(parser)
    parser.add_argument(
        "selector", metavar="SELECTOR", help="a path, a glob, re:..., or torch.nn:Conv2d"
    )


def _explain(arguments: argparse.Namespace) -> Answer:
    model = load_model(arguments.model, arguments, weights=arguments.weights)
    selector = arguments.selector
    if ":" in selector and not selector.startswith("re:"):
        selector = imported(selector, ConfigError, "the selector")
    found = fxquant.explain(model, selector)
    return Answer(str(found), found.to_dict())


REPORT: Final = Verb(
    "report",
    "what became of every op of a quantized model, and why",
    _report,
    _report_options,
    examples=("fxquant report model.pt --trust-pickle --html report.html",),
)
EXPLAIN: Final = Verb(
    "explain",
    "why an op is int8 or float, and what would change that",
    _explain,
    _explain_options,
    examples=("fxquant explain model.pt layer1.0.conv1 --trust-pickle",),
)
