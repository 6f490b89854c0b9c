"""What a verb is: a function from the parsed arguments to an :class:`Answer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """What the exit status says."""

    OK = 0
    CHECK = 1
    USAGE = 2
    MODEL = 3
    CALIBRATION = 4
    UNSUPPORTED = 5
    BUG = 70
    INTERRUPTED = 130
    PIPE = 141


@dataclass(frozen=True)
class Answer:
    """The result of a verb.

    Args:
        text: for people.
        data: the same in plain types, for ``--json``; the keys are stable.
        code: the exit status.
        coloured: the text for terminals with colours, where it has any.
    """

    text: str
    data: dict[str, Any]
    code: int = Exit.OK
    coloured: str | None = None


@dataclass(frozen=True)
class Verb:
    """One thing that the command line can do.

    Args:
        name: what the user types.
        help: one line.
        run: does it.
        options: adds the arguments of its own; ``--json`` and ``--debug`` are there already.
        extra: the optional dependencies it needs, as in ``pip install fxquant[extra]``.
        examples: commands that the help shows.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], Answer]
    options: Callable[[argparse.ArgumentParser], None] | None = None
    extra: str = ""
    examples: tuple[str, ...] = field(default=())
