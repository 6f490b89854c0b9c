"""``fxquant diff``: how a model was rewritten, or how two models differ."""

from __future__ import annotations

import argparse
from typing import Final

import fxquant
from fxquant.cli.data import load_data, load_transform
from fxquant.cli.job import add_seed, as_example, example_batch
from fxquant.cli.models import add_trust, load_model
from fxquant.cli.output import check_writable, write_text
from fxquant.cli.parsing import positive
from fxquant.cli.verb import Answer, Exit, Verb
from fxquant.errors import ConfigError
from fxquant.graph.diff import GraphDiff
from fxquant.graph.text import names_near, shown


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a model: package.module:factory, or a file")
    parser.add_argument(
        "b", metavar="B", nargs="?", help="another; without it, A before and after quantization"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="run float A and quantized B on it, and show the SQNR of what changed",
    )
    parser.add_argument(
        "--example-inputs",
        metavar="DATA",
        help="one batch, for float models that ask for sizes or branch on values",
    )
    parser.add_argument("--transform", metavar="MODULE:FUNCTION", help="makes batches of the data")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="split what files hold")
    parser.add_argument("--max-batches", type=positive, metavar="N", help="look at so many")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if they differ")
    parser.add_argument("--only", metavar="PATH", help="only what is inside one module")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--html", metavar="FILE", help="also draw it, as a page of its own")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write what is printed here")
    add_trust(parser)
    add_seed(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    for path in filter(None, (arguments.output, arguments.html)):
        check_writable(path)
    if arguments.data is not None and arguments.b is None:
        raise ConfigError("--data is for two models: pass the float one and the quantized one")
    a, b = (
        None if spec is None else load_model(spec, arguments, weights=weights)
        for spec, weights in ((arguments.a, arguments.weights), (arguments.b, None))
    )
    assert a is not None  # argparse asks for it
    data = None if arguments.data is None else load_data(arguments.data, arguments.batch_size)
    transform = load_transform(arguments.transform)
    example = None
    if arguments.example_inputs is not None:
        batch = example_batch(arguments.example_inputs, a, transform, arguments.batch_size)
        # The transform has done its work, unless there are data as well.
        example, transform = as_example(*batch), None if data is None else transform
    found = fxquant.diff(
        a, b, data=data, transform=transform, max_batches=arguments.max_batches,
        example_inputs=example,
    )  # fmt: skip
    if arguments.only is not None:
        _check_path(found, arguments.only)
        found = found.only(arguments.only)
    text = found.to_markdown() if arguments.markdown else str(found)
    if arguments.output is not None:
        write_text(arguments.output, text)
    if arguments.html is not None:
        write_text(arguments.html, found.to_html())
    code = Exit.CHECK if arguments.exit_code and found else Exit.OK
    coloured = None if arguments.markdown else found.to_text(color=True)
    return Answer(text, {"differ": bool(found), **found.to_dict()}, code, coloured)


def _check_path(found: GraphDiff, path: str) -> None:
    """Refuse a module that neither graph has: no differences there would say nothing.

    Raises:
        ConfigError: names the nearest.
    """
    known: dict[str, None] = {"": None}
    for state in (found.before, found.after):
        for node in state.nodes:
            parts = node.path.split(".")
            known.update(dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts))))
    if path not in known:
        where = shown(path, 60)
        raise ConfigError(
            f"--only {where}: neither graph has a module there: {names_near(path, known)}"
        )


DIFF: Final = Verb(
    "diff",
    "how quantization rewrote a model, or how two models differ",
    _run,
    _options,
    examples=(
        "fxquant diff model.pt --trust-pickle --only layer1",
        "fxquant diff mymodels:old mymodels:new --exit-code",
        "fxquant diff mymodels:build model.pt --trust-pickle --data held_out/",
    ),
)
