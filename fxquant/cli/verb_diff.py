"""``fxquant diff``: how a model was rewritten, or how two models differ."""

from __future__ import annotations

import argparse
from typing import Final

import fxquant
from fxquant.cli.job import add_seed
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.output import check_writable, write_text
from fxquant.cli.verb import Answer, Exit, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a model: package.module:factory, or a file")
    parser.add_argument(
        "b", metavar="B", nargs="?", help="another; without it, A before and after quantization"
    )
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if they differ")
    parser.add_argument("--only", metavar="PATH", help="only what is inside one module")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write what is printed here")
    add_trust(parser)
    add_seed(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    if arguments.output is not None:
        check_writable(arguments.output)
    a, b = (
        None if spec is None else load_model(spec, arguments, weights=weights)
        for spec, weights in ((arguments.a, arguments.weights), (arguments.b, None))
    )
    assert a is not None  # argparse asks for it
    found = fxquant.diff(a, b)
    if arguments.only is not None:
        found = found.only(arguments.only)
    text = found.to_markdown() if arguments.markdown else str(found)
    if arguments.output is not None:
        write_text(arguments.output, text)
    code = Exit.CHECK if arguments.exit_code and found else Exit.OK
    data = {"differ": bool(found), **found.to_dict()}
    return Answer(text, data, code, marked=not arguments.markdown)


DIFF: Final = Verb(
    "diff",
    "how quantization rewrote a model, or how two models differ",
    _run,
    _options,
    examples=(
        "fxquant diff model.pt --trust-pickle --only layer1",
        "fxquant diff mymodels:old mymodels:new --exit-code",
    ),
)
