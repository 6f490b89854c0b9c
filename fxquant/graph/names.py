"""Names of modules and tensors, which torch.fx writes into the code that it generates."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from fxquant.errors import TraceError
from fxquant.graph.text import shown


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
    """Whether a name between double quotes is the very same name."""
    try:
        return bool(ast.literal_eval(f'"{name}"') == name)
    except (SyntaxError, ValueError):  # a surrogate is no text to a compiler
        return False
