"""Reads what callers pass as ``patterns=``."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.custom.pattern import Pattern
from fxquant.errors import ConfigError
from fxquant.patterns.rule import Rule

Patterns = Pattern | Iterable[Pattern | Rule]


def rules_of(patterns: Patterns) -> tuple[Rule, ...]:
    """The rules behind patterns: one, or any iterable of them, kept where the program likes.

    Raises:
        ConfigError: one is something else.
    """
    if isinstance(patterns, Pattern | Rule):
        patterns = (patterns,)
    given: object = patterns
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"patterns is a {type(given).__name__}: it takes fxquant.Pattern objects")
    return tuple(_rule(each) for each in given)


def _rule(given: object) -> Rule:
    if isinstance(given, Pattern):
        return given.rule
    if isinstance(given, Rule):
        return given
    hint = "pass fxquant.Pattern objects"
    if callable(given) and not isinstance(given, type):
        name = getattr(given, "__name__", "it")
        hint = f"put @fxquant.pattern above the definition of {name}"
    elif isinstance(given, tuple | list):
        hint = "wrap a list of ops: fxquant.Pattern([...])"
    raise ConfigError(f"patterns holds a {type(given).__name__}: {hint}")
