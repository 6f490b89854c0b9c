"""What the terminal is like, and writing to it: the one place that reads the environment."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, TextIO

from fxquant.errors import FxQuantWarning
from fxquant.graph.text import shown
from fxquant.progress import Report, showing

_MOST: Final = 4000


def emit(text: str, stream: TextIO) -> None:
    """Lines on a stream; what its encoding does not have shows as an escape."""
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def say(text: str) -> None:
    """Lines for the person at the terminal, on stderr."""
    emit(text, sys.stderr)


def tell(text: str) -> None:
    """What is going on: as :func:`say`, where somebody is looking."""
    if sys.stderr.isatty():
        say(text)


def is_dumb() -> bool:
    """Whether the terminal says that it cannot move its cursor."""
    return os.environ.get("TERM") == "dumb"


def may_colour(stream: TextIO) -> bool:
    """Whether colours are wanted on ``stream``; see https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and not is_dumb()


def plain(text: str) -> str:
    """An error message, which may quote names: what would act on a terminal shows as an escape."""
    return "\n".join(shown(line, _MOST) for line in text.splitlines())


@contextmanager
def progress(label: str) -> Generator[Report | bool]:
    """What to pass as ``progress=``: shown where stderr is a terminal, as well as that can."""
    with showing(None, label, plain=is_dumb()) as report:
        yield False if report is None else report


@contextmanager
def warnings_as_lines() -> Generator[None]:
    """Warnings of the package are one line each, without a place in its source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, FxQuantWarning):
                say(plain(f"warning: {message}"))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", FxQuantWarning)
        yield
