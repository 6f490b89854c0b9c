"""The user's own code: found as ``package.module:name``, called, and blamed by name."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

from fxquant.cli.parsing import did_you_mean
from fxquant.errors import FxQuantError

_NONE: Final = object()
"""Stands for an attribute that is not there."""


@contextmanager
def importable_here() -> Generator[None]:
    """Modules in the current directory can be imported, as ``python -m`` lets them."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def imported(spec: str, failure: type[FxQuantError], what: str) -> Any:
    """What stands at ``package.module:name``; the name may have dots.

    Args:
        spec: module and name.
        failure: what to raise where that cannot be had.
        what: what it is for, for the message.

    Raises:
        FxQuantError: of the class ``failure``.

    Example:
        >>> imported("math:pi", FxQuantError, "a number")
        3.141592653589793
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise failure(f"{what} {spec!r} is not of the form package.module:name")
    found = call(functools.partial(_module, spec, failure, what), f"import {module_name}", failure)
    where = module_name
    for part in name.split("."):
        # A module may have a __getattr__ of its own, and a class descriptors, which may fail.
        held = call(functools.partial(getattr, found, part, _NONE), f"read {spec}", failure)
        if held is _NONE:
            hint = did_you_mean(part, [each for each in dir(found) if not each.startswith("_")])
            raise failure(f"{what} {spec!r}: {where} has no {part!r}{hint}")
        found, where = held, f"{where}.{part}"
    return found


def _module(spec: str, failure: type[FxQuantError], what: str) -> Any:
    module_name = spec.partition(":")[0]
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise  # one that it imports itself
        raise failure(
            f"{what} {spec!r}: there is no module {missing!r}; modules are looked for in the "
            f"current directory ({os.getcwd()}) and among what is installed"
        ) from error


def call(function: Callable[[], Any], what: str, failure: type[FxQuantError]) -> Any:
    """What a function of the user's returns; whatever it raises is blamed on it.

    Args:
        function: called without arguments.
        what: what it does, for the message.
        failure: what to raise in the place of what it raised.

    Raises:
        FxQuantError: of the class ``failure``, or one that the function raised.
    """
    try:
        return function()
    except FxQuantError:
        raise
    except SystemExit as error:
        raise failure(f"could not {what}: it called exit({error.code!r})") from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # the user's code may raise anything
        raise failure(f"could not {what}: {type(error).__name__}: {error}") from error
