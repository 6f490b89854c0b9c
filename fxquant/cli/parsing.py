"""Arguments: a parser that suggests what was meant, and the types of values."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from fxquant.graph.text import shown


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest verb or option."""

    def __init__(self, **options: object) -> None:
        # Abbreviations would change their meaning with the next option that is added.
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # type: ignore[arg-type]  # argparse's own long list, handed on
        )

    def error(self, message: str) -> NoReturn:
        """Exit with 2; adds a suggestion where a choice was misspelled."""
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found is not None:
            known = [name.strip(" '") for name in found[2].split(",")]
            message += did_you_mean(found[1], known)
        super().error(shown(message))

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with 2 because of arguments that nothing takes."""
        known = [name for action in self._actions for name in action.option_strings]
        hints = [did_you_mean(each.partition("=")[0], known) for each in unknown]
        self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A suggestion, or nothing.

    Example:
        >>> did_you_mean("quantise", ["quantize", "report"])
        "; did you mean 'quantize'?"
    """
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def natural(text: str) -> int:
    """A whole number from 0 on that a seed can be."""
    number = whole(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return number


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def threads(text: str) -> int:
    """A number of threads; far more than there are processors end the process."""
    number = positive(text)
    most = max(64, 4 * (os.cpu_count() or 1))
    if number > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return number


def real(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if number - number != 0:
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = real(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def duration(text: str) -> float:
    """Seconds, more than none."""
    number = real(text)
    if number <= 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number
