"""The command line: results on stdout, progress and errors on stderr, telling exit codes.

A verb is a function from the parsed arguments to an :class:`Answer`, and an entry in :data:`VERBS`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final

import torch

import fxquant
from fxquant.errors import (
    CalibrationError,
    ConfigError,
    FxQuantError,
    LoadError,
    LoweringError,
    PatternError,
    TraceError,
)
from fxquant.report.tables import table


class Exit(IntEnum):
    """What the exit status says."""

    OK = 0
    USAGE = 2
    MODEL = 3
    CALIBRATION = 4
    UNSUPPORTED = 5
    BUG = 70
    INTERRUPTED = 130
    PIPE = 141


_CODES: Final[tuple[tuple[type[FxQuantError], Exit], ...]] = (
    (ConfigError, Exit.USAGE),
    (PatternError, Exit.USAGE),
    (TraceError, Exit.MODEL),
    (LoadError, Exit.MODEL),
    (CalibrationError, Exit.CALIBRATION),
    (LoweringError, Exit.UNSUPPORTED),
)


@dataclass(frozen=True)
class Answer:
    """The result of a verb.

    Args:
        text: for people.
        data: the same in plain types, for ``--json``.
        code: the exit status.
    """

    text: str
    data: dict[str, Any]
    code: int = Exit.OK


@dataclass(frozen=True)
class Verb:
    """One thing that the command line can do.

    Args:
        name: what the user types.
        help: one line.
        run: does it.
        options: adds the arguments of its own; ``--json`` and ``--debug`` are there already.
        extra: the optional dependencies it needs, as in ``pip install fxquant[extra]``.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], Answer]
    options: Callable[[argparse.ArgumentParser], None] | None = None
    extra: str = ""


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_natural, default=0, help="of all that is random (0)")
    parser.add_argument("--epochs", type=_positive, help="rounds of training")


def _demo(arguments: argparse.Namespace) -> Answer:
    # Imported when asked for: it needs scikit-learn, and no other verb does.
    demo = importlib.import_module("fxquant.demo")
    epochs = demo.EPOCHS if arguments.epochs is None else arguments.epochs
    shown = demo.run(seed=arguments.seed, epochs=epochs, say=_say)
    return Answer(str(shown), shown.to_dict())


def _backends(arguments: argparse.Namespace) -> Answer:
    found = fxquant.backends()
    rows = [(b.name, "yes" if b.available else "no", b.reason) for b in found]
    data = {
        "fxquant": fxquant.__version__,
        "torch": str(torch.__version__),
        "backends": [asdict(backend) for backend in found],
    }
    return Answer(table(("backend", "runs here", "about"), rows, limit=200), data)


VERBS: Final = (
    Verb("demo", "train a small network, quantize it, compare both", _demo, _demo_options, "demo"),
    Verb("backends", "what can run here, and why the others cannot", _backends),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments, without the name of the program; by default those of the process.

    Raises:
        SystemExit: the arguments cannot be used (2), or help or the version was asked for (0).

    Example:
        >>> main(["backends", "--json"])
        {
          ...
        0
    """
    arguments = _parser().parse_args(argv)
    verb: Verb = arguments.verb
    try:
        answer = verb.run(arguments)
        print(json.dumps(answer.data, indent=2, allow_nan=False) if arguments.json else answer.text)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the result has enough; what is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.PIPE)
    except Exception as error:  # noqa: BLE001 - the edge of the process: no user sees a traceback
        if arguments.debug:
            traceback.print_exc()
        code, message = _explain(error, verb)
        _say(message)
        return int(code)
    return int(answer.code)


def _explain(error: Exception, verb: Verb) -> tuple[Exit, str]:
    """The exit status of an error, and what to say about it."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, f"error: {error}"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if verb.extra and missing and missing.partition(".")[0] != "fxquant":
        return Exit.UNSUPPORTED, (
            f"error: `fxquant {verb.name}` needs {missing.partition('.')[0]}, which is not "
            f"installed: run `pip install fxquant[{verb.extra}]`"
        )
    return Exit.BUG, (
        f"error: {type(error).__name__}: {error}\n"
        "This is a bug in fxquant. Please report it with what `fxquant --version` and "
        f"`fxquant backends` print, and with what `fxquant {verb.name}` prints with --debug."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxquant", description="Turn a PyTorch model into an int8 one, and see every rewrite."
    )
    version = f"fxquant {fxquant.__version__} (torch {torch.__version__}, Python "
    parser.add_argument(
        "--version", action="version", version=f"{version}{platform.python_version()})"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        own = verbs.add_parser(verb.name, help=verb.help, description=f"{verb.help}.".capitalize())
        own.add_argument("--json", action="store_true", help="print JSON instead of text")
        # Without a default of its own it does not undo `fxquant --debug VERB`.
        own.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of errors",
        )
        if verb.options is not None:
            verb.options(own)
        own.set_defaults(verb=verb)
    return parser


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _natural(text: str) -> int:
    number = _whole(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return number


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
