"""Text that users chose, made harmless: module and argument names may hold anything."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_UNSAFE: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Controls, formats (right-to-left marks, zero-width), lone surrogates, separators of lines."""
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


_LONG: Final = re.compile(r"\S{400,}")


def readable(text: str) -> str:
    """A message as it is shown: harmless, and names of any length in it cut in their middle."""
    short = _LONG.sub(lambda found: f"{found[0][:120]}...{found[0][-120:]}", text)
    return harmless(short, keep="\n")


def harmless(text: str, keep: str = "") -> str:
    r"""``text`` with an escape in the place of all that would act on a terminal or a reader.

    Args:
        text: anything.
        keep: characters that stay as they are.

    Example:
        >>> print(harmless("red \x1b[31m\nline"))
        red \x1b[31m\nline
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if each in keep else _visible(each) for each in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    if character in _NAMED:
        return _NAMED[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
