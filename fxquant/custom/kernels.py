"""A user's int8 kernel: what it receives, and whether its signature fits its pattern."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fxquant.errors import PatternError
from fxquant.graph.info import QType
from fxquant.graph.kernel_unit import Codes, IntegerLayer

__all__ = ["Codes", "IntegerLayer", "QType", "check_kernel_signature"]


def check_kernel_signature(
    kernel: Callable[..., Any], names: tuple[str, ...], outputs: int, line: str
) -> None:
    """Refuse a kernel that cannot be called with the parameters of its pattern, by name.

    Args:
        kernel: the user's function.
        names: of the pattern's parameters.
        outputs: how many tensors the pattern returns.
        line: where the pattern is written, for messages.

    Raises:
        PatternError: the signature does not fit.
    """
    last = "output" if outputs == 1 else "outputs"
    given = (*names, last)
    if last in names:
        raise PatternError(
            f"{line}: a parameter of the pattern is called {last!r}, and so is what its kernel is "
            "told of its result: rename the parameter"
        )
    try:
        signature = inspect.signature(kernel)
    except (TypeError, ValueError):
        return  # a builtin that tells nothing; the comparison on random codes will
    try:
        signature.bind(**dict.fromkeys(given))
    except TypeError as error:
        raise PatternError(
            f"{line}: the kernel {getattr(kernel, '__name__', kernel)}{signature} does not fit its "
            f"pattern: it is called with {', '.join(f'{name}=' for name in given)} ({error})"
        ) from error
