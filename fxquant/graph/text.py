"""Showing text that users chose: module and argument names may hold anything."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_UNSAFE: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Controls, formats (right-to-left marks, zero-width), lone surrogates, separators of lines."""


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
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_safe, text))
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


def _safe(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    if named is not None:
        return named
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
