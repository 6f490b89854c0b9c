"""Showing text that users chose: module and argument names may hold anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from fxquant.text import harmless


def shown(text: str, limit: int | None = None) -> str:
    r"""``text`` on one line, safe to print: what would act on a terminal shows as an escape.

    Args:
        text: anything.
        limit: at most this many characters; the middle of longer text gives way to ``...``.

    Example:
        >>> print(shown("red \x1b[31m\nline"))
        red \x1b[31m\nline
        >>> shown("a" * 100, 9)
        'aaa...aaa'
    """
    if limit is not None and len(text) > limit:
        # Cut before escaping, so that a name of megabytes costs nothing; cut again below.
        text = text[:limit] + text[-limit:]
    text = harmless(text)
    if limit is not None and len(text) > limit:
        head = (limit - 3) // 2
        return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"
    return text


_MARKUP: Final = re.compile(r"[\\`*_\[\]|~#]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_ENTITIES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def shown_in_markdown(text: str, limit: int | None = None) -> str:
    r"""``text`` as one line of Markdown that shows it and nothing else, in cells of tables too.

    Args:
        text: anything.
        limit: at most this many characters shown; the middle of longer text gives way to ``...``.

    Example:
        >>> print(shown_in_markdown("a|b <img> *c*"))
        a\|b &lt;img&gt; \*c\*
    """
    marked = _MARKUP.sub(lambda found: f"\\{found[0]}", shown(text, limit))
    return marked.translate(_ENTITIES)


_LONGEST: Final = 200
"""Comparing two names takes time by the square of their length."""
_NAME: Final = 60


def names_near(given: object, known: Iterable[str]) -> str:
    """What to say about a name that is none: those that are nearest, or else some that there are.

    Args:
        given: what was asked for; anything but a string is near to none.
        known: the names that there are.

    Example:
        >>> names_near("haed", ["head", "body"])
        "the nearest names are ['head']"
        >>> names_near("neck", ["head", "body"])
        "there are, for example, ['head', 'body']"
    """
    names = list(dict.fromkeys(filter(None, known)))
    near: list[str] = []
    if isinstance(given, str) and len(given) <= _LONGEST:
        near = difflib.get_close_matches(given, [n for n in names if len(n) <= _LONGEST], n=3)
    listed = [shown(name, _NAME) for name in near or names[:5]]
    return f"{'the nearest names are' if near else 'there are, for example,'} {listed}"
