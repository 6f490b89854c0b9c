"""Whether a model is still the one that was recorded."""

from __future__ import annotations

from operator import is_
from typing import Any, Final

from torch import Tensor, nn

_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")
_HOOKS: Final = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
_BOOKKEEPING: Final = frozenset((*vars(nn.Module()), "meta", "_graph", "_code")) - {"training"}
"""Attributes that change nothing, or that are looked into. A new graph is a new class."""


class Watch:
    """Holds on to all that modules have, and says when something of it was replaced.

    Numbers may change in place: an operator that reads a tensor reads what is in it then.

    Args:
        model: with all modules in it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> watch = Watch(model)
        >>> watch.unchanged()
        True
        >>> hook = model[0].register_forward_hook(print)
        >>> watch.unchanged()
        False
        >>> hook.remove()
        >>> watch.unchanged()
        True
        >>> model[0].bias = None
        >>> watch.unchanged()
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._things: list[Any] = []
        self._hooks: list[Any] = []
        self._homes: list[dict[str, Any]] = []
        for module in model.modules():
            own = vars(module)
            self._keep(own, [name for name in own if _matters(module, name)])
            for registry in (own[name] for name in _REGISTRIES):
                self._keep(registry, list(registry))
            self._hooks += [own[name] for name in _HOOKS]
        self._sizes = [len(home) for home in self._homes]

    def _keep(self, place: dict[str, Any], names: list[str]) -> None:
        self._homes.append(place)
        self._places += [place] * len(names)
        self._names += names
        self._things += [place[name] for name in names]

    def is_heard(self) -> bool:
        """Whether somebody listens to a module: it has hooks."""
        return any(self._hooks)

    def unchanged(self) -> bool:
        """Whether every module has what it had, no more, and nobody listens to it."""
        return (
            not self.is_heard()
            and list(map(len, self._homes)) == self._sizes
            and all(map(is_, map(dict.get, self._places, self._names), self._things))
        )


def _matters(module: nn.Module, name: str) -> bool:
    """Whether an attribute, or another in its place, may change what a module computes."""
    if name in _BOOKKEEPING:
        return False
    # What an int8 layer is does not change; what it was packed into does, when it is loaded.
    own = type(module).__module__.startswith("fxquant.")
    return not own or _holds_tensors(vars(module)[name])


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    # What is packed when it is first needed lies in a dictionary.
    return isinstance(value, Tensor | dict)
