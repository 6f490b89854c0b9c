"""Names of modules and tensors, which torch.fx writes into the code that it generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from fxquant.errors import TraceError
from fxquant.graph.text import shown

_ENDING: Final = frozenset('"\\\n\r\0')
"""What ends a string between double quotes, or means something else in it."""


def check_names(model: nn.Module) -> None:
    """Refuse names that would end the string that torch.fx writes them as, and be run as code.

    Args:
        model: the model.

    Raises:
        TraceError: it has such a name: one with quotes, backslashes or line breaks.

    Example:
        >>> check_names(nn.Sequential(nn.Linear(2, 2)))
    """
    for owner, name in _names(model):
        if not name.isidentifier() and not _survives(name):
            where = f" of {shown(owner, 60)}" if owner else ""
            raise TraceError(
                f"the name {shown(name, 60)!r}{where} cannot stand in the code that torch.fx "
                "writes for a graph: give the module or tensor another one, without quotes, "
                "backslashes and line breaks"
            )


def _names(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        for held in (module._modules, module._parameters, module._buffers):
            for name in held.keys():  # noqa: SIM118 - those of ScriptModules iterate by place
                yield path, name


def _survives(name: str) -> bool:
    """Whether a name between double quotes is the very same name.

    Told without ``ast``: two threads that parse at once may fail with a SystemError (CPython 3.11.7
    counts the depth of both in one place), and models are captured from several.
    """
    try:
        name.encode()
    except UnicodeEncodeError:  # a surrogate is no text to a compiler
        return False
    return _ENDING.isdisjoint(name)
