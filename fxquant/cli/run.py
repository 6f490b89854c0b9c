"""Runs one command: parses it, calls its verb, prints the answer, turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import torch

import fxquant
from fxquant.cli.code import importable_here
from fxquant.cli.job import seeded
from fxquant.cli.parsing import Parser
from fxquant.cli.terminal import emit, may_colour, plain, say, warnings_as_lines
from fxquant.cli.verb import Answer, Exit, Verb
from fxquant.cli.verb_bench import BENCH
from fxquant.cli.verb_compare import COMPARE
from fxquant.cli.verb_demo import DEMO
from fxquant.cli.verb_diff import DIFF
from fxquant.cli.verb_machine import BACKENDS, DOCTOR
from fxquant.cli.verb_quantize import QUANTIZE
from fxquant.cli.verb_report import EXPLAIN, REPORT
from fxquant.errors import (
    CalibrationError,
    ConfigError,
    FxQuantError,
    GuardError,
    LoadError,
    LoweringError,
    PatternError,
    TraceError,
)
from fxquant.text import harmless

_CODES: Final[tuple[tuple[type[FxQuantError], Exit], ...]] = (
    (ConfigError, Exit.USAGE),
    (PatternError, Exit.USAGE),
    (TraceError, Exit.MODEL),
    (LoadError, Exit.MODEL),
    (CalibrationError, Exit.CALIBRATION),
    (GuardError, Exit.UNSUPPORTED),
    (LoweringError, Exit.UNSUPPORTED),
)
_STATUS: Final = """\
exit status:
  0 done, 1 a check failed, 2 usage, 3 the model cannot be loaded or captured,
  4 data or calibration, 5 not supported, 70 a bug in fxquant, 130 interrupted
"""

VERBS: Final[tuple[Verb, ...]] = (
    QUANTIZE, REPORT, EXPLAIN, DIFF, COMPARE, BENCH, DEMO, BACKENDS, DOCTOR,
)  # fmt: skip


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
    arguments = _parsed(argv)
    verb: Verb = arguments.verb
    try:
        answer = _answer(verb, arguments)
        _print(answer, arguments)
    except KeyboardInterrupt:
        say("interrupted")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the result has enough; what is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.PIPE)
    except Exception as error:  # noqa: BLE001 - the edge of the process: no user sees a traceback
        if arguments.debug:
            traceback.print_exc()
        code, message = _explain(error, verb)
        say(plain(message))
        return int(code)
    return int(answer.code)


def _answer(verb: Verb, arguments: argparse.Namespace) -> Answer:
    """What the verb says; whatever the user's code prints meanwhile is no result."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        importable_here(),
        warnings_as_lines(),
        seeded(getattr(arguments, "seed", None)),
    ):
        return verb.run(arguments)


def _print(answer: Answer, arguments: argparse.Namespace) -> None:
    """The result, on stdout."""
    text = harmless(answer.text, keep="\n")  # it may quote names of files
    if arguments.json:
        text = json.dumps(answer.data, indent=2, allow_nan=False)
    elif answer.coloured is not None and may_colour(sys.stdout):
        text = answer.coloured
    try:
        emit(text, sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        # The disk that stdout goes to is full: its buffer must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ConfigError(f"cannot write the result to stdout: {error.strerror}") from error


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
        "This is a bug in fxquant. Please report it with what `fxquant doctor` prints, and with "
        f"what `fxquant {verb.name}` prints with --debug."
    )


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.refuse(unknown)
    return arguments


def _parser() -> Parser:
    parser = Parser(
        prog="fxquant",
        description="Turn a PyTorch model into an int8 one, and see every rewrite.",
        epilog=_examples(tuple(each for verb in VERBS for each in verb.examples[:1])) + _STATUS,
    )
    version = f"fxquant {fxquant.__version__} (torch {torch.__version__}, Python "
    parser.add_argument(
        "--version", action="version", version=f"{version}{platform.python_version()})"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        own = verbs.add_parser(
            verb.name,
            help=verb.help,
            description=f"{verb.help[:1].upper()}{verb.help[1:]}.",
            epilog=_examples(verb.examples),
        )
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
        own.set_defaults(verb=verb, parser=own)
    return parser


def _examples(commands: tuple[str, ...]) -> str:
    if not commands:
        return ""
    return "\n".join(["examples:", *(f"  {command}" for command in commands), "", ""])
